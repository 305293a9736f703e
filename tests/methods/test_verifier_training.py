"""The verifier's training: what it learns where right and wrong can be told apart, what it pays, how it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toy import Sums, bench, example, fake, of_kind, question_of, right_answer

from cotune.bench import Bench, MemoryStore
from cotune.config import VerifierConfig
from cotune.engines.base import Request, Sampling
from cotune.engines.fake import FakeEngine
from cotune.errors import BudgetExhausted, CotuneError
from cotune.evaluate import evaluate
from cotune.methods.objectives import soft_cross_entropy
from cotune.methods.verifier import auc, verifier_for
from cotune.models.base import BaseModel
from cotune.strategies.base import Fixed
from cotune.values import Completion, Event, InferencePlan, Prompt
from cotune.verifier import VerifierHead

PLAN = InferencePlan("weighted-best-of", 4, "verifier", 1.0)
START = Fixed(Prompt("Add the numbers."), plan=PLAN)
TRAIN, OTHERS = [example(i) for i in range(20)], [example(i) for i in range(20, 30)]
SMALL = VerifierConfig(examples=20, samples=4, epochs=5)


class Spoken(FakeEngine):
    """Says `answer` in tokens of the model that reads it."""

    def __init__(self, base: BaseModel, answer: Any) -> None:
        super().__init__(answer)
        self.base = base

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        rows = super().generate(requests, sampling)
        return [[replace(c, token_ids=tuple(self.base.encode(c.text))) for c in row] for row in rows]


def marked(rendered: str, adapter: str | None, sample: int) -> str:
    """Every other sample is right, and ends in another token than a wrong one."""
    return f"{right_answer(rendered)} !" if sample % 2 else f"{len(question_of(rendered))} or 1 ?"


def trained(base: BaseModel, at: Bench, settings: VerifierConfig = SMALL, *candidates: Fixed) -> VerifierHead:
    found = verifier_for(PLAN, candidates or [START], settings, Sums(), TRAIN, 16, at)
    assert found is not None
    return found


def test_it_ranks_every_right_completion_above_every_wrong_one_where_a_token_tells(random_base: BaseModel) -> None:
    """The optimum is known: the classes are separable, so the AUC on questions it has not seen is 1."""
    events: list[Event] = []
    at = bench(random_base, Spoken(random_base, marked), events=events)
    head = trained(random_base, at)
    done = evaluate(Sums(), OTHERS, [START.under(PLAN, head).condition([e], at)[0] for e in OTHERS], Sampling(16), at)
    assert done.score == 1.0
    chances = np.array([s.scores for s in done.samples if s is not None], dtype=np.float64).ravel()
    right = np.array([float(i % 2) for i in range(len(chances))])
    assert auc(chances, right, np.ones((len(right), len(right)), dtype=bool)) == 1.0
    assert ((chances >= 0) & (chances <= 1)).all()
    (told,) = of_kind(events, "verifier")
    assert (told["held_out_auc"], told["held_out_auc_within"]) == (1.0, 1.0)
    assert (told["examples"], told["completions"], told["held_out"], told["mean_score"]) == (20, 80, 2, 0.5)


def test_what_it_scores_does_not_depend_on_the_reference(random_base: BaseModel) -> None:
    at = bench(random_base, Spoken(random_base, marked))
    head = trained(random_base, at)
    conditionings = START.under(PLAN, head).condition(OTHERS, at)
    others = [replace(e, reference="77", rationale="it is 77") for e in OTHERS]
    one, other = (evaluate(Sums(), rows, conditionings, Sampling(16), at) for rows in (OTHERS, others))
    assert [s.scores for s in one.samples if s] == [s.scores for s in other.samples if s]
    assert one.score > other.score == 0.0


@pytest.mark.parametrize(("share", "chance"), [(1.0, 73 / 74), (0.0, 1 / 74)])
def test_completions_that_all_score_alike_give_one_chance_to_all(
    share: float, chance: float, random_base: BaseModel
) -> None:
    """Laplace's rule: (72 s + 1) / (72 + 2), of 18 examples with 4 samples (2 are held out)."""
    events: list[Event] = []
    answer = fake(lambda rendered, adapter: share).answer
    head = trained(random_base, bench(random_base, Spoken(random_base, answer), events=events))
    assert head.chances(torch.randn(3, len(head.weight_D))).tolist() == pytest.approx([chance] * 3)
    (told,) = of_kind(events, "verifier")
    assert (told["constant"], told["mean_score"]) == (True, share)
    assert not of_kind(events, "step")


