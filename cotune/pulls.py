"""Arms (prompt, N) pulled on the real model: IAPO's environment (arXiv 2508.10030) over the bench, and the best arm.

An arm is a candidate (whatever conditions examples: a prompt, an adapter, a generator of both) with a number of samples
N under one aggregation. Every answer goes through `evaluate`, so it is booked, journaled and within the budget. Knows
nothing of how candidates were found, nor of how a learner (bandits/) chooses what to pull.

Ours:

- Queries come in shuffled passes over the train examples, and the i-th pull of every candidate draws the same one, with
  fresh samples in every pass. (The paper draws them anew for every pull. In a re-run of its MATH study common queries
  did no harm and mostly helped.)
- There is one context. Its utility is the score of the aggregated answer minus `cost_weight` for every 1,000 generated
  tokens of all N samples. (The paper's cost of a completion is a constant for each prompt.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cotune.aggregation import Answer, Floats, Ints, blocks, total_block_sums
from cotune.bandits.base import Arm, Learned, Learner
from cotune.bandits.baselines import UCB, EpsilonGreedy, Softmax, Triple, Uniform
from cotune.bandits.psst import PSST
from cotune.bench import Bench
from cotune.config import InferenceConfig
from cotune.engines.base import Sampling
from cotune.errors import BudgetExhausted, UsageError
from cotune.evaluate import evaluate
from cotune.plans import block_scores, check
from cotune.tasks.base import Task
from cotune.values import Conditioning, Example, InferencePlan, Samples, Tuned, Verifier

PER_TOKENS = 1000  # `cost_weight` is the price of so many
Drawn = tuple[Samples, Mapping[Answer, float]]  # the samples of one query, and what each of their answers scores


def learner(c: InferenceConfig, prompts: int) -> Learner:
    """The one that `inference.learner` names, for so many candidates. TRIPLE's N is 1: a random one is no plan.

    Raises UsageError for an unknown scorer, and when `inference.completions` does not pay for one pull of every
    candidate at the largest N, which serves all of its arms.
    """
    plan_of(c, c.samples)
    least = prompts * c.samples
    if c.completions < least:
        raise UsageError(
            f"inference.completions = {c.completions} does not pay for one pull of every arm: {prompts} "
            f"prompt{'s' if prompts > 1 else ''} with up to {c.samples} samples take {least}. Raise it, or lower "
            f"inference.samples{' or inference.prompts' if prompts > 1 else ''}."
        )
    made: dict[str, Learner] = {
        "psst": PSST(c.stockpiling, None, c.screening),
        "psst-screening": PSST(c.stockpiling, c.screened, c.screening),
        "uniform": Uniform(),
        "epsilon-greedy": EpsilonGreedy(c.epsilon),
        "softmax": Softmax(c.tau),
        "ucb": UCB(c.c),
        "triple": Triple(random_n=False),
    }
    return made[c.learner]


def plan_of(c: InferenceConfig, n: int) -> InferencePlan:
    """The plan of an arm's N; of best-of the scorer is log-probability where none is named."""
    scorer = c.scorer if c.aggregation == "majority" else c.scorer or "log-probability"
    return check(InferencePlan(c.aggregation, n, scorer, c.temperature, c.top_p))


