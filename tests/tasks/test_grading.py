from __future__ import annotations

import random
from fractions import Fraction

import pytest

from cotune.tasks import grading, task
from cotune.tasks.grading import final_choice, final_expression, final_number, last_boxed, marked, numbers, value
from cotune.values import Example, Outcome
from tests.reference import hotpot

CHOICES = ("He was tired .", "She went home .", "It rained .", "None of the above choices .")


@pytest.mark.parametrize(
    ("completion", "prediction", "explicit"),
    [
        ("#### 18", "18", True),
        ("#### $1,080.50 dollars", "1080.50", True),
        ("first #### 3\nno, #### 4 apples", "4", True),
        ("#### -7", "-7", True),
        ("#### \u22127", "-7", True),
        ("#### -$5", "-5", True),
        ("#### \u0661\u0668", "\u0661\u0668", True),  # Arabic digits
        ("so \\boxed{72}. The answer is 71", "72", True),  # a box comes before words
        ("#### 5, that is \\boxed{6}", "5", True),  # and #### before a box
        ("\\boxed{1{,}080}", "1080", True),
        ("\\boxed{\\frac{1}{2}}", "1/2", True),
        ("#### none. \\boxed{9}", "9", True),  # no number after ####: the next rule
        ("The answer is 12 because 3 + 9 = 12", "12", True),
        ("**Answer:** 1,200 km", "1200", True),
        ("5 - 3 = 2", "2", False),
        ("it costs 5-3", "3", False),
        ("about 50%", "50", False),
        ("a total of .5", ".5", False),
        ("ends in 18.", "18", False),
        ("1,00,000 rupees", "100000", False),
        ("we have 3,4,5", "5", False),
        ("no number at all", None, False),
        ("", None, False),
        ("9" * 5000, None, False),
    ],
)
def test_gsm8k_reads_one_final_number(completion: str, prediction: str | None, explicit: bool) -> None:
    found = final_number(completion)
    assert found.explicit is explicit
    if prediction is None:
        assert found.text is None
    else:
        assert found.text is not None and value(found.text) == value(prediction)


def test_numbers_are_exact() -> None:
    assert value(numbers("18.00")[0]) == 18
    assert value(numbers("0.1")[0]) + value(numbers("0.2")[0]) == value(numbers("0.3")[0])
    assert value("7/2") == Fraction(7, 2)


@pytest.mark.parametrize(
    ("completion", "truncated", "outcome"),
    [
        ("#### 18", False, Outcome.CORRECT),
        ("#### 18.0", False, Outcome.CORRECT),
        ("#### 19", False, Outcome.WRONG),
        ("18 in all", False, Outcome.CORRECT),
        ("18 in all", True, Outcome.TRUNCATED),
        ("#### 18 and then", True, Outcome.CORRECT),
        ("The answer is 17", True, Outcome.WRONG),
        ("", False, Outcome.WRONG),
        ("", True, Outcome.TRUNCATED),
    ],
)
def test_gsm8k_outcomes(completion: str, truncated: bool, outcome: Outcome) -> None:
    grade = task("gsm8k").grade(Example("1", "q", "18"), completion, truncated)
    assert grade.outcome is outcome
    assert grade.score == grade.metrics["accuracy"] == float(outcome is Outcome.CORRECT)
    assert bool(grade.note) == (outcome is Outcome.TRUNCATED)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{3}", "3"),
        (r"\boxed {4}", "4"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed 9", None),
        (r"\boxed{72", None),
        ("none", None),
    ],
)
def test_last_balanced_box(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("completion", "prediction", "explicit"),
    [
        (r"so $x = \boxed{5}$", "5", True),
        (r"\boxed{} so the answer is $\frac12$.", r"$\frac12$.", True),
        ("#### x+1", "x+1", True),
        ("thus 3 + 4 = 7", "7", False),
        ("nothing", None, False),
    ],
)
def test_math_reads_one_final_expression(completion: str, prediction: str | None, explicit: bool) -> None:
    found = final_expression(completion)
    assert (found.text, found.explicit) == (prediction, explicit)


def test_marked_takes_the_last_marker_and_its_line() -> None:
    assert marked("Answer: no\nAnswer: yes\nbecause") == "yes"
    assert marked("**Answer:**\n\nParis\nFrance") == "Paris"
    assert marked("The answer is Paris.") == "Paris."
    assert marked("answering: nothing") is None
    assert marked("Answer:") is None