def test_one_example_is_learned_from_and_chosen_by(random_base: BaseModel) -> None:
    at = bench(random_base, Spoken(random_base, marked))
    head = verifier_for(PLAN, [START], SMALL, Sums(), TRAIN[:1], 16, at)
    assert head is not None and head.weight_D.abs().sum() > 0


def test_another_scorer_needs_none(random_base: BaseModel) -> None:
    at = bench(random_base, Spoken(random_base, marked))
    plan = replace(PLAN, scorer="log-probability")
    assert verifier_for(plan, [START], SMALL, Sums(), TRAIN, 16, at) is None
    assert at.ledger.tuning.tokens == 0


def test_candidates_take_turns_and_greedy_samples_are_drawn_once(random_base: BaseModel) -> None:
    engine = Spoken(random_base, marked)
    plan = replace(PLAN, samples=1, temperature=0.0)
    others = [START, replace(START, prompt=Prompt("Sum up."))]
    verifier_for(plan, others, SMALL, Sums(), TRAIN, 16, bench(random_base, engine))
    assert len(engine.calls) == 20
    assert sum("Sum up." in call.prompt for call in engine.calls) == 10


def test_generating_and_reading_are_booked_and_nothing_passes_the_budget(random_base: BaseModel) -> None:
    at = bench(random_base, Spoken(random_base, marked))
    trained(random_base, at)
    spent = at.ledger.tuning
    written = spent.generated_tokens
    assert (spent.calls, spent.trained_tokens) == (80, 0)
    prompts = sum(random_base.token_count(random_base.render(Sums().messages(START.prompt, e))) for e in TRAIN)
    words = sum(
        len(random_base.render(Sums().messages(START.prompt, e)).split()) for e in TRAIN
    )  # the fake's own count
    assert spent.prompt_tokens == words + 4 * prompts + written
    for tokens in (0, spent.tokens - 1):
        small = bench(random_base, Spoken(random_base, marked), tokens=tokens)
        with pytest.raises(BudgetExhausted):
            trained(random_base, small)
        assert small.ledger.tuning.tokens <= tokens
    exact = bench(random_base, Spoken(random_base, marked), tokens=spent.tokens + 20 * 4 * 16)
    trained(random_base, exact)


class Killed(BaseException):
    """Not an Exception that anything could catch."""


class Failing(MemoryStore):
    """Is killed while it writes its `at`-th checkpoint."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def save_checkpoint(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed
        super().save_checkpoint(name, tensors, meta)


def test_a_killed_training_continues_to_the_same_bytes(random_base: BaseModel) -> None:
    whole = bench(random_base, Spoken(random_base, marked))
    expected = trained(random_base, whole).digest
    for stop in range(1, 8):
        store = Failing(stop)
        with pytest.raises(Killed):
            trained(random_base, bench(random_base, Spoken(random_base, marked), store=store))
        engine = Spoken(random_base, marked)
        again = bench(random_base, engine, store=store)
        assert trained(random_base, again).digest == expected
        assert not engine.calls
        assert again.ledger.tuning.tokens == whole.ledger.tuning.tokens
        assert again.ledger.tuning.flops == whole.ledger.tuning.flops


def test_a_score_outside_its_range_is_the_tasks_mistake(random_base: BaseModel) -> None:
    class Generous(Sums):
        def grade(self, *args: Any, **kwargs: Any) -> Any:
            return replace(super().grade(*args, **kwargs), score=2.0)

    with pytest.raises(CotuneError, match="the score 2"):
        verifier_for(PLAN, [START], SMALL, Generous(), TRAIN, 16, bench(random_base, Spoken(random_base, marked)))


def test_the_loss_is_cross_entropy_with_soft_targets() -> None:
    logits, scores = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 0.25, 0.0])
    chances = [1 / (1 + math.exp(-x)) for x in (0.0, 2.0, -1.0)]
    by_hand = [-(s * math.log(p) + (1 - s) * math.log(1 - p)) for s, p in zip((1, 0.25, 0), chances, strict=True)]
    assert soft_cross_entropy(logits, scores).tolist() == pytest.approx(by_hand)


def test_the_share_of_ordered_pairs_by_hand() -> None:
    """Of (0.9, right), (0.5, wrong), (0.5, right), (0.1, wrong) three pairs are in order and one is level."""
    chances, scores = np.array([0.9, 0.5, 0.5, 0.1]), np.array([1.0, 0.0, 1.0, 0.0])
    every = np.ones((4, 4), dtype=bool)
    assert auc(chances, scores, every) == 3.5 / 4
    assert auc(chances, scores, np.eye(4, dtype=bool)) is None
