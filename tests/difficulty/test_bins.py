"""Difficulty bins: quantiles with ties, entropy against its definition, what agreement counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.difficulty.attempts import attempts
from cotune.difficulty.bins import (
    Agreement,
    agreement,
    answer_entropy,
    certainty,
    difficulty_bins,
    mean_rating,
    pass_at_1,
)
from cotune.errors import UsageError


def test_quintiles_without_ties_are_of_equal_size_and_the_easiest_come_first() -> None:
    ease = np.random.default_rng(0).permutation(20) / 20
    bins = difficulty_bins(ease)
    assert np.bincount(bins).tolist() == [4] * 5
    assert sorted(ease[bins == 0]) == [16 / 20, 17 / 20, 18 / 20, 19 / 20]
    assert difficulty_bins(range(7)).tolist() == [4, 3, 3, 2, 1, 1, 0]  # floor(5 (r + 1/2) / 7), r = 6 .. 0


def test_ties_share_the_bin_of_the_middle_of_their_ranks() -> None:
    # Ranks 0-5 (middle 3 of 10: bin 1), 6-8 (middle 7.5: bin 3) and 9 (middle 9.5: bin 4).
    assert difficulty_bins([1.0] * 6 + [0.5] * 3 + [0.0]).tolist() == [1] * 6 + [3] * 3 + [4]
    assert difficulty_bins([0.3] * 4).tolist() == [2] * 4
    assert difficulty_bins([0.3], 1).tolist() == [0]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.integers(1, 6))
def test_only_the_order_counts_and_no_row_is_special(ease: list[int], count: int) -> None:
    bins = difficulty_bins(ease, count)
    assert (difficulty_bins([math.exp(e) for e in ease], count) == bins).all()
    order = np.random.default_rng(len(ease)).permutation(len(ease))
    assert (difficulty_bins(np.array(ease)[order], count) == bins[order]).all()
    assert 0 <= bins.min() <= bins.max() < count
    for e, b in zip(ease, bins, strict=True):
        assert all(other <= b for f, other in zip(ease, bins, strict=True) if f >= e)


@pytest.mark.parametrize("ease", [[], [math.nan], [[1.0]]])
def test_bins_of_nothing(ease: list[float]) -> None:
    with pytest.raises(UsageError, match="one number for each question"):
        difficulty_bins(ease)


def test_entropy_by_hand() -> None:
    assert answer_entropy(["a"] * 4) == 0
    assert answer_entropy(["a", "a", "b", "b"]) == pytest.approx(math.log(2))
    assert answer_entropy(["a", "a", "a", "b"]) == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert answer_entropy(["a", "b", "c", "d"]) == pytest.approx(math.log(4))


def test_missing_answers_agree_with_nothing() -> None:
    assert answer_entropy([None] * 4) == pytest.approx(math.log(4))
    assert answer_entropy(["a", "a", None, None]) == pytest.approx(answer_entropy(["a", "a", "b", "c"]))


def test_eases_of_attempts() -> None:
    made = attempts([["a", "a"], ["a", "b"]], [[1, 1], [1, 0]], [[1, 1]] * 2, [[0.25, 0.5], [0.75, 0.5]])
    assert pass_at_1(made).tolist() == [1, 0.5]
    assert mean_rating(made).tolist() == [0.375, 0.625]
    assert certainty(made) == pytest.approx([0, -math.log(2)])
    with pytest.raises(UsageError, match="predict it by answer entropy"):
        mean_rating(attempts([["a"]], [[1]], [[1]]))


def test_equal_scores_in_another_order_are_equal_eases() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floats; the bins must not tell them apart."""
    made = attempts([["a", "b", "c"]] * 2, [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]], [[1] * 3] * 2)
    first, second = pass_at_1(made)
    assert first == second


def test_agreement_counts_bins_and_ranks() -> None:
    ease = np.arange(10.0)
    assert agreement(ease, 2 * ease) == Agreement(1.0, 1.0, pytest.approx(1.0))
    # Reversed, bins 0 1 2 3 4 meet 4 3 2 1 0: only the middle one is the same, none is one apart.
    assert agreement(ease, -ease) == Agreement(0.2, 0.2, pytest.approx(-1.0))
    # By one bin: ranks rolled by two.
    assert agreement(ease, np.roll(ease, 2)) == Agreement(0.0, 0.8, pytest.approx(1 - 6 * (8 * 4 + 2 * 64) / 990))
    assert agreement(ease, np.zeros(10)).correlation is None
    with pytest.raises(UsageError, match="the same questions"):
        agreement(ease, ease[1:])
