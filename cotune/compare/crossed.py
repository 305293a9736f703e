"""Scores of several seeds on the same examples: means and differences whose intervals cover other seeds too.

Every seed's run answers the same examples, so the design is crossed: a score varies with the example, with the seed,
and with both at once. Each part is estimated on its own and enters the interval with its own degrees of freedom.
Knows matrices [seeds, examples] and nothing of runs or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, stdtrit

from cotune.compare.stats import (
    ALPHA,
    CONFIDENCE,
    POWER,
    RESAMPLES,
    SEED,
    Estimate,
    Finding,
    Floats,
    cohens_dz,
    compare_mean,
    compare_paired,
    detectable_t,
    mean_of,
    mean_score,
    resampled,
    score_interval,
    standard_error,
    two_sided,
    wilson,
)

LEAST_SEEDS = 3  # with two, their spread has one degree of freedom: an interval about six times as wide as with many
_LEAST_P = 1e-100  # smaller ones are taken for it: for few degrees of freedom t is not computed well there


@dataclass(frozen=True, eq=False)
class Arm:
    """Scores [seeds, examples] of one strategy. `tunes_nothing`: another seed could not score otherwise."""

    scores: Floats
    tunes_nothing: bool = False

    @property
    def seeds(self) -> int:
        return len(self.scores)

    @property
    def constant(self) -> bool:
        """Whether there is no seed spread to cover: it tunes nothing, or several seeds scored every example alike."""
        if self.seeds == 1:
            return self.tunes_nothing
        return bool((self.scores == self.scores[0]).all())

    @property
    def per_example(self) -> Floats:
        """Each example's mean over the seeds; a constant arm's own scores, without rounding."""
        first: Floats = self.scores[0]
        means: Floats = self.scores.mean(axis=0)
        return first if self.constant or self.seeds == 1 else means

    @property
    def spread(self) -> bool:
        """Whether the seeds' spread can be estimated."""
        return self.seeds >= LEAST_SEEDS and not self.constant

    @property
    def blind(self) -> bool:
        """Whether other seeds may score otherwise and there are too few here to tell how much."""
        return not self.constant and not self.spread


@dataclass(frozen=True)
class Variance:
    """Of a mean over examples and seeds, in parts that are independent estimates.

    `items`, with `items_freedom`: of each example's mean over the seeds, divided by the number of examples. It holds
    what differs between examples and what differs by example and seed at once. `between` with `seeds_freedom`: of the
    seeds' means, divided by their number. It holds the seeds' spread, and again what differs by both at once; `within`
    is the estimate of just that, so between - within is what the seeds add (two-way analysis of variance without
    replication, Searle, Casella & McCulloch 1992, chapter 4).
    """

    items: float
    items_freedom: float
    between: float = 0.0
    within: float = 0.0
    seeds_freedom: float = math.inf

    @property
    def seeds(self) -> float:
        return max(0.0, self.between - self.within)

    @property
    def total(self) -> float:
        return self.items + self.seeds

    def half(self, confidence: float = CONFIDENCE) -> float:
        """Half the interval's width: sqrt(t_items^2 items + t_seeds^2 seeds), t at each part's degrees of freedom.

        Banerjee (1960, Sankhya 22:357-358): at least the nominal coverage for independent parts with normal errors.
        With three to five seeds `hierarchical_bootstrap` covers less (tests/compare/test_calibration.py).
        """
        return self._half((1 - confidence) / 2)

    def _half(self, tail: float) -> float:
        return math.sqrt(math.fsum(float(stdtrit(f, tail)) ** 2 * v for v, f in self._parts))

    @property
    def _parts(self) -> list[tuple[float, float]]:
        return [(v, f) for v, f in ((self.items, self.items_freedom), (self.seeds, self.seeds_freedom)) if v > 0]

    def p(self, mean: float) -> float | None:
        """Two-sided p of a true mean of 0: 1 - the confidence whose interval just ends at 0. None without variance."""
        parts = self._parts
        if not parts:
            return None
        if mean == 0:
            return 1.0
        if len(parts) == 1:
            return two_sided(mean / math.sqrt(parts[0][0]), parts[0][1])
        # With t at the degrees of freedom of one part for both, p is too small or too large: it lies between.
        ends = sorted(two_sided(mean / math.sqrt(self.total), f) for _, f in parts)
        if ends[1] < _LEAST_P or ends[1] - ends[0] < 1e-9 * ends[1]:
            return ends[1]
        low, high = (math.log(max(end, _LEAST_P) / 2) for end in ends)
        if ends[0] < _LEAST_P and self._half(math.exp(low)) < abs(mean):
            return _LEAST_P

        def excess(log_tail: float) -> float:
            return self._half(math.exp(log_tail)) - abs(mean)

        return 2 * math.exp(brentq(excess, low - 1e-9, high + 1e-9, xtol=1e-13))

    @property
    def detectable(self) -> float | None:
        """Smallest true mean whose `p` is below 5% in 80% of studies like this one; None without variance.

        A study's mean is normal around the true one with variance `total`; its `between` is, apart from it, chi-squared
        around its own; the power is averaged over 200 quantiles of that. Without seeds: `stats.detectable_t`.
        """
        if not self.total:
            return None
        if not self.between:
            return detectable_t(math.sqrt(self.items), self.items_freedom)
        f, error = self.seeds_freedom, math.sqrt(self.total)
        between = max(self.between, self.within) * chdtri(f, (np.arange(200) + 0.5) / 200) / f
        seeds = np.maximum(0.0, between - self.within)
        items_t, seeds_t = (float(stdtrit(freedom, ALPHA / 2)) for freedom in (self.items_freedom, f))
        half = np.sqrt(items_t**2 * self.items + seeds_t**2 * seeds)

        def lacks(d: float) -> float:
            return float(np.mean(ndtr((d - half) / error) + ndtr((-d - half) / error))) - POWER

        return float(brentq(lacks, 0.0, float(half.max()) + 10 * error))


