"""Means, intervals and paired differences of scores in [0, 1]. Pure arithmetic on sequences of numbers.

Everything here is about the sample of test examples: the intervals say how much a number could move with other examples
of the same kind, for the models and prompts as they were tuned. They do not cover what another seed would tune.
Knows nothing of runs or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import ndtri, stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` examples. What cannot be estimated from so few or such equal numbers is None."""

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval; False where there is no interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def wilson(mean: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval (Wilson 1927) of a proportion `mean` of `n` independent examples.

    It keeps its coverage near 0 and 1 and for few examples, where mean ± 2 standard errors does not. For scores
    between 0 and 1 (token F1, or the mean of several seeds) it is conservative: no variable in [0, 1] varies more
    around its mean p than one that is only ever 0 or 1, p (1 - p).
    """
    z = float(ndtri((1 + confidence) / 2))
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At a mean of 0 or 1 one end is the mean itself, which rounding may just miss.
    return max(0.0, min(mean, (centre - half) / scale)), min(1.0, max(mean, (centre + half) / scale))


def mean_score(scores: Sequence[float]) -> Estimate:
    """Mean of one score per example with the Wilson interval, and the standard error sd / sqrt(n), sd with n - 1."""
    n = len(scores)
    mean = math.fsum(scores) / n
    low, high = wilson(mean, n)
    return Estimate(mean, low, high, _standard_error(scores, mean), n)


def paired(differences: Sequence[float]) -> Estimate:
    """Mean of one difference per example with Student's t interval: mean ± t(n - 1) sd / sqrt(n).

    Approximate: it leans on the mean of n differences being close to normal, which is coarse below some 30 examples.
    No interval when n = 1 or when all differences are equal (the spread is then unknown, not zero).
    """
    n = len(differences)
    mean = math.fsum(differences) / n
    error = _standard_error(differences, mean)
    if not error:
        return Estimate(mean, None, None, error, n)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return Estimate(mean, mean - half, mean + half, error, n)


def over_tasks(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over tasks of one mean difference each, every task counting alike, for tasks with examples of their own.

    Standard error sqrt(sum SE_t^2) / T, with Student's t at the degrees of freedom of Welch (1947) and Satterthwaite
    (1946), (sum SE_t^2)^2 / sum(SE_t^4 / (n_t - 1)). It covers other examples of these tasks, not other tasks.
    No interval where a task has no standard error, or where all of them are 0.
    """
    mean = math.fsum(e.mean for e in estimates) / len(estimates)
    n = sum(e.n for e in estimates)
    variances = [e.standard_error**2 for e in estimates if e.standard_error is not None]
    total = math.fsum(variances)
    if len(variances) < len(estimates) or not total:
        return Estimate(mean, None, None, None, n)
    freedom = total**2 / math.fsum(v**2 / (e.n - 1) for v, e in zip(variances, estimates, strict=True))
    error = math.sqrt(total) / len(estimates)
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return Estimate(mean, mean - half, mean + half, error, n)


def _standard_error(values: Sequence[float], mean: float) -> float | None:
    n = len(values)
    if n < 2:
        return None
    if min(values) == max(values):  # exactly, not up to the rounding of the mean
        return 0.0
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
