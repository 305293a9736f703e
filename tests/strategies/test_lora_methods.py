"""Learning from own completions: what is sampled, what is learned from it, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lab import START, half, strategy
from toy import Sums, bench, fake, of_kind, problem, right_answer

from cotune.bench import MemoryStore
from cotune.config import WeightsConfig, resolve
from cotune.engines.base import Request, Sampling
from cotune.engines.fake import Answer, FakeEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import CotuneError, NoData, UsageError
from cotune.models.base import BaseModel, load, weights_digest
from cotune.models.lora import LoraFactors, attached
from cotune.strategies.base import Fixed, Workload
from cotune.supervision import Trace, completion_loss, token_row
from cotune.values import Completion, Event, Grade, Outcome, Prompt


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load(str(random_model_dir), device="cpu", dtype="float32")


OWN: dict[str, Any] = {"samples": 4, "epochs": 2, "learning_rate": 1e-2, "batch_size": 4, "checkpoint_every": 1}


class Spoken(FakeEngine):
    """Answers from a function, with the real model's token ids."""

    def __init__(self, base: BaseModel, answer: Answer) -> None:
        super().__init__(answer)
        self.base = base

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        rows = super().generate(requests, sampling)
        return [[replace(c, token_ids=tuple(self.base.encode(c.text))) for c in row] for row in rows]


def mixed(base: BaseModel) -> FakeEngine:
    """Two right and two wrong completions of every question."""

    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        return f"{right_answer(rendered) if sample % 2 else 'I do not know'} {'.' * (sample // 2)}"

    return Spoken(base, answer)


def margin(base: BaseModel, given: Any, adapter: LoraFactors | None) -> float:
    """Mean over questions of log p(right) - log p(wrong), in nats."""
    factors, scaling = (adapter.factors, adapter.scaling) if adapter else ({}, 1.0)
    total = 0.0
    with torch.no_grad(), attached(base.model, factors, scaling):
        for e in given.train:
            rendered = base.render(Sums().messages(START.prompt, e))
            right, wrong = (token_row(base, rendered, Trace(e, t)) for t in (e.rationale, "I do not know"))
            total += float(completion_loss(base, [wrong]) - completion_loss(base, [right]))
    return total / len(given.train)


@pytest.mark.parametrize("method", ["dpo", "kto", "grpo", "ppo"])
def test_right_becomes_likelier_than_wrong(base: BaseModel, method: str) -> None:
    before, given, events = weights_digest(base.model), problem(base, train=8, val=4), list[Event]()
    at = bench(base, mixed(base), events=events)
    tuned = strategy(method=method, **OWN).tune(START, given, at)
    assert isinstance(tuned, Fixed) and tuned.adapter is not None
    assert margin(base, given, tuned.adapter) > margin(base, given, None) + 1.0
    assert weights_digest(base.model) == before
    if method in ("dpo", "kto"):
        [found] = of_kind(events, "preferences")
        assert (found["sampled"], found["right"], found["wrong"], found["mixed"]) == (32, 16, 16, 8)
        assert found["kept"] == (16 if method == "dpo" else 32)
    else:
        rounds = of_kind(events, "rewards")
        assert [(r["epoch"], r["round"]) for r in rounds] == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert all(r["mean_score"] == 0.5 and r["constant_groups"] == 0 for r in rounds)
        assert len(of_kind(events, "step")) == 4 * (4 if method == "ppo" else 1)
    works = strategy(method=method, **OWN).plan(Workload(8, 4, 120, 30, 16))
    assert at.ledger.tuning.calls <= sum(w.calls for w in works)


@pytest.mark.parametrize("method", ["rft", "dpo", "kto", "ppo"])
def test_own_completions_resume_bit_for_bit(base: BaseModel, method: str) -> None:
    class Stopping(MemoryStore):
        left = 3

        def save_checkpoint(self, name: str, tensors: Any, meta: Any) -> None:
            super().save_checkpoint(name, tensors, meta)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    given, chosen = problem(base, train=8, val=4), strategy(method=method, **OWN, updates=2)
    whole = bench(base, mixed(base))
    expected = chosen.tune(START, given, whole)
    store = Stopping()
    with pytest.raises(KeyboardInterrupt):
        chosen.tune(START, given, bench(base, mixed(base), store=store))
    again = bench(base, mixed(base), store=store)
    resumed = chosen.tune(START, given, again)
    assert isinstance(expected, Fixed) and isinstance(resumed, Fixed) and expected.adapter and resumed.adapter
    assert resumed.adapter.digest == expected.adapter.digest
    assert again.ledger.tuning.tokens == whole.ledger.tuning.tokens


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("dpo", "0 of 4 examples have both"),
        ("kto", "0 different ones are right and 4 wrong"),
        ("grpo", "all completions of each question scored alike"),
        ("ppo", "all completions of every batch scored alike"),
    ],
)
def test_where_all_scores_are_alike_there_is_nothing_to_learn(base: BaseModel, method: str, said: str) -> None:
    engine = Spoken(base, lambda *_: "I do not know")
    with pytest.raises(NoData, match=said):
        strategy(method=method, **OWN).tune(START, problem(base, train=4, val=4), bench(base, engine))


