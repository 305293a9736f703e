"""The choice of a plan for each bin: exact on small tables, on populations where bins help, and where they do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cotune.aggregation import majority_accuracy
from cotune.difficulty.choosing import Choice, best_plan, choose_by_difficulty, halved, plans_of_bins

SIZES = np.array([1, 2, 4, 8])
HALVES = np.array([0.0] * 20 + [-1.0] * 20)  # eases: an easy and a hard half


def choose(utility: np.ndarray, ease: np.ndarray = HALVES, probe: int = 2, count: int = 2) -> Choice:
    question = np.arange(len(ease))
    return choose_by_difficulty(utility, SIZES, question, ease, probe, count, np.random.default_rng(0))


def test_the_best_of_equal_plans_is_the_first_and_only_offered_ones_are_taken() -> None:
    utility = np.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    assert best_plan(utility, np.ones(3, dtype=bool)) == 0
    assert best_plan(utility, np.array([False, True, True])) == 1
    bins = np.array([0, 2])
    assert plans_of_bins(utility, bins, 3, np.ones(3, dtype=bool)) == (2, 0, 1)  # the empty bin gets the best of all


def test_every_bin_gets_its_own_number_and_the_gain_is_exact() -> None:
    """Easy questions are right at once and pay for more; hard ones are right with 8. Price: 0.05 a sample."""
    right = np.array([[1.0] * 20 + [0.0] * 20] * 3 + [[1.0] * 40])
    found = choose(right - 0.05 * SIZES[:, None])
    assert (found.one, found.plans, found.edges) == (3, (1, 3), (-0.5,))
    assert found.gain == pytest.approx(0.5 * 0.05 * (8 - 2))  # half of the questions save six samples
    assert found.parts


def test_where_all_are_alike_one_plan_answers_all() -> None:
    found = choose(np.tile(np.array([[0.1], [0.2], [0.9], [0.3]]), 40))
    assert (found.one, found.plans) == (2, (2, 2))
    assert (found.gain, found.parts) == (0.0, False)


def test_a_probe_that_costs_more_than_it_saves_is_not_bought() -> None:
    """One sample is best for all, so whatever the bins, a probe of two only costs."""
    found = choose(np.tile(-0.1 * SIZES[:, None], 40))
    assert (found.one, found.plans) == (0, (1, 1))
    assert found.gain == pytest.approx(-0.1)
    assert not found.parts


def test_bins_that_gain_by_luck_alone_are_seldom_bought() -> None:
    """Scores of nothing but noise: a choice on the same questions would always find a gain, the folds do not."""
    random = np.random.default_rng(0)
    bought, looked = 0, 0
    for _ in range(100):
        found = choose(random.random((4, 40)))
        bought += found.parts
        looked += any(plan != found.one for plan in found.plans)
    assert looked > 60
    assert bought < 20


def test_draws_of_one_question_are_in_one_fold() -> None:
    """Every question has a plan that is right for it alone; a fold that shared questions would look perfect."""
    random = np.random.default_rng(1)
    best = random.integers(4, size=10)
    utility = np.repeat((best[None] == np.arange(4)[:, None]).astype(float), 8, axis=1)
    ease = np.repeat(np.arange(10.0), 8)  # a bin for each question
    found = choose_by_difficulty(utility, SIZES, np.repeat(np.arange(10), 8), ease, 1, 10, random)
    assert found.plans == tuple(best[::-1])
    assert found.gain < 0.4
    assert not found.parts


@pytest.mark.parametrize("questions", [1, 2, 3])
def test_fewer_questions_than_bins(questions: int) -> None:
    ease = -np.arange(float(questions))
    found = choose(np.random.default_rng(0).random((4, questions)), ease, count=5)
    assert len(found.plans) == len(found.edges) + 1 <= 5
    assert math.isinf(found.error) == (questions == 1)
    assert questions > 1 or not found.parts


def test_the_same_generations_do_more_where_the_best_number_differs() -> None:
    """Exact accuracies: easy questions (0.95) hardly gain from votes, hard ones (0.55 of two answers) do.

    What the choice by bins spends on average is put into one plan for all: that scores less.
    """
    sizes = np.arange(1, 33)
    accuracy = np.stack([majority_accuracy([p, 1 - p], 32) for p in [0.95] * 20 + [0.55] * 20], axis=1)
    found = choose_by_difficulty(
        accuracy - 0.003 * sizes[:, None], sizes, np.arange(40), HALVES, 2, 2, np.random.default_rng(0)
    )
    assert found.parts
    chosen = np.array(found.plans)[found.bins]
    spent = sizes[chosen].mean()
    uniform = accuracy[math.ceil(spent) - 1].mean()  # no fewer samples than the bins take
    assert sizes[found.plans[0]] < spent < sizes[found.plans[1]]
    assert accuracy[chosen, np.arange(40)].mean() > uniform + 0.01


@pytest.mark.parametrize("count", [1, 7, 8])
def test_both_folds_have_as_many_easy_questions_as_hard_ones(count: int) -> None:
    ease = np.arange(float(count))
    fold = halved(ease, np.random.default_rng(count))
    ranked = fold[np.argsort(-ease)]
    assert all({*ranked[i : i + 2]} == {0, 1} for i in range(0, count - 1, 2))
