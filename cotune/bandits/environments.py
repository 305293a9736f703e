"""Environments for bandits: outcomes with known probabilities per (prompt, query), drawn synthetically or from a cache.

A completion is one of M outcomes of its (prompt, query); with cached completions these are the M completions, each as
likely. So true values are exact sums, not simulations. Utilities are IAPO's (arXiv 2508.10030): the objectives' part of
a majority vote or of a best-of-N, minus the weighted cost of all N completions. Knows nothing of learners.

Axis letters: C contexts, P prompts, X queries, M outcomes, K objectives, S answers, N numbers of completions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cotune.aggregation import (
    Answer,
    Floats,
    Ints,
    best_block_sums,
    best_of_n_value,
    check_n,
    majority_accuracy,
    majority_block_sums,
    total_block_sums,
)
from cotune.errors import DataError, UsageError

Drawn = tuple[int, Ints, Ints]  # B pulls of N completions: prompt, queries [B, 1], outcomes [B, N]


class Outcomes(ABC):
    """`probability` and `cost` broadcast to [P, X, M], `weights` [C, K + 1] with cost's last, all at least 0.

    `train` are the queries that pulls draw from, evenly and with replacement; the others are `test`.
    """

    def __init__(
        self, probability: ArrayLike, cost: ArrayLike, weights: ArrayLike, n_max: int, train: Sequence[int] | Ints
    ) -> None:
        self.probability = np.asarray(probability, dtype=np.float64)
        self.cost = np.broadcast_to(np.asarray(cost, dtype=np.float64), self.probability.shape)
        self.weights = np.asarray(weights, dtype=np.float64)
        self.n_max, self.train = n_max, np.asarray(train, dtype=np.int64)
        self.contexts, (self.prompts, self.queries) = len(self.weights), self.probability.shape[:2]
        self.test = np.setdiff1d(np.arange(self.queries), self.train)
        check_n(n_max)
        if self.weights.ndim != 2 or self.weights.size == 0 or not (self.weights >= 0).all():
            raise UsageError("Every context needs one weight of at least 0 for each objective and for cost.")
        if not np.isfinite(self.cost).all():
            raise DataError("The cost of a completion is not a finite number; count it before tuning on it.")
        if not len(self.train):
            raise DataError("There is no training query to pull; give the environment at least one.")
        if not np.allclose(self.probability.sum(-1), 1):
            raise DataError("The probabilities of the outcomes of a prompt and a query must sum to 1.")
        self._cumulative = np.cumsum(self.probability, axis=-1)[..., :-1]

    def pull(self, prompt: int, n: int, count: int, random: np.random.Generator) -> tuple[Ints, Floats]:
        chance = random.random((count, n + 1, 1))  # of the query, and of every completion
        queries = self.train[(chance[:, 0, 0] * len(self.train)).astype(np.int64)]
        outcomes = (chance[:, 1:] >= self._cumulative[prompt, queries][:, None, :]).sum(-1)
        drawn = (prompt, queries[:, None], outcomes)
        return queries, self._gained(drawn) - self.weights[:, -1:] * total_block_sums(self.cost[drawn])

    def values(self, queries: Ints) -> Floats:
        cost = (self.probability[:, queries] * self.cost[:, queries]).sum(-1).mean(1)
        paid = cost[:, None] * np.arange(1, self.n_max + 1)
        values: Floats = self._gain(queries) - self.weights[:, -1, None, None] * paid
        return values

    @abstractmethod
    def _gained(self, drawn: Drawn) -> Floats:
        """The objectives' part of `pull`'s sums, [C, N]."""

    @abstractmethod
    def _gain(self, queries: Ints) -> Floats:
        """The objectives' part of `values`, [C, P, N]."""


