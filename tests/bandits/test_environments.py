"""Environments: pulls agree with true values, caches are what they hold, the synthetic ones have the paper's sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cotune.aggregation import blocks
from cotune.bandits.environments import (
    BestOfN,
    MajorityVote,
    Outcomes,
    synth_bernoulli,
    synth_categorical,
    vote_on_completions,
)
from cotune.errors import DataError, UsageError


def worked_example(weights: object = ((1, 0), (1, 1)), n_max: int = 10) -> MajorityVote:
    right = np.array([[0.4, 0.9], [0.62, 0.62]])
    return MajorityVote([0, 1], [1.0, 0.0], np.stack([right, 1 - right], -1), 0.01, weights, n_max, [0, 1])


def small_best_of_n() -> BestOfN:
    random = np.random.default_rng(3)
    weights = [(0.3, 0.7, 0), (0.3, 0.7, 1), (0.9, 0.1, 0.5)]
    probability = random.dirichlet(np.ones(3), (2, 3))
    return BestOfN(random.normal(size=(2, 3, 3, 2)), probability, random.random((2, 1, 3)), weights, 6, [0, 1, 2])


def test_values_are_those_of_the_worked_example_minus_cost() -> None:
    values = worked_example().values(np.array([0, 1]))
    assert values[0, :, 9] == pytest.approx([0.632838, 0.773776], abs=5e-7)
    assert values[1] == pytest.approx(values[0] - 0.01 * np.arange(1, 11))


@pytest.mark.parametrize("make", [worked_example, small_best_of_n])
def test_pulls_estimate_the_values(make: Callable[[], Outcomes]) -> None:
    """Within five standard errors, computed from the pulls themselves, which are independent."""
    environment, random, pulls = make(), np.random.default_rng(0), 400
    n = environment.n_max
    truth = environment.values(environment.train)
    for prompt in range(2):
        means = np.array([environment.pull(prompt, n, 1, random)[1] / blocks(n).count for _ in range(pulls)])
        error = means.std(0, ddof=1) / np.sqrt(pulls)
        assert (np.abs(means.mean(0) - truth[:, prompt]) <= 5 * error + 1e-12).all()


def test_a_batch_is_the_sum_of_its_pulls() -> None:
    """With one outcome per query nothing is random but the query, so every pull's sums are known."""
    environment = BestOfN([[[[2.0]], [[3.0]]]], [[[1.0], [1.0]]], 0.5, [(1, 1)], 3, [0, 1])
    queries, sums = environment.pull(0, 3, 50, np.random.default_rng(0))
    gained = 2.0 * 50 + queries.sum()
    assert sums[0] == pytest.approx([3 * gained - 75, gained - 50, gained - 75])


def test_a_cache_of_completions() -> None:
    predictions = [[["4", "5", "4", None]], [[None, None, "5", None]]]
    scores = [[[1, 0, 1, 0]], [[1, 1, 0, 1]]]  # a grade of no answer is not believed
    cost = [[[1, 2, 3, 4]], [[1, 1, 1, 1]]]
    environment = vote_on_completions(predictions, scores, cost, [(1, 0), (1, 0.1)], 3, [0])
    values = environment.values(np.array([0]))
    # Prompt 0: gold 2/4, two others 1/4 each. N = 3: (2/4)^3 + 3 (2/4)^2 (2/4) + 3! (2/4)(1/4)(1/4) / 3.
    assert values[0] == pytest.approx(np.array([[0.5, 0.5, 0.125 + 0.375 + 0.0625], [0, 0, 0]]))
    assert values[1] == pytest.approx(values[0] - 0.1 * np.outer([2.5, 1], [1, 2, 3]))
    assert len(environment.test) == 0


def test_equal_predictions_are_worth_their_mean_grade() -> None:
    environment = vote_on_completions([[["a", "a"]]], [[[1, 0.5]]], [[[0, 0]]], [(1, 0)], 2, [0])
    assert environment.values(np.array([0]))[0, 0] == pytest.approx([0.75, 0.75])


@pytest.mark.parametrize(("make", "queries", "contexts"), [(synth_bernoulli, 520, 3), (synth_categorical, 512, 27)])
def test_synthetic_sizes(make: Callable[[np.random.Generator], Outcomes], queries: int, contexts: int) -> None:
    environment = make(np.random.default_rng(0))
    assert (environment.prompts, environment.n_max, environment.queries) == (32, 32, queries)
    assert environment.contexts == contexts
    assert len(environment.train) == queries * 4 // 5
    assert not set(environment.train) & set(environment.test)
    again = make(np.random.default_rng(0))
    assert (again.probability == environment.probability).all() and (again.cost == environment.cost).all()


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="number of completions of 0"):
        worked_example(n_max=0)
    with pytest.raises(UsageError, match="at least 0"):
        worked_example(weights=[(1, -1)])
    with pytest.raises(UsageError, match="one objective"):
        worked_example(weights=[(1, 1, 1)])
    with pytest.raises(DataError, match="no training query"):
        MajorityVote([0, 1], [1.0, 0.0], [[[0.5, 0.5]]], 0, [(1, 0)], 1, [])
    with pytest.raises(DataError, match="sum to 1"):
        MajorityVote([0, 1], [1.0, 0.0], [[[0.5, 0.4]]], 0, [(1, 0)], 1, [0])
    with pytest.raises(UsageError, match="one number for each objective"):
        BestOfN([[[[1.0]]]], [[[1.0]]], 0, [(1, 1, 1)], 1, [0])
    with pytest.raises(DataError, match="grade of a completion is not a finite number"):
        vote_on_completions([[["a"]]], [[[float("nan")]]], [[[0]]], [(1, 0)], 1, [0])
    with pytest.raises(DataError, match="cost of a completion is not a finite number"):
        MajorityVote([0, 1], [1.0, 0.0], [[[0.5, 0.5]]], float("nan"), [(1, 0)], 1, [0])
    for predictions, scores in (
        ([], []),
        ([[["a"], ["a", "b"]]], [[[1], [1]]]),
        ([[["a"], ["b"]], [["a"]]], [[[1], [1]], [[1], [1]]]),
        ([[["a"]]], [[[1, 1]]]),
        ([[[]]], [[[]]]),
    ):
        with pytest.raises(DataError, match="equally many graded completions"):
            vote_on_completions(predictions, scores, [[[0]]], [(1, 0)], 1, [0])
