"""Intervals against published numbers, closed forms and brute force."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import slow_statistics as slow
from scipy import stats

from cotune.compare.stats import (
    bootstrap_t,
    cohens_dz,
    cohens_g,
    compare_mean,
    compare_paired,
    detectable_mcnemar,
    detectable_t,
    holm,
    mcnemar,
    mean_score,
    sign_flip,
    tango,
    wilson,
)

unit = st.floats(0, 1, allow_nan=False)


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


# ---- paired, 0 and 1 ----


def test_mcnemar_and_tango_of_a_published_example() -> None:
    """Fagerland, Lydersen & Laake 2013, table 1 (Bentur 2009): 7 against 1 of 21 children; p 0.070 and 0.039."""
    exact, mid = mcnemar(1, 7)
    assert (exact, mid) == (pytest.approx(0.0703125), pytest.approx(0.0390625))  # 18 / 256 and 10 / 256
    assert tango(1, 7, 21) == (pytest.approx(-0.517, abs=5e-4), pytest.approx(-0.026, abs=5e-4))  # Fagerland 2014


@given(st.integers(0, 200), st.integers(0, 200))
def test_exact_mcnemar_is_scipys_binomial_test_and_mid_p_is_half_a_step_below(wins: int, losses: int) -> None:
    exact, mid = mcnemar(wins, losses)
    if wins + losses == 0:
        assert (exact, mid) == (1.0, 1.0)
        return
    assert exact == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    least = stats.binom.pmf(min(wins, losses), wins + losses, 0.5)
    assert mid == pytest.approx(1.0 if wins == losses else exact - least)
    assert mcnemar(losses, wins) == (exact, mid)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data())
def test_tangos_ends_solve_its_equation_and_mirror(n: int, data: st.DataObject) -> None:
    wins = data.draw(st.integers(0, n))
    losses = data.draw(st.integers(0, n - wins))
    low, high = tango(wins, losses, n)
    assert -1 <= low <= (wins - losses) / n <= high <= 1
    for end in (low, high):
        if -1 < end < 1:
            assert abs(slow.tango_statistic(wins, losses, n, end)) == pytest.approx(1.959963984540054, abs=1e-3)
    assert tango(losses, wins, n) == (pytest.approx(-high), pytest.approx(-low))


def test_tango_at_zero_is_mcnemars_asymptotic_test() -> None:
    """(wins - losses)^2 / (wins + losses) = z^2: 25 and 10 is just beyond, 24 and 11 just within."""
    assert tango(25, 10, 100)[0] > 0
    assert tango(24, 11, 100)[0] > 0 > tango(23, 12, 100)[0]


def test_a_pair_without_any_difference_has_an_interval_and_says_what_it_could_have_seen() -> None:
    found = compare_paired([1.0, 0.0] * 10, [1.0, 0.0] * 10)
    z2 = 1.959963984540054**2
    assert (found.estimate.mean, found.p, found.p_exact, found.effect) == (0.0, 1.0, 1.0, None)
    assert found.estimate.high == pytest.approx(z2 / (20 + z2))  # as Wilson's of 0 in 20
    assert found.detectable is not None
    assert 20 * found.detectable == pytest.approx((1.959964 + 0.841621 * math.sqrt(1 - found.detectable)) ** 2)


@pytest.mark.parametrize(("ours", "theirs"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)])
def test_all_right_or_all_wrong_columns_have_numbers_within_bounds(ours: float, theirs: float) -> None:
    found = compare_paired([ours] * 20, [theirs] * 20)
    e = found.estimate
    assert e.mean == ours - theirs
    assert e.low is not None
    assert e.high is not None
    assert -1 <= e.low <= e.mean <= e.high <= 1
    assert found.effect == {1.0: 0.5, -1.0: -0.5}.get(ours - theirs)
    assert found.p == (pytest.approx(2**-20) if ours != theirs else 1.0)  # mid-p of 20 : 0 is half of 2 / 2^20


def test_effect_sizes_by_hand() -> None:
    assert cohens_g(15, 5) == 0.25
    assert cohens_g(0, 0) is None
    assert cohens_dz(np.array([1.0, 0.0, 1.0, 0.0])) == pytest.approx(0.5 / math.sqrt(1 / 3))
    assert cohens_dz(np.array([0.5, 0.5])) is None


def test_detectable_difference_solves_connors_equation() -> None:
    for n, share in ((100, 0.2), (1319, 0.1), (500, 0.5)):
        d = detectable_mcnemar(share, n)
        needed = (1.959963984540054 * math.sqrt(share) + 0.8416212335729143 * math.sqrt(share - d * d)) ** 2 / d**2
        assert needed == pytest.approx(n)


def test_a_design_that_can_see_nothing_says_one() -> None:
    assert detectable_mcnemar(0.5, 1) == 1.0
    assert compare_paired([1.0], [0.0]).detectable == 1.0


def test_detectable_mean_is_near_the_sum_of_two_quantiles() -> None:
    assert detectable_t(1.0, 1e6) == pytest.approx(1.959964 + 0.841621, abs=1e-4)
    tail = stats.nct.sf(stats.t.ppf(0.975, 4), 4, detectable_t(1.0, 4))
    assert tail == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 0.0]), ([], [])])
def test_unequal_or_no_examples_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match=f"same examples on both sides, not {len(ours)} and {len(theirs)}"):
        compare_paired(ours, theirs)


# ---- paired, fractions ----


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-16, 16).map(lambda k: k / 16), min_size=1, max_size=9))
def test_sign_flip_counts_all_patterns(differences: list[float]) -> None:
    assert sign_flip(np.array(differences)) == pytest.approx(slow.sign_flip(differences))


def test_random_sign_flips_agree_with_scipys() -> None:
    rng = np.random.default_rng(1)
    differences = rng.normal(0.15, 0.5, 60).clip(-1, 1)
    theirs = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=9999, rng=rng)
    assert sign_flip(differences) == pytest.approx(theirs.pvalue, abs=0.01)


def test_sign_flip_is_never_zero() -> None:
    assert sign_flip(np.full(500, 0.5)) == 1 / 10_000
    assert sign_flip(np.zeros(500)) == 1.0


def test_studentized_bootstrap_equals_a_loop_over_its_own_definition() -> None:
    """Other random numbers, so the ends agree up to the bootstrap's own noise."""
    rng = np.random.default_rng(2)
    values = rng.beta(0.5, 0.3, 80)
    error = values.std(ddof=1) / math.sqrt(80)
    ts = []
    for _ in range(4000):
        again = rng.choice(values, 80)
        ts.append((again.mean() - values.mean()) / (again.std(ddof=1) / math.sqrt(80)))
    low, high = np.quantile(ts, (0.025, 0.975))
    ends = bootstrap_t(values)
    assert ends is not None
    assert ends[0] == pytest.approx(values.mean() - high * error, abs=0.006)
    assert ends[1] == pytest.approx(values.mean() - low * error, abs=0.006)


