"""Rollouts of the prompt search with racing against full evaluation of the same proposals: is the choice the same?

    python benchmarks/racing.py [--seeds 10] [--tasks micro-gsm8k ...] [--rounds 3] [--examples 100] [--val 100]

The tiny model, its settings (method opro, proposer edits), train and val alone. For each task and seed the search runs
once with racing = false; then its proposals are searched again with racing = true and "adaptive". A rollout is an
answer to a search example. The choice on val, which costs all the same, is made and compared, and is not counted.
Answers of the first search are looked up in the others, so that all see the same ones (decoding is greedy) and the
others cost no time.

Floor: at the same final choice, at most a third of the rollouts (median over seeds, every task). A changed choice is
looked at too: by how much its score on the search examples and on val differs. The proposals of a real search would be
others, since one that races knows less when it makes them: so each rule also runs by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cotune.bench import Bench, MemoryStore
from cotune.config import RunConfig, resolve
from cotune.engines.base import Engine, Request, Sampling
from cotune.experiment import dataset, decoding, engine_factory, make_strategy, seed_prompt
from cotune.ledger import Ledger
from cotune.models.base import BaseModel, load
from cotune.search import Proposal, Proposer, Racing, Scored
from cotune.strategies.base import Fixed, Problem
from cotune.strategies.prompt_methods.base import Finalist, Ground
from cotune.strategies.prompt_methods.opro import Opro
from cotune.strategies.prompt_only import PromptOnly
from cotune.tasks import task as make_task
from cotune.values import Completion, Event, Prompt

TASKS = ("micro-gsm8k", "micro-math", "micro-hotpotqa", "micro-cosmosqa")
FLOOR = 1 / 3
RULES: dict[str, Racing] = {"test": True, "adaptive": "adaptive"}


class Remembering:
    """An engine that answers a prompt once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, list[Completion]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        new = [r for r in requests if r.prompt not in self._known]
        made = self._engine.generate(new, sampling) if new else []
        self._known |= {r.prompt: row for r, row in zip(new, made, strict=True)}
        return [self._known[r.prompt] for r in requests]


@dataclass
class Recording:
    """A proposer that keeps what it proposed."""

    proposer: Proposer
    rounds: list[list[Proposal]]

    def propose(self, round: int, history: Sequence[Scored], best: Prompt, bench: Bench) -> list[Proposal]:
        self.rounds.append(self.proposer.propose(round, history, best, bench))
        return self.rounds[-1]


@dataclass
class Replaying:
    """A proposer that proposes what another one did."""

    rounds: list[list[Proposal]]

    def propose(self, round: int, history: Sequence[Scored], best: Prompt, bench: Bench) -> list[Proposal]:
        return self.rounds[round - 1]


@dataclass(frozen=True)
class Recorded:
    """OPRO's search that leaves its proposals in `rounds`, or, when there are some, goes through them."""

    opro: Opro
    rounds: list[list[Proposal]] = field(default_factory=list)
    teaches: bool = False
    demonstrations: int = 0

    def search(self, ground: Ground) -> list[Finalist]:
        how, search = self.opro.proposing, ground.search
        proposer: Proposer = Replaying(self.rounds)
        if not self.rounds:
            made = how.proposer(ground.task, search.board.examples, ground.generator, ground.bench)
            proposer = Recording(made, self.rounds)
        for _ in range(self.opro.rounds):
            search.round(proposer)
        return ground.finalists()


def searched(strategy: PromptOnly, config: RunConfig, base: BaseModel, engine: Engine) -> tuple[Prompt, list[Any]]:
    """The chosen prompt and the events."""
    task, events = make_task(config.task), list[Event]()
    data = dataset(config, task)
    bench = Bench(base, engine, lambda _: engine, Ledger(), MemoryStore(), config.seed, events.append, "tune")
    problem = Problem(task, data.train, data.val, base, base, decoding(config, task))
    tuned = strategy.tune(seed_prompt(config, task), problem, bench)
    assert isinstance(tuned, Fixed)
    return tuned.prompt, [e for e in events if e.kind in ("candidate", "finalist")]


def rollouts(events: Sequence[Event]) -> int:
    return sum({e.data["text"]: e.data["n"] for e in events if e.kind == "candidate"}.values())


