"""The choice by two-fold cross-validation: by hand, on populations whose optimum is known, and without leaks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.aggregation import majority_accuracy
from cotune.compare.stats import mean_score
from cotune.difficulty.allocation import (
    BY_ENTROPY,
    BY_RATING,
    ONE_CHOICE,
    ORACLE,
    Curve,
    Match,
    Point,
    accuracy_by_bin,
    by_difficulty,
    chosen,
    folds,
    gain,
    generations_to_match,
    shared_out,
    spread,
    two_fold,
    uniform,
)
from cotune.difficulty.attempts import Attempts, attempts
from cotune.difficulty.bins import difficulty_bins, pass_at_1
from cotune.difficulty.plans import BEST, MAJORITY, WEIGHTED, Measured, Plan, measure
from cotune.errors import UsageError

# ---- folds and choice ----


def test_every_bin_is_halved() -> None:
    bins = np.array([0, 0, 0, 0, 1, 1, 1, 2])
    fold = folds(bins, np.random.default_rng(0))
    assert [int((fold[bins == b] == 0).sum()) for b in range(3)] == [2, 2, 1]
    assert [int((fold[bins == b] == 1).sum()) for b in range(3)] == [2, 1, 0]
    halves = np.mean([folds(bins, np.random.default_rng(seed)) for seed in range(400)], axis=0)
    assert halves[:4] == pytest.approx([0.5] * 4, abs=0.1)  # anyone may be in either half


def test_each_half_gets_what_is_best_on_the_other() -> None:
    scores = np.array([[1.0, 0.0, 1.0, 0.5, 0.0], [0.0, 1.0, 0.5, 1.0, 1.0]])
    bins, fold = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 0])
    # Question 0 is best under plan 0, so question 1 gets it, and the other way round: both lose. Question 4 is alone.
    assert two_fold(scores, bins, fold).tolist() == [1, 0, 1, 0, 0]


def test_ties_and_lonely_questions_keep_the_first_plan() -> None:
    scores = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.2, 0.2]])
    alike, fold = np.zeros(3, dtype=int), np.array([1, 1, 1])
    assert two_fold(scores, alike, fold).tolist() == [0, 0, 0]
    assert two_fold(scores, alike, np.array([1, 1, 0]))[2] == 1  # on questions 0 and 1: 0.3, 0.5, 0.4
    tied = np.array([[0.1, 0.2, 0.3, 0], [0.3, 0.2, 0.1, 0]])  # 0.1 + 0.2 + 0.3 in two orders
    assert two_fold(tied, np.zeros(4, dtype=int), np.array([1, 1, 1, 0]))[3] == 0
    assert two_fold(scores, np.arange(3), np.zeros(3, dtype=int)).tolist() == [0, 0, 0]  # one question a bin


@settings(max_examples=60)
@given(st.integers(0, 10_000))
def test_no_question_has_a_say_in_its_own_plan(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores, bins = random.random((3, 12)), random.integers(0, 3, 12)
    fold, q = folds(bins, random), int(random.integers(12))
    before = two_fold(scores, bins, fold)[q]
    scores[:, q] = random.random(3)
    assert two_fold(scores, bins, fold)[q] == before


def curve_of(name: str, sizes: list[int], scores: list[list[float]], estimation: int = 0) -> Curve:
    plan = (Plan(MAJORITY),) * len(scores[0])
    tokens = np.ones(len(scores[0]))
    return Curve(
        name, estimation, tuple(Point(n, np.array(s), tokens, plan) for n, s in zip(sizes, scores, strict=True))
    )


def test_curves_hold_what_each_question_got() -> None:
    plans = (Plan(MAJORITY), Plan(BEST))
    scores, tokens = np.array([[1.0, 0.0], [0.5, 0.25]]), np.array([[10.0, 20.0], [30.0, 40.0]])
    measured = [Measured(4, plans, scores, tokens)]
    point = chosen("x", 7, measured, np.array([0, 0]), np.array([0, 1])).points[0]
    # On question 1 best-of-N is better, so question 0 gets it; on question 0 majority is.
    assert (point.scores.tolist(), point.tokens.tolist()) == ([0.5, 0.0], [30.0, 20.0])
    assert point.plans == (plans[1], plans[0])
    assert point.accuracy == 0.25
    assert uniform(BEST, measured).points[0].scores.tolist() == [0.5, 0.25]
    with pytest.raises(UsageError, match="no weighted best-of-N of 4 generations"):
        uniform(WEIGHTED, measured)


def test_accuracy_of_plans_in_bins() -> None:
    at = Measured(4, (Plan(MAJORITY), Plan(BEST)), np.array([[1.0, 0.5, 0.0], [0.25, 0.75, 1.0]]), np.ones((2, 3)))
    means = accuracy_by_bin(at, np.array([2, 2, 0]))
    assert means[:, [0, 2]].tolist() == [[0.0, 0.75], [1.0, 0.5]]
    assert np.isnan(means[:, [1, 3, 4]]).all()


def test_the_gain_is_paired_and_of_equal_generations() -> None:
    ours, theirs = curve_of("a", [4, 8], [[0.5, 1.0, 0.5, 0.75]] * 2).points, curve_of("b", [4], [[0.25] * 4]).points
    found = gain(ours[0], theirs[0])
    assert found.estimate.mean == pytest.approx(0.4375)
    assert found.test == "sign-flip"
    assert ours[0].estimate == mean_score([0.5, 1.0, 0.5, 0.75])
    nothing = gain(ours[0], ours[0])
    assert (nothing.estimate.mean, nothing.p) == (0, 1)
    with pytest.raises(UsageError, match="8 and 4 generations"):
        gain(ours[1], theirs[0])


# ---- a population whose optimum is known ----

EASY, HARD = (0.7, 0.3), (0.3, 0.7)  # two answers, the right one first
N = 9


def two_kinds(random: np.random.Generator, questions: int, per: int) -> Attempts:
    """Half the questions easy, half hard. On easy ones the wrong answer rates higher, on hard ones the right one."""
    right = random.random((questions, per)) < np.where(np.arange(questions) % 2 == 0, EASY[0], HARD[0])[:, None]
    knows = np.arange(questions)[:, None] % 2 == 1
    return attempts(np.where(right, "a", "b").tolist(), right, np.ones(right.shape), np.where(right == knows, 0.9, 0.1))


def test_the_known_optimum_is_found_and_its_value_is_right() -> None:
    """A vote is worth 0.9012 on easy and 0.0988 on hard questions, best-of-9 by rating 0.7^9 and 1 - 0.7^9."""
    vote = majority_accuracy([EASY, HARD], N)[:, N - 1]
    best = np.array([EASY[0] ** N, 1 - HARD[1] ** N])
    assert vote == pytest.approx([0.901191, 0.098809], abs=1e-6)
    made = two_kinds(np.random.default_rng(0), 400, 40 + 6 * N)
    found = by_difficulty(made, None, [1, N], 40, 10, np.random.default_rng(1))
    at = {name: curve.points[1] for name, curve in found.curves.items()}
    assert at[MAJORITY].accuracy == pytest.approx(vote.mean(), abs=0.02)
    assert at[BEST].accuracy == pytest.approx(best.mean(), abs=0.02)
    # With 40 samples pass@1 tells 0.7 from 0.3 nearly always; the middle bin mixes the two kinds.
    easy = found.bins[ORACLE] < 2
    assert {plan.aggregation for plan, e in zip(at[ORACLE].plans, easy, strict=True) if e} == {MAJORITY}
    assert {plan.aggregation for plan, b in zip(at[ORACLE].plans, found.bins[ORACLE], strict=True) if b > 2} == {BEST}
    optimum = (vote[0] + best[1]) / 2
    assert at[ORACLE].scores[easy].mean() == pytest.approx(vote[0], abs=0.02)
    assert at[ORACLE].accuracy > optimum - 0.12
    seen = gain(at[ORACLE], at[MAJORITY]).estimate
    assert seen.low is not None and seen.low > 0.2
    # 0.7 and 0.3 are as uncertain as each other: entropy predicts nothing, by construction.
    assert abs(found.agreements[BY_ENTROPY].correlation or 1) < 0.15
    assert at[BY_ENTROPY].accuracy < at[ORACLE].accuracy - 0.2
    # Mean rating is 0.34 on easy and 0.34 on hard ones, nothing either.
    assert abs(found.agreements[BY_RATING].correlation or 1) < 0.15
    assert found.curves[ORACLE].points[0].scores.tolist() == found.curves[MAJORITY].points[0].scores.tolist()
    assert found.curves[ORACLE].estimation == 40 and found.curves[BY_ENTROPY].estimation == 10


def test_with_true_bins_the_choice_reaches_the_optimum() -> None:
    made = two_kinds(np.random.default_rng(2), 400, 6 * N)
    bins = np.arange(400) % 2
    point = chosen("known", 0, [measure(N, made)], bins, folds(bins, np.random.default_rng(3))).points[0]
    assert point.accuracy == pytest.approx((0.901191 + 1 - 0.7**9) / 2, abs=0.015)


# ---- no leak ----


def coin_gain(seed: int, judged: bool) -> float:
    """Gain of oracle bins where every question is the same coin and ratings know nothing."""
    random = np.random.default_rng(seed)
    right = random.random((60, 24)) < 0.5
    made = attempts(np.where(right, "a", "b").tolist(), right, np.ones(right.shape), random.random(right.shape))
    estimate, rest = made.split(12)
    measured = [measure(12, rest)]
    bins = difficulty_bins(pass_at_1(rest if judged else estimate))
    ours = chosen("x", 0, measured, bins, folds(bins, random)).points[0]
    return ours.accuracy - uniform(MAJORITY, measured).points[0].accuracy


def test_labels_without_meaning_gain_nothing_on_average_and_would_with_the_judged_samples() -> None:
    gains = np.array([coin_gain(seed, judged=False) for seed in range(80)])
    assert abs(gains.mean()) < 3 * gains.std(ddof=1) / math.sqrt(len(gains))
    leaked = np.array([coin_gain(seed, judged=True) for seed in range(20)])
    assert leaked.mean() > 0.1


def test_shuffled_labels_gain_nothing_on_average() -> None:
    """Answers, ratings and lengths as in a population where difficulty helps, and scores dealt out anew."""
    gains: dict[str, list[float]] = {ORACLE: [], BY_ENTROPY: [], BY_RATING: []}
    for seed in range(60):
        random = np.random.default_rng(seed)
        made = two_kinds(random, 40, 16)
        shuffled = random.permutation(made.scores.ravel()).reshape(made.scores.shape)
        found = by_difficulty(replace(made, scores=shuffled), None, [8], 8, 8, random)
        for name, of_name in gains.items():
            of_name.append(found.curves[name].points[0].accuracy - found.curves[MAJORITY].points[0].accuracy)
    for of_name in gains.values():
        assert abs(np.mean(of_name)) < 3 * np.std(of_name) / math.sqrt(len(of_name))


def test_choosing_among_plans_of_pure_luck_gains_nothing_and_in_sample_would() -> None:
    random = np.random.default_rng(5)
    crossed, in_sample = [], []
    for _ in range(400):
        scores, bins = random.integers(0, 2, (6, 30)).astype(float), np.arange(30) % 5
        choice = two_fold(scores, bins, folds(bins, random))
        crossed.append(scores[choice, np.arange(30)].mean() - 0.5)
        in_sample.append(np.mean([scores[:, bins == b].mean(1).max() for b in range(5)]) - 0.5)
    assert abs(np.mean(crossed)) < 3 * np.std(crossed) / 20
    assert np.mean(in_sample) > 0.15


# ---- the figure of merit ----


def test_generations_to_match_by_hand() -> None:
    sizes = [1, 4, 16, 64]
    curve = curve_of("by difficulty", sizes, [[0.2] * 5, [0.5] * 5, [0.7] * 5, [0.8] * 5], estimation=10)
    reference = curve_of("uniform", sizes, [[0.2] * 5, [0.4] * 5, [0.5] * 5, [0.75] * 5]).points
    assert generations_to_match(curve, reference[2], charged=False) == Match(4, 4, 4)
    assert generations_to_match(curve, reference[2], charged=True) == Match(14, 14, 14)
    assert generations_to_match(curve, reference[3], charged=False) == Match(64, 64, 64)
    assert generations_to_match(curve, reference[0], charged=False) == Match(1, 1, 1)
    never = curve_of("worse", sizes, [[0.1] * 5] * 4)
    assert generations_to_match(never, reference[0], charged=True) == Match(None, None, None)


def test_the_interval_of_the_match_covers_what_questions_decide() -> None:
    """Half the questions gain at N = 4 what the others lose; whether 4 is enough hangs on who is drawn."""
    scores = [[1.0, 0.0] * 10, [1.0] * 20]
    found = generations_to_match(curve_of("ours", [4, 16], scores), curve_of("u", [16], [[0.5] * 20]).points[0], False)
    assert found == Match(4, 4, 16)


def test_a_dip_behind_a_match_does_not_undo_it() -> None:
    curve = curve_of("dips", [1, 4, 16], [[0.4] * 3, [0.9] * 3, [0.6] * 3])
    assert generations_to_match(curve, curve_of("u", [16], [[0.7] * 3]).points[0], False).generations == 4


# ---- all of it, and the edges ----


def test_same_seed_same_result() -> None:
    made = two_kinds(np.random.default_rng(6), 30, 16)
    first, second = (by_difficulty(made, None, [4, 1, 4], 8, 4, np.random.default_rng(7)) for _ in range(2))
    assert list(first.curves) == [MAJORITY, BEST, WEIGHTED, ONE_CHOICE, ORACLE, BY_ENTROPY, BY_RATING]
    for name, curve in first.curves.items():
        assert [p.n for p in curve.points] == [1, 4]
        assert [p.scores.tolist() for p in curve.points] == [p.scores.tolist() for p in second.curves[name].points]


@pytest.mark.parametrize(("answer", "score"), [(None, 0.0), ("a", 1.0)])
def test_all_without_an_answer_and_all_right(answer: str | None, score: float) -> None:
    made = attempts([[answer] * 8] * 6, np.ones((6, 8)), np.ones((6, 8)))
    found = by_difficulty(made, None, [1, 4], 4, 2, np.random.default_rng(0))
    assert {point.accuracy for curve in found.curves.values() for point in curve.points} == {score}
    assert set(found.bins[ORACLE]) == set(found.bins[BY_ENTROPY]) == {2}
    assert BY_RATING not in found.curves
    assert found.agreements[BY_ENTROPY].correlation is None
    for name in (ORACLE, BY_ENTROPY):
        assert generations_to_match(found.curves[name], found.curves[MAJORITY].points[1], False) == Match(1, 1, 1)


def test_five_questions_one_a_bin_are_the_uniform_plan() -> None:
    scores = np.arange(5)[:, None] / 5 > np.linspace(0.1, 0.9, 8)[None]
    made = attempts(np.where(scores, "a", "b").tolist(), scores, np.ones((5, 8)), np.where(scores, 0.1, 0.9))
    found = by_difficulty(made, None, [4], 4, 4, np.random.default_rng(0))
    assert found.curves[ORACLE].points[0].scores.tolist() == found.curves[MAJORITY].points[0].scores.tolist()


def test_chains_enter_the_choice() -> None:
    """Revision mends every first attempt, and sampling never does: all bins take the longest chain."""
    samples = attempts([["b"] * 8] * 10, np.zeros((10, 8)), np.ones((10, 8)))
    said = [[["b", "a", "a", "a"]]] * 10
    chains = attempts(said, np.array(said) == "a", np.ones((10, 1, 4)))
    found = by_difficulty(samples, chains, [1, 4], 4, 4, np.random.default_rng(0))
    assert {plan.name for plan in found.curves[ORACLE].points[1].plans} == {"majority, 4 in a row"}
    assert found.curves[ORACLE].points[1].accuracy == 1
    assert found.curves[MAJORITY].points[1].accuracy == 0


def test_bad_input() -> None:
    made = two_kinds(np.random.default_rng(0), 6, 8)
    random = np.random.default_rng(0)
    with pytest.raises(UsageError, match="8 generations needs 8 samples of every question and 4 are left"):
        by_difficulty(made, None, [8], 4, 2, random)
    for oracle, few in ((4, 5), (4, 0)):
        with pytest.raises(UsageError, match=f"predicted from {few} of 4 samples"):
            by_difficulty(made, None, [1], oracle, few, random)
    with pytest.raises(UsageError, match="Of 8 samples a question, 8 cannot be set apart"):
        by_difficulty(made, None, [1], 8, 2, random)
    with pytest.raises(UsageError, match="at least one number of generations"):
        by_difficulty(made, None, [], 4, 2, random)


# ---- an N of its own for each bin ----


def test_generations_are_shared_out_exactly() -> None:
    """Three bins of 2, 1 and 1 questions, N = 2: eight generations. By hand: the last bin takes 4, the first ones 1."""
    values = np.array([[0.9, 0.9, 0.95], [0.1, 0.1, 0.1], [0.2, 0.5, 0.9]])
    counts = np.array([2, 1, 1])
    assert shared_out(values, counts, [1, 2, 4], 2) == (0, 0, 2)
    assert shared_out(values, counts, [1, 2, 4], 1) == (0, 0, 0)
    assert shared_out(values, counts, [1, 2, 4], 4) == (2, 0, 2)  # what gains nothing takes the fewest
    with pytest.raises(UsageError, match="fewer than the smallest"):
        shared_out(values, counts, [2, 4, 8], 1)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 4))
def test_no_more_generations_than_allowed_on_average_in_either_fold(seed: int, questions: int, count: int) -> None:
    random = np.random.default_rng(seed)
    measured = [
        Measured(n, (Plan(MAJORITY), Plan(BEST)), random.random((2, questions)), random.random((2, questions)))
        for n in (1, 2, 4)
    ]
    bins = random.integers(count, size=questions)
    fold = folds(bins, random)
    for at, point in zip(measured, spread("x", 0, measured, (1, 2, 4), bins, fold).points, strict=True):
        assert point.own is not None
        assert point.generations <= at.n
        for half in (0, 1):
            assert not (fold == half).any() or point.own[fold == half].mean() <= at.n
        for q, (n, plan) in enumerate(zip(point.own.tolist(), point.plans, strict=True)):
            own = next(m for m in measured if m.n == n)
            assert point.scores[q] == own.scores[own.plans.index(plan), q]


def test_shared_out_is_the_best_of_all_combinations() -> None:
    random = np.random.default_rng(5)
    for _ in range(30):
        bins, sizes = int(random.integers(1, 4)), [1, 2, 3, 5]
        values, counts = random.random((bins, 4)), random.integers(1, 6, size=bins)
        n = int(random.integers(1, 6))
        every = [
            sum(c * v[s] for c, v, s in zip(counts, values, places, strict=True))
            for places in product(range(4), repeat=bins)
            if sum(c * sizes[s] for c, s in zip(counts, places, strict=True)) <= n * counts.sum()
        ]
        found = shared_out(values, counts, sizes, n)
        assert sum(c * sizes[s] for c, s in zip(counts, found, strict=True)) <= n * counts.sum()
        assert sum(c * v[s] for c, v, s in zip(counts, values, found, strict=True)) == pytest.approx(max(every))


def test_an_n_of_its_own_beats_the_same_n_where_the_bins_differ() -> None:
    """Easy questions are always right; hard ones are right in 0.6 of two answers, and gain from every other vote."""
    exact = [[majority_accuracy([p, 1 - p], 16)[n - 1] for p in (1.0, 0.6)] for n in range(1, 17)]
    measured = [
        Measured(n, (Plan(MAJORITY),), np.repeat([right], 20, axis=1), np.full((1, 40), float(n)))
        for n, right in enumerate(exact, 1)
    ]
    bins, sizes = np.repeat([0, 1], 20), (1, 2, 4, 8)
    fold = folds(bins, np.random.default_rng(0))
    own = spread("x", 4, measured, sizes, bins, fold)
    same = chosen("x", 0, [m for m in measured if m.n in sizes], bins, fold)
    assert [p.n for p in own.points] == [1, 2, 4, 8]
    assert [[p.own[0], p.own[-1]] for p in own.points if p.own is not None] == [[1, 1], [1, 3], [1, 7], [1, 15]]
    assert [p.accuracy for p in own.points] == pytest.approx([(1 + exact[n - 1][1]) / 2 for n in (1, 3, 7, 15)])
    # Four on average are as good as eight for everybody; telling the difficulty took four.
    assert generations_to_match(own, same.points[3], charged=False).generations == 4
    assert generations_to_match(own, same.points[3], charged=True).generations == 8
