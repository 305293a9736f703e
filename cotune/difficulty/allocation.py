"""Which plan for which difficulty, what that gains at equal generations, and how many generations it saves.

Source: Snell et al. (arXiv 2408.03314; sheet 03): the best plan of a difficulty bin at N generations, chosen on one
fold of the bin's questions and scored on the other. As in the paper every question gets the same N; one of its own
for each bin, at no more generations a question on average, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.aggregation import Floats, Ints
from cotune.compare.stats import (
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    Finding,
    compare_paired,
    mean_of,
    mean_score,
    resampled,
)
from cotune.difficulty.attempts import Attempts
from cotune.difficulty.bins import (
    BINS,
    Agreement,
    agreement,
    certainty,
    difficulty_bins,
    mean_rating,
    pass_at_1,
)
from cotune.difficulty.plans import Measured, Plan, measure
from cotune.errors import UsageError
from cotune.values import of_n

OWN_N = ", own N"  # after the name of a difficulty: each bin has a number of generations of its own
ONE_CHOICE, ORACLE, BY_ENTROPY, BY_RATING = "one choice for all", "oracle", "predicted, entropy", "predicted, rating"


@dataclass(frozen=True, eq=False)
class Point:
    """One policy at `n` generations a question: expected `scores` and generated `tokens`, and its `plans`, [Q] each.

    Equal generations are not equal tokens, and tokens read are not in them: a revision also reads earlier attempts.
    `own` [Q] are the generations of each question where they differ; their mean is then at most `n`.
    """

    n: int
    scores: Floats
    tokens: Floats
    plans: tuple[Plan, ...]
    own: Ints | None = None

    @property
    def accuracy(self) -> float:
        return mean_of(self.scores)

    @property
    def estimate(self) -> Estimate:
        """The accuracy with its interval over questions: `stats.mean_score`."""
        return mean_score(self.scores)

    @property
    def generations(self) -> float:
        """What a question takes on average."""
        return float(self.n) if self.own is None else float(self.own.mean())


@dataclass(frozen=True, eq=False)
class Curve:
    """A policy over N, ascending. `estimation`: generations a question that told its difficulty; 0 if it needs none."""

    name: str
    estimation: int
    points: tuple[Point, ...]


def folds(bins: Ints, random: np.random.Generator) -> Ints:
    """0 or 1 for each question, [Q]: every bin is halved at random; with an odd number fold 0 has one more."""
    fold = np.empty(len(bins), dtype=np.int64)
    for b in np.unique(bins):
        members = random.permutation(np.flatnonzero(bins == b))
        fold[members] = np.arange(len(members)) % 2
    return fold


def two_fold(scores: Floats, bins: Ints, fold: Ints) -> Ints:
    """The plan that each question gets, [Q], from scores [P, Q]: the best one on the other fold of its bin.

    Ties, and a bin whose other fold is empty, go to the first plan (ours). The mean over questions of what they get is
    the paper's average over the swap, each fold weighing as many questions as it has.
    """
    choice = np.zeros(scores.shape[1], dtype=np.int64)
    for b in np.unique(bins):
        for half in (0, 1):
            judged, chosen_on = (bins == b) & (fold == half), (bins == b) & (fold != half)
            if chosen_on.any():
                means = [math.fsum(row) for row in scores[:, chosen_on]]  # exact sums: equal plans do tie
                choice[judged] = means.index(max(means))
    return choice


def chosen(name: str, estimation: int, measured: Sequence[Measured], bins: Ints, fold: Ints) -> Curve:
    """The compute-optimal policy: at every N the plans of `two_fold`."""
    points = []
    for at in measured:
        choice = two_fold(at.scores, bins, fold)
        every = np.arange(len(choice))
        points.append(
            Point(at.n, at.scores[choice, every], at.tokens[choice, every], tuple(at.plans[c] for c in choice))
        )
    return Curve(name, estimation, tuple(points))


def spread(
    name: str, estimation: int, measured: Sequence[Measured], sizes_shown: Sequence[int], bins: Ints, fold: Ints
) -> Curve:
    """At every N shown the plans and numbers of generations of the bins that score most together (ours).

    At most N a question on average, in either fold: `shared_out` counts the questions of the fold that is judged, whose
    bins are known, and values them by the other fold. `measured` holds every N that a bin can have, ascending.
    """
    points = []
    for place, at in [(i, at) for i, at in enumerate(measured) if at.n in sizes_shown]:
        sizes = np.full(len(bins), place, dtype=np.int64)  # where nothing is known N and the first plan
        choice = np.zeros(len(bins), dtype=np.int64)
        for half in (0, 1):
            on, judged = fold != half, fold == half
            if not (on.any() and judged.any()):
                continue
            inside = [bins == b for b in np.unique(bins[judged])]
            best = [_best_plans(measured, on & own if (on & own).any() else on) for own in inside]
            counts = np.array([int((judged & own).sum()) for own in inside])
            values = np.array([[value for value, _ in of_bin] for of_bin in best])
            shares = shared_out(values, counts, [m.n for m in measured], at.n)
            for own, of_bin, size in zip(inside, best, shares, strict=True):
                sizes[judged & own], choice[judged & own] = size, of_bin[size][1]
        each = [(measured[s], c, q) for q, (s, c) in enumerate(zip(sizes.tolist(), choice.tolist(), strict=True))]
        scores = np.array([m.scores[c, q] for m, c, q in each])
        tokens = np.array([m.tokens[c, q] for m, c, q in each])
        generations = np.array([m.n for m, _, _ in each], dtype=np.int64)
        points.append(Point(at.n, scores, tokens, tuple(m.plans[c] for m, c, _ in each), generations))
    return Curve(name, estimation, tuple(points))


def _best_plans(measured: Sequence[Measured], questions: NDArray[np.bool_]) -> list[tuple[float, int]]:
    """Of each N the best mean over these questions and the plan that has it, the first of equal ones."""
    found = []
    for at in measured:
        means = [mean_of(row[questions]) for row in at.scores]
        found.append((max(means), means.index(max(means))))
    return found


def shared_out(values: Floats, counts: Ints, sizes: Sequence[int], n: int) -> tuple[int, ...]:
    """The place in `sizes` for each bin: the largest sum of counts x values [B, sizes] at n generations a question.

    Exact, bin by bin over all that can have been spent so far; of equal sums (to 12 digits) the one of fewest
    generations. UsageError where n is below all sizes.
    """
    if n < min(sizes):
        raise UsageError(f"{n} generations a question are fewer than the smallest number measured, {min(sizes)}.")
    budget = n * int(counts.sum())
    best = np.full(budget + 1, -np.inf)  # the sum at exactly so many generations
    best[0] = 0.0
    taken = []
    for count, of_bin in zip(counts.tolist(), values, strict=True):
        rows = np.full((len(sizes), budget + 1), -np.inf)
        for row, size, value in zip(rows, sizes, of_bin, strict=True):
            if count * size <= budget:
                row[count * size :] = best[: budget + 1 - count * size] + count * value
        taken.append(rows.argmax(0))
        best = rows.max(0)
    left, places = int(np.round(best, 12).argmax()), []
    for count, chosen_at in zip(counts.tolist()[::-1], taken[::-1], strict=True):
        places.append(int(chosen_at[left]))
        left -= count * sizes[places[-1]]
    return tuple(places[::-1])


def accuracy_by_bin(at: Measured, bins: Ints, count: int = BINS) -> Floats:
    """Mean score of every plan in every bin, [P, count], NaN where a bin is empty: which plan suits which difficulty.

    For looking at, not for choosing: the best number of a column is the best of several estimates, hence too high.
    """
    inside = (bins[:, None] == np.arange(count)).astype(np.float64)
    sizes = inside.sum(0)
    means: Floats = np.where(sizes > 0, at.scores @ inside / np.maximum(sizes, 1), np.nan)
    return means


def uniform(aggregation: str, measured: Sequence[Measured]) -> Curve:
    """Parallel samples under one aggregation, the same for every question; UsageError where N = 2 or more lacks it."""
    points = []
    for at in measured:
        plan = Plan(aggregation) if at.n > 1 else at.plans[0]  # of one answer all aggregations are the same
        if plan not in at.plans:
            raise UsageError(f"There is no {of_n(aggregation, at.n)} generations; rate the attempts first.")
        place = at.plans.index(plan)
        points.append(Point(at.n, at.scores[place], at.tokens[place], (plan,) * at.scores.shape[1]))
    return Curve(aggregation, 0, tuple(points))


def gain(ours: Point, theirs: Point) -> Finding:
    """`ours` - `theirs` at equal generations, paired by question: `stats.compare_paired` (the bootstrap for fractions).

    It is about other questions under the plans as they were chosen. Other choices are not in its interval, which is
    too narrow where the choice hangs on luck (docs/findings.md has its coverage).
    """
    if ours.n != theirs.n:
        raise UsageError(f"{ours.n} and {theirs.n} generations cannot be compared as equal; take points of one N.")
    return compare_paired(ours.scores, theirs.scores)


# ---- the figure of merit ----


@dataclass(frozen=True)
class Match:
    """Generations a question that reach an accuracy, with their interval; None: no measured N reaches it."""

    generations: int | None
    low: int | None
    high: int | None


def generations_to_match(curve: Curve, reference: Point, charged: bool) -> Match:
    """The fewest generations at which `curve` is at least as accurate as `reference` (Snell et al.'s figure of merit).

    Only measured N count, nothing is interpolated (ours). `charged` adds the generations that estimated the
    difficulty, which the paper leaves out. The interval is that of the percentile bootstrap over questions, both
    policies on the same ones, with the plans as they were chosen; an end beyond all measured N is None.
    """
    n = len(reference.scores)
    scores = np.stack([*(p.scores for p in curve.points), reference.scores])
    cost = np.array([p.n for p in curve.points], dtype=np.float64) + charged * curve.estimation

    def fewest(means: Floats) -> Floats:  # [R, points + 1] -> [R]
        reaches = means[:, :-1] >= means[:, -1:] - 1e-9  # equal scores may be summed in different orders
        least: Floats = np.where(reaches, cost, np.inf).min(1)
        return least

    drawn = np.sort(fewest(resampled(n) @ scores.T / n))
    tail = round((1 - CONFIDENCE) / 2 * (RESAMPLES + 1)) - 1
    ends = (fewest(scores.mean(1)[None])[0], drawn[tail], drawn[-1 - tail])
    return Match(*(int(end) if np.isfinite(end) else None for end in ends))


# ---- all of it ----


@dataclass(frozen=True, eq=False)
class ByDifficulty:
    """`curves`: every uniform plan, one choice for all questions, then the choices by difficulty, by name; each choice
    with N for every question and (`OWN_N`) with an own one for each bin, of one choice for all the best up to N.

    `agreements` of each predicted difficulty with the oracle's, `bins` [Q] of each difficulty; `measured` is what there
    was to choose from.
    """

    measured: tuple[Measured, ...]
    curves: dict[str, Curve]
    agreements: dict[str, Agreement]
    bins: dict[str, Ints]

    @property
    def choices(self) -> list[str]:
        """The names of the policies that choose by difficulty."""
        return [name + own for own in ("", OWN_N) for name in self.bins if name + own in self.curves]


def by_difficulty(
    samples: Attempts,
    chains: Attempts | None,
    sizes: Sequence[int],
    oracle: int,
    few: int,
    random: np.random.Generator,
    own: Sequence[int] = (),
) -> ByDifficulty:
    """Curves over `sizes` of uniform and compute-optimal policies; with `own`, where a bin has one of these N, too.

    The first `oracle` samples of every question tell its pass@1, the first `few` of these its predicted difficulty; all
    plans are judged on the other samples (the paper draws separate ones too). Without that split a question would be
    called easy where the very samples of the vote were lucky. Chains are not used for difficulty. UsageError unless
    1 <= few <= oracle < samples, and where a size needs more samples than are left.
    """
    if not sizes:
        raise UsageError("A curve over N needs at least one number of generations.")
    if not 1 <= few <= oracle:
        raise UsageError(f"Difficulty is predicted from {few} of {oracle} samples; use at least 1 and at most all.")
    estimate, judged = samples.split(oracle)
    first = estimate if few == oracle else estimate.split(few)[0]
    measured = tuple(measure(n, judged, chains) for n in sorted(set(sizes)))
    curves = {name: uniform(name, measured) for name in dict.fromkeys(p.aggregation for p in measured[-1].plans)}
    nobody = np.zeros(samples.questions, dtype=np.int64)
    half = folds(nobody, random)
    curves[ONE_CHOICE] = chosen(ONE_CHOICE, 0, measured, nobody, half)
    free = tuple(measure(n, judged, chains) for n in sorted({*sizes, *own})) if own else ()
    if free:
        curves[ONE_CHOICE + OWN_N] = spread(ONE_CHOICE + OWN_N, 0, free, sizes, nobody, half)
    eases = {ORACLE: (oracle, pass_at_1(estimate)), BY_ENTROPY: (few, certainty(first))}
    if samples.ratings is not None:
        eases[BY_RATING] = few, mean_rating(first)
    bins = {name: difficulty_bins(ease, BINS) for name, (_, ease) in eases.items()}
    halves = {name: folds(bins[name], random) for name in eases}
    for name, (cost, _) in eases.items():
        curves[name] = chosen(name, cost, measured, bins[name], halves[name])
    for name, (cost, _) in eases.items() if free else ():
        curves[name + OWN_N] = spread(name + OWN_N, cost, free, sizes, bins[name], halves[name])
    known = eases[ORACLE][1]
    agreements = {name: agreement(ease, known) for name, (_, ease) in eases.items() if name != ORACLE}
    return ByDifficulty(measured, curves, agreements, bins)
