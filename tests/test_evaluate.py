"""Grades come batch by batch and in order, whatever order the engine answers in; what it tells while it works."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cotune.engines.base import Request, Sampling
from cotune.engines.fake import FakeEngine
from cotune.errors import BudgetExhausted
from cotune.evaluate import evaluate
from cotune.models.base import BaseModel
from cotune.values import Conditioning, Event, Prompt
from tests.toy import Sums, bench, example, of_kind, question_of, right_answer

EXAMPLES = tuple(example(i) for i in range(5))
SEED = [Conditioning(Prompt("Add the numbers."))] * 5
SAMPLING = Sampling(16)


class LastFirst(FakeEngine):
    """Knows the even examples, and answers in batches of two from the end."""

    def __init__(self) -> None:
        super().__init__(self._say, batch_size=2)

    def _say(self, rendered: str, adapter: str | None, sample: int) -> str:
        number = [e.question for e in EXAMPLES].index(question_of(rendered))
        return "I do not know" if number % 2 else right_answer(rendered)

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        return [[4, 3], [2, 1], [0]]


def test_the_score_so_far_is_told_with_each_batch(random_base: BaseModel) -> None:
    events: list[Event] = []
    at = bench(random_base, LastFirst(), events=events).at("tune")
    done = evaluate(Sums(), EXAMPLES, SEED, SAMPLING, at, label="val")
    assert [grade.score for grade in done.grades] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert [grade.prediction for grade in done.grades] == ["4", None, "10", None, "16"]
    told = of_kind(events, "progress")
    assert [(t["stage"], t["label"], t["done"], t["of"], t["score"]) for t in told] == [
        ("tune", "val", 2, 5, 0.5),
        ("tune", "val", 4, 5, 0.5),
        ("tune", "val", 5, 5, 0.6),
    ]
    spent = [t["tuning_tokens"] for t in told]
    assert spent == sorted(set(spent))
    assert spent[-1] == at.ledger.tuning.tokens


def test_without_a_label_nothing_is_told_and_the_grades_are_the_same(random_base: BaseModel) -> None:
    events: list[Event] = []
    done = evaluate(Sums(), EXAMPLES, SEED, SAMPLING, bench(random_base, LastFirst(), events=events))
    assert done.score == 0.6
    assert events == []


def test_a_budget_that_ends_in_the_middle_gives_no_evaluation(random_base: BaseModel) -> None:
    events: list[Event] = []
    at = bench(random_base, LastFirst(), events=events, tokens=80)
    with pytest.raises(BudgetExhausted):
        evaluate(Sums(), EXAMPLES, SEED, SAMPLING, at, label="val")
    assert [t["done"] for t in of_kind(events, "progress")] == [2]
