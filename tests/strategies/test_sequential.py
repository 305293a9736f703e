"""The fold over stages, with real stages on a fake engine and with scripted ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from toy import bench, fake, instruction_of, of_kind, problem, question_of, right_answer

from cotune.bench import Bench
from cotune.config import resolve
from cotune.engines.fake import FakeEngine
from cotune.errors import NoData, UsageError
from cotune.models.base import BaseModel, load
from cotune.models.lora import LoraFactors
from cotune.strategies.base import Fixed, Problem, Workload, fixed
from cotune.strategies.sequential import KINDS, Sequential
from cotune.values import Demonstration, Event, Prompt, Tuned

START = Fixed(Prompt("Add the numbers."))
ADAPTER = LoraFactors({"model.layers.0.self_attn.q_proj": (torch.ones(1, 64), torch.ones(64, 1))}, 1.0)


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir), device="cpu", dtype="float32")


@dataclass
class Scripted:
    """Notes what it starts from; changes its lever, or nothing when told that it may not."""

    lever: str
    levers: ClassVar[frozenset[str]] = frozenset()
    allowed: bool = True

    @classmethod
    def from_config(cls, config: Any) -> Scripted:
        raise NotImplementedError

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        assert isinstance(start, Fixed)
        seen.append((bench.stage, start))
        if not self.allowed:
            return start
        if self.lever == "p":
            return replace(start, prompt=Prompt(f"{start.prompt.instruction}+", (Demonstration("q", "a"),)))
        return replace(start, adapter=ADAPTER)


seen: list[tuple[str, Fixed]] = []


def scripted(kinds: str, restart: bool = True, **stages: Scripted) -> Sequential:
    seen.clear()
    return Sequential(kinds.split(","), {"p": Scripted("p"), "w": Scripted("w")} | stages, restart, 4)


def run(strategy: Sequential, base: BaseModel, events: list[Event] | None = None) -> Fixed:
    at = bench(base, fake(lambda rendered, adapter: 0.5), events=events)
    tuned = strategy.tune(START, problem(base), at.at("tune"))
    assert isinstance(tuned, Fixed)
    return tuned


def test_a_later_prompt_stage_restarts_from_the_original_prompt_with_the_adapter_so_far(base: BaseModel) -> None:
    tuned = run(scripted("p,w,p"), base)
    assert [(stage, s.prompt.instruction, s.adapter) for stage, s in seen] == [
        ("tune/0-p", "Add the numbers.", None),
        ("tune/1-w", "Add the numbers.+", None),
        ("tune/2-p", "Add the numbers.", ADAPTER),
    ]
    assert seen[1][1].prompt.demonstrations  # what to do with them is the stage's own option
    assert (tuned.prompt.instruction, tuned.adapter) == ("Add the numbers.+", ADAPTER)


def test_without_restart_it_goes_on_from_the_last_prompt(base: BaseModel) -> None:
    assert run(scripted("p,w,p", restart=False), base).prompt.instruction == "Add the numbers.++"
    assert run(scripted("p,p", restart=False), base).prompt.instruction == "Add the numbers.++"
    assert run(scripted("p,p"), base).prompt.instruction == "Add the numbers.+"


@pytest.mark.parametrize("kinds", ["p,w", "w,p", "w,w", "w", "p"])
def test_any_order(kinds: str, base: BaseModel) -> None:
    tuned = run(scripted(kinds), base)
    assert (tuned.adapter is not None) == ("w" in kinds)
    assert (tuned.prompt != START.prompt) == ("p" in kinds)


def test_a_restarted_stage_that_could_do_nothing_does_not_lose_the_prompt(base: BaseModel) -> None:
    @dataclass
    class OnlyOnce(Scripted):
        def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
            return super().tune(start, problem, bench) if bench.stage.endswith("0-p") else start

    tuned = run(scripted("p,w,p", p=OnlyOnce("p")), base)
    assert (tuned.prompt.instruction, tuned.adapter) == ("Add the numbers.+", ADAPTER)
    assert run(scripted("p,w,p", p=Scripted("p", allowed=False), w=Scripted("w", allowed=False)), base) == START


def test_a_restarted_stage_may_choose_the_original_prompt(base: BaseModel) -> None:
    """Under the adapter it is the best on val; on the search examples it is not even a finalist."""

    given = problem(base, train=16, val=6)
    on_val = {e.question for e in given.val}

    def share(rendered: str, adapter: str | None) -> float:
        suits = adapter is not None and question_of(rendered) in on_val
        return 0.9 if suits == (instruction_of(rendered) == START.prompt.instruction) else 0.2

    events: list[Event] = []
    strategy = Sequential(["p", "w", "p"], real("p,w,p").stages | {"w": Scripted("w")}, True, 6)
    tuned = strategy.tune(START, given, bench(base, fake(share), events=events).at("tune"))
    first, last = of_kind(events, "chosen")
    assert first["text"] != last["text"] == START.prompt.instruction
    assert tuned == replace(START, adapter=ADAPTER)


def test_every_stage_is_reported_at_no_cost_to_tuning(base: BaseModel) -> None:
    events: list[Event] = []
    run(scripted("p,w,p"), base, events)
    results = of_kind(events, "stage-result")
    assert [(r["stage"], r["strategy"], r["val_n"]) for r in results] == [
        ("tune/0-p", "prompt-only", 4),
        ("tune/1-w", "lora-only", 4),
        ("tune/2-p", "prompt-only", 4),
    ]
    assert all(r["tuning_tokens"] == 0 for r in results)


SMALL: dict[str, Any] = {
    "strategy": "sequential",
    "model": "x",
    "task": "micro-gsm8k",
    "prompt": {"proposer": "edits", "rounds": 1, "candidates": 4, "demonstration_sets": 1, "search_examples": 8},
    "weights": {
        "method": "rft",
        "rank": 2,
        "alpha": 4.0,
        "target_modules": "all-linear",
        "epochs": 1,
        "learning_rate": 1e-2,
        "batch_size": 4,
        "micro_batch_size": 4,
    },
}


def real(stages: str) -> Sequential:
    return Sequential.from_config(resolve(SMALL, {"sequential": {"stages": stages}, "prompt": {"choice_examples": 6}}))


@pytest.mark.parametrize("stages", ["p,w,p", "w,p", "p,p", "w,w"])
def test_real_stages(stages: str, base: BaseModel) -> None:
    def share(rendered: str, adapter: str | None) -> float:
        return 0.3 + 0.3 * ("step" in instruction_of(rendered)) + 0.3 * (adapter is not None)

    results: list[Fixed] = []
    for _ in range(2):
        events: list[Event] = []
        tuned = real(stages).tune(START, problem(base, train=16, val=6), bench(base, fake(share), events=events))
        assert isinstance(tuned, Fixed)
        results.append(tuned)
    assert (tuned.adapter is not None) == ("w" in stages)
    assert len(of_kind(events, "stage-result")) == len(stages.split(","))
    assert results[0].prompt == results[1].prompt
    if results[0].adapter and results[1].adapter:
        assert results[0].adapter.digest == results[1].adapter.digest


@pytest.mark.parametrize("stages", ["p,i", "w,i", "p,w,i", "i,p"])
def test_the_inference_plan_is_a_stage(stages: str, base: BaseModel) -> None:
    """Votes of a model that is right on 0.6 and says something else each time it is not."""

    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        return right_answer(rendered) if sample in (1, 3, 4) or adapter else f"{1000 + sample}"

    events: list[Event] = []
    config = resolve(
        SMALL,
        {
            "sequential": {"stages": stages},
            "prompt": {"choice_examples": 6},
            "weights": {"method": "sft"},
            "inference": {"samples": 5, "completions": 200, "cost_weight": 0.0},
        },
    )
    at = bench(base, FakeEngine(answer, batch_size=8), events=events)
    tuned = Sequential.from_config(config).tune(START, problem(base, train=16, val=6), at)
    assert isinstance(tuned, Fixed)
    assert (tuned.adapter is not None) == ("w" in stages)
    assert tuned.plan.aggregation == "majority"
    if "w" not in stages:  # with the adapter it is always right, and one sample does
        assert tuned.plan.samples in (4, 5)
    results = of_kind(events, "stage-result")
    assert [r["strategy"] for r in results] == [KINDS[kind] for kind in stages.split(",")]
    assert results[-1]["val_score"] == 1.0  # reported under the plan; greedy it says 1000


@pytest.mark.parametrize(
    ("kinds", "asked"), [("p,i", "train"), ("i,w", "train"), ("w,i", "val"), ("p,w,i", "val"), ("w,p,i", "val")]
)
def test_the_plan_of_trained_weights_is_chosen_on_what_they_have_not_learned(
    kinds: str, asked: str, base: BaseModel
) -> None:
    at = problem(base, train=5, val=3)
    given: list[tuple[str, Problem]] = []

    @dataclass
    class Noting(Scripted):
        def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
            given.append((self.lever, problem))
            return replace(fixed(start, "i"), prompt=Prompt("?")) if self.lever == "i" else start

    order = kinds.split(",")
    strategy = Sequential(order, {kind: Noting(kind) for kind in order}, True, 2)
    strategy.tune(START, at, bench(base, fake(lambda rendered, adapter: 0.5)))
    for lever, seen_by_it in given:
        assert seen_by_it.val == at.val
        assert seen_by_it.train == (at.val if lever == "i" and asked == "val" else at.train)


def test_what_the_verifier_of_trained_weights_reads_is_planned() -> None:
    def planned(stages: str) -> int:
        inference = {"aggregation": "best-of", "scorer": "verifier", "samples": 2, "completions": 10}
        made = Sequential.from_config(resolve(SMALL, {"sequential": {"stages": stages}, "inference": inference}))
        [read] = [w.calls for w in made.plan(Workload(16, 6, 10, 10, 10)) if "verifier" in w.what]
        return read

    assert (planned("p,i"), planned("w,i")) == (16 * 8, 6 * 8)


def test_a_plan_that_was_chosen_makes_later_stages_dearer_to_plan() -> None:
    def planned(stages: str) -> list[int]:
        given = {"sequential": {"stages": stages}, "inference": {"samples": 4, "completions": 40}}
        made = Sequential.from_config(resolve(SMALL, given))
        return [w.calls for w in made.plan(Workload(16, 6, 10, 10, 10)) if "choose on val" in w.what]

    assert planned("p,i,p") == [planned("p")[0], 4 * planned("p")[0]]


@pytest.mark.parametrize("stages", ["j", "j,p", "i,j", "p,x", "", "j,i,i"])
def test_stages_that_make_no_sequence_are_refused(stages: str) -> None:
    with pytest.raises(UsageError, match="stages are p, w and i joined by commas"):
        resolve(SMALL, {"sequential": {"stages": stages}})


def test_no_accepted_rollouts_is_no_data_not_a_prompt_only_result(base: BaseModel) -> None:
    """Sheet 01: weights first is undefined for a model that solves nothing zero-shot."""
    at = bench(base, fake(lambda rendered, adapter: 0.0))
    with pytest.raises(NoData):
        real("w,p").tune(START, problem(base, train=8, val=4), at)
    with pytest.raises(NoData):
        real("p,w").tune(START, problem(base, train=8, val=4), at)


def test_from_config_hands_in_the_stages() -> None:
    made = real("w,p")
    assert made.kinds == ["w", "p"]
    assert {kind: type(s).__name__ for kind, s in made.stages.items()} == {"p": "PromptOnly", "w": "LoraOnly"}
    assert set(real("p,p").stages) == {"p"}
    assert made.restart and made.levers == {"prompt", "weights"}