def variance(first: Arm, second: Arm | None = None) -> Variance:
    """Of the mean of `first`, or of `first` - `second`, whose examples are the same and whose seeds are independent.

    Seeds enter for an arm with three or more that differ. Degrees of freedom of the seeds of two arms together:
    Welch (1947). One example has no variance that could be known: all zero, with no degrees of freedom.
    """
    arms = [first] if second is None else [first, second]
    differences = first.per_example - second.per_example if second else first.per_example
    n = len(differences)
    if n < 2:
        return Variance(0.0, 0)
    between = within = squares = 0.0
    for arm in arms:
        if not arm.spread:
            continue
        s, runs = arm.seeds, arm.scores.mean(axis=1)
        mine = float(np.var(runs, ddof=1)) / s
        left = arm.scores - arm.per_example - runs[:, None] + runs.mean()
        between += mine
        within += float((left**2).sum()) / ((s - 1) * (n - 1)) / (s * n)
        squares += mine**2 / (s - 1)
    freedom = between**2 / squares if squares else math.inf
    return Variance((standard_error(differences) or 0.0) ** 2, n - 1, between, within, freedom)


def mean_variance(parts: Sequence[Variance]) -> Variance:
    """Of the mean of independent means (tasks with examples and runs of their own), each counting alike.

    Degrees of freedom of each kind of part: Welch (1947) and Satterthwaite (1946), (sum v)^2 / sum(v^2 / f). All zero
    (unknown) when one of the parts is.
    """
    if any(v.items_freedom < 1 for v in parts):
        return Variance(0.0, 0)
    t2 = len(parts) ** 2

    def pooled(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
        total, squares = math.fsum(v for v, _ in values), math.fsum(v * v / f for v, f in values if v)
        return total / t2, total**2 / squares if squares else math.inf

    items, items_freedom = pooled([(v.items, v.items_freedom) for v in parts])
    between, seeds_freedom = pooled([(v.between, v.seeds_freedom) for v in parts])
    return Variance(items, items_freedom, between, math.fsum(v.within for v in parts) / t2, seeds_freedom)


def hierarchical_bootstrap(first: Arm, second: Arm | None = None) -> tuple[float, float] | None:
    """2.5% and 97.5% percentiles of the mean of `first`, or of `first` - `second`, with seeds and examples drawn again.

    Examples are drawn for both arms alike, seeds for each apart: the design is crossed, so each draw is of rows and of
    columns (Owen 2007, Annals of Applied Statistics 1:386-411). It takes the few seeds for all there are, so that its
    coverage is too low where they matter (below 88% with three, tests/compare/test_calibration.py), and draws what
    differs by example and seed at once twice, so that it is a little wide where they do not. It stands beside the
    intervals of `Variance` and decides nothing. None when no arm has seeds whose spread can be estimated.
    """
    arms = [first] if second is None else [first, second]
    if not any(arm.spread for arm in arms):
        return None
    n = first.scores.shape[1]
    drawn = np.zeros(RESAMPLES)
    for place, arm in enumerate(arms):
        sums = resampled(n) @ np.rint(arm.scores.T * 2.0**20)  # whole numbers: exact in whatever order they are added
        random = np.random.Generator(np.random.PCG64([SEED, place, arm.seeds]))
        picked = random.integers(0, arm.seeds, (RESAMPLES, arm.seeds))
        means = np.take_along_axis(sums, picked, axis=1).sum(axis=1) / (arm.seeds * n * 2.0**20)
        drawn += -means if place else means
    drawn.sort()
    tail = round((1 - CONFIDENCE) / 2 * (RESAMPLES + 1)) - 1
    return float(drawn[tail]), float(drawn[-1 - tail])


def estimate_score(arm: Arm) -> Estimate:
    """Mean score. One seed, or several that agree on every example: `stats.mean_score`.

    Else Wilson's interval with the effective sample size mean (1 - mean) / variance, the seeds in it from three on.
    """
    values = arm.per_example
    n = len(values)
    if arm.seeds == 1 or arm.constant or n < 2:
        return mean_score(values)
    mean, found = mean_of(values), variance(arm)
    room = mean * (1 - mean)
    low, high = score_interval(mean, found.half() ** 2 / room) if found.total and room > 0 else wilson(mean, n)
    return Estimate(mean, low, high, math.sqrt(found.total), n, hierarchical_bootstrap(arm))


def difference(ours: Arm, theirs: Arm) -> Finding:
    """`ours` - `theirs`, paired by example.

    No arm whose seeds' spread can be estimated: the examples alone, `stats.compare_paired` on each example's mean. Else
    Student's t over examples and seeds, by `Variance`; the effect is d_z of each example's means.
    Raises ValueError when the two do not have the same number of examples, or none.
    """
    a, b = ours.per_example, theirs.per_example
    if not (ours.spread or theirs.spread) or len(a) != len(b) or len(a) < 2:
        return compare_paired(a, b)
    return _over_seeds(a - b, variance(ours, theirs), 1.0, hierarchical_bootstrap(ours, theirs))


def effect(arm: Arm, order: int) -> Finding:
    """Mean effect of `order` levers (factorial.py), of which `arm` holds each seed's and example's.

    That of one lever lies between -1 and 1; each further lever takes the difference of two such effects.
    """
    values, bound = arm.per_example, 2.0 ** (order - 1)
    if not arm.spread or len(values) < 2:
        return compare_mean(values, bound)
    return _over_seeds(values, variance(arm), bound, hierarchical_bootstrap(arm))


def _over_seeds(values: Floats, found: Variance, bound: float, bootstrap: tuple[float, float] | None) -> Finding:
    mean, n = mean_of(values), len(values)
    test = of_variance(mean, found, n)
    low, high = test.estimate.low, test.estimate.high
    clipped = None if low is None else max(-bound, low), None if high is None else min(bound, high)
    return replace(
        test,
        estimate=Estimate(mean, *clipped, test.estimate.standard_error, n, bootstrap),
        effect=cohens_dz(values),
        effect_name="d_z",
    )


def of_variance(mean: float, found: Variance | None, n: int) -> Finding:
    """Mean ± `Variance.half`, its test and what it could have seen; without an interval when there is no variance."""
    if found is None or not found.total:
        return Finding(Estimate(mean, None, None, None if found is None else 0.0, n), "t", None, None, None, None, "")
    half = found.half()
    error = math.sqrt(found.total)
    return Finding(
        Estimate(mean, mean - half, mean + half, error, n), "t", found.p(mean), None, found.detectable, None, ""
    )


def ratio_variance(ours: Arm, theirs: Arm) -> Variance | None:
    """Of mean(ours) / mean(theirs), by the delta method; None when `theirs` has a mean of 0 or there is one example.

    To first order the ratio r varies like mean(ours - r theirs) / mean(theirs), a paired difference like any other.
    """
    base = mean_of(theirs.per_example)
    if not base or len(theirs.per_example) < 2:
        return None
    ratio = mean_of(ours.per_example) / base
    scaled = replace(theirs, scores=theirs.scores * (ratio / base))
    return variance(replace(ours, scores=ours.scores / base), scaled)