def test_questions_without_room_for_an_answer_are_left_out_aloud(base: BaseModel) -> None:
    given, start = problem(base, train=8, val=4), Fixed(Prompt(""))
    lengths = sorted(base.token_count(base.render(Sums().messages(start.prompt, e))) for e in given.train)
    room = Fixed(Prompt("x" * (base.context_length - 16 - lengths[0])))  # for the shortest ones alone
    events: list[Event] = []
    strategy(method="grpo", **OWN).tune(room, given, bench(base, mixed(base), events=events))
    kept = lengths.count(lengths[0])
    assert of_kind(events, "warning")[0]["message"].startswith(f"{8 - kept} of 8 train questions leave no room")
    assert sum(r["groups"] for r in of_kind(events, "rewards") if r["epoch"] == 1) == kept
    with pytest.raises(NoData, match="no question leaves room for an answer of 16 tokens"):
        strategy(method="grpo", **OWN).tune(Fixed(Prompt("x" * 500)), given, bench(base, mixed(base)))


def test_pairs_leave_no_completion_out(base: BaseModel) -> None:
    """One right and three wrong completions of each question: three pairs."""

    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        return right_answer(rendered) if sample == 2 else f"no {sample}"

    events: list[Event] = []
    at = bench(base, Spoken(base, answer), events=events)
    tuned = strategy(method="dpo", **OWN).tune(START, problem(base, train=4, val=4), at)
    assert isinstance(tuned, Fixed) and tuned.adapter is not None
    [found] = of_kind(events, "preferences")
    assert (found["right"], found["wrong"], found["mixed"], found["kept"]) == (4, 12, 4, 12)


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan")])
def test_a_reward_outside_0_to_1_is_refused(base: BaseModel, score: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sums, "grade", lambda *_: Grade(Outcome.WRONG, None, score))
    with pytest.raises(CotuneError, match=r"gave example toy-\d the score .*; rewards must lie in \[0, 1\]"):
        strategy(method="grpo", **OWN).tune(START, problem(base, train=4, val=4), bench(base, mixed(base)))


def test_the_reference_is_the_adapter_that_training_began_with(base: BaseModel) -> None:
    """Before the first step policy and reference agree, so DPO's loss is log 2 and PPO's KL is 0."""
    given = problem(base, train=8, val=4)
    first = strategy(epochs=1).tune(START, given, bench(base, fake(half)))
    for method, key, value in (("dpo", "loss", math.log(2)), ("ppo", "kl", 0.0)):
        events: list[Event] = []
        at = bench(base, mixed(base), events=events).at("again")
        strategy(method=method, **OWN).tune(first, given, at)
        assert of_kind(events, "step")[0][key] == pytest.approx(value, abs=1e-4)


def test_a_method_brings_its_defaults_and_refuses_what_it_cannot_use() -> None:
    def weights(**given: Any) -> WeightsConfig:
        return resolve({"strategy": "lora-only", "model": "x", "task": "micro-gsm8k", "weights": given}).weights

    assert (weights().samples, weights(method="rft").temperature) == (1, 0.1)
    assert (weights(method="dpo").samples, weights(method="dpo").beta) == (8, 0.1)
    assert (weights(method="ppo").updates, weights(method="grpo").updates) == (4, 1)
    given = weights(method="grpo", samples=16, beta=0)
    assert (given.samples, given.beta) == (16, 0.0)
    assert weights(**given.model_dump()) == given  # what a run folder keeps gives the same again
    with pytest.raises(UsageError, match="samples must be 2 or more"):
        weights(method="grpo", samples=1)
    with pytest.raises(UsageError, match="dpo has no gradient"):
        weights(method="dpo", beta=0)
    with pytest.raises(UsageError, match="temperature = 1 and top_p = 1"):
        weights(method="ppo", temperature=0.7)
    assert weights(rank=16, alpha=8.0).scaling == 0.5
    assert weights(rank=16, alpha=8.0, variant="rslora").scaling == 2.0
    assert weights(rank=16, alpha=8.0, variant="dora").scaling == 0.5
    with pytest.raises(UsageError, match="joint generates low-rank factors and no magnitudes"):
        resolve({"strategy": "joint", "model": "x", "task": "micro-gsm8k", "weights": {"variant": "dora"}})


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_the_rewarded_tokens_are_found(base: BaseModel, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token a completion, of which half are worth 1 and half 0, sampled and scored by the real engine: the best
    policy is known, and its score is 1 (with samples: nearly)."""

    def grade(task: Any, example: Any, completion: str, truncated: bool = False) -> Grade:
        good = bool(completion) and ord(completion[0]) % 2 == 0
        return Grade(Outcome.CORRECT if good else Outcome.WRONG, None, float(good))

    monkeypatch.setattr(Sums, "grade", grade)
    events: list[Event] = []
    at = bench(base, TransformersEngine(base), events=events)
    given = problem(base, train=2, val=2, max_new_tokens=1)
    settings = {"samples": 16, "epochs": 10, "batch_size": 2, "micro_batch_size": 32, "updates": 2}
    strategy(method=method, **settings).tune(START, given, at)
    scores = [r["mean_score"] for r in of_kind(events, "rewards")]
    assert scores[0] < 0.5 and sum(scores[-5:]) / 5 > 0.9
    assert all(r["mean_tokens"] <= 2 for r in of_kind(events, "rewards"))
