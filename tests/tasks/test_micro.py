"""The offline tasks: official row formats, references that grade correct, disjoint splits, difficulty."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from cotune.errors import UsageError
from cotune.tasks import micro, task
from cotune.tasks.micro_arithmetic import EQUATION_MIX, WORD_MIX
from cotune.tasks.micro_stories import HOP_MIX, NONE_OF_THESE, STORY_MIX
from cotune.values import Outcome

NAMES = ("micro-gsm8k", "micro-math", "micro-hotpotqa", "micro-cosmosqa")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("difficulty", micro.DIFFICULTIES)
def test_references_grade_correct_and_others_wrong(name: str, difficulty: int) -> None:
    one = task(name)
    rows = one.generate_rows("test", 60, seed=3, difficulty=difficulty)
    examples = [one.parse(row, str(i)) for i, row in enumerate(rows)]
    assert all(set(one.columns) <= set(row) for row in rows)
    for example in examples:
        assert one.grade(example, one.reference_completion(example)).outcome is Outcome.CORRECT
    for example, other in pairwise(examples):
        if example.reference != other.reference:
            wrong = one.reference_completion(other)
            assert one.grade(example, wrong).outcome is Outcome.WRONG


@pytest.mark.parametrize("name", NAMES)
def test_rows_depend_on_the_seed_alone_and_a_longer_draw_begins_with_the_shorter(name: str) -> None:
    one, again = task(name), task(name)
    assert one.generate_rows("train", 40, seed=1) == again.generate_rows("train", 60, seed=1)[:40]
    assert one.generate_rows("train", 40, seed=1) != one.generate_rows("train", 40, seed=2)
    assert one.generate_rows("train", 40, seed=1) != one.generate_rows("train", 40, seed=1, difficulty=2)


@pytest.mark.parametrize("name", NAMES)
def test_no_question_is_in_two_splits_whatever_the_seed_or_difficulty(name: str) -> None:
    one = task(name)

    def texts(split: str, seed: int, difficulty: int) -> set[str]:
        rows = one.generate_rows(split, 400, seed, difficulty)
        found = {one.question_text(one.parse(row, "0")) for row in rows}
        assert len(found) == 400  # no duplicates within a split
        return found

    train = texts("train", 0, 0) | texts("train", 5, 1)
    val = texts("val", 0, 1)
    test = texts("test", 0, 1) | texts("test", 9, 0)
    assert not train & test and not train & val and not val & test


def test_unknown_split_and_difficulty_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="no split 'dev'"):
        task("micro-math").generate_rows("dev", 1, 0)
    with pytest.raises(UsageError, match="0, 1 or 2"):
        task("micro-math").generate_rows("test", 1, 0, difficulty=3)


@pytest.mark.parametrize(
    ("stream", "mix"),
    [
        (micro.word_problems, WORD_MIX),
        (micro.equations, EQUATION_MIX),
        (micro.hop_questions, HOP_MIX),
        (micro.narratives, STORY_MIX),
    ],
)
def test_difficulty_sets_the_share_of_each_kind(stream: object, mix: object) -> None:
    for difficulty in micro.DIFFICULTIES:
        found = Counter(p.kind for p, _ in zip(stream("train", 0, difficulty), range(1500), strict=False))  # type: ignore[operator]
        shares = mix[difficulty]  # type: ignore[index]
        assert sum(shares.values()) == pytest.approx(1.0)
        assert set(found) == set(shares)
        # a kind with few different problems is drawn less often than asked, as none is drawn twice
        for kind, share in shares.items():
            assert abs(found[kind] / 1500 - share) < 0.06, (difficulty, kind, found)


def test_a_gsm8k_row_is_written_as_the_official_ones_are() -> None:
    for row in task("micro-gsm8k").generate_rows("train", 50, 0):
        assert set(row) == {"question", "answer"}
        *lines, last = row["answer"].split("\n")
        assert last.startswith("#### ")
        for line in lines:
            left, _, rest = line.partition("=<<")
            inside, _, after = rest.partition(">>")
            expression, _, result = inside.partition("=")
            assert left.endswith(expression) and after.startswith(result + " ")
        assert last == f"#### {result}"


def test_hotpotqa_answers_follow_from_the_supporting_facts() -> None:
    for row in task("micro-hotpotqa").generate_rows("train", 200, 0):
        paragraphs = dict(row["context"])
        facts = [paragraphs[title][index] for title, index in row["supporting_facts"]]
        assert len(facts) == 2
        if row["type"] == "bridge":
            assert row["answer"] in facts[1] and row["answer"] not in facts[0]
            title = row["supporting_facts"][1][0]
            assert title in facts[0] and row["supporting_facts"][0][0] in row["question"]


def test_cosmosqa_choices_differ_and_the_label_is_spread() -> None:
    rows = task("micro-cosmosqa").generate_rows("train", 400, 0)
    labels = Counter(row["label"] for row in rows)
    assert all(len({row[f"answer{i}"] for i in range(4)}) == 4 for row in rows)
    assert set(labels) == {"0", "1", "2", "3"} and min(labels.values()) > 70
    assert any(row[f"answer{row['label']}"] == NONE_OF_THESE for row in rows)
