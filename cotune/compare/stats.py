"""Intervals, tests, effect sizes and power for scores in [0, 1] of one sample of examples. Pure arithmetic on numbers.

Everything here is about the examples: what the numbers could have been with other examples of the same kind, for the
prompts and weights as they were tuned. What other seeds could have tuned: crossed.py. Knows nothing of runs or files.

Random numbers come from a fixed seed, and what is summed by a matrix product is whole numbers below 2^53, so the
result does not depend on the order in which a machine adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import bdtr, nctdtrinc, ndtri, stdtr, stdtrit

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
RESAMPLES = 1999  # of the bootstrap: the 2.5% quantiles are its 50th smallest and largest values
FLIPS = 9999  # of the sign-flip test: its p is at least 1 / 10,000
EXACT_FLIPS = 13  # up to so many differences that are not 0, all 2^m sign patterns are counted
SEED = 20260101

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` examples. What cannot be estimated from so few or such equal numbers is None.

    `bootstrap`, where several seeds went into it: the ends of `crossed.hierarchical_bootstrap`, to look at beside
    `low` and `high`.
    """

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None
    n: int
    bootstrap: tuple[float, float] | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval; False where there is no interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Finding:
    """A mean difference, the test of "it is 0", and what the same design could have seen.

    `p` is two-sided, by `test`; `p_exact` is McNemar's exact p where `test` is its mid-p version; `p_holm` is `p` after
    Holm's correction over all differences that are shown together, None before that. `detectable` is the smallest
    true difference that this design finds in `POWER` of such studies at level `ALPHA`, taken alone. `effect` is
    `effect_name`: Cohen's g or d_z. `uncovered` says which seeds the interval does not cover, "" when it covers all.
    """

    estimate: Estimate
    test: str
    p: float | None
    p_exact: float | None
    detectable: float | None
    effect: float | None
    effect_name: str
    uncovered: str = ""
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        """Whether it gets its star: p after Holm's correction below `ALPHA`."""
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def lost_to_holm(self) -> bool:
        """Whether it would have had a star alone and has none among the others."""
        return self.p is not None and self.p < ALPHA and not self.significant


def mean_of(values: Sequence[float] | Floats) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: Floats) -> float | None:
    """sd / sqrt(n), the sd with n - 1; None for one value, exactly 0 for equal ones."""
    n = len(values)
    if n < 2:
        return None
    if values.min() == values.max():  # exactly, not up to the rounding of the mean
        return 0.0
    return math.sqrt(math.fsum((values - mean_of(values)) ** 2) / (n - 1) / n)


def is_binary(values: Floats) -> bool:
    """Whether there is nothing but 0 and 1."""
    return bool(((values == 0) | (values == 1)).all())


# ---- one score ----


def score_interval(mean: float, squared: float) -> tuple[float, float]:
    """Wilson's score interval, given z^2 / n: all p with (mean - p)^2 <= squared * p (1 - p).

    crossed.py gives it half^2 / (mean (1 - mean)) for an interval mean ± half that holds for the mean itself, which is
    z^2 over the effective sample size of survey statistics (Korn & Graubard 1998).
    """
    centre = mean + squared / 2
    half = math.sqrt(squared * mean * (1 - mean) + squared * squared / 4)
    # At a mean of 0 or 1 one end is the mean itself, which rounding may just miss.
    return max(0.0, min(mean, (centre - half) / (1 + squared))), min(1.0, max(mean, (centre + half) / (1 + squared)))


