"""Intervals against published numbers, closed forms and brute force."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from scipy import stats

from cotune.compare.stats import Estimate, mean_score, over_tasks, paired, wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_newcombes_published_examples(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits / n, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_ends_solve_its_equation() -> None:
    """Its definition: the ends are the p with |mean - p| = z sqrt(p (1 - p) / n)."""
    for hits in range(1, 10):
        for end in wilson(hits / 10, 10):
            assert abs(hits / 10 - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / 10))


def test_wilson_stays_in_range_and_mirrors() -> None:
    for n in (1, 2, 7, 1000):
        for hits in (0, n // 2, n):
            low, high = wilson(hits / n, n)
            assert 0 <= low <= hits / n <= high <= 1
            mirrored = wilson(1 - hits / n, n)
            assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))


def test_mean_score_standard_error_is_that_of_the_mean() -> None:
    scores = [1.0, 0.0, 1.0, 1.0, 0.25]
    estimate = mean_score(scores)
    assert estimate.mean == pytest.approx(0.65)
    assert estimate.standard_error == pytest.approx(statistics.stdev(scores) / math.sqrt(5))
    assert estimate.n == 5


def test_one_example_has_no_standard_error() -> None:
    assert mean_score([1.0]).standard_error is None


def test_paired_interval_by_hand() -> None:
    """Differences 1, 0, 1, 0: mean 1/2, sd sqrt(1/3), t(3) at 97.5% is 3.182446305 (any table)."""
    estimate = paired([1.0, 0.0, 1.0, 0.0])
    half = 3.182446305284263 * math.sqrt(1 / 3) / 2
    assert (estimate.low, estimate.high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert not estimate.excludes_zero


def test_paired_marks_a_clear_difference_both_ways() -> None:
    assert paired([1.0] * 20 + [0.0]).excludes_zero
    assert paired([-1.0] * 20 + [0.0]).excludes_zero


@pytest.mark.parametrize("equal", [[0.0] * 5, [1.0] * 5, [0.1] * 3, [1.0]])
def test_equal_differences_have_no_interval(equal: list[float]) -> None:
    """Their spread is unknown, not zero: claiming certainty from three equal numbers would be wrong."""
    estimate = paired(equal)
    assert (estimate.low, estimate.high, estimate.excludes_zero) == (None, None, False)
    assert estimate.mean == pytest.approx(equal[0])


def test_paired_covers_the_truth_about_95_times_in_100() -> None:
    rng = random.Random(1)
    covered = 0
    for _ in range(2000):
        differences = [rng.choice((-1.0, 0.0, 0.0, 1.0, 1.0)) for _ in range(60)]  # true mean 0.2
        estimate = paired(differences)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.2 <= estimate.high
    assert 0.935 <= covered / 2000 <= 0.965


def test_wilson_covers_fractional_scores_at_least_as_often() -> None:
    rng = random.Random(2)
    covered = 0
    for _ in range(1000):
        low, high = wilson(statistics.fmean(rng.random() ** 2 for _ in range(40)), 40)  # true mean 1/3
        covered += low <= 1 / 3 <= high
    assert covered / 1000 >= 0.95


def test_mean_over_tasks_by_hand() -> None:
    """Two tasks, SE 0.1 and 0.2: SE = sqrt(0.05) / 2, df = 0.05^2 / (0.1^4 / 9 + 0.2^4 / 19) = 26.19."""
    over = over_tasks([Estimate(0.1, None, None, 0.1, 10), Estimate(0.3, None, None, 0.2, 20)])
    freedom = 0.05**2 / (0.1**4 / 9 + 0.2**4 / 19)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(0.05) / 2
    assert (over.mean, over.n) == (pytest.approx(0.2), 30)
    assert (over.low, over.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))


def test_mean_over_tasks_of_one_equals_that_of_its_examples() -> None:
    one = paired([1.0, 0.0, 0.0, 1.0])
    over = over_tasks([one])
    assert (over.low, over.high) == (pytest.approx(one.low), pytest.approx(one.high))


@pytest.mark.parametrize("errors", [(0.0, 0.0), (None, 0.1)])
def test_mean_over_tasks_without_a_spread_has_no_interval(errors: tuple[float | None, ...]) -> None:
    over = over_tasks([Estimate(0.1, None, None, error, 10) for error in errors])
    assert (over.mean, over.low, over.high) == (pytest.approx(0.1), None, None)
