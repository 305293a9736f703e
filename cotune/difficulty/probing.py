"""The difficulty bin of a question from its first samples alone: no reference, and of other questions the edges.

Source: Snell et al. (arXiv 2408.03314; sheet 03), who predict difficulty by a verifier's mean score. Ours: a few
samples that are the first of those that answer the question (the paper draws 2,048 others); answer entropy where there
is no scorer; edges that are fitted once, on train (the paper cuts the test questions into quantiles).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cotune.aggregation import Answer, Floats
from cotune.difficulty.bins import answer_entropy, difficulty_bins
from cotune.values import Told


def ease_of(votes: Sequence[Answer], ratings: Sequence[float | None] | None) -> float:
    """The mean rating, a missing one counting 0 (as when the answer is chosen); without ratings minus the entropy."""
    if ratings is None:
        return -answer_entropy(votes)
    return math.fsum(rating or 0.0 for rating in ratings) / len(ratings)


def bin_of(edges: Sequence[float], ease: float) -> int:
    """How many of the falling edges the ease is below: 0 is the easiest bin, and who is on an edge is above it."""
    return sum(ease < edge for edge in edges)


def told(edges: Sequence[float], votes: Sequence[Answer], ratings: Sequence[float | None] | None) -> Told:
    ease = ease_of(votes, ratings)
    return Told(len(votes), ease, bin_of(edges, ease))


def fitted_edges(eases: Floats, count: int) -> tuple[float, ...]:
    """Falling edges of at most `count` bins, none of which is empty among these eases.

    The bins are those of `difficulty_bins`: quantiles, equal eases together. With few different eases, or fewer
    questions than bins, there are fewer. An edge lies in the middle between two bins, so that rounding moves nobody.
    """
    bins = difficulty_bins(eases, count)
    filled = np.unique(bins)
    edges = []
    for easier, harder in pairwise(filled):
        above, below = float(eases[bins == easier].min()), float(eases[bins == harder].max())
        middle = below + (above - below) / 2
        edges.append(middle if middle > below else above)
    return tuple(edges)
