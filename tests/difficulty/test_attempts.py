"""The input: shapes, what is refused and how it is said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cotune.difficulty.attempts import attempts, likelihood
from cotune.errors import DataError, UsageError


def test_samples_are_chains_of_one_attempt() -> None:
    made = attempts([["a", "b"], ["c", None]], [[1, 0.5], [0, 1]], [[3, 4], [5, 6]], [[0.1, 0.2], [0.3, 0.4]])
    assert (made.questions, made.chains, made.length) == (2, 2, 1)
    assert made.predictions.tolist() == [[["a"], ["b"]], [["c"], [None]]]
    assert made.scores.tolist() == [[[1], [0.5]], [[0], [0]]]  # no answer is never right
    assert made.ratings is not None
    assert attempts([[["a", "b"]]], [[[1, 0]]], [[[2, 2]]]).length == 2


def test_split_keeps_all_fields_together() -> None:
    made = attempts([["a", "b", "c"]], [[1, 0, 1]], [[3, 4, 5]], [[0.1, 0.2, 0.3]])
    first, rest = made.split(1)
    assert first.predictions.tolist() == [[["a"]]]
    assert rest.predictions.tolist() == [[["b"], ["c"]]]
    assert (first.scores.sum(), first.tokens.sum(), rest.scores.sum(), rest.tokens.sum()) == (1, 3, 1, 9)
    assert first.ratings is not None and rest.ratings is not None
    assert (first.ratings.tolist(), rest.ratings.tolist()) == ([[[0.1]]], [[[0.2], [0.3]]])
    unrated = attempts([["a", "b"]], [[1, 0]], [[3, 4]]).split(1)
    assert [part.ratings for part in unrated] == [None, None]
    for bad in (0, 3):
        with pytest.raises(UsageError, match=f"Of 3 samples a question, {bad} cannot be set apart"):
            made.split(bad)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], [], []), "equally many attempts, at least 1"),
        (([[], []], [[], []], [[], []]), "equally many attempts, at least 1"),
        ((["ab"], [[1, 0]], [[1, 1]]), "equally many attempts, at least 1"),
        (([["a"], ["a", "b"]], [[1], [1, 0]], [[1], [1, 1]]), "equally many attempts, at least 1"),
        (([[["a"], ["a", "b"]]], [[[1], [1, 0]]], [[[1], [1, 1]]]), "equally many attempts, at least 1"),
        (([[7]], [[1]], [[1]]), "in text or None"),
        (([["a", "b"]], [[1]], [[1, 1]]), "one score, its generated tokens"),
        (([["a", "b"]], [[1, 0]], [[1]]), "one score, its generated tokens"),
        (([["a", "b"], ["a", "b"]], [[1], [1, 0]], [[1, 1], [1, 1]]), "one score, its generated tokens"),
        (([["a"]], [[1]], [[1]], [0.5]), "one score, its generated tokens"),
        (([["a"]], [[1.5]], [[1]]), "outside"),
        (([["a"]], [[math.nan]], [[1]]), "outside"),
        (([["a"]], [[1]], [[-1]]), "at least 0; count them"),
        (([["a"]], [[1]], [[1]], [[-0.3]]), "log-probabilities by `likelihood`"),
        (([["a"]], [[1]], [[1]], [[math.nan]]), "log-probabilities by `likelihood`"),
    ],
)
def test_bad_input(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        attempts(*given)


def test_likelihood_is_the_geometric_mean_of_token_probabilities() -> None:
    logs = np.log([0.5, 0.2, 0.4])
    assert likelihood(logs.mean()) == pytest.approx((0.5 * 0.2 * 0.4) ** (1 / 3))
    assert likelihood([0.0, -math.inf]).tolist() == [1, 0]