def wilson(mean: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval (Wilson 1927) of a proportion `mean` of `n` independent examples.

    It keeps its coverage near 0 and 1 and for few examples, where mean ± 2 standard errors does not. For scores
    between 0 and 1 it is conservative: no variable in [0, 1] varies more around its mean p than one that is only ever
    0 or 1, p (1 - p).
    """
    return score_interval(mean, float(ndtri((1 + confidence) / 2)) ** 2 / n)


def mean_score(scores: ArrayLike) -> Estimate:
    """Mean of one score per example: Wilson's interval when all are 0 or 1, else the studentized bootstrap's.

    Equal fractions have no spread to resample and get Wilson's, which is too wide rather than none.
    """
    values = np.asarray(scores, dtype=np.float64)
    mean = mean_of(values)
    ends = None if is_binary(values) else bootstrap_t(values)
    low, high = (max(0.0, ends[0]), min(1.0, ends[1])) if ends else wilson(mean, len(values))
    return Estimate(mean, low, high, standard_error(values), len(values))


# ---- one paired difference ----


def compare_paired(ours: ArrayLike, theirs: ArrayLike) -> Finding:
    """`ours` - `theirs`, one score each per example, in the same order.

    Both only 0 and 1: McNemar's test (mid-p; exact p beside it), Tango's interval, Cohen's g, detectable difference
    from the observed share of discordant examples. Else: see `compare_mean`, within [-1, 1].
    Raises ValueError when there are no examples or not equally many.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if len(a) != len(b) or not len(a):
        raise ValueError(f"A paired comparison needs the same examples on both sides, not {len(a)} and {len(b)}.")
    if not (is_binary(a) and is_binary(b)):
        return compare_mean(a - b, 1.0)
    n, wins, losses = len(a), int((a > b).sum()), int((a < b).sum())
    low, high = tango(wins, losses, n)
    exact, mid = mcnemar(wins, losses)
    return Finding(
        Estimate((wins - losses) / n, low, high, standard_error(a - b), n),
        "McNemar mid-p",
        mid,
        exact,
        detectable_mcnemar((wins + losses) / n, n),
        cohens_g(wins, losses),
        "g",
    )


def compare_mean(differences: ArrayLike, bound: float) -> Finding:
    """Mean of one difference per example in [-bound, bound]: sign-flip test and studentized bootstrap interval."""
    values = np.asarray(differences, dtype=np.float64)
    n, mean, error = len(values), mean_of(values), standard_error(values)
    ends = bootstrap_t(values)
    return Finding(
        Estimate(mean, max(-bound, ends[0]) if ends else None, min(bound, ends[1]) if ends else None, error, n),
        "sign-flip",
        sign_flip(values),
        None,
        detectable_t(error, n - 1) if error else None,
        cohens_dz(values),
        "d_z",
    )


def mcnemar(wins: int, losses: int) -> tuple[float, float]:
    """Two-sided exact p of McNemar's test, and its mid-p, from the examples that only one side gets right.

    Given their number m, the wins are Binomial(m, 1/2) when there is no difference. Exact: 2 P(X <= min(wins, losses)),
    at most 1. Mid-p: that minus P(X = min(wins, losses)); 1 when wins = losses. The exact test rejects far less often
    than its level because X takes few values; the mid-p version is close to the level and hardly ever above it
    (Fagerland, Lydersen & Laake 2013, BMC Medical Research Methodology 13:91), so it is the one that decides here.
    """
    m, least = wins + losses, min(wins, losses)
    at_most = float(bdtr(least, m, 0.5))
    below = float(bdtr(least - 1, m, 0.5)) if least else 0.0
    return min(1.0, 2 * at_most), 1.0 if wins == losses else at_most + below


def tango(wins: int, losses: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval for the difference of two paired proportions (Tango 1998, Statistics in Medicine 17:891-908).

    All d with |wins - losses - n d| <= z sqrt(n (2 q + d (1 - d))), where q is the likelihood's estimate of the losses'
    probability given d: the larger root of 2n q^2 - (wins + losses - (2n - wins + losses) d) q - losses d (1 - d) = 0.
    It always lies in [-1, 1], exists also where no example differs, and at d = 0 is McNemar's asymptotic test.
    """
    z = float(ndtri((1 + confidence) / 2))

    def excess(d: float) -> float:
        b = -wins - losses + (2 * n - wins + losses) * d
        q = (math.sqrt(max(0.0, b * b + 8 * n * losses * d * (1 - d))) - b) / (4 * n)
        return wins - losses - n * d - math.copysign(z, seen - d) * math.sqrt(max(0.0, n * (2 * q + d * (1 - d))))

    seen = (wins - losses) / n
    ends = []
    for end in (-1.0, 1.0):
        inside, outside = seen, end
        for _ in range(50):  # the statistic falls as d grows
            d = (inside + outside) / 2
            if excess(d) * (seen - d) > 0:
                outside = d
            else:
                inside = d
        ends.append((inside + outside) / 2)
    return ends[0], ends[1]


def cohens_g(wins: int, losses: int) -> float | None:
    """How far the share of wins among the discordant examples is from 1/2, -0.5 to 0.5 (Cohen 1988, chapter 5).

    0.05 is a small effect, 0.15 medium, 0.25 large. Unlike their odds ratio it is finite when one side never wins.
    """
    return wins / (wins + losses) - 0.5 if wins + losses else None


def cohens_dz(differences: Floats) -> float | None:
    """Mean difference in standard deviations of the differences (Cohen 1988, section 2.3.5; Lakens 2013)."""
    error = standard_error(differences)
    return mean_of(differences) / (error * math.sqrt(len(differences))) if error else None


def detectable_mcnemar(discordant: float, n: int) -> float:
    """Smallest difference of two paired proportions that McNemar's test finds in 80% of studies, at 5%, two-sided.

    `discordant` is the share of examples on which the two differ, taken as what the next study would see too. Solves
    n = (z_a sqrt(discordant) + z_b sqrt(discordant - d^2))^2 / d^2 (Connor 1987, Biometrics 43:207-211; Miettinen 1968)
    for d. A difference cannot exceed the share of discordant examples; where the solution would, all of those are on
    one side, discordant = d, and n d = (z_a + z_b sqrt(1 - d))^2. 1 when even that is not enough. It is a little too
    large for few examples (tests/compare/test_calibration.py).
    """
    za, zb = float(ndtri(1 - ALPHA / 2)), float(ndtri(POWER))
    d = math.sqrt(discordant) * (za * math.sqrt(n) + zb * math.sqrt(max(0.0, n + zb * zb - za * za))) / (n + zb * zb)
    if 0 < d <= discordant:
        return d
    if n <= za * za:
        return 1.0
    return float(brentq(lambda d: n * d - (za + zb * math.sqrt(1 - d)) ** 2, 0.0, 1.0))


def detectable_t(error: float, freedom: float) -> float:
    """Smallest true mean that a t test with this standard error finds in 80% of studies, at 5%, two-sided.

    `error` times the noncentrality of the noncentral t that exceeds the critical value with 80% (Bloom 1995's minimum
    detectable effect has the sum of two t quantiles, which is too small below some 10 degrees of freedom).
    """
    return error * float(nctdtrinc(freedom, 1 - POWER, stdtrit(freedom, 1 - ALPHA / 2)))


# ---- resampling ----


def bootstrap_t(values: Floats, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Studentized bootstrap interval of a mean (Efron & Tibshirani 1993, section 12.5), or None without a spread.

    Each resample's t = (mean* - mean) / error*; the ends are mean - t_high error and mean - t_low error. It follows the
    skew of the values, which mean ± t error does not, and keeps its coverage for few of them better than the
    percentiles of mean*. An end is infinite when resamples without any spread are that frequent.
    """
    n, error = len(values), standard_error(values)
    if not error:
        return None
    whole = _whole(values)
    sums = resampled(n) @ np.stack([whole, whole * whole], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums[:, 0] / n
        errors = np.sqrt(np.maximum(sums[:, 1] / n - means**2, 0.0) / (n - 1))
        t = np.nan_to_num((means - math.fsum(whole) / n) / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)
    t.sort()
    tail = round((1 - confidence) / 2 * (len(t) + 1)) - 1  # the order statistics themselves: no sum to round
    mean = mean_of(values)
    return mean - float(t[-1 - tail]) * error, mean - float(t[tail]) * error


def sign_flip(differences: Floats) -> float:
    """Two-sided p of the sign-flip permutation test of a mean of 0 (Fisher 1935, section 21).

    If the two sides are exchangeable, each difference could as well have had the other sign. p is the share of sign
    patterns whose sum is at least as far from 0 as the observed one: of all 2^m patterns for at most 13 differences
    that are not 0, else of 9,999 random ones and the observed one (Phipson & Smyth 2010), so it is never 0.
    """
    whole = _whole(differences[differences != 0])
    m = len(whole)
    if m == 0:
        return 1.0
    observed = abs(math.fsum(whole))
    if m <= EXACT_FLIPS:
        patterns = (np.arange(2**m)[:, None] >> np.arange(m)) & 1
        return float((np.abs((2 * patterns - 1) @ whole) >= observed).mean())
    random = np.random.Generator(np.random.PCG64([SEED, m]))
    at_least, left = 1, FLIPS
    while left:
        rows = min(left, 1024)
        bits = np.unpackbits(np.frombuffer(random.bytes(rows * ((m + 7) // 8)), np.uint8).reshape(rows, -1), axis=1)
        flipped = whole.sum() - 2 * (bits[:, :m].astype(np.float64) @ whole)
        at_least += int((np.abs(flipped) >= observed).sum())
        left -= rows
    return at_least / (FLIPS + 1)


def _whole(values: Floats) -> Floats:
    """Values in [-2, 2] times a power of two, rounded: sums of n of them, and of their squares, are exact in a float.

    For 1,319 values that keeps a millionth of a score; below it, resamples do not see a difference.
    """
    scale: float = 2.0 ** ((51 - math.ceil(math.log2(max(2, len(values))))) // 2)
    return np.rint(values * scale)


@lru_cache(maxsize=2)
def resampled(n: int) -> Floats:
    """How often each of `n` examples is in each resample, [RESAMPLES, n]. The same for all columns of n examples."""
    random = np.random.Generator(np.random.PCG64([SEED, n]))
    counts = np.empty((RESAMPLES, n))
    for row in counts:
        row[:] = np.bincount(random.integers(0, n, n), minlength=n)
    return counts


# ---- several tests ----


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p values after Holm's step-down correction (Holm 1979), in the given order; None stays None and is not counted.

    The k-th smallest of m is multiplied by m - k + 1, kept at least as large as the one before it, and at most 1. The
    chance that any of them is below `ALPHA` without a difference is then at most `ALPHA`, however they depend.
    """
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    out: list[float | None] = [None] * len(ps)
    least = 0.0
    for k, (p, i) in enumerate(order):
        least = max(least, min(1.0, p * (len(order) - k)))
        out[i] = least
    return out


def two_sided(t: float, freedom: float) -> float:
    """p of Student's t."""
    return 2 * float(stdtr(freedom, -abs(t)))
