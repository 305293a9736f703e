"""Scores drawn from a world whose true means are known, and a plain crossed bootstrap to measure others against."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Floats = NDArray[np.float64]

ITEM, BOTH = 1.5, 0.5  # standard deviations of an example's ease, for every strategy alike and for one of them


def level(mean: float, tau: float) -> float:
    """What makes `answers` right with probability `mean`."""
    return float(ndtri(mean)) * math.sqrt(1 + ITEM**2 + BOTH**2 + tau**2)


def answers(
    rng: np.random.Generator, sims: int, seeds: tuple[int, int], n: int, tau: float, means: tuple[float, float]
) -> tuple[Floats, Floats]:
    """0/1 scores of two strategies, [sims, seeds, n] each, with the given true means.

    Probit: right where normal noise < level + ease of the example (shared and the strategy's own) + seed, which has the
    standard deviation `tau`. A strategy of 0 seeds has no noise and no seed spread, and one row: a greedy zero-shot.
    """
    shared = rng.normal(0, ITEM, (sims, 1, n))
    out = []
    for mean, count in zip(means, seeds, strict=True):
        ease = shared + rng.normal(0, BOTH, (sims, 1, n))
        if count:
            right = rng.normal(size=(sims, count, n)) < level(mean, tau) + ease + rng.normal(0, tau, (sims, count, 1))
        else:
            right = ease > -float(ndtri(mean)) * math.hypot(ITEM, BOTH)
        out.append(right.astype(np.float64))
    return out[0], out[1]


def fractions(rng: np.random.Generator, n: int, shift: float) -> tuple[Floats, Floats]:
    """Scores like token F1: many 0 and 1, the rest between; the first strategy's ease is `shift` larger."""
    ease = rng.normal(size=n) + rng.normal(0, 0.5, (2, n))
    ease[0] += shift
    scores = np.clip(1.6 * ndtr(1.5 * ease) - 0.3, 0, 1)
    return scores[0], scores[1]


def bootstrap_ends(rng: np.random.Generator, ours: Floats, theirs: Floats, resamples: int) -> tuple[float, float]:
    """Percentile interval of the difference; seeds (of each side) and examples (of both alike) drawn again."""
    n = ours.shape[1]
    drawn = np.empty(resamples)
    for i in range(resamples):
        items = rng.integers(0, n, n)
        a = ours[rng.integers(0, len(ours), len(ours))][:, items].mean()
        drawn[i] = a - theirs[rng.integers(0, len(theirs), len(theirs))][:, items].mean()
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
