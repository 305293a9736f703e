"""Tune the inference plan alone: how many samples, for the prompt and the weights that are there already.

With `difficulty.bins` above 1 a plan for each difficulty (by_difficulty.py), where that is worth more than one for all.

IAPO (arXiv 2508.10030) with one prompt. As the stage i of a sequence it is the second half of what that paper calls
disjoint: first the prompt, then N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from cotune.bandits.base import Learner
from cotune.bench import Bench
from cotune.by_difficulty import plan_by_difficulty
from cotune.config import DifficultyConfig, InferenceConfig, RunConfig, VerifierConfig
from cotune.errors import BudgetExhausted
from cotune.methods.verifier import verifier_for
from cotune.pulls import Pulls, best_arm, learner, plan_of
from cotune.strategies.base import Problem, Work, Workload
from cotune.values import Tuned


@dataclass(frozen=True)
class PlanOnly:
    levers: ClassVar[frozenset[str]] = frozenset({"plan"})

    settings: InferenceConfig
    learner: Learner
    verifier: VerifierConfig
    difficulty: DifficultyConfig

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls(config.inference, learner(config.inference, prompts=1), config.verifier, config.difficulty)

    def plan(self, load: Workload) -> list[Work]:
        return load.pulling(self.settings, self.verifier, load.question)

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        """`start` under the plan that is worth most on train; with an exhausted budget, of those that were tried.

        A plan that ranks by a verifier has it trained first, on what `start` answers.
        """
        task, train, sampling = problem.task, problem.train, problem.sampling
        largest, limit = plan_of(self.settings, self.settings.samples), sampling.max_new_tokens
        try:
            verifier = verifier_for(largest, [start], self.verifier, task, train, limit, bench)
        except BudgetExhausted as stop:
            bench.emit("budget", where="verifier", message=str(stop))
            return start
        pulls = Pulls([start], self.settings, task, train, sampling, bench, verifier)
        if self.difficulty.bins > 1:
            plan = plan_by_difficulty(pulls, self.difficulty, bench)
            return start.under(plan, verifier) if plan else start
        found = best_arm(pulls, self.learner, [{}], bench)
        return start.under(found.plan, verifier) if found else start