@pytest.mark.parametrize("equal", [[0.5] * 5, [0.1] * 3, [0.25]])
def test_equal_differences_have_no_interval(equal: list[float]) -> None:
    """Their spread is unknown, not zero: claiming certainty from three equal numbers would be wrong."""
    found = compare_mean(equal, 1.0)
    assert (found.estimate.low, found.estimate.high, found.detectable) == (None, None, None)
    assert found.estimate.mean == pytest.approx(equal[0])
    assert found.p == pytest.approx(2.0 ** (1 - len(equal)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(unit, unit), min_size=2, max_size=30))
def test_a_comparison_mirrors_and_stays_in_range(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    one, other = compare_paired(ours, theirs), compare_paired(theirs, ours)
    assert one.p == other.p
    assert one.p is not None
    assert 0 < one.p <= 1
    assert one.estimate.mean == -other.estimate.mean
    if one.estimate.low is not None and one.estimate.high is not None:
        assert -1 <= one.estimate.low <= one.estimate.high <= 1
        assert other.estimate.low == pytest.approx(-one.estimate.high, abs=1e-6)


@given(st.lists(unit, min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_score_always_has_an_interval_in_range(scores: list[float]) -> None:
    e = mean_score(scores)
    assert e.low is not None
    assert e.high is not None
    assert 0 <= e.low <= e.high <= 1


# ---- several tests ----


def test_holm_by_hand() -> None:
    """Smallest times 4, next times 3, ..., never below the one before: R's p.adjust gives the same."""
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(unit, min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_alone_and_bonferroni(ps: list[float]) -> None:
    corrected = holm(ps)
    for p, after in zip(ps, corrected, strict=True):
        assert after is not None
        assert p <= after <= min(1.0, p * len(ps)) + 1e-15
    assert sorted(range(len(ps)), key=lambda i: (ps[i], i)) == sorted(
        range(len(ps)), key=lambda i: (corrected[i], ps[i], i)
    )


# ---- the same bytes ----


def test_resampling_does_not_depend_on_how_many_threads_add() -> None:
    code = (
        "import numpy as np; from cotune.compare.stats import compare_paired as c, mean_score as m\n"
        "x = np.random.default_rng(1).random((2, 700)); print(c(x[0], x[1]), m(x[0]))"
    )
    out = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_env(threads)
        ).stdout
        for threads in ("1", "4")
    }
    assert len(out) == 1


def _env(threads: str) -> dict[str, str]:
    return os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
