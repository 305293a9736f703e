"""Every real row: its reference grades correct through the task's own rendering and grading, a wrong one wrong."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from cotune.tasks import task
from cotune.tasks.data import _read
from cotune.tasks.equality import equal
from cotune.values import Example, Outcome, Prompt

NAMES = ["gsm8k", "math", "hotpotqa", "cosmosqa"]
UNUSABLE = {"math": ["train-1655", "train-1707", "train-5529", "train-5531"]}


def examples(name: str, folder: Path) -> list[Example]:
    found = [_read(task(name), folder, split, None) for split in ("train", "test")]
    return [e for split in found if split for e in (*split.examples, *split.repeated)]


@pytest.mark.parametrize("name", NAMES)
def test_every_reference_grades_correct(name: str, real_data: Path) -> None:
    benchmark = task(name)
    outcomes = Counter(benchmark.grade(e, benchmark.reference_completion(e)).outcome for e in examples(name, real_data))
    assert set(outcomes) == {Outcome.CORRECT}
    assert all(benchmark.grade(e, benchmark.reference_completion(e), truncated=True).score == 1
               for e in examples(name, real_data)[:200])  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_unusable_rows_are_named(name: str, real_data: Path) -> None:
    reports = [split.report for s in ("train", "test") if (split := _read(task(name), real_data, s, None))]
    assert [row_id for report in reports for row_id, _ in report.unusable] == UNUSABLE.get(name, [])
    assert all(report.rows == report.usable + report.duplicates + len(report.unusable) for report in reports)


def test_wrong_gsm8k_numbers_grade_wrong(real_data: Path) -> None:
    benchmark = task("gsm8k")
    for e in examples("gsm8k", real_data):
        assert benchmark.grade(e, f"{e.rationale}\n#### 1{e.reference}").outcome is Outcome.WRONG
        assert benchmark.grade(e, f"#### {e.reference}.5").outcome is Outcome.WRONG
        assert benchmark.grade(e, f"The answer is ${int(e.reference):,}.00.").outcome is Outcome.CORRECT


def test_wrong_choices_and_spans_grade_wrong(real_data: Path) -> None:
    cosmosqa, hotpotqa = task("cosmosqa"), task("hotpotqa")
    for e in examples("cosmosqa", real_data):
        for index, letter in enumerate("ABCD"):
            expected = Outcome.CORRECT if letter == e.reference else Outcome.WRONG
            assert cosmosqa.grade(e, f"Answer: {letter}").outcome is expected
            if e.choices.count(e.choices[index]) == 1:
                assert cosmosqa.grade(e, f"Answer: {e.choices[index]}").outcome is expected
    for e in examples("hotpotqa", real_data):
        assert hotpotqa.grade(e, f"Answer: {e.reference} not").outcome is Outcome.WRONG
        assert hotpotqa.grade(e, e.reference.upper()).outcome is Outcome.CORRECT


def test_math_answers_set_differently_are_equal_and_changed_ones_are_not(real_data: Path) -> None:
    answers = sorted({e.reference for e in examples("math", real_data)})
    for answer in answers:
        other = answer.replace(r"\frac", r"\dfrac").replace(r"\left", "").replace(r"\right", "")
        assert equal(answer, f"$ {other.replace('pmatrix', 'bmatrix')} $"), answer
    rng = random.Random(0)
    chosen = rng.sample(answers, 500)
    accepted = [(a, wrong) for a in chosen if (wrong := _changed(a, rng)) and equal(a, wrong)]
    assert accepted == []


def _changed(answer: str, rng: random.Random) -> str | None:
    """One whole number in the answer plus one; None where a convention makes that the same answer."""
    places = list(re.finditer(r"\d+", answer))
    if not places or "=" in answer or r"\approx" in answer:
        return None
    place = rng.choice(places)
    return f"{answer[: place.start()]}{int(place[0]) + 1}{answer[place.end() :]}"


@pytest.mark.parametrize("name", NAMES)
def test_the_frame_is_the_instruction_and_the_question(name: str, real_data: Path) -> None:
    benchmark = task(name)
    e = examples(name, real_data)[0]
    system, user = benchmark.messages(Prompt(benchmark.seed_instruction), e)
    assert system == {"role": "system", "content": benchmark.seed_instruction}
    assert e.question in user["content"] and e.context in user["content"]
    assert "<<" not in benchmark.reference_completion(e)
    assert all(choice in user["content"] for choice in e.choices)
