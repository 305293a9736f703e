"""Choose prompt and number of samples together, by a bandit over both (IAPO with PSST).

"Inference-Aware Prompt Optimization" (arXiv 2508.10030): the prompt that is best for one completion is often not the
best for N aggregated ones, so arms are pairs (prompt, N). The candidates come from any prompt method of prompt-only,
where the paper has a fixed set that a larger model wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from cotune.bandits.base import Learner
from cotune.bench import Bench
from cotune.config import InferenceConfig, RunConfig, VerifierConfig
from cotune.errors import BudgetExhausted
from cotune.methods.verifier import verifier_for
from cotune.plugins import resolve
from cotune.pulls import Pulls, best_arm, learner, plan_of
from cotune.strategies import STRATEGIES
from cotune.strategies.base import Explorer, Fixed, Problem, Work, Workload, fixed
from cotune.values import Tuned


@dataclass(frozen=True)
class InferenceAware:
    """`explorer` proposes candidates; `settings.prompts` of them become arms."""

    levers: ClassVar[frozenset[str]] = frozenset({"prompt", "plan"})

    explorer: Explorer
    settings: InferenceConfig
    learner: Learner
    verifier: VerifierConfig

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        explorer = resolve("strategies", STRATEGIES, "prompt-only").from_config(config)
        return cls(explorer, config.inference, learner(config.inference, config.inference.prompts), config.verifier)

    def plan(self, load: Workload) -> list[Work]:
        longest = self.explorer.longest(load)
        return [*self.explorer.exploring(load), *load.pulling(self.settings, self.verifier, longest)]

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        """The prompt and N that the learner chooses among those of the search (val is not asked: the pulls choose).

        A plan that ranks by a verifier has it trained before the pulls, on what all candidates answer. With an
        exhausted budget: the best arm that was pulled, or, before any was, the best prompt of the search under the plan
        of `start`, or `start` itself.
        """
        begin = fixed(start, "inference-aware")
        candidates = self._candidates(begin, problem, bench)
        if not candidates:
            return start
        task, train, sampling = problem.task, problem.train, problem.sampling
        largest, limit = plan_of(self.settings, self.settings.samples), sampling.max_new_tokens
        try:
            verifier = verifier_for(largest, candidates, self.verifier, task, train, limit, bench)
        except BudgetExhausted as stop:
            bench.emit("budget", where="verifier", message=str(stop))
            return candidates[0]
        pulls = Pulls(candidates, self.settings, task, train, sampling, bench, verifier)
        found = best_arm(pulls, self.learner, [_facts(c) for c in candidates], bench)
        return found.tuned.under(found.plan, verifier) if found else candidates[0]

    def _candidates(self, begin: Fixed, problem: Problem, bench: Bench) -> Sequence[Tuned]:
        """The best of the search, and always `begin` (ours).

        What the search dropped early follows what ran in full, by its score so far: it was judged by one completion,
        or by the plan of `begin`, and may be better at N.
        """
        tried = self.explorer.candidates(begin, problem, bench)
        kept = list(tried[: self.settings.prompts])
        if kept and begin not in kept:
            kept = [*kept[: self.settings.prompts - 1], begin]
        return kept


def _facts(candidate: Tuned) -> dict[str, Any]:
    if not isinstance(candidate, Fixed):
        return {}
    prompt = candidate.prompt
    return {"text": prompt.instruction, "demonstrations": len(prompt.demonstrations)}
