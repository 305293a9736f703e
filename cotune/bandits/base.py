"""What a bandit of prompts and numbers of completions sees and hands over: arms, environments, what was observed.

The problem is IAPO's (arXiv 2508.10030): an arm is a prompt and a number of completions N, a context is a vector of
weights on the objectives and on cost, and a policy names one arm per context. A pull of (p, N) draws one training query
and costs N completions. Knows neither where completions come from nor how a learner chooses.

Axis letters: C contexts, P prompts, N numbers of completions 1..n_max, X queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cotune.aggregation import Floats, Ints, blocks
from cotune.errors import UsageError


@dataclass(frozen=True)
class Arm:
    """A prompt by its number and how many completions to draw; None draws N evenly from 1..n_max for every query."""

    prompt: int
    n: int | None


class Environment(Protocol):
    """Where pulls come from. `queries` counts all of them, those held out included."""

    contexts: int
    prompts: int
    n_max: int
    queries: int

    def pull(self, prompt: int, n: int, count: int, random: np.random.Generator) -> tuple[Ints, Floats]:
        """`count` pulls of (prompt, n): their training queries [count], and for every context and every size k = 1..n
        the sum of the utility over all blocks of k completions of all pulls, [C, n]."""
        ...

    def values(self, queries: Ints) -> Floats:
        """The true mean utility Q(c, p, N) over these queries, [C, P, N]. Not for learners."""
        ...


@dataclass(frozen=True)
class Learned:
    """A policy, one arm per context, and what it took: completions `spent`, and per prompt and N [P, N] the `pulls` of
    that arm itself, the `blocks` behind its last estimate, and the distinct `queries` of all pulls that serve it."""

    policy: tuple[Arm, ...]
    spent: int
    pulls: Ints
    blocks: Ints
    queries: Ints


class Learner(Protocol):
    name: str

    def learn(self, environment: Environment, budget: int, random: np.random.Generator) -> Learned:
        """Spends at most `budget` completions. UsageError for a budget below 1."""
        ...


class Observed:
    """The account of one learner: what it pulled, what that says about every arm, and what is left to spend.

    Every pull serves all contexts and, by disjoint blocks, all smaller N of its prompt. All learners share this, so
    they differ in the choice of arms alone.
    """

    def __init__(self, environment: Environment, budget: int, random: np.random.Generator) -> None:
        if budget < 1:
            raise UsageError(f"A budget of {budget} completions pays for no pull; give at least 1.")
        self.environment, self.budget, self.random, self.spent = environment, budget, random, 0
        shape = (environment.prompts, environment.n_max)
        self._sums = np.zeros((environment.contexts, *shape))
        self.blocks = np.zeros(shape, dtype=np.int64)  # behind every estimate, [P, N]
        self._pulls: list[tuple[int, int, Ints]] = []  # prompt, N and the queries of each batch

    @property
    def left(self) -> int:
        return self.budget - self.spent

    def pull(self, prompt: int, n: int, count: int = 1) -> None:
        if count * n > self.left:
            raise ValueError(f"{count} pulls of {n} completions exceed the {self.left} that are left.")
        queries, sums = self.environment.pull(prompt, n, count, self.random)
        self.spent += count * n
        self._sums[:, prompt, :n] += sums
        self.blocks[prompt, :n] += count * blocks(n).count
        self._pulls.append((prompt, n, queries))

    def forget(self) -> None:
        """Start the estimates anew; what was spent stays spent."""
        self._sums[:] = 0
        self.blocks[:] = 0

    def means(self, unseen: float) -> Floats:
        """Mean utility of every arm, [C, P, N]; `unseen` where no block was observed."""
        return np.where(self.blocks, self._sums / np.maximum(self.blocks, 1), unseen)

    def context_means(self, context: int) -> Floats:
        """Mean utility in one context, [P, N]; 0 where no block was observed."""
        means: Floats = self._sums[context] / np.maximum(self.blocks, 1)
        return means

    def best(self) -> tuple[Arm, ...]:
        """The arm with the best mean in each context, ties at random, never one without a block unless all are so."""
        chosen = (best_index(mean.ravel(), self.random) for mean in self.means(-np.inf))
        return tuple(Arm(i // self.environment.n_max, i % self.environment.n_max + 1) for i in chosen)

    def learned(self, policy: tuple[Arm, ...]) -> Learned:
        pulls = np.zeros_like(self.blocks)
        largest = np.zeros((len(pulls), self.environment.queries), dtype=np.int64)  # N pulled with each query
        for prompt, n, queries in self._pulls:
            pulls[prompt, n - 1] += len(queries)
            largest[prompt, queries] = np.maximum(largest[prompt, queries], n)
        distinct = (largest[:, :, None] >= np.arange(1, self.environment.n_max + 1)).sum(1)
        return Learned(policy, self.spent, pulls, self.blocks, distinct)


def best_index(values: Floats, random: np.random.Generator) -> int:
    """Index of the largest value, one of the tied at random."""
    tied = np.flatnonzero(values == values.max())
    return int(tied[0] if len(tied) == 1 else tied[random.integers(len(tied))])


def average_return(values: Floats, policy: tuple[Arm, ...]) -> float:
    """ACR: the mean over contexts of Q(c, policy(c)), all contexts alike; `values` [C, P, N]."""
    chosen = zip(values, policy, strict=True)
    return float(np.mean([q[arm.prompt].mean() if arm.n is None else q[arm.prompt, arm.n - 1] for q, arm in chosen]))
