"""Attempts of one policy at the questions of a set: what was answered, what it scored, how long it was, how it rates.

The input of everything in this room. Knows nothing of prompts, engines or graders: these are numbers and strings.

Axis letters: Q questions, C chains, L attempts in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cotune.aggregation import Floats
from cotune.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Attempts:
    """C chains of L attempts at each of Q questions; every field is [Q, C, L]. Made by `attempts`.

    An attempt of a chain was made in sight of those before it; chains are independent of each other, and chains of one
    attempt are independent samples. `predictions` are extracted answers (None: there was none), `scores` the grader's
    in [0, 1], `tokens` the generated ones, `ratings` what a scorer that has not seen the reference gave, at least 0.
    """

    predictions: NDArray[np.object_]
    scores: Floats
    tokens: Floats
    ratings: Floats | None

    @property
    def questions(self) -> int:
        return len(self.scores)

    @property
    def chains(self) -> int:
        return len(self.scores[0])

    @property
    def length(self) -> int:
        return len(self.scores[0, 0])

    def split(self, first: int) -> tuple[Attempts, Attempts]:
        """The first chains of every question, and the others. UsageError unless both have some."""
        if not 1 <= first < self.chains:
            raise UsageError(
                f"Of {self.chains} samples a question, {first} cannot be set apart: take and leave at least 1."
            )
        return self._cut(slice(None, first)), self._cut(slice(first, None))

    def _cut(self, part: slice) -> Attempts:
        ratings = None if self.ratings is None else self.ratings[:, part]
        return Attempts(self.predictions[:, part], self.scores[:, part], self.tokens[:, part], ratings)


def attempts(
    predictions: Sequence[Sequence[Any]], scores: ArrayLike, tokens: ArrayLike, ratings: ArrayLike | None = None
) -> Attempts:
    """Independent samples from [Q][S], or chains from [Q][C][L]; every argument has the same shape.

    An attempt without an answer scores 0 whatever the grader said (ours, as in aggregation.py). Raises DataError where
    questions have different numbers of attempts or none, a score is outside [0, 1], tokens are below 0, or a rating
    is below 0 or not finite (sums of ratings could not be compared).
    """
    answers = _objects(predictions)
    try:
        graded, lengths = (np.asarray(given, dtype=np.float64) for given in (scores, tokens))
        rated = None if ratings is None else np.asarray(ratings, dtype=np.float64)
    except ValueError:
        raise DataError("Every attempt needs one score, its generated tokens and, if any has one, a rating.") from None
    if any(given.shape != answers.shape for given in (graded, lengths, rated) if given is not None):
        raise DataError("Every attempt needs one score, its generated tokens and, if any has one, a rating.")
    if not ((graded >= 0) & (graded <= 1)).all():
        raise DataError("A score is outside [0, 1]; grade every attempt first.")
    if not (np.isfinite(lengths) & (lengths >= 0)).all():
        raise DataError("The generated tokens of an attempt are not a number of at least 0; count them first.")
    if rated is not None and not (np.isfinite(rated) & (rated >= 0)).all():
        raise DataError("A rating is below 0 or not finite; rate every attempt, log-probabilities by `likelihood`.")
    graded = np.where(answers == np.array(None), 0.0, graded)
    shape = answers.shape if answers.ndim == 3 else (*answers.shape, 1)
    return Attempts(
        answers.reshape(shape),
        graded.reshape(shape),
        lengths.reshape(shape),
        None if rated is None else rated.reshape(shape),
    )


def _objects(predictions: Sequence[Sequence[Any]]) -> NDArray[np.object_]:
    try:
        answers = np.array(predictions, dtype=object)
    except ValueError:  # numpy's word for some ragged lists
        answers = np.empty(0, dtype=object)
    if answers.ndim not in (2, 3) or not answers.size or not all(a is None or isinstance(a, str) for a in answers.flat):
        raise DataError("Every question needs equally many attempts, at least 1, each an answer in text or None.")
    return answers


def likelihood(mean_log_probabilities: ArrayLike) -> Floats:
    """exp(mean token log-probability): the geometric mean of an attempt's token probabilities, in (0, 1], any shape.

    As a rating where there is no trained verifier (ours; the paper trains one): best-of-N orders as by the mean
    log-probability itself, and sums over equal answers grow with every vote, which those of negative numbers do not.
    """
    rating: Floats = np.exp(np.asarray(mean_log_probabilities, dtype=np.float64))
    return rating
