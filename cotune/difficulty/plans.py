"""Inference plans of N generations: how many attempts in a row, how the answers become one, what that is worth.

Source: Snell et al. (arXiv 2408.03314; sheet 03). Beam search is left out: it needs a verifier of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cotune.aggregation import (
    Answer,
    Floats,
    Shares,
    best_of_n,
    check_n,
    expected_score,
    hierarchical,
    majority_vote,
)
from cotune.difficulty.attempts import Attempts
from cotune.errors import UsageError

Grid = Sequence[Sequence[Answer]]  # chains of attempts
Rated = Sequence[Sequence[float]]


def _majority(answers: Grid, ratings: Rated) -> Shares:
    return majority_vote(_flat(answers))


def _best(answers: Grid, ratings: Rated) -> Shares:
    return best_of_n(_flat(answers), [r for chain in ratings for r in chain])


def _flat(answers: Grid) -> list[Answer]:
    return [answer for chain in answers for answer in chain]


MAJORITY, BEST, WEIGHTED = "majority", "best-of-N", "weighted best-of-N"
_AGGREGATIONS: Mapping[str, Callable[[Grid, Rated], Shares]] = {
    MAJORITY: _majority,
    BEST: _best,
    WEIGHTED: hierarchical,
}


@dataclass(frozen=True)
class Plan:
    """N generations as N / `length` chains of `length` attempts each, and which of their answers is given.

    `length` 1 is parallel sampling, N one chain of revisions: the paper's ratio sequential : parallel is
    `length` : N / `length`.
    """

    aggregation: str
    length: int = 1

    @property
    def name(self) -> str:
        return self.aggregation if self.length == 1 else f"{self.aggregation}, {self.length} in a row"


@dataclass(frozen=True, eq=False)
class Measured:
    """P plans of `n` generations on Q questions: expected `scores` and generated `tokens` of one answer, [P, Q]."""

    n: int
    plans: tuple[Plan, ...]
    scores: Floats
    tokens: Floats


def plans_at(n: int, samples: Attempts, chains: Attempts | None = None) -> Iterator[Plan]:
    """All plans of n generations that the attempts can serve, majority of parallel samples first.

    One generation is one plan: there is nothing to aggregate. Rated plans need ratings. UsageError where there are
    fewer than n samples.
    """
    check_n(n)
    if samples.chains < n:
        raise UsageError(
            f"A plan of {n} generations needs {n} samples of every question and {samples.chains} are left for it; "
            "draw more, or leave this N out."
        )
    for length in range(1, n + 1):
        source = samples if length == 1 else chains
        if source is None or n % length or length > source.length or n // length > source.chains:
            continue
        rated = n > 1 and source.ratings is not None
        for aggregation in (MAJORITY, BEST, WEIGHTED) if rated else (MAJORITY,):
            yield Plan(aggregation, length)


def measure(n: int, samples: Attempts, chains: Attempts | None = None) -> Measured:
    """What each plan of `plans_at` is worth on every question.

    The mean over as many disjoint neighbours as the attempts have, so no attempt serves one plan twice; each is an
    unbiased estimate of a fresh draw. UsageError like `plans_at`, and where chains are of other questions.
    """
    if chains is not None and chains.questions != samples.questions:
        raise UsageError(
            f"There are samples of {samples.questions} questions and chains of {chains.questions}; "
            "give both of the same ones."
        )
    plans = tuple(plans_at(n, samples, chains))
    scores, tokens = np.empty((2, len(plans), samples.questions))
    for length in dict.fromkeys(plan.length for plan in plans):
        rows = [i for i, plan in enumerate(plans) if plan.length == length]
        source = samples if length == 1 or chains is None else chains
        scores[rows], tokens[rows] = _measured([plans[i].aggregation for i in rows], length, n, source)
    return Measured(n, plans, scores, tokens)


def _measured(aggregations: Sequence[str], length: int, n: int, source: Attempts) -> tuple[Floats, Floats]:
    """Expected scores [A, Q] and generated tokens [Q] of n generations, of which `length` are in a row."""
    wide = n // length
    starts = range(0, source.chains - wide + 1, wide)
    scores = np.empty((len(aggregations), source.questions, len(starts)))
    ratings = np.zeros_like(source.scores) if source.ratings is None else source.ratings  # a vote looks at none
    for q in range(source.questions):
        for place, start in enumerate(starts):
            draw = (q, slice(start, start + wide), slice(None, length))
            answers, rated = source.predictions[draw].tolist(), ratings[draw].tolist()
            worth = _worth(answers, source.scores[draw].tolist())
            for a, aggregation in enumerate(aggregations):
                scores[a, q, place] = expected_score(_AGGREGATIONS[aggregation](answers, rated), worth)
    used = source.tokens[:, : len(starts) * wide, :length].sum((1, 2)) / len(starts)
    return scores.mean(-1), used


def _worth(answers: Grid, scores: Rated) -> Mapping[Answer, float]:
    """Mean score of each answer in the draw; a grader gives equal answers equal scores, or nearly."""
    graded: dict[Answer, list[float]] = {}
    for answer, score in zip(_flat(answers), (s for chain in scores for s in chain), strict=True):
        graded.setdefault(answer, []).append(score)
    return {answer: sum(given) / len(given) for answer, given in graded.items()}
