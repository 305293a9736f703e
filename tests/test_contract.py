"""The contract suite: what every strategy in the table must hold, on a random model of 90k parameters.

A strategy or prompt method that is added to its table (or by an entry point) is covered here without a new test; that
every method resumes and keeps its budget is in strategies/test_prompt_methods.py.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from toy import Wrapped

from cotune.bench import Bench, MemoryStore
from cotune.config import RunConfig, resolve
from cotune.engines.base import Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import UsageError
from cotune.experiment import dataset, make_strategy, seed_prompt
from cotune.ledger import Ledger
from cotune.models.base import BaseModel, load, weights_digest
from cotune.plugins import names
from cotune.strategies import STRATEGIES, load_tuned
from cotune.strategies.base import Problem, Workload
from cotune.strategies.prompt_methods import METHODS
from cotune.tasks import task as make_task
from cotune.values import Completion, Conditioning, Event, Example, Grade, InferencePlan, Outcome, Tuned

# Everything on, at the smallest size that still goes through every part.
SMALL: dict[str, Any] = {
    "task": "micro-gsm8k",
    "limit_train": 12,
    "limit_val": 6,
    "limit_test": 6,
    "decoding": {"max_new_tokens": 8},
    "prompt": {
        "proposer": "edits",
        "rounds": 1,
        "candidates": 3,
        "demonstration_sets": 1,
        "demonstrations": 1,
        "search_examples": 6,
        "choice_examples": 4,
        "minibatch": 3,
        "finalists": 2,
    },
    "rlprompt": {"tokens": 2, "samples": 3, "hidden": 8, "steps": 3, "try_every": 2, "learning_rate": 1e-2},
    "weights": {
        "rank": 2,
        "alpha": 4.0,
        "target_modules": "all-linear",
        "epochs": 2,
        "learning_rate": 1e-2,
        "batch_size": 4,
        "micro_batch_size": 4,
        "checkpoint_every": 1,
    },
    "verifier": {"examples": 6, "samples": 4, "epochs": 2, "batch_size": 4, "held_out": 0.2},
    "inference": {"samples": 2, "prompts": 3, "completions": 24, "aggregation": "best-of", "temperature": 1.5},
    "joint": {
        "share": 0.5,
        "rank": 2,
        "width": 8,
        "generator_rank": 2,
        "rollouts": 2,
        "rollout_examples": 6,
        "sync_every": 2,
        "epochs": 1,
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_prompt_tokens": 8,
        "checkpoint_every": 1,
    },
}


class Interrupted(BaseException):
    """As a kill would: not an Exception that a strategy could catch."""


@dataclass
class Watched(Wrapped):
    """Every prompt noted; raises Interrupted before the `stop_at`-th batch."""

    prompts: list[str] = field(default_factory=list)
    batches: int = 0
    stop_at: int | None = None

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        if self.batches == self.stop_at:
            raise Interrupted
        self.batches += 1
        self.prompts += [r.prompt for r in requests]
        return super().generate(requests, sampling)


@dataclass
class Lab:
    """One strategy on one small problem."""

    config: RunConfig
    base: BaseModel
    ledger: Ledger = field(default_factory=Ledger)
    store: MemoryStore = field(default_factory=MemoryStore)
    events: list[Event] = field(default_factory=list)
    stop_at: int | None = None

    def __post_init__(self) -> None:
        self.task = make_task(self.config.task)
        self.data = dataset(self.config, self.task)
        self.start = seed_prompt(self.config, self.task)
        self.engine = self.make_engine(self.base)
        self.engine.stop_at = self.stop_at
        self.bench = Bench(
            self.base, self.engine, self.make_engine, self.ledger, self.store, self.config.seed, self.events.append
        )

    def make_engine(self, base: BaseModel) -> Watched:
        return Watched(TransformersEngine(base, batch_size=8, max_batch_tokens=8192, threads=1))

    def tune(self) -> Tuned:
        sampling = Sampling(self.config.decoding.max_new_tokens or 8)
        problem = Problem(self.task, self.data.train, self.data.val, self.base, self.base, sampling)
        return make_strategy(self.config).tune(self.start, problem, self.bench.at("tune"))

    def conditionings(self, tuned: Tuned) -> list[Conditioning]:
        with self.ledger.measuring():
            return tuned.condition(self.data.val, self.bench.at("check"))


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir), device="cpu", dtype="float32")


# Every strategy, the methods of weights that sample while they train, and plans that rank by a verifier.
VERIFIED = ["plan-only/verifier", "inference-aware/verifier"]
STRATEGY_NAMES = [*sorted(names("strategies", STRATEGIES)), "lora-only/grpo", "lora-only/ppo", *VERIFIED]
METHOD_NAMES = [f"prompt-only/{m}" for m in sorted(names("prompt_methods", METHODS)) if m != "opro+bootstrap"]


@pytest.fixture(params=STRATEGY_NAMES)
def config(request: pytest.FixtureRequest, random_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    strategy, _, method = request.param.partition("/")
    layer: dict[str, Any] = {"strategy": strategy, "model": str(random_model_dir), "seed": 3}
    if method and strategy == "prompt-only":
        layer["prompt"] = {"method": method} | ({"proposer": "self"} if method == "bpo" else {})  # it needs a writer
    elif method == "verifier":
        layer["inference"] = {"scorer": "verifier"}
        monkeypatch.setattr(type(make_task("micro-gsm8k")), "grade", by_chance)
    elif method:
        layer["weights"] = {"method": method, "samples": 2, "updates": 2, "batch_size": 6, "epochs": 1}
        monkeypatch.setattr(type(make_task("micro-gsm8k")), "grade", by_chance)
    made = resolve(SMALL, layer)
    try:
        make_strategy(made)
    except UsageError as missing:  # an extra that is not installed
        pytest.skip(str(missing))
    return made


def by_chance(task: Any, example: Example, completion: str, truncated: bool = False) -> Grade:
    """A random model is never right: say of half its completions that they are good."""
    good = zlib.crc32(completion.encode()) % 2 == 0
    return Grade(Outcome.CORRECT if good else Outcome.WRONG, None, float(good))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def saved(tuned: Tuned, folder: Path) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    tuned.save(folder)
    return contents(folder)


def same(left: Sequence[Conditioning], right: Sequence[Conditioning]) -> bool:
    def key(c: Conditioning) -> tuple[str, str | None, InferencePlan, str | None]:
        parts = (c.adapter, c.verifier)
        adapter, verifier = (part.digest if part else None for part in parts)
        return c.prompt.digest, adapter, c.plan, verifier

    return [key(c) for c in left] == [key(c) for c in right]


@pytest.mark.parametrize("config", STRATEGY_NAMES + METHOD_NAMES, indirect=True)
def test_one_full_tune(config: RunConfig, base: BaseModel, tmp_path: Path) -> None:
    """Base untouched, start untouched, train and val only, events sound, Tuned survives saving, seeds decide all."""
    before = weights_digest(base.model)
    lab = Lab(config, base)
    start = lab.conditionings(lab.start)
    tuned = lab.tune()

    assert weights_digest(base.model) == before
    assert not any(p.requires_grad for p in base.model.parameters())
    assert same(lab.conditionings(lab.start), start)

    tokens = [e.data["tuning_tokens"] for e in lab.events if "tuning_tokens" in e.data]
    assert tokens == sorted(tokens)
    assert json.loads(json.dumps([[e.kind, e.data] for e in lab.events], allow_nan=False)) is not None
    strategy = make_strategy(config)
    assert (lab.ledger.tuning.tokens > 0) == bool(strategy.levers)

    questions = [lab.task.question_text(e) for e in lab.data.test()]
    assert len(questions) == 6
    assert not [q for q in questions if any(q in p for p in lab.engine.prompts)]

    ours = lab.conditionings(tuned)
    files = saved(tuned, tmp_path / "tuned")
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors"}
    assert same(lab.conditionings(load_tuned(tmp_path / "tuned", base)), ours)
    for lever, part in (("weights", "adapter"), ("prompt", "prompt"), ("plan", "plan")):
        if lever not in strategy.levers:
            assert [getattr(c, part) for c in ours] == [getattr(c, part) for c in start]

    again = Lab(config, base)
    assert saved(again.tune(), tmp_path / "again") == files
    assert again.ledger.tuning.tokens == lab.ledger.tuning.tokens


def test_the_plan_names_work_exactly_when_something_is_tuned(config: RunConfig) -> None:
    strategy = make_strategy(config)
    works = strategy.plan(Workload(train=12, val=6, question=80, reference=30, limit=8))
    assert bool(works) == bool(strategy.levers)
    assert all(work.calls > 0 or work.trained_tokens > 0 for work in works)
    assert any(work.trained_tokens for work in works) == ("weights" in strategy.levers)
    double = strategy.plan(Workload(train=12, val=6, question=160, reference=60, limit=16))
    assert all(d.forward_tokens >= w.forward_tokens for d, w in zip(double, works, strict=True))


def test_a_zero_budget_returns_start(config: RunConfig, base: BaseModel) -> None:
    lab = Lab(config, base, ledger=Ledger(tokens=0))
    assert same(lab.conditionings(lab.tune()), lab.conditionings(lab.start))
    assert lab.ledger.tuning.tokens == 0


@pytest.mark.parametrize("fraction", [0.15, 0.5, 0.9])
def test_a_budget_is_never_exceeded(config: RunConfig, base: BaseModel, fraction: float) -> None:
    free = Lab(config, base)
    free.tune()
    limit = int(free.ledger.tuning.tokens * fraction)
    lab = Lab(config, base, ledger=Ledger(tokens=limit))
    lab.conditionings(lab.tune())
    assert lab.ledger.tuning.tokens <= limit


def test_an_interrupted_tune_continues_to_the_same_bytes(config: RunConfig, base: BaseModel, tmp_path: Path) -> None:
    whole = Lab(config, base)
    expected = saved(whole.tune(), tmp_path / "whole")
    for stop_at in range(0, whole.engine.batches, max(1, whole.engine.batches // 4)):
        store = MemoryStore()
        with pytest.raises(Interrupted):
            Lab(config, base, store=store, stop_at=stop_at).tune()
        resumed = Lab(config, base, store=store)
        assert saved(resumed.tune(), tmp_path / f"resumed-{stop_at}") == expected
        assert resumed.ledger.tuning.tokens == whole.ledger.tuning.tokens
        assert resumed.engine.batches <= whole.engine.batches - stop_at
