"""What plans are worth: against exact values, brute force over all draws, and a slow hierarchy written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.aggregation import Answer, Floats, hierarchical, majority_accuracy, weighted_best_of_n
from cotune.difficulty.attempts import Attempts, attempts
from cotune.difficulty.plans import BEST, MAJORITY, WEIGHTED, Plan, measure, plans_at
from cotune.errors import UsageError

P = np.array([0.4, 0.35, 0.25])  # of the answers 0 (right), 1 and 2


def every_draw(n: int, ratings: Floats) -> tuple[Attempts, Floats]:
    """One question for each of the 3^n possible draws, and how likely each is; the answer alone sets the rating."""
    draws = np.array(list(itertools.product(range(3), repeat=n)))
    made = attempts(draws.astype(str).tolist(), draws == 0, np.ones(draws.shape), ratings[draws])
    return made, P[draws].prod(1)


def worth(n: int, ratings: Floats, aggregation: str) -> float:
    made, chance = every_draw(n, ratings)
    measured = measure(n, made)
    return float(measured.scores[measured.plans.index(Plan(aggregation))] @ chance)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_majority_is_worth_its_exact_accuracy(n: int) -> None:
    assert worth(n, np.ones(3), MAJORITY) == pytest.approx(majority_accuracy(P, n)[n - 1], abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_best_of_n_by_a_rating_that_knows_and_by_one_that_is_fooled(n: int) -> None:
    assert worth(n, np.array([0.9, 0.5, 0.1]), BEST) == pytest.approx(1 - 0.6**n, abs=1e-12)
    assert worth(n, np.array([0.1, 0.5, 0.9]), BEST) == pytest.approx(0.4**n, abs=1e-12)
    # Rated between the two wrong ones: no 1 was drawn, and not only 2.
    assert worth(n, np.array([0.5, 0.9, 0.1]), BEST) == pytest.approx(0.65**n - 0.25**n, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_weighted_best_of_n_is_a_vote_where_ratings_are_equal_and_counts_them_else(n: int) -> None:
    assert worth(n, np.full(3, 0.3), WEIGHTED) == pytest.approx(worth(n, np.ones(3), MAJORITY), abs=1e-12)
    # Rated 1, 1/2, 1/4, exact in binary: summed over the counts of each answer.
    total = 0.0
    for a, b in itertools.product(range(n + 1), repeat=2):
        c = n - a - b
        if c >= 0 and a >= max(b / 2, c / 4):
            ways = math.factorial(n) / (math.factorial(a) * math.factorial(b) * math.factorial(c))
            total += ways * 0.4**a * 0.35**b * 0.25**c / (1 + (a == b / 2) + (a == c / 4))
    assert worth(n, np.array([1.0, 0.5, 0.25]), WEIGHTED) == pytest.approx(total, abs=1e-12)


def test_smaller_plans_use_all_samples_in_disjoint_neighbours() -> None:
    made = attempts(
        [["a", "a", "b", "c", "b"]],
        [[1, 1, 0, 0, 0]],
        [[1, 10, 100, 1000, 10000]],
        [[0.2, 0.3, 0.1, 0.9, 1.0]],
    )
    two = measure(2, made)
    assert [p.name for p in two.plans] == ["majority", "best-of-N", "weighted best-of-N"]
    assert two.scores.tolist() == [[0.5], [0.5], [0.5]]  # (a, a) is right and (b, c) wrong; the fifth is left over
    assert two.tokens.tolist() == [[1111 / 2]] * 3
    one = measure(1, made)
    assert (one.scores.tolist(), one.tokens.tolist()) == ([[0.4]], [[11111 / 5]])
    assert measure(5, made).scores.tolist() == [[0.5], [0.0], [0.0]]  # a and b tie with two votes each


def test_equal_answers_are_worth_their_mean_score() -> None:
    made = attempts([["a", "a", "b"]], [[1.0, 0.5, 0.0]], [[1, 1, 1]])
    assert measure(3, made).scores.tolist() == [[0.75]]


def test_no_answer_at_all_and_only_right_ones() -> None:
    nothing = attempts([[None] * 4] * 2, np.ones((2, 4)), np.ones((2, 4)), np.ones((2, 4)))
    right = attempts([["a"] * 4] * 2, np.ones((2, 4)), np.ones((2, 4)), np.zeros((2, 4)))
    for n in (1, 2, 4):
        assert not measure(n, nothing).scores.any()
        assert (measure(n, right).scores == 1).all()


# ---- chains ----


def test_which_ratios_a_set_of_chains_serves() -> None:
    samples = attempts([["a"] * 8], np.ones((1, 8)), np.ones((1, 8)))
    chains = attempts([[["a"] * 4] * 2], np.ones((1, 2, 4)), np.ones((1, 2, 4)))  # two chains of four
    lengths = {n: [p.length for p in plans_at(n, samples, chains)] for n in (1, 2, 4, 6, 8)}
    assert lengths == {1: [1], 2: [1, 2], 4: [1, 2, 4], 6: [1, 3], 8: [1, 4]}
    assert [p.name for p in plans_at(4, samples, chains)][1:] == ["majority, 2 in a row", "majority, 4 in a row"]
    assert [p.length for p in plans_at(8, samples)] == [1]


def test_revisions_by_hand() -> None:
    samples = attempts([["x"] * 4], np.zeros((1, 4)), np.ones((1, 4)))
    chains = attempts(
        [[["b", "a", "a", "a"], ["c", "b", "b", "b"]]],
        [[[0, 1, 1, 1], [0, 0, 0, 0]]],
        [[[1, 2, 4, 8], [16, 32, 64, 128]]],
    )
    measured = measure(4, samples, chains)
    assert [p.length for p in measured.plans] == [1, 2, 4]
    # 2 in a row: b, a, c, b is b's. 4 in a row: the first chain says a, the second b.
    assert measured.scores.tolist() == [[0.0], [0.0], [0.5]]
    assert measured.tokens.tolist() == [[4.0], [1 + 2 + 16 + 32], [255 / 2]]


def test_hierarchy_by_hand() -> None:
    answers = [["a", "b", "b"], ["c", "c", "a"]]
    # b has 0.5 + 0.375 > 0.75 in the first chain and goes on with 0.5; c has 0.25 + 0.25 < 0.625 of a in the second.
    assert hierarchical(answers, [[0.75, 0.5, 0.375], [0.25, 0.25, 0.625]]) == {"a": 1.0}
    # Tied in the first chain, a and b go on with half of 0.5 each; a has 0.125 more from the second.
    assert hierarchical([["a", "b"], ["a", "c"]], [[0.5, 0.5], [0.125, 0.0]]) == {"a": 1.0}
    assert hierarchical([["a", "b"]], [[0.5, 0.5]]) == {"a": 0.5, "b": 0.5}


answers = st.sampled_from(["a", "b", "c", None])
ratings = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])


@settings(max_examples=100)
@given(st.lists(st.tuples(answers, ratings), min_size=1, max_size=6))
def test_a_hierarchy_of_chains_of_one_is_flat(drawn: list[tuple[Answer, float]]) -> None:
    said, rated = [a for a, _ in drawn], [r for _, r in drawn]
    assert hierarchical([[a] for a in said], [[r] for r in rated]) == weighted_best_of_n(said, rated)


@settings(max_examples=50)
@given(st.lists(st.tuples(answers, ratings), min_size=4, max_size=4), st.permutations(["a", "b", "c"]))
def test_names_of_answers_do_not_matter(drawn: list[tuple[Answer, float]], names: list[str]) -> None:
    renamed = dict(zip("abc", names, strict=True))
    said, rated = [a for a, _ in drawn], [r for _, r in drawn]
    scores = [float(a == "a") for a in said]
    first = measure(4, attempts([said], [scores], [[1] * 4], [rated]))
    second = measure(4, attempts([[renamed.get(a or "") for a in said]], [scores], [[1] * 4], [rated]))
    assert first.scores.tolist() == second.scores.tolist()


def test_a_chain_is_one_draw_of_its_whole_length() -> None:
    """Over all pairs of chains of two from a Markov chain, a vote is worth the sum over them (brute force)."""
    start, then = np.array([0.3, 0.7]), np.array([[0.8, 0.2], [0.4, 0.6]])  # right, wrong
    paths = list(itertools.product(range(2), repeat=2))
    pairs = list(itertools.product(paths, repeat=2))
    chance = np.array([math.prod(start[a] * then[a, b] for a, b in pair) for pair in pairs])
    drawn = np.array(pairs)
    chains = attempts(drawn.astype(str).tolist(), drawn == 0, np.ones(drawn.shape))
    samples = attempts([["x"] * 4] * 16, np.zeros((16, 4)), np.ones((16, 4)))
    measured = measure(4, samples, chains)
    credit = [0.5 if sum(map(sum, pair)) == 2 else float(sum(map(sum, pair)) < 2) for pair in pairs]
    row = measured.scores[measured.plans.index(Plan(MAJORITY, 2))]
    assert row.tolist() == credit
    first, second = 0.3, 0.3 * 0.8 + 0.7 * 0.4
    assert chance @ (drawn == 0).mean((1, 2)) == pytest.approx((first + second) / 2)


def test_bad_input() -> None:
    samples = attempts([["a"] * 3], np.ones((1, 3)), np.ones((1, 3)))
    with pytest.raises(UsageError, match="4 generations needs 4 samples of every question and 3 are left"):
        measure(4, samples)
    with pytest.raises(UsageError, match="choose at least 1"):
        measure(0, samples)
    with pytest.raises(UsageError, match="samples of 1 questions and chains of 2"):
        measure(2, samples, attempts([[["a", "b"]]] * 2, np.ones((2, 1, 2)), np.ones((2, 1, 2))))