def test_hotpot_scores_match_the_slow_oracle() -> None:
    rng = random.Random(0)
    vocabulary = ["The", "a", "an", "yes", "no", "noanswer", "Paris,", "U.S.", "war", "of", "1812", "---", "é"]
    hotpotqa = task("hotpotqa")
    for _ in range(2000):
        reference, prediction = (" ".join(rng.choices(vocabulary, k=rng.randint(1, 4))) for _ in range(2))
        if rng.random() < 0.2:
            prediction = reference.lower()
        grade = hotpotqa.grade(Example("1", "q", reference, "c"), f"Answer: {prediction}")
        assert grade.prediction == prediction
        assert grade.metrics["exact_match"] == grade.score == hotpot.exact_match(prediction, reference)
        assert grade.metrics["token_f1"] == pytest.approx(hotpot.token_f1(prediction, reference), abs=1e-12)


def test_hotpot_known_values() -> None:
    # computed by hand: 2 shared words of 3 and 2
    assert grading.token_f1("the Eiffel Tower Paris", "Eiffel Tower") == pytest.approx(0.8)
    assert grading.token_f1("yes indeed", "yes") == 0.0
    assert grading.token_f1("Yes.", "yes") == 1.0
    grade = task("hotpotqa").grade(Example("1", "q", "Eiffel Tower", "c"), "The Eiffel Tower.")
    assert (grade.outcome, grade.prediction) == (Outcome.CORRECT, "The Eiffel Tower.")
    assert task("hotpotqa").grade(Example("1", "q", "x", "c"), "x", truncated=True).outcome is Outcome.TRUNCATED


@pytest.mark.parametrize(
    ("completion", "letter", "explicit"),
    [
        ("Answer: B", "B", True),
        ("Answer: (c)", "C", True),
        ("**Answer: D.** None of these", "D", True),
        (r"\boxed{A}", "A", True),
        ("The answer is she went home.", "B", True),
        ("Answer: 2", "C", True),
        ("The correct answer is option D because", "D", True),
        ("Answer: The best choice is B.", "B", True),
        ("B", "B", False),
        ("B. She went home .", "B", False),
        ("Option C", "C", False),
        ("She went home", "B", False),
        ("I think\nC", "C", False),
        ("Surely it rained, I think.", "C", False),
        ("It rained and she went home .", None, False),
        ("A man walked by", None, False),
        ("Answer: E", None, False),
        ("", None, False),
    ],
)
def test_cosmosqa_reads_letter_text_or_index(completion: str, letter: str | None, explicit: bool) -> None:
    found = final_choice(completion, CHOICES)
    assert (found.text, found.explicit) == (letter, explicit)


def test_cosmosqa_text_of_a_choice_comes_before_its_index() -> None:
    assert final_choice("Answer: 2", ("1", "2", "3", "0")).text == "B"


def _examples() -> dict[str, Example]:
    return {
        "gsm8k": Example("1", "q", "5"),
        "math": Example("1", "q", r"\frac{1}{2}"),
        "hotpotqa": Example("1", "q", "yes", "c"),
        "cosmosqa": Example("1", "q", "B", "c", choices=CHOICES),
    }


@pytest.mark.parametrize("name", ["gsm8k", "math", "hotpotqa", "cosmosqa"])
@pytest.mark.parametrize(
    "completion",
    [
        "", "\x00", "\ud800 answer: \udfff", "{" * 10**6, r"\boxed{" * 10**4,
        r"\boxed{" + "{" * 10**5 + "}" * 10**5 + "}",
        "####" * 10**4, "answer: " * 10**4, "9" * 10**5, "1," * 10**4, "- " * 10**4, "\\" * 10**5, "\n" * 10**5,
        "1/" * 10**4, "1/0 \\boxed{1/0} #### 1/0", "#### 1e999999999", r"\boxed{\frac10}", "٣", "½", "\u2212",
    ],
    ids=range(20),
)  # fmt: skip
@pytest.mark.timeout(30)
def test_a_grade_never_raises(name: str, completion: str) -> None:
    example = _examples()[name]
    for truncated in (False, True):
        grade = task(name).grade(example, completion, truncated)
        assert grade.outcome in (Outcome.WRONG, Outcome.TRUNCATED, Outcome.ERRORED)
        assert grade.score == 0
        if grade.prediction is not None:
            grade.prediction.encode()  # what was read can be written
