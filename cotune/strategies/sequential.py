"""Stages in turn: prompt (p) and weights (w) in any order (BetterTogether, Algorithm 1), and the inference plan (i).

The stage i chooses the number of samples for what the stages before it have tuned, and the later ones are scored under
that plan (ours; `p,i` is what IAPO calls disjoint). `j,i` chooses it for what joint tuning generates. After trained
weights it asks the val examples: those of train are known by heart, and on them one sample is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from cotune.bench import Bench
from cotune.config import RunConfig
from cotune.evaluate import evaluate
from cotune.plugins import resolve
from cotune.scorers import VERIFIER
from cotune.strategies import STRATEGIES
from cotune.strategies.base import Problem, Strategy, Work, Workload, fixed
from cotune.values import Tuned

KINDS = {"p": "prompt-only", "w": "lora-only", "i": "plan-only", "j": "joint"}


@dataclass(frozen=True)
class Sequential:
    """`kinds` in order, each tuned by its strategy. `choice_examples` val examples report every stage.

    `samples` is the largest N that a stage i can choose, `verified` whether a verifier ranks its samples.
    """

    kinds: Sequence[str]
    stages: Mapping[str, Strategy]
    restart: bool
    choice_examples: int
    samples: int = 1
    verified: bool = False

    @property
    def levers(self) -> frozenset[str]:
        return frozenset().union(*(self.stages[kind].levers for kind in self.kinds))

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        kinds = config.sequential.stages.split(",")
        stages = {kind: resolve("strategies", STRATEGIES, KINDS[kind]).from_config(config) for kind in sorted({*kinds})}
        samples = config.inference.samples if "i" in kinds else 1
        verified = "i" in kinds and config.inference.scorer == VERIFIER
        return cls(kinds, stages, config.sequential.restart, config.prompt.choice_examples, samples, verified)

    def plan(self, load: Workload) -> list[Work]:
        works = []
        for i, kind in enumerate(self.kinds):
            asked = replace(load, train=load.val) if self._asks_val(i) else load
            works += [replace(work, what=f"{i}-{kind}: {work.what}") for work in self.stages[kind].plan(asked)]
            if kind == "i":
                load = replace(load, samples=max(load.samples, self.samples), verified=load.verified or self.verified)
        return works

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        """What the last stage gives, as in the paper (DSPy returns the stage that is best on val).

        With `restart` a later p begins with the original prompt under the adapter so far. Raises NoData when a weights
        stage has nothing to train on: the result of an earlier stage is never passed off as this strategy's.
        """
        original = fixed(start, "sequential")
        current: Tuned = original
        val = problem.val[: self.choice_examples]
        for i, kind in enumerate(self.kinds):
            stage = bench.at(f"{i}-{kind}")
            begin = current
            if self.restart and kind == "p":
                begin = replace(fixed(current, "sequential"), prompt=original.prompt)
            asked = replace(problem, train=problem.val) if self._asks_val(i) else problem
            tuned = self.stages[kind].tune(begin, asked, stage)
            if tuned is not begin:  # else what we have stands: the budget allowed nothing, or training made it worse
                current = tuned
            with bench.ledger.measuring():  # for the record only; the stages have chosen already
                conditionings = current.condition(val, stage)
                done = evaluate(problem.task, val, conditionings, problem.sampling, stage, label="stage")
            stage.emit("stage-result", strategy=KINDS[kind], val_score=done.score, val_n=len(val))
        return current

    def _asks_val(self, i: int) -> bool:
        return self.kinds[i] == "i" and any(kind in ("w", "j") for kind in self.kinds[:i])
