"""Tune the inference plan alone: how many samples, for the prompt and the weights that are there already.

IAPO (arXiv 2508.10030) with one prompt. As the stage i of a sequence it is the second half of what that paper calls
disjoint: first the prompt, then N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from cotune.bandits.base import Learner
from cotune.bench import Bench
from cotune.config import InferenceConfig, RunConfig
from cotune.pulls import Pulls, best_arm, learner
from cotune.strategies.base import Problem, Work, Workload
from cotune.values import Tuned


@dataclass(frozen=True)
class PlanOnly:
    levers: ClassVar[frozenset[str]] = frozenset({"plan"})

    settings: InferenceConfig
    learner: Learner

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls(config.inference, learner(config.inference, prompts=1))

    def plan(self, load: Workload) -> list[Work]:
        return [Work.generation("pull arms", self.settings.completions, load.question, load.limit)]

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        """`start` under the N that is worth most on train; with an exhausted budget, of those that were tried."""
        pulls = Pulls([start], self.settings, problem.task, problem.train, problem.sampling, bench)
        found = best_arm(pulls, self.learner, [{}], bench)
        return start.under(found.plan) if found else start