class MajorityVote(Outcomes):
    """MV: outcome m is answer `answers[p, x, m]`, and answer s scores `worth[p, x, s]`, [P, X, S]; one objective."""

    def __init__(
        self,
        answers: ArrayLike,
        worth: ArrayLike,
        probability: ArrayLike,
        cost: ArrayLike,
        weights: ArrayLike,
        n_max: int,
        train: Sequence[int] | Ints,
    ) -> None:
        super().__init__(probability, cost, weights, n_max, train)
        self.answers = np.broadcast_to(np.asarray(answers, dtype=np.int64), self.probability.shape)
        self.worth = np.asarray(worth, dtype=np.float64)
        self.worth = np.broadcast_to(self.worth, (self.prompts, self.queries, self.worth.shape[-1]))
        if self.weights.shape[1] != 2:
            raise UsageError("A majority vote has one objective: a context is (weight of the score, weight of cost).")

    def _gained(self, drawn: Drawn) -> Floats:
        prompt, queries, _ = drawn
        return self.weights[:, :1] * majority_block_sums(self.answers[drawn], self.worth[prompt, queries[:, 0]])

    def _gain(self, queries: Ints) -> Floats:
        worth = self.worth[:, queries]
        answers, outcome = self.answers[:, queries], self.probability[:, queries]
        chance = np.stack([(outcome * (answers == s)).sum(-1) for s in range(worth.shape[-1])], axis=-1)  # [P, X, S]
        score = np.zeros((self.prompts, len(queries), self.n_max))
        for s in np.flatnonzero((worth * chance).any((0, 1))):
            score += worth[..., s, None] * majority_accuracy(_first(chance, int(s)), self.n_max)
        gain: Floats = self.weights[:, 0, None, None] * score.mean(1)
        return gain


def _first(chance: Floats, s: int) -> Floats:
    """`chance` with answer s moved to column 0."""
    return np.concatenate([chance[..., s : s + 1], np.delete(chance, s, axis=-1)], axis=-1)


class BestOfN(Outcomes):
    """BON: outcome m has the objectives `objectives[p, x, m]`, [P, X, M, K]; the best weighted sum of N counts."""

    def __init__(
        self,
        objectives: ArrayLike,
        probability: ArrayLike,
        cost: ArrayLike,
        weights: ArrayLike,
        n_max: int,
        train: Sequence[int] | Ints,
    ) -> None:
        super().__init__(probability, cost, weights, n_max, train)
        self.objectives = np.asarray(objectives, dtype=np.float64)
        if self.objectives.shape[:3] != self.probability.shape or self.objectives.shape[3:] != (
            self.weights.shape[1] - 1,
        ):
            raise UsageError("Every outcome needs one number for each objective that the contexts weigh.")
        # Contexts that differ in the weight of cost alone share the maximum.
        self._mixes, self._mix = np.unique(self.weights[:, :-1], axis=0, return_inverse=True)

    def _gained(self, drawn: Drawn) -> Floats:
        return best_block_sums(np.moveaxis(self.objectives[drawn] @ self._mixes.T, -1, 0))[self._mix]

    def _gain(self, queries: Ints) -> Floats:
        values = self.objectives[:, queries] @ self._mixes.T  # [P, X, M, mixes]
        best = best_of_n_value(np.moveaxis(values, -1, 0), self.probability[:, queries], self.n_max)
        gain: Floats = best.mean(2)[self._mix]
        return gain


def vote_on_completions(
    predictions: Sequence[Sequence[Sequence[Answer]]],
    scores: ArrayLike,
    cost: ArrayLike,
    weights: ArrayLike,
    n_max: int,
    train: Sequence[int] | Ints,
) -> MajorityVote:
    """Pulls that resample, with replacement, M cached completions of every (prompt, query).

    `predictions` [P][X][M] are what was read out of them, `scores` [P, X, M] their grades and `cost` [P, X, M] what
    each cost. Equal predictions vote together and are worth their mean grade; None is an answer of its own worth 0
    (ours). Raises DataError when not every (prompt, query) has equally many completions, at least one.
    """
    graded = np.asarray(scores, dtype=np.float64)
    shapes = {(len(row), len(cell)) for row in predictions for cell in row}
    if len(shapes) != 1 or graded.shape != (len(predictions), *next(iter(shapes))) or not graded.size:
        raise DataError("The cache must hold equally many graded completions, at least one, of every prompt and query.")
    if not np.isfinite(graded).all():
        raise DataError("The grade of a completion is not a finite number; grade it before tuning on it.")
    answers = np.empty(graded.shape, dtype=np.int64)
    worth = np.zeros(graded.shape)
    for p, row in enumerate(predictions):
        for x, cell in enumerate(row):
            grades: dict[Answer, list[float]] = {}
            for answer, grade in zip(cell, graded[p, x], strict=True):
                grades.setdefault(answer, []).append(0.0 if answer is None else grade)
            mean = {answer: sum(of_answer) / len(of_answer) for answer, of_answer in grades.items()}
            ranked = sorted(mean, key=mean.__getitem__, reverse=True)  # `values` needs a sum for each place above 0
            answers[p, x] = [ranked.index(answer) for answer in cell]
            worth[p, x, : len(ranked)] = [mean[answer] for answer in ranked]
    worth = worth[..., : int(answers.max()) + 1]
    return MajorityVote(answers, worth, np.full(graded.shape, 1 / graded.shape[2]), cost, weights, n_max, train)


