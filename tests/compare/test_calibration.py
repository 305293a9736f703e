"""Do the intervals cover, do the tests reject as often as they say, does the design see what it says it could?

Simulated studies with fixed seeds. With 1,000 of them a share of 5% or 95% has a standard error of 0.7 points. The
bands are the promise itself: a true "no difference" is rejected in 3.5-6.5%, coverage 93-97%, power within 5 points.
McNemar's test has few outcomes, so its shares are summed over all of them, without simulation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import astuple
from statistics import fmean

import numpy as np
import pytest
from reference.simulated_scores import answers, fractions, level
from scipy.special import ndtr
from scipy.stats import binom, multinomial

from cotune.compare.crossed import (
    Arm,
    Variance,
    difference,
    effect,
    estimate_score,
    mean_variance,
    of_variance,
    ratio_variance,
    variance,
)
from cotune.compare.factorial import LEVERS, attribution, cells
from cotune.compare.stats import (
    Estimate,
    Finding,
    compare_paired,
    detectable_mcnemar,
    detectable_t,
    holm,
    mcnemar,
    mean_score,
    tango,
    wilson,
)

SIMS = 1000


def covers(e: Estimate, truth: float) -> bool:
    assert e.low is not None
    assert e.high is not None
    return e.low <= truth <= e.high


def share(draw: Callable[[], bool], sims: int = SIMS) -> float:
    return sum(draw() for _ in range(sims)) / sims


def below(tested: Finding) -> bool:
    assert tested.p is not None
    return tested.p < 0.05


# ---- one seed, 0 and 1 ----


@pytest.mark.parametrize("mean", [0.3, 0.7])
def test_a_strategy_against_itself_is_marked_in_5_percent(mean: float) -> None:
    rng = np.random.default_rng(1)
    pairs = zip(*answers(rng, 2 * SIMS, (1, 1), 200, 0.0, (mean, mean)), strict=True)
    assert 0.035 <= np.mean([below(compare_paired(a[0], b[0])) for a, b in pairs]) <= 0.065


def rejects(n: int, discordant: float, which: int) -> float:
    """Exact chance that McNemar's exact (0) or mid-p (1) test rejects when wins and losses are equally likely."""
    total = 0.0
    for m in range(n + 1):
        if (weight := binom.pmf(m, n, discordant)) > 1e-9:
            total += weight * sum(
                2 * binom.pmf(x, m, 0.5) for x in range((m + 1) // 2) if mcnemar(x, m - x)[which] < 0.05
            )
    return float(total)


@pytest.mark.parametrize(("n", "discordant"), [(50, 0.3), (100, 0.1), (200, 0.05), (200, 0.3)])
def test_mid_p_rejects_as_often_as_it_says(n: int, discordant: float) -> None:
    assert 0.035 <= rejects(n, discordant, 1) <= 0.05


def test_twenty_rows_err_on_the_side_of_no_difference() -> None:
    assert 0.03 <= rejects(20, 0.3, 1) < 0.035
    d = detectable_mcnemar(0.3, 20)  # above 0.3: all that differ are on one side
    assert 0.85 <= float(binom.sf(4, 20, d)) <= 0.95  # five wins without a loss are the fewest with p below 0.05


def test_exact_mcnemar_rejects_too_rarely_which_is_why_mid_p_decides() -> None:
    assert rejects(200, 0.1, 0) < 0.03


@pytest.mark.parametrize("wins", [0.5, 0.8])
@pytest.mark.parametrize(("n", "discordant"), [(50, 0.3), (100, 0.1), (200, 0.1), (200, 0.3)])
def test_tangos_interval_covers(n: int, discordant: float, wins: float) -> None:
    """Its exact coverage, summed over all outcomes that are not next to impossible."""
    truth, covered = discordant * (2 * wins - 1), 0.0
    outcomes = np.array([(b, c, n - b - c) for b in range(n + 1) for c in range(n + 1 - b)])
    weights = multinomial.pmf(outcomes, n, [discordant * wins, discordant * (1 - wins), 1 - discordant])
    for (b, c, _), weight in zip(outcomes[weights > 1e-5], weights[weights > 1e-5], strict=True):
        low, high = tango(int(b), int(c), n)
        covered += weight * (low <= truth <= high)
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(("n", "mean"), [(100, 0.3), (200, 0.7), (500, 0.9), (1319, 0.5)])
def test_wilson_covers(n: int, mean: float) -> None:
    ends = [wilson(hits / n, n) for hits in np.random.default_rng(2).binomial(n, mean, SIMS)]
    assert 0.93 <= np.mean([low <= mean <= high for low, high in ends]) <= 0.97


@pytest.mark.parametrize(("n", "discordant"), [(50, 0.3), (100, 0.2), (200, 0.1), (200, 0.3), (1319, 0.1)])
def test_mcnemar_sees_the_detectable_difference_in_80_percent(n: int, discordant: float) -> None:
    d = detectable_mcnemar(discordant, n)
    wins = (discordant + d) / 2
    counts = np.random.default_rng(3).multinomial(n, [wins, discordant - wins, 1 - discordant], SIMS)
    assert 0.75 <= np.mean([mcnemar(int(b), int(c))[1] < 0.05 for b, c, _ in counts]) <= 0.85


# ---- one seed, fractions ----


@functools.cache
def true_means(shift: float) -> tuple[float, float]:
    ours, theirs = fractions(np.random.default_rng(4), 1_000_000, shift)
    return float(ours.mean()), float(theirs.mean())


def test_fractions_reject_cover_and_have_power() -> None:
    rng = np.random.default_rng(5)
    assert 0.035 <= share(lambda: below(compare_paired(*fractions(rng, 60, 0.0)))) <= 0.065
    ours, theirs = true_means(0.2)
    assert 0.93 <= share(lambda: covers(compare_paired(*fractions(rng, 60, 0.2)).estimate, ours - theirs)) <= 0.97
    assert 0.93 <= share(lambda: covers(mean_score(fractions(rng, 60, 0.2)[0]), ours)) <= 0.97
    # The n at which 0.2 is what could be seen: its standard error is then that fraction of the difference.
    a, b = fractions(np.random.default_rng(4), 1_000_000, 0.2)
    n = next(n for n in range(10, 10_000) if detectable_t(float((a - b).std()) / n**0.5, n - 1) <= ours - theirs)
    assert 0.75 <= share(lambda: below(compare_paired(*fractions(rng, n, 0.2))), 600) <= 0.85


# ---- several seeds ----

# Seeds of each side (0: a greedy zero-shot), examples, tau. Seeds' standard deviation: about 20 tau points.
DESIGNS = [
    ((3, 3), 500, 0.1),
    ((3, 3), 200, 0.2),
    ((4, 4), 200, 0.1),
    ((5, 5), 200, 0.05),
    ((5, 3), 200, 0.1),
    ((3, 0), 200, 0.1),
    ((5, 0), 200, 0.2),
]


def compared(
    rng: np.random.Generator, seeds: tuple[int, int], n: int, tau: float, means: tuple[float, float]
) -> list[Finding]:
    drawn = zip(*answers(rng, SIMS, seeds, n, tau, means), strict=True)
    return [difference(Arm(a), Arm(b, tunes_nothing=len(b) == 1)) for a, b in drawn]


@pytest.mark.parametrize(("seeds", "n", "tau"), DESIGNS)
def test_several_seeds_reject_and_cover(seeds: tuple[int, int], n: int, tau: float) -> None:
    rng = np.random.default_rng(6)
    for means in ((0.6, 0.6), (0.68, 0.6)):
        tested = compared(rng, seeds, n, tau, means)
        assert 0.93 <= np.mean([covers(t.estimate, means[0] - means[1]) for t in tested]) <= 0.97
        if means[0] == means[1]:
            assert 0.035 <= np.mean([below(t) for t in tested]) <= 0.065


@pytest.mark.parametrize("seeds", [3, 5])
def test_without_any_seed_spread_the_interval_is_only_a_little_too_wide(seeds: int) -> None:
    rng = np.random.default_rng(7)
    tested = compared(rng, (seeds, seeds), 200, 0.0, (0.6, 0.6))
    assert 0.94 <= np.mean([covers(t.estimate, 0.0) for t in tested]) <= 0.98


def test_the_hierarchical_bootstrap_of_three_seeds_does_not_cover() -> None:
    """It takes three seeds' spread for that of all seeds: far too little where seeds matter."""
    rng = np.random.default_rng(8)
    hits = ours = 0
    for a, b in zip(*answers(rng, 200, (3, 3), 100, 0.6, (0.6, 0.6)), strict=True):
        estimate = difference(Arm(a), Arm(b)).estimate
        low, high = estimate.bootstrap
        hits += low <= 0 <= high
        ours += covers(estimate, 0.0)
    assert hits / 200 < 0.88
    assert 0.91 <= ours / 200 <= 0.99  # 200 simulations: a standard error of 1.5 points


def test_score_of_several_seeds_covers() -> None:
    rng = np.random.default_rng(9)
    for seeds, n, tau, mean in ((3, 200, 0.1, 0.6), (5, 200, 0.2, 0.9), (3, 500, 0.05, 0.8)):
        runs, _ = answers(rng, SIMS, (seeds, 0), n, tau, (mean, 0.5))
        assert 0.93 <= np.mean([covers(estimate_score(Arm(a)), mean) for a in runs]) <= 0.97


def test_interaction_of_several_seeds_covers_and_rejects() -> None:
    rng = np.random.default_rng(10)
    neither, prompt = answers(rng, SIMS, (0, 3), 200, 0.1, (0.3, 0.5))
    weights, both = answers(rng, SIMS, (3, 3), 200, 0.1, (0.6, 0.8))
    tested = [effect(Arm(each), 2) for each in (both - prompt) - (weights - neither)]
    assert 0.93 <= np.mean([covers(t.estimate, 0.0) for t in tested]) <= 0.97
    assert 0.035 <= np.mean([below(t) for t in tested]) <= 0.065


def test_effects_of_three_levers_cover_and_reject() -> None:
    """Each lever adds to the mean whatever the others are: true main effects, and no interaction to be found."""
    rng, added = np.random.default_rng(15), {"prompt": 0.2, "weights": 0.1, "plan": 0.15}
    drawn = {}
    for without in cells(LEVERS[:2]):  # pairs of cells that differ in the plan share their examples' ease
        mean = 0.3 + sum(added[lever] for lever in without)
        means = (mean, mean + added["plan"])
        drawn[without], drawn[without | {"plan"}] = answers(rng, SIMS // 4, (3, 3), 200, 0.1, means)
    effects = [attribution({cell: runs[i] for cell, runs in drawn.items()}) for i in range(SIMS // 4)]
    covered = {of: np.mean([covers(e[of].estimate, added[of[0]] if len(of) == 1 else 0.0) for e in effects])
               for of in effects[0]}  # fmt: skip
    rejected = [below(e[of]) for e in effects for of in e if len(of) > 1]
    assert all(0.91 <= each <= 0.99 for each in covered.values())  # 250 simulations: a standard error of 1.4
    assert 0.93 <= np.mean(list(covered.values())) <= 0.97
    assert 0.035 <= np.mean(rejected) <= 0.065


def test_several_seeds_see_the_detectable_difference_in_80_percent() -> None:
    rng = np.random.default_rng(11)
    for seeds, n, tau in (((3, 3), 200, 0.1), ((3, 0), 200, 0.1)):
        found = [
            variance(Arm(a), Arm(b, tunes_nothing=len(b) == 1))
            for a, b in zip(*answers(rng, SIMS, seeds, n, tau, (0.7, 0.6)), strict=True)
        ]
        # The median, because runs whose means are equal have an infinite number of degrees of freedom.
        items, freedom, between, within, seeds_freedom = zip(*map(astuple, found), strict=True)
        median = float(np.median(seeds_freedom))
        mean = Variance(fmean(items), freedom[0], fmean(between), fmean(within), median)
        assert mean.detectable is not None
        means = (0.6 + mean.detectable, 0.6)
        assert 0.75 <= np.mean([below(t) for t in compared(rng, seeds, n, tau, means)]) <= 0.85


# ---- over tasks, over comparisons ----


def test_mean_over_tasks_and_relative_gain_cover() -> None:
    rng = np.random.default_rng(12)
    means = [(0.5, 0.45), (0.7, 0.6), (0.3, 0.25), (0.9, 0.85)]
    tasks = [answers(rng, SIMS, (3, 3), 200, 0.1, pair) for pair in means]
    truth, gain = np.mean([a - b for a, b in means]), np.mean([a / b - 1 for a, b in means])
    plain = relative = 0
    for i in range(SIMS):
        arms = [(Arm(ours[i]), Arm(theirs[i])) for ours, theirs in tasks]
        observed = [(a.per_example.mean(), b.per_example.mean()) for a, b in arms]
        own = of_variance(np.mean([a - b for a, b in observed]), mean_variance([variance(a, b) for a, b in arms]), 800)
        ratios = mean_variance([r for a, b in arms if (r := ratio_variance(a, b))])
        plain += covers(own.estimate, float(truth))
        relative += covers(of_variance(np.mean([a / b - 1 for a, b in observed]), ratios, 800).estimate, float(gain))
    assert 0.93 <= plain / SIMS <= 0.97
    assert 0.93 <= relative / SIMS <= 0.97


def test_holm_keeps_the_chance_of_any_false_star() -> None:
    """Four strategies, none better than the baseline: uncorrected, some star would be there far more often."""
    rng = np.random.default_rng(13)
    raw = corrected = 0
    for _ in range(SIMS):
        shared = rng.normal(size=200)
        scores = [(shared + rng.normal(size=200) > 0).astype(float) for _ in range(5)]
        ps = [compare_paired(other, scores[0]).p for other in scores[1:]]
        raw += min(p for p in ps if p is not None) < 0.05
        corrected += min(p for p in holm(ps) if p is not None) < 0.05
    assert raw / SIMS > 0.1
    assert corrected / SIMS <= 0.065


def test_the_simulated_world_has_the_means_it_says() -> None:
    ours, theirs = answers(np.random.default_rng(14), 2000, (3, 0), 200, 0.3, (0.7, 0.4))
    assert ours.mean() == pytest.approx(0.7, abs=0.005)
    assert theirs.mean() == pytest.approx(0.4, abs=0.005)
    assert float(ndtr(level(0.7, 0.3) / (1 + 1.5**2 + 0.5**2 + 0.3**2) ** 0.5)) == pytest.approx(0.7)
