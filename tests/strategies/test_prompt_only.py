"""Prompt search end to end on a fake engine that likes certain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Sums, answering, bench, fake, instruction_of, of_kind, problem, question_of

from cotune.bench import Bench, MemoryStore
from cotune.config import resolve
from cotune.engines.fake import FakeEngine
from cotune.errors import CotuneError, UsageError
from cotune.models.base import BaseModel, load
from cotune.models.lora import LoraFactors
from cotune.strategies.base import Fixed
from cotune.strategies.prompt_only import PromptOnly
from cotune.values import Conditioning, Event, InferencePlan, Prompt, Tuned, Verifier

START = Fixed(Prompt("Add the numbers."))
SMALL: dict[str, Any] = {
    "proposer": "edits",
    "rounds": 3,
    "candidates": 4,
    "search_examples": 24,
    "choice_examples": 20,
    "minibatch": 8,
    "finalists": 2,
}


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir), device="cpu", dtype="float32")


def strategy(**changes: Any) -> PromptOnly:
    config = {"strategy": "prompt-only", "model": "x", "task": "micro-gsm8k", "prompt": SMALL | changes}
    return PromptOnly.from_config(resolve(config))


def likes_steps(rendered: str, adapter: str | None) -> float:
    return 0.2 + 0.3 * ("step" in instruction_of(rendered)) + 0.2 * ("check" in instruction_of(rendered).lower())


def test_the_better_prompt_is_found_chosen_on_val_and_told(base: BaseModel) -> None:
    events: list[Event] = []
    given = problem(base)
    engine = fake(likes_steps)
    tuned = strategy(method="opro").tune(START, given, bench(base, engine, events=events))
    assert isinstance(tuned, Fixed) and tuned.adapter is None
    assert likes_steps(f"<|im_start|>system\n{tuned.prompt.instruction}<|im_end|>", None) >= 0.5
    assert Fixed(Prompt("Add the numbers.")) == START

    finalists = of_kind(events, "finalist")
    assert [f["text"] for f in finalists].count("Add the numbers.") == 1
    [chosen] = of_kind(events, "chosen")
    assert chosen["text"] == tuned.prompt.instruction
    best = max(f["val_score"] for f in finalists)
    assert [f["val_score"] for f in finalists if f["text"] == chosen["text"]] == [best]
    assert [r["round"] for r in of_kind(events, "round")] == [1, 2, 3]

    val = {e.question for e in given.val}
    driving = [r for r in engine.calls if question_of(r.prompt) not in val]
    assert len({question_of(r.prompt) for r in driving}) == 24


def test_val_decides_even_against_the_search(base: BaseModel) -> None:
    """A prompt that only helps on the examples of the search loses to the starting one on val."""
    given = problem(base)
    val = {e.question for e in given.val}

    def overfits(rendered: str, adapter: str | None) -> float:
        if instruction_of(rendered) == "Add the numbers.":
            return 0.5
        return 0.0 if question_of(rendered) in val else 1.0

    tuned = strategy(method="opro").tune(START, given, bench(base, fake(overfits)))
    assert tuned == START
    assert strategy(method="opro", finalists=1).tune(START, given, bench(base, fake(overfits))) == START


def test_demonstrations_are_used_when_they_help_and_never_judge_themselves(base: BaseModel) -> None:
    def likes_examples(rendered: str, adapter: str | None) -> float:
        return min(1.0, 0.3 + 0.3 * (rendered.count("<|im_start|>user") - 1))

    engine = fake(likes_examples)
    tuned = strategy(rounds=1, demonstrations=2).tune(START, problem(base), bench(base, engine))
    assert isinstance(tuned, Fixed)
    assert len(tuned.prompt.demonstrations) == 2
    shown = [r.prompt for r in engine.calls if r.prompt.count("<|im_start|>user") > 1]
    assert shown
    for prompt in shown:
        *demos, question = [turn.split("<|im_end|>")[0] for turn in prompt.split("<|im_start|>user\n")[1:]]
        assert question not in demos


def test_the_adapter_of_start_is_kept_and_used(base: BaseModel) -> None:
    adapter = LoraFactors({"model.layers.0.self_attn.q_proj": (torch.ones(1, 64), torch.ones(64, 1))}, 1.0)
    engine = fake(likes_steps)
    tuned = strategy(rounds=1).tune(Fixed(START.prompt, adapter), problem(base), bench(base, engine))
    assert isinstance(tuned, Fixed) and tuned.adapter is adapter
    assert all(r.adapter is adapter for r in engine.calls)


def test_an_adaptive_race_takes_a_third_of_the_rollouts(base: BaseModel) -> None:
    spent: dict[bool | str, int] = {}
    for racing in (True, "adaptive"):
        at = bench(base, fake(likes_steps), events=(events := []))
        tuned = strategy(method="opro", racing=racing).tune(START, problem(base), at)
        assert isinstance(tuned, Fixed) and "step" in tuned.prompt.instruction
        rollouts = {c["text"]: c["n"] for c in of_kind(events, "candidate")}
        spent[racing] = sum(rollouts.values())
        finalists = [f["text"] for f in of_kind(events, "finalist")]
        assert finalists.count(START.prompt.instruction) == 1
    assert spent["adaptive"] <= 24 * len(rollouts) / 3 < spent[True]


@pytest.mark.parametrize("method", ["mipro", "gepa", "bpo"])
def test_an_adaptive_race_is_refused_where_nothing_races(method: str) -> None:
    with pytest.raises(UsageError, match=f"{method} does not race"):
        strategy(method=method, racing="adaptive")


@pytest.mark.parametrize("racing", [True, "adaptive"])
def test_a_budget_of_any_size_is_kept(base: BaseModel, racing: bool | str) -> None:
    opro = strategy(method="opro", racing=racing)
    free = bench(base, fake(likes_steps), events=(events := []))
    whole = opro.tune(START, problem(base), free)
    # The last batch is asked for at its longest possible, so more than was spent must be allowed to end it.
    spent = of_kind(events, "chosen")[-1]["tuning_tokens"]
    for limit in range(0, spent + 1, max(1, spent // 7)):
        at = bench(base, fake(likes_steps), tokens=limit)
        opro.tune(START, problem(base), at)
        assert at.ledger.tuning.tokens <= limit
    enough = bench(base, fake(likes_steps), tokens=spent + 1000)
    assert opro.tune(START, problem(base), enough) == whole


def test_budgets(base: BaseModel) -> None:
    free = bench(base, fake(likes_steps), events=(events := []))
    strategy(method="opro").tune(START, problem(base), free)
    spent = of_kind(events, "round")[-1]["tuning_tokens"]
    searched = of_kind(events, "round")[-1]["best"]

    none = bench(base, fake(likes_steps), tokens=0)
    assert strategy().tune(START, problem(base), none) is START
    assert none.ledger.tuning.tokens == 0
    # Enough for the search, not for a choice: the best that ran in full on the search examples.
    no_choice = bench(base, fake(likes_steps), tokens=spent + 100, events=(events := []))
    tuned = strategy(method="opro").tune(START, problem(base), no_choice)
    assert isinstance(tuned, Fixed)
    scores = {c["text"]: c["score"] for c in of_kind(events, "candidate") if c["n"] == 24}
    assert scores[tuned.prompt.instruction] == searched
    assert of_kind(events, "budget")[0]["where"] == "choice"


@pytest.mark.parametrize("racing", [True, "adaptive"])
def test_interrupted_and_resumed_is_the_same(base: BaseModel, racing: bool | str) -> None:
    class Stopping(FakeEngine):
        left = 0

        def generate(self, requests: Any, sampling: Any) -> Any:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().generate(requests, sampling)

    def at(engine: FakeEngine, store: MemoryStore) -> Bench:
        return bench(base, engine, store=store)

    whole_bench = at(fake(likes_steps), MemoryStore())
    whole = strategy(racing=racing).tune(START, problem(base), whole_bench)
    store = MemoryStore()
    for stop_after in (1, 5, 9):
        engine = Stopping(answering(likes_steps), batch_size=8)
        engine.left = stop_after
        with pytest.raises(KeyboardInterrupt):
            strategy(racing=racing).tune(START, problem(base), at(engine, store))
    last = at(fake(likes_steps), store)
    assert strategy(racing=racing).tune(START, problem(base), last) == whole
    assert last.ledger.tuning.tokens == whole_bench.ledger.tuning.tokens
    assert last.ledger.tuning.calls == whole_bench.ledger.tuning.calls


def test_too_long_prompts_are_rejected_not_run(base: BaseModel) -> None:
    events: list[Event] = []
    tight = problem(base, max_new_tokens=512 - 20)
    strategy(rounds=2).tune(START, tight, bench(base, fake(likes_steps), events=events))
    assert sum(r["rejected"].get("over_context", 0) for r in of_kind(events, "round")) > 0


def test_candidates_are_all_that_was_tried_those_dropped_early_last(base: BaseModel) -> None:
    events: list[Event] = []
    at = bench(base, fake(likes_steps), events=events)
    found = strategy(method="opro").candidates(START, problem(base), at)
    tried = of_kind(events, "candidate")
    dropped = [c["text"] for c in tried if c["dropped"]]
    assert dropped
    texts = [f.prompt.instruction for f in found if isinstance(f, Fixed)]
    assert sorted(texts) == sorted(c["text"] for c in tried)
    assert set(texts[-len(dropped) :]) == set(dropped)
    best = max(c["score"] for c in tried if not c["dropped"])
    assert texts[0] in [c["text"] for c in tried if c["score"] == best]
    assert strategy().candidates(START, problem(base), bench(base, fake(likes_steps), tokens=0)) == []


def test_a_start_made_per_example_is_refused(base: BaseModel) -> None:
    class PerExample(Tuned):
        def condition(self, examples: Any, bench: Any) -> list[Conditioning]:
            return [Conditioning(Prompt(e.id)) for e in examples]

        def under(self, plan: InferencePlan, verifier: Verifier | None = None) -> Tuned:
            return self

        def save(self, folder: Path) -> None: ...

    with pytest.raises(CotuneError, match="one fixed prompt"):
        strategy().tune(PerExample(), problem(base), bench(base, fake(likes_steps)))


def test_one_training_example_is_enough_to_run(base: BaseModel) -> None:
    tuned = strategy(rounds=1).tune(START, problem(base, train=1, val=1), bench(base, fake(likes_steps)))
    assert isinstance(tuned, Fixed)
    assert Sums.seed_instruction == START.prompt.instruction
