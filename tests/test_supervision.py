"""What is accepted for learning, how it becomes token rows, and the loss against a slow oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy import Sums, bench, example, question_of, right_answer

from cotune.engines.base import Sampling
from cotune.engines.fake import FakeEngine
from cotune.models.base import BaseModel, load
from cotune.supervision import TokenRow, Trace, accepted, completion_loss, demonstration, gold, token_row
from cotune.values import Conditioning, Demonstration, Prompt

EXAMPLES = [example(i) for i in range(4)]


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir), device="cpu", dtype="float32")


def test_accepted_are_the_correct_the_whole_and_the_distinct(base: BaseModel) -> None:
    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        i = next(i for i, e in enumerate(EXAMPLES) if e.question == question_of(rendered))
        return [
            right_answer(rendered),  # the same three times
            f"{'so ' * sample}{right_answer(rendered)}",  # three ways
            f"{'so ' * 20}{right_answer(rendered)}",  # cut off
            "no idea",
        ][i]

    engine = FakeEngine(answer)
    conditionings = [Conditioning(Prompt("Add."))] * 4
    traces, sampled = accepted(Sums(), EXAMPLES, conditionings, Sampling(16, 0.7, n=3), bench(base, engine))
    assert sampled == 12
    assert [t.example.id for t in traces] == ["toy-0", "toy-1", "toy-1", "toy-1"]
    assert len({t.completion for t in traces}) == 4
    assert all(Sums().grade(t.example, t.completion).score == 1.0 for t in traces)


def test_gold_and_demonstrations() -> None:
    traces = gold(Sums(), EXAMPLES)
    assert [t.completion for t in traces] == [e.rationale for e in EXAMPLES]
    assert demonstration(Sums(), traces[0]) == Demonstration("What is 3 + 1 ?", "3 + 1 = 4")


def test_a_row_ends_its_turn(base: BaseModel) -> None:
    rendered = base.render(Sums().messages(Prompt("Add."), EXAMPLES[0]))
    row = token_row(base, rendered, Trace(EXAMPLES[0], "3 + 1 = 4"))
    assert row.example == EXAMPLES[0].id
    assert base.decode(row.completion) == "3 + 1 = 4"
    assert row.completion[-1] == base.end_of_turn_ids[0]
    assert list(row.context) == base.encode(rendered)
    assert len(row) == len(row.context) + len(row.completion)


def test_loss_is_the_sum_over_completion_tokens_one_by_one(base: BaseModel) -> None:
    rows = [
        token_row(base, base.render(Sums().messages(Prompt(p), e)), Trace(e, e.rationale))
        for p, e in zip(("Add.", "Add the two numbers that you see.", "", "Sum"), EXAMPLES, strict=True)
    ]
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            for i, token in enumerate(row.completion):
                before = torch.tensor([[*row.context, *row.completion[:i]]])
                expected -= float(base.model(input_ids=before).logits[0, -1].double().log_softmax(-1)[token])
        together = float(completion_loss(base, rows))
        apart = sum(float(completion_loss(base, [row])) for row in rows)
    assert together == pytest.approx(expected, rel=1e-5)
    assert apart == pytest.approx(expected, rel=1e-5)
    assert float(completion_loss(base, [TokenRow((5, 6), (7,), "x")])) > 0
