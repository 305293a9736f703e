"""Prompts with worked examples: BootstrapFewShot with random search (BetterTogether, sheet 01).

The model under the best prompt so far is its own teacher; sets of its accepted answers become demonstrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cotune.bench import Bench
from cotune.engines.base import Sampling
from cotune.search import Proposal, Scored
from cotune.supervision import Trace, accepted, demonstration, gold
from cotune.tasks.base import Task
from cotune.values import Adapter, Conditioning, Example, Prompt


class DemonstrationProposer:
    """The best prompt with gold demonstrations, without any (if it has some), and with `sets` sets of accepted answers.

    `examples` are apart from those that score the search (ours: a demonstration must not give away the answer of a
    question it is judged on). A random set has 1 to `most` demonstrations, as in DSPy; the gold set has `most`. Each
    round draws other sets.
    """

    def __init__(
        self,
        task: Task,
        examples: Sequence[Example],
        adapter: Adapter | None,
        sampling: Sampling,
        *,
        most: int,
        sets: int,
    ) -> None:
        self._task = task
        self._examples = tuple(examples)
        self._adapter = adapter
        self._sampling = sampling
        self._most = most
        self._sets = sets
        self._rounds = 0  # behind it

    def propose(self, round: int, history: Sequence[Scored], best: Prompt, bench: Bench) -> list[Proposal]:
        teacher = [Conditioning(best, self._adapter)] * len(self._examples)
        traces, sampled = accepted(self._task, self._examples, teacher, self._sampling, bench)
        bench.emit("traces", use="demonstrations", sampled=sampled, accepted=len(traces))
        again = [self._rounds] if self._rounds else []
        first, self._rounds = self._rounds * self._sets, self._rounds + 1
        shown = bench.rng("gold", *again).sample(self._examples, min(self._most, len(self._examples)))
        labelled = gold(self._task, shown)
        proposals = [self._with(best, labelled, "gold-demonstrations")]
        if best.demonstrations:
            proposals.append(Proposal(replace(best, demonstrations=()), "no-demonstrations"))
        for i in range(first, first + self._sets if traces else first):
            rng = bench.rng("demonstrations", i)
            chosen = rng.sample(traces, min(rng.randint(1, self._most), len(traces)))
            proposals.append(self._with(best, chosen, "own-demonstrations"))
        return proposals

    def _with(self, best: Prompt, traces: Sequence[Trace], origin: str) -> Proposal:
        return Proposal(replace(best, demonstrations=tuple(demonstration(self._task, t) for t in traces)), origin)