class Pulls:
    """A `bandits.base.Environment` of `candidates` x {1..samples}, with one context. `verifier` ranks for a scorer of
    that name.

    `observed` and `behind` [P, N] are the sums and numbers of blocks of everything that was pulled, which is what is
    left to choose by when the ledger's budget ends a learner early. There are no true values.
    """

    contexts = 1

    def __init__(
        self,
        candidates: Sequence[Tuned],
        settings: InferenceConfig,
        task: Task,
        examples: Sequence[Example],
        sampling: Sampling,
        bench: Bench,
        verifier: Verifier | None = None,
    ) -> None:
        self.candidates, self.settings, self.examples = candidates, settings, tuple(examples)
        self.prompts, self.n_max, self.queries = len(candidates), settings.samples, len(examples)
        self._task, self._sampling, self._bench, self._verifier = task, sampling, bench, verifier
        self._position = [0] * self.prompts
        self._orders: list[list[int]] = []
        self._made: dict[tuple[int, int], Conditioning] = {}
        self.observed = np.zeros((self.prompts, self.n_max))
        self.behind = np.zeros((self.prompts, self.n_max), dtype=np.int64)
        self.spent = 0

    def pull(self, prompt: int, n: int, count: int, random: np.random.Generator) -> tuple[Ints, Floats]:
        """As the protocol says; the queries do not come from `random`. Raises BudgetExhausted."""
        queries, sums = np.empty(count, dtype=np.int64), np.zeros(n)
        done = 0
        for chosen, drawn in self.draws(prompt, n, count):
            gained = self._gained(n, drawn)
            queries[done : done + len(chosen)] = chosen
            sums += gained
            done += len(chosen)
            self.observed[prompt, :n] += gained
            self.behind[prompt, :n] += len(chosen) * blocks(n).count
        return queries, sums[None]

    def draws(self, prompt: int, n: int, count: int) -> Iterator[tuple[Sequence[int], list[Drawn]]]:
        """The next `count` queries of a candidate, pass by pass, and n samples of each. Raises BudgetExhausted."""
        done = 0
        while done < count:
            number, at = divmod(self._position[prompt], self.queries)
            chosen = self._order(number)[at : at + count - done]
            drawn = self._answered(prompt, n, chosen, number)
            self._position[prompt] += len(chosen)
            done += len(chosen)
            self.spent += n * len(chosen)
            self._bench.progress("pulls", self.spent, self.settings.completions)
            yield chosen, drawn

    def values(self, queries: Ints) -> Floats:
        raise NotImplementedError("Nobody knows the true values of a model.")

    def best(self) -> Arm | None:
        """The arm with the best mean of what was pulled so far; ties: the earlier candidate, the smaller N."""
        if not self.behind.any():
            return None
        means = np.where(self.behind, self.observed / np.maximum(self.behind, 1), -np.inf)
        prompt, n = divmod(int(means.argmax()), self.n_max)
        return Arm(prompt, n + 1)

    def means(self, prompt: int) -> list[float | None]:
        """Mean utility of a candidate at N = 1..n_max; None where nothing was seen."""
        columns = zip(self.observed[prompt], self.behind[prompt], strict=True)
        return [float(total / count) if count else None for total, count in columns]

    def _order(self, number: int) -> list[int]:
        while len(self._orders) <= number:
            order = list(range(self.queries))
            self._bench.rng("queries", len(self._orders)).shuffle(order)
            self._orders.append(order)
        return self._orders[number]

    def _answered(self, prompt: int, n: int, chosen: Sequence[int], number: int) -> list[Drawn]:
        plan = plan_of(self.settings, n)
        examples = [self.examples[i] for i in chosen]
        conditionings = [replace(c, plan=plan, verifier=self._verifier) for c in self._conditionings(prompt, chosen)]
        sampling = replace(self._sampling, seed=self._bench.seed_for("pass", number))
        done = evaluate(self._task, examples, conditionings, sampling, self._bench)
        return [(s, w) for s, w in zip(done.samples, done.worth, strict=True) if s is not None and w is not None]

    def _gained(self, n: int, drawn: Sequence[Drawn]) -> Floats:
        """Sums of the utility over all blocks of 1..n samples of these draws, [n]."""
        plan = plan_of(self.settings, n)
        scores = [sum(sum(block_scores(plan, s.votes, s.scores, w, k)) for s, w in drawn) for k in range(1, n + 1)]
        tokens = np.array([[c.generated_tokens for c in s.completions] for s, _ in drawn], dtype=np.float64)
        gained: Floats = np.array(scores) - self.settings.cost_weight / PER_TOKENS * total_block_sums(tokens)
        return gained

    def _conditionings(self, prompt: int, chosen: Sequence[int]) -> list[Conditioning]:
        """Made once for each candidate and query: a generator that writes prompts is asked and paid once."""
        new = [i for i in chosen if (prompt, i) not in self._made]
        made = self.candidates[prompt].condition([self.examples[i] for i in new], self._bench) if new else []
        self._made |= {(prompt, i): c for i, c in zip(new, made, strict=True)}
        return [self._made[prompt, i] for i in chosen]


@dataclass(frozen=True)
class Found:
    """A candidate and the plan to use it with."""

    tuned: Tuned
    candidate: int
    plan: InferencePlan


def best_arm(pulls: Pulls, learner: Learner, named: Sequence[dict[str, Any]], bench: Bench) -> Found | None:
    """The candidate and plan that the learner chooses; with an exhausted budget the best arm that was pulled, or None.

    Emits an "arm" event for each candidate (`named` says which it is) with its mean utility at every N, and "policy".
    """
    random = np.random.default_rng(bench.seed_for("learner"))
    learned: Learned | None = None
    try:
        learned = learner.learn(pulls, pulls.settings.completions, random)
        (arm,) = learned.policy
    except BudgetExhausted as stop:
        bench.emit("budget", where="pulls", message=str(stop))
        best = pulls.best()
        if best is None:
            return None
        arm = best
    assert arm.n is not None
    for number, about in enumerate(named):
        bench.emit("arm", **about, utility=pulls.means(number), chosen=number == arm.prompt)
    facts: dict[str, Any] = {"learner": learner.name, **named[arm.prompt], "samples": arm.n, "completions": pulls.spent}
    if learned is not None:  # of the chosen arm: pulls of any N that serve it, and the different queries of them
        facts |= {"queries": int(learned.queries[arm.prompt, arm.n - 1])}
    bench.emit("policy", **facts)
    plan = plan_of(pulls.settings, arm.n)
    return Found(pulls.candidates[arm.prompt], arm.prompt, plan)
