"""Where an adaptive race runs its prompts next, told from their scores so far (ours, after LUCB: Kalyanakrishnan 2012).

Knows tables alone: scores [prompts, examples], NaN where a prompt has not run, and the prompts' sizes in characters.
What is missing is imputed. Numbers found by replaying searches whose scores were all known (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cotune.imputation import Scores, impute

SHARE = 1 / 3  # of the rollouts that running every prompt in full would take
LEADERS = 2  # prompts in full before the others are told from them
_TELLING = 10  # the best so many show where prompts differ
_DOUBT_Z = 2.0  # standard deviations
_PAIRS = 2  # that run at once


def estimates(table: Scores) -> list[float]:
    """Each prompt's mean score, rounded so that equals are equal."""
    return [round(float(row.mean()), 9) for row in impute(table)[0]]


def order(scores: Scores, sizes: Sequence[int]) -> list[int]:
    """The rows, best first; ties: the shorter, then the earlier."""
    return sorted(range(len(sizes)), key=lambda i: (-round(float(scores[i].sum()), 9), sizes[i]))


def telling(table: Scores, sizes: Sequence[int], look: int) -> list[int]:
    """The `look` examples on which the best prompts differ most: there a new prompt runs first."""
    scores, _ = impute(table)
    spread = scores[order(scores, sizes)[:_TELLING]].var(axis=0)
    return [int(e) for e in np.argsort(-spread, kind="stable")[:look]]


def leader(table: Scores, sizes: Sequence[int]) -> int | None:
    """The best row that has not run everywhere, as long as fewer than LEADERS have; then None."""
    unfinished = {i for i, row in enumerate(table) if np.isnan(row).any()}
    if not unfinished or len(table) - len(unfinished) >= LEADERS:
        return None
    return next(i for i in order(impute(table)[0], sizes) if i in unfinished)


def doubtful(table: Scores, sizes: Sequence[int], finalists: int, look: int) -> list[tuple[int, list[int]]]:
    """Rows that may yet change places at the border of the best `finalists`, each with `look` examples to run on.

    Of the finalists those that may be worst, of the others those that may be best, on the examples where each is least
    sure of its score. Empty when the border is settled.
    """
    scores, variance = impute(table)
    ranked = order(scores, sizes)
    total, doubt = scores.sum(axis=1), _DOUBT_Z * np.sqrt(variance.sum(axis=1))
    low, high = total - doubt, total + doubt
    inside = sorted(ranked[:finalists], key=lambda i: low[i])
    outside = sorted(ranked[finalists:], key=lambda i: -high[i])
    pairs = list(zip(inside, outside, strict=False))[:_PAIRS]
    asked = []
    for row in (i for a, b in pairs if high[b] > low[a] for i in (a, b)):
        least_sure = np.argsort(-variance[row], kind="stable")[:look]
        if places := [int(e) for e in least_sure if variance[row, e] > 0]:
            asked.append((row, places))
    return asked
