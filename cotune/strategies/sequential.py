"""Stages in turn: prompt (p) and weights (w) in any order (BetterTogether, Algorithm 1), and the inference plan (i).

The stage i chooses the number of samples for what the stages before it have tuned, and the later ones are scored under
that plan (ours; `p,i` is what IAPO calls disjoint). `j,i` chooses it for what joint tuning generates. After trained
weights it asks the val examples: those of train are known by heart, and on them one sample is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from cotune.bench import Bench
from cotune.config import RunConfig
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.plugins import resolve
from cotune.scorers import VERIFIER
from cotune.strategies import STRATEGIES
from cotune.strategies.base import Fixed, Problem, Strategy, Work, Workload, fixed, one_adapter
from cotune.values import Tuned

KINDS = {"p": "prompt-only", "w": "lora-only", "i": "plan-only", "j": "joint"}


@dataclass(frozen=True)
class Sequential:
    """`kinds` in order, each tuned by its strategy. `choice_examples` val examples report every stage.

    `samples` is the largest N that a stage i can choose, `verified` whether a verifier ranks its samples. `written`
    has how long (tokens) the prompts are that a kind of stage leaves to be written for every question, if it does.
    """

    kinds: Sequence[str]
    stages: Mapping[str, Strategy]
    restart: bool
    choice_examples: int
    samples: int = 1
    verified: bool = False
    written: Mapping[str, int] = field(default_factory=dict)

    @property
    def levers(self) -> frozenset[str]:
        return frozenset().union(*(self.stages[kind].levers for kind in self.kinds))

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        kinds, restart = config.sequential.stages.split(","), config.sequential.restart
        written = dict[str, int]()
        if config.prompt.method == "bpo":
            written["p"] = config.bpo.max_prompt_tokens
        if config.joint.prompt_branch != "off":
            written["j"] = config.joint.max_prompt_tokens
        if not restart and "p" in written and kinds.count("p") > 1:
            raise UsageError(
                "prompt.method = 'bpo' writes a prompt for every example, and a later stage p could go on from one for "
                "all of them only. Leave sequential.restart on, or take another prompt.method."
            )
        stages = {kind: resolve("strategies", STRATEGIES, KINDS[kind]).from_config(config) for kind in sorted({*kinds})}
        samples = config.inference.samples if "i" in kinds else 1
        verified = "i" in kinds and config.inference.scorer == VERIFIER
        return cls(kinds, stages, restart, config.prompt.choice_examples, samples, verified, written)

    def plan(self, load: Workload) -> list[Work]:
        works = []
        for i, kind in enumerate(self.kinds):
            asked = replace(load, train=load.val) if self._asks_val(i) else load
            some = self.stages[kind].plan(asked)
            written = max((self.written.get(before, 0) for before in self.kinds[:i]), default=0)
            if written and kind != "p":  # a stage p starts again from the one prompt
                some.insert(0, load.rewriting(asked.train + asked.val, written))
            works += [replace(work, what=f"{i}-{kind}: {work.what}") for work in some]
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
                so_far = one_adapter(current, "sequential")
                begin = Fixed(original.prompt, so_far.adapter, so_far.plan, so_far.verifier)
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
