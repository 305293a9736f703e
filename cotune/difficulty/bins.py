"""How hard a question is for one policy: oracle bins from pass@1, predicted ones without labels, how far they agree.

Source: Snell et al. (arXiv 2408.03314; sheet 03): five quantiles, specific to the model. "Ease" is any number that
is larger where a question is easier.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import spearmanr

from cotune.aggregation import Answer, Floats, Ints
from cotune.compare.stats import mean_of
from cotune.difficulty.attempts import Attempts
from cotune.errors import UsageError

BINS = 5  # the paper's


def pass_at_1(attempts: Attempts) -> Floats:
    """Oracle ease [Q]: the mean score of the attempts (paper: of 2,048 samples)."""
    return _means(attempts.scores)


def mean_rating(attempts: Attempts) -> Floats:
    """Predicted ease [Q]: the mean rating (the paper's, with its verifier). UsageError without ratings."""
    if attempts.ratings is None:
        raise UsageError("Difficulty by rating needs rated attempts; rate them, or predict it by answer entropy.")
    return _means(attempts.ratings)


def certainty(attempts: Attempts) -> Floats:
    """Predicted ease [Q]: minus `answer_entropy` (ours; the paper has a verifier)."""
    return np.array([-answer_entropy(answers.ravel().tolist()) for answers in attempts.predictions])


def _means(values_QCL: Floats) -> Floats:
    return np.array([mean_of(of_question.ravel()) for of_question in values_QCL])  # exact sums: equal ones do tie


def answer_entropy(predictions: Sequence[Answer]) -> float:
    """-sum over answers of share log share, in nats, 0 where all agree; log k at most for k predictions (ours).

    None agrees with nothing, not even with another None: a model that fails to answer is not sure of anything.
    """
    votes = Counter(p for p in predictions if p is not None)
    alone = len(predictions) - votes.total()
    shares = [v / len(predictions) for v in (*votes.values(), *[1] * alone)]
    return math.fsum(-s * math.log(s) for s in shares)


def difficulty_bins(ease: ArrayLike, count: int = BINS) -> Ints:
    """The bin of each question, [Q], 0 the easiest: `count` quantiles of `ease` among these questions.

    Questions of equal ease share a bin, that of the middle of their ranks: floor(count (easier + equal / 2) / Q), with
    `equal` counting the question itself (ours; the paper says nothing of ties). So bins are of equal size without
    ties, and with many of them some are larger and some empty; a choice never hangs on the order of the rows.
    """
    values = np.asarray(ease, dtype=np.float64)
    if values.ndim != 1 or not len(values) or np.isnan(values).any() or count < 1:
        raise UsageError("Difficulty bins need one number for each question, at least one question and one bin.")
    rank = np.sort(-values)
    before, upto = np.searchsorted(rank, -values, "left"), np.searchsorted(rank, -values, "right")
    bins: Ints = count * (before + upto) // (2 * len(values))
    return bins


@dataclass(frozen=True)
class Agreement:
    """Of two orders of the same questions: shares in the `same` bin and at most one bin apart (`adjacent`).

    `correlation` is Spearman's of the two eases, None where one of them is the same for all questions.
    """

    same: float
    adjacent: float
    correlation: float | None


def agreement(ease: ArrayLike, other: ArrayLike, count: int = BINS) -> Agreement:
    """How far two eases of the same questions agree. By chance, 1/count of the questions share a bin."""
    first, second = np.asarray(ease, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if first.shape != second.shape:
        raise UsageError("Two difficulties agree or not on the same questions only; give one number for each in both.")
    apart = np.abs(difficulty_bins(first, count) - difficulty_bins(second, count))
    ordered = np.ptp(first) > 0 and np.ptp(second) > 0
    correlation = float(spearmanr(first, second).statistic) if ordered else None
    return Agreement(float((apart == 0).mean()), float((apart <= 1).mean()), correlation)
