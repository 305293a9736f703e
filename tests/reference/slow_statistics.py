"""The definitions behind compare/stats.py and compare/crossed.py, written out slowly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import fmean

from scipy import stats


def sign_flip(differences: Sequence[float]) -> float:
    """Share of all sign patterns whose sum is at least as far from 0."""
    seen = abs(math.fsum(differences))
    patterns = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(s >= seen - 1e-12 for s in sums) / len(sums)


def tango_statistic(wins: int, losses: int, n: int, d: float) -> float:
    """Score statistic of a paired difference d: the likelihood is maximised over the losses' share by a fine search."""
    both = n - wins - losses

    def log_likelihood(q: float) -> float:  # shares: wins q + d, losses q, neither 1 - 2q - d
        parts = ((wins, q + d), (losses, q), (both, 1 - 2 * q - d))
        return sum(k * math.log(p) if k else 0.0 for k, p in parts) if all(p > 0 or not k for k, p in parts) else -1e300

    low, high = max(0.0, -d), (1 - d) / 2
    for _ in range(200):  # golden section: the log-likelihood is concave
        a, b = high - (high - low) * 0.6180339887498949, low + (high - low) * 0.6180339887498949
        if log_likelihood(a) < log_likelihood(b):
            low = a
        else:
            high = b
    q = (low + high) / 2
    return (wins - losses - n * d) / math.sqrt(n * (2 * q + d - d * d))


def two_way(scores: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean squares of a [seeds, examples] table without replication: seeds, examples, what is left."""
    s, n = len(scores), len(scores[0])
    grand = fmean(x for row in scores for x in row)
    rows = [fmean(row) for row in scores]
    columns = [fmean(row[i] for row in scores) for i in range(n)]
    left = sum((scores[k][i] - rows[k] - columns[i] + grand) ** 2 for k in range(s) for i in range(n))
    return (
        n * sum((r - grand) ** 2 for r in rows) / (s - 1),
        s * sum((c - grand) ** 2 for c in columns) / (n - 1),
        left / ((s - 1) * (n - 1)),
    )


def banerjee(items: float, items_freedom: float, seeds: float, seeds_freedom: float, confidence: float) -> float:
    """Half-width, from scipy's t distribution."""
    tail = (1 + confidence) / 2
    total = stats.t.ppf(tail, items_freedom) ** 2 * items
    return float(math.sqrt(total + (stats.t.ppf(tail, seeds_freedom) ** 2 * seeds if seeds else 0.0)))
