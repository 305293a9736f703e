"""The learners that IAPO compares PSST with (arXiv 2508.10030), behind the same interface.

All share samples over contexts and over smaller N by blocks (`Observed`), so that only the choice of arms differs. The
rules are those of the paper's text where it states them, else of the authors' code. Ours everywhere: the budget is
hard, ties are broken at random, and a policy never names an arm without data while one with data exists (in the
authors' code an untried arm counts as 0 and wins where all means are negative).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np

from cotune.aggregation import Floats, Ints
from cotune.bandits.base import Arm, Environment, Learned, Observed, best_index
from cotune.bandits.psst import trim
from cotune.errors import UsageError


class Uniform:
    """One batch: floor(T / (|P| n_max)) pulls of every (p, n_max), then the best mean.

    A budget below one pull each pulls as many prompts as it pays for, in random order; one below n_max completions
    pulls one prompt with all it has (ours; the authors' code pulls every prompt at least once).
    """

    name = "uniform"

    def learn(self, environment: Environment, budget: int, random: np.random.Generator) -> Learned:
        observed = Observed(environment, budget, random)
        n = min(environment.n_max, budget)
        each = max(1, budget // (environment.prompts * n))
        for prompt in random.permutation(environment.prompts):
            if each * n <= observed.left:
                observed.pull(int(prompt), n, each)
        return observed.learned(observed.best())


class Sequential(ABC):
    """One pull a step: a random context, one affordable arm by its estimates, until nothing is affordable."""

    name: str

    def learn(self, environment: Environment, budget: int, random: np.random.Generator) -> Learned:
        observed = Observed(environment, budget, random)
        while observed.left:
            affordable = min(environment.n_max, observed.left)
            means = observed.context_means(int(random.integers(environment.contexts)))[:, :affordable]
            arm = self.choose(means.ravel(), observed.blocks[:, :affordable].ravel(), random)
            observed.pull(arm // affordable, arm % affordable + 1)
        return observed.learned(observed.best())

    @abstractmethod
    def choose(self, means: Floats, blocks: Ints, random: np.random.Generator) -> int:
        """Index of the arm to pull, given the mean (0 when untried) and the blocks of every affordable arm."""


class EpsilonGreedy(Sequential):
    """The best arm of the context; with probability `epsilon`, any. Untried arms count as 0 (authors' code)."""

    name = "epsilon-greedy"

    def __init__(self, epsilon: float) -> None:
        if not 0 <= epsilon <= 1:
            raise UsageError(f"epsilon is a probability; {epsilon} is not between 0 and 1.")
        self.epsilon = epsilon

    def choose(self, means: Floats, blocks: Ints, random: np.random.Generator) -> int:
        if random.random() < self.epsilon:
            return int(random.integers(len(means)))
        return best_index(means, random)


class Softmax(Sequential):
    """An arm with probability proportional to exp(mean / tau). Untried arms count as 0 (authors' code)."""

    name = "softmax"

    def __init__(self, tau: float) -> None:
        if tau <= 0:
            raise UsageError(f"A temperature tau of {tau} has no softmax; choose one above 0.")
        self.tau = tau

    def choose(self, means: Floats, blocks: Ints, random: np.random.Generator) -> int:
        heights = np.exp((means - means.max()) / self.tau).cumsum()
        return int(heights[:-1].searchsorted(random.random() * heights[-1], side="right"))


class UCB(Sequential):
    """The largest mean + c sqrt(ln t / n): n blocks of the arm, t blocks of all affordable arms; untried arms first."""

    name = "UCB"

    def __init__(self, c: float) -> None:
        if c <= 0:
            raise UsageError(f"UCB's c of {c} does not explore; choose one above 0.")
        self.c = c

    def choose(self, means: Floats, blocks: Ints, random: np.random.Generator) -> int:
        bound = means + self.c * np.sqrt(math.log(max(1, blocks.sum())) / np.maximum(blocks, 1))
        return best_index(np.where(blocks, bound, np.inf), random)


class Triple:
    """TRIPLE: sequential halving over the prompts, one completion a pull; with `random_n` deployed with a random number
    of completions for every query, else with one. It is PSST where N = 1 is all there is (authors' code)."""

    def __init__(self, random_n: bool) -> None:
        self.name = "TRIPLE, N random" if random_n else "TRIPLE, N = 1"
        self.n = None if random_n else 1

    def learn(self, environment: Environment, budget: int, random: np.random.Generator) -> Learned:
        observed = Observed(environment, budget, random)
        active = np.zeros((environment.contexts, environment.prompts, environment.n_max), dtype=bool)
        active[:, :, 0] = True
        prompts = trim(observed, active, stockpiling=True)
        return observed.learned(tuple(Arm(arm.prompt, self.n) for arm in prompts))
