"""Scores drawn from a world whose true means are known."""

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
