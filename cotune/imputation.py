"""Scores of prompts on examples that they did not run, told from the prompts that score alike where both ran.

Knows neither prompts nor engines. Ours, no paper's: prompts that work alike are right on the same examples but for a
few. So what one of them would score is known where the others agree, and has to be asked only where they do not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

# Conventions, found by replaying searches whose scores were all known (docs/performance.md).
_SHARPNESS = 8  # a prompt counts (share of agreement) to this power
_OWN = 0.3  # what a prompt's own mean counts in the variance, in agreeing prompts
_SURPRISE = 0.02  # variance left where a prompt's likes agree, divided by 1 + their weight


def impute(scores: Scores) -> tuple[Scores, Scores]:
    """`scores` [P, E] in [0, 1], NaN where a prompt has not run; every prompt has run somewhere.

    Returns the scores [P, E] with what is missing filled in, and the variance [P, E] of each, 0 where it ran. A missing
    score is the weighted median of those that ran the example, so that alike prompts tie; a prompt that agreed in a
    share a of the examples that both ran (with one more of which half agreed) has the weight a^8. Where nobody ran it
    is the prompt's own mean.
    """
    ran = ~np.isnan(scores)
    known = np.where(ran, scores, 0.0)
    own = (known.sum(1) + 0.5) / (ran.sum(1) + 1)
    weights = np.zeros((len(scores), len(scores)))
    for i, (mine, here) in enumerate(zip(known, ran, strict=True)):
        both = ran & here
        shared = both.sum(1)
        apart = (np.abs(known - mine) * both).sum(1)
        weights[i] = np.where(shared > 0, (1 - (apart + 0.5) / (shared + 1)) ** _SHARPNESS, 0.0)
    np.fill_diagonal(weights, 0.0)

    mass = weights @ ran
    mean = (weights @ known + _OWN * own[:, None]) / (mass + _OWN)
    square = (weights @ known**2 + _OWN * own[:, None]) / (mass + _OWN)
    variance = square - mean**2 + _SURPRISE / (1 + mass)
    filled = np.where(mass > 0, _weighted_medians(known, ran, weights, mass), own[:, None])
    return np.where(ran, scores, filled), np.where(ran, 0.0, variance)


def _weighted_medians(known: Scores, ran: NDArray[np.bool_], weights: Scores, mass: Scores) -> Scores:
    """[P, E]: of each example's known scores the lowest with at least half of the weight at or below it."""
    medians = np.zeros_like(known)
    for e in range(known.shape[1]):
        rows = np.flatnonzero(ran[:, e])
        order = rows[np.argsort(known[rows, e], kind="stable")]
        below = np.cumsum(weights[:, order], axis=1)
        reached = below >= 0.5 * mass[:, e : e + 1] - 1e-12
        at = reached.argmax(axis=1) if len(order) else np.zeros(len(known), dtype=int)
        medians[:, e] = known[order, e][at] if len(order) else 0.0
    return medians