# ---- synthetic environments ----

PROMPTS = 32
N_MAX = 32


def synth_bernoulli(random: np.random.Generator) -> MajorityVote:
    """Synth-Bernoulli (MV): 32 prompts, N to 32, 520 queries, right or wrong, three contexts of cost 0, 0.5 and 1.

    Sizes, contexts and the three tiers of difficulty are the authors' (paper and class defaults of their code); how
    probabilities and costs are drawn is not published, so all of this is ours: a query is easy, medium or hard with
    chance 1/3; a prompt has a level in [0.35, 0.65] and a spread in [0, 0.35], and succeeds with level + spread, level,
    level - spread in the three tiers, plus normal noise of 0.05 per query, cut to [0.02, 0.98]. A wide prompt can be
    best with one completion and loses its hard queries in a vote, as in the paper's example. A completion costs
    0.0025 to 0.01, one price per prompt (the released MATH file: 0.0049 to 0.0100). 80% of the queries are to train.
    """
    queries = 520
    tier = random.integers(-1, 2, queries)
    level, spread = random.uniform(0.35, 0.65, (PROMPTS, 1)), random.uniform(0, 0.35, (PROMPTS, 1))
    right = np.clip(level + spread * tier + random.normal(0, 0.05, (PROMPTS, queries)), 0.02, 0.98)
    return MajorityVote(
        answers=[0, 1],
        worth=[1.0, 0.0],
        probability=np.stack([right, 1 - right], axis=-1),
        cost=random.uniform(0.0025, 0.01, (PROMPTS, 1, 1)),
        weights=[(1, 0), (1, 0.5), (1, 1)],
        n_max=N_MAX,
        train=_training(queries, random),
    )


def synth_categorical(random: np.random.Generator) -> BestOfN:
    """Synth-Categorical (BON): 32 prompts, N to 32, 512 queries, two objectives up to 4, 27 contexts.

    Sizes are the paper's; the contexts are nine pairs of weights that sum to 1 (inferred) with cost 0.1, 0.5 and 1
    (class defaults of the authors' code). The rest is ours: every (prompt, query) has six outcomes with Dirichlet(1,
    ..., 1) probabilities; an objective of an outcome is the prompt's level in [1, 2.5], plus what the query adds to it
    for all prompts, normal with 0.3, plus normal noise times the prompt's spread in [0.1, 1.2], cut to [0, 4]. A prompt
    of wide spread gains most from best-of-N. A completion costs 0.01 to 0.04, one price per prompt: Synth-Bernoulli's,
    in the same share of the largest objective. 80% of the queries are to train.
    """
    queries, outcomes = 512, 6
    level, spread = random.uniform(1, 2.5, (PROMPTS, 1, 1, 2)), random.uniform(0.1, 1.2, (PROMPTS, 1, 1, 1))
    noise = random.normal(0, 1, (PROMPTS, queries, outcomes, 2))
    pairs = [(w / 10, 1 - w / 10) for w in range(1, 10)]
    return BestOfN(
        objectives=np.clip(level + random.normal(0, 0.3, (queries, 1, 2)) + spread * noise, 0, 4),
        probability=random.dirichlet(np.ones(outcomes), (PROMPTS, queries)),
        cost=random.uniform(0.01, 0.04, (PROMPTS, 1, 1)),
        weights=[(*pair, cost) for pair in pairs for cost in (0.1, 0.5, 1)],
        n_max=N_MAX,
        train=_training(queries, random),
    )


def _training(queries: int, random: np.random.Generator) -> Ints:
    return np.sort(random.permutation(queries)[: queries * 4 // 5])
