"""Votes and best-of-N: the exact values of the IAPO paper's example, brute force over all draws, blocks, bad input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.aggregation import (
    best_block_sums,
    best_of_n,
    best_of_n_value,
    blocks,
    expected_score,
    majority_accuracy,
    majority_block_sums,
    majority_vote,
    total_block_sums,
    weighted_best_of_n,
)
from cotune.errors import UsageError

# The paper's worked example (two queries, right or wrong): 0.65 against 0.62 at N = 1, about 0.63 against 0.77 at 10.
WIDE = {1: 0.65, 3: 0.662, 5: 0.654440, 7: 0.643532, 9: 0.632838, 15: 0.606535, 31: 0.564191}
STEADY = {1: 0.62, 3: 0.676544, 5: 0.716509, 7: 0.747895, 9: 0.773776, 15: 0.831285, 31: 0.914213}
# Four answers, gold first.
FOUR = {
    (0.4, 0.2, 0.2, 0.2): {1: 0.4, 2: 0.4, 3: 0.448, 4: 0.4864, 5: 0.50944, 10: 0.616825},
    (0.4, 0.3, 0.2, 0.1): {1: 0.4, 2: 0.4, 3: 0.44, 4: 0.472, 5: 0.49024, 10: 0.569317},
}


def test_worked_example_of_two_prompts() -> None:
    wide = majority_accuracy([[0.4, 0.6], [0.9, 0.1]], 32).mean(0)
    steady = majority_accuracy([[0.62, 0.38]], 32)[0]
    for n in WIDE:
        assert wide[n - 1] == pytest.approx(WIDE[n], abs=5e-7) == wide[n]
        assert steady[n - 1] == pytest.approx(STEADY[n], abs=5e-7) == steady[n]
    assert (wide > steady).tolist() == [True, True] + 30 * [False]  # the order flips between N = 2 and N = 3


def test_each_query_of_the_worked_example_at_ten() -> None:
    assert majority_accuracy([[0.4, 0.6], [0.9, 0.1]], 10)[:, 9] == pytest.approx([0.266568, 0.999109], abs=5e-7)


@pytest.mark.parametrize("probabilities", FOUR)
def test_worked_example_of_four_answers(probabilities: tuple[float, ...]) -> None:
    accuracy = majority_accuracy(probabilities, 10)
    for n, value in FOUR[probabilities].items():
        assert accuracy[n - 1] == pytest.approx(value, abs=5e-7)


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_an_even_vote_of_two_answers_is_worth_the_odd_one_before(right: list[float]) -> None:
    accuracy = majority_accuracy([[p, 1 - p] for p in right], 20)
    assert accuracy[:, 1::2] == pytest.approx(accuracy[:, ::2], abs=1e-12)


def test_votes_of_all_answers_sum_to_one() -> None:
    p = np.array([0.4, 0.35, 0.25])
    assert sum(majority_accuracy(np.roll(p, -s), 50) for s in range(3)) == pytest.approx(np.ones(50), abs=1e-12)


@pytest.mark.parametrize("answers", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_vote_and_its_accuracy_agree_with_all_tuples(answers: int, n: int) -> None:
    p = np.random.default_rng(answers).dirichlet(np.ones(answers))
    worth = {str(s): float(s == 0) for s in range(answers)}
    total = sum(
        math.prod(p[list(drawn)]) * expected_score(majority_vote([str(s) for s in drawn]), worth)
        for drawn in itertools.product(range(answers), repeat=n)
    )
    assert majority_accuracy(p, n)[n - 1] == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_agrees_with_all_tuples(n: int) -> None:
    values, p = np.array([1.5, -1.0, 1.5, 0.2]), np.array([0.1, 0.3, 0.2, 0.4])
    total = sum(math.prod(p[list(d)]) * values[list(d)].max() for d in itertools.product(range(4), repeat=n))
    assert best_of_n_value(values, p, n)[n - 1] == pytest.approx(total, abs=1e-12)


def test_choosing_among_completions() -> None:
    predictions = ["7", "8", "8", None, "9", "9"]
    assert majority_vote(predictions) == {"8": 0.5, "9": 0.5}
    assert best_of_n(predictions, [0.9, 0.1, 0.2, 0.3, 0.9, 0.5]) == {"7": 0.5, "9": 0.5}
    assert weighted_best_of_n(predictions, [0.9, 0.1, 0.2, 0.3, 0.9, 0.5]) == {"9": 1.0}
    # 0.1 + 0.2 + 0.3 in any order is the same sum, so it ties with 0.6.
    assert weighted_best_of_n(["a", "b", "b", "b"], [0.6, 0.3, 0.2, 0.1]) == {"a": 0.5, "b": 0.5}


def test_no_answer_votes_and_is_never_right() -> None:
    shares = majority_vote(["4", None, None, "4", "5"])
    assert shares == {"4": 0.5, None: 0.5}
    assert expected_score(shares, {"4": 1.0, None: 1.0}) == 0.5
    assert majority_vote([None]) == {None: 1.0}


@pytest.mark.parametrize("n", [1, 2, 5, 7, 32])
def test_blocks_are_disjoint_neighbours_and_as_many_as_fit(n: int) -> None:
    cut = blocks(n)
    for size in range(1, n + 1):
        assert cut.count[size - 1] == n // size
        rows = cut.inside[cut.of_size[size - 1] :][: n // size]
        assert rows.sum(1).tolist() == [size] * (n // size)
        assert (rows.sum(0) == cut.covered[:, size - 1]).all() and cut.covered[:, size - 1].max() == 1


def test_block_sums_agree_with_cutting_by_hand() -> None:
    random = np.random.default_rng(0)
    answers, worth = random.integers(0, 3, (4, 7)), random.random((4, 3))
    values = random.normal(size=(2, 4, 7))
    for n in range(1, 8):
        cuts = [(b, slice(i * n, i * n + n)) for b in range(4) for i in range(7 // n)]
        vote = sum(
            expected_score(majority_vote([str(a) for a in answers[b, c]]), {str(s): worth[b, s] for s in range(3)})
            for b, c in cuts
        )
        assert majority_block_sums(answers, worth)[n - 1] == pytest.approx(vote)
        assert best_block_sums(values)[:, n - 1] == pytest.approx(sum(values[:, b, c].max(-1) for b, c in cuts))
        assert total_block_sums(values[0])[n - 1] == pytest.approx(sum(values[0, b, c].sum() for b, c in cuts))


def test_blocks_are_unbiased_over_all_draws() -> None:
    """The mean over the blocks of a draw of 5 is, over all 3^5 draws, exactly what each smaller N is worth."""
    p, value = np.array([0.5, 0.3, 0.2]), np.array([0.1, 2.0, -1.0])
    draws = np.array(list(itertools.product(range(3), repeat=5)))
    chance = p[draws].prod(1)
    worth = np.array([[1.0, 0.0, 0.0]])
    count = blocks(5).count
    vote = sum(c * majority_block_sums(draw[None], worth) for c, draw in zip(chance, draws, strict=True)) / count
    best = sum(c * best_block_sums(value[draw][None]) for c, draw in zip(chance, draws, strict=True)) / count
    assert vote == pytest.approx(majority_accuracy(p, 5), abs=1e-12)
    assert best == pytest.approx(best_of_n_value(value, p, 5), abs=1e-12)


def test_bad_input() -> None:
    with pytest.raises(UsageError, match="0 completions"):
        majority_vote([])
    with pytest.raises(UsageError, match="as many scores"):
        best_of_n(["a"], [])
    with pytest.raises(UsageError, match="not a finite number"):
        weighted_best_of_n(["a"], [math.nan])
    for call in (lambda: majority_accuracy([1.0], 0), lambda: best_of_n_value([1.0], [1.0], 0), lambda: blocks(0)):
        with pytest.raises(UsageError, match="choose at least 1"):
            call()
    for probabilities in ([0.5, 0.4], [1.5, -0.5], []):
        with pytest.raises(UsageError, match="sum to 1"):
            majority_accuracy(probabilities, 2)