def scores(chosen: Prompt, events: Sequence[Event]) -> tuple[float, float]:
    """On the search examples and on val."""
    [found] = [e.data for e in events if e.kind == "finalist" and e.data["text"] == chosen.instruction]
    return found["score"], found["val_score"]


def compared(config: RunConfig, base: BaseModel) -> list[dict[str, Any]]:
    """Two rows for each rule: on the proposals of the full search, and by itself."""
    strategy = make_strategy(config)
    assert isinstance(strategy, PromptOnly) and isinstance(strategy.method, Opro)
    method: Any = Recorded(strategy.method)
    engine: Any = Remembering(engine_factory(config)(base))
    full = replace(strategy, method=method, racing=False)
    chosen, everything = searched(full, config, base, engine)
    races = {rule: replace(full, racing=racing) for rule, racing in RULES.items()}
    races |= {f"{rule} by itself": replace(strategy, racing=racing) for rule, racing in RULES.items()}
    rows = []
    for rule, race in races.items():
        raced, racing = searched(race, config, base, engine)
        of_full, of_raced = scores(chosen, everything), scores(raced, racing)
        rows.append(
            {
                "rule": rule,
                "task": config.task,
                "seed": config.seed,
                "full": rollouts(everything),
                "racing": rollouts(racing),
                "ratio": rollouts(racing) / rollouts(everything),
                "same": chosen == raced,
                "search_score_difference": of_raced[0] - of_full[0],
                "val_score_difference": of_raced[1] - of_full[1],
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'rule':<18} {'task':<15} seeds  full  racing  median ratio (range)  same choice  val points (SE)")
    for rule, task in dict.fromkeys((r["rule"], r["task"]) for r in rows):
        line(rule, task, [r for r in rows if (r["rule"], r["task"]) == (rule, task)])
    for rule in dict.fromkeys(r["rule"] for r in rows):
        line(rule, "all", [r for r in rows if r["rule"] == rule])
        same = [r["ratio"] for r in rows if r["rule"] == rule and r["same"]]
        if same:
            print(f"    where the choice is the same: {statistics.median(same):.3f} (floor {FLOOR:.3f})")


def line(rule: str, task: str, rows: Sequence[dict[str, Any]]) -> None:
    ratios = sorted(r["ratio"] for r in rows)
    points = [100 * r["val_score_difference"] for r in rows]
    error = statistics.stdev(points) / len(points) ** 0.5 if len(points) > 1 else float("nan")
    full, racing = (statistics.median(r[key] for r in rows) for key in ("full", "racing"))
    print(
        f"{rule:<18} {task:<15} {len(rows):>5} {full:>5.0f} {racing:>7.0f}  {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f}-{ratios[-1]:.3f})   {sum(r['same'] for r in rows):>8}/{len(rows)}  "
        f"{statistics.mean(points):+.2f} ({error:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--rounds", type=int, default=3, help="as the tiny profile has it; PromptConfig's default is 6")
    parser.add_argument("--examples", type=int, default=100, help="search examples (PromptConfig's default)")
    parser.add_argument("--val", type=int, default=100)
    parser.add_argument("--rows", type=Path, help="JSON lines of results; those that are there are not measured again")
    asked = parser.parse_args()
    rows = (
        [json.loads(line) for line in asked.rows.read_text().splitlines()] if asked.rows and asked.rows.exists() else []
    )
    base = load("tiny")
    for seed in range(asked.seeds):
        for task in asked.tasks:
            if any((r["task"], r["seed"]) == (task, seed) for r in rows):
                continue
            prompt = {"rounds": asked.rounds, "search_examples": asked.examples, "choice_examples": asked.val}
            sizes = {"limit_train": max(240, asked.examples), "limit_val": asked.val, "limit_test": 1}
            given = {"strategy": "prompt-only", "model": "tiny", "task": task, "seed": seed, "prompt": prompt}
            found = compared(resolve(given | sizes), base)
            rows += found
            print(*found, sep="\n", flush=True)
            if asked.rows:
                with asked.rows.open("a") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in found))
    table(rows)


if __name__ == "__main__":
    main()
