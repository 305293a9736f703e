"""Supervised fine-tuning: on worked answers (sft), or on the model's own accepted completions (rft).

rft is BetterTogether's BootstrapFinetune (sheet 01) for one module; the name is that of rejection-sampling fine-tuning
(Yuan et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from cotune.errors import NoData
from cotune.methods.base import Material
from cotune.supervision import TokenRow, Trace, accepted, completion_loss, gold, token_row
from cotune.training import Cost, shuffled_batches
from cotune.values import Conditioning


class Supervised:
    """Cross-entropy of completion tokens; every token of a batch weighs the same."""

    parameters: Mapping[str, nn.Parameter] = {}
    updates = 1

    def __init__(self, material: Material) -> None:
        """Emits "traces" with what survived each step. Raises NoData, and BudgetExhausted like Bench.generate."""
        self._material = material
        self.micro_batch_size = material.config.micro_batch_size
        self._rows = self._kept()
        self.steps = -(-len(self._rows) // material.config.batch_size)

    def batches(self, epoch: int, done: int, meta: MutableMapping[str, Any]) -> Iterable[Sequence[TokenRow]]:
        rng = self._material.bench.rng("epoch", epoch)
        return shuffled_batches(self._rows, self._material.config.batch_size, rng)[done:]

    def loss(self, items: Sequence[TokenRow]) -> tuple[Tensor, dict[str, float]]:
        with self._material.policy.training():
            return completion_loss(self._material.policy.base, items), {}

    def weight(self, item: TokenRow) -> float:
        return len(item.completion)

    def cost(self, item: TokenRow) -> Cost:
        return self._material.policy.cost(item)

    def name_of(self, item: TokenRow) -> str:
        return item.example

    def _kept(self) -> list[TokenRow]:
        m = self._material
        traces, counts = self._traces()
        rows = [token_row(m.policy.base, m.taught(t.example), t) for t in traces]
        kept = [row for row in rows if len(row) <= m.policy.base.context_length]
        counts |= {"over_context": len(rows) - len(kept), "kept": len(kept)}
        m.bench.emit("traces", use="weights", method=m.config.method, examples=len(m.examples), **counts)
        if not kept:
            raise NoData(
                f"There is nothing to train on: of {counts['sampled']} own completions the grader accepted "
                f"{counts['accepted']}, there were {counts['gold']} gold ones, and {counts['over_context']} did not "
                "fit the context. Tune the prompt first, raise weights.samples, or set weights.method = 'sft'."
            )
        return kept

    def _traces(self) -> tuple[list[Trace], dict[str, int]]:
        m = self._material
        if m.config.method == "sft":
            traces = gold(m.task, m.examples)
            return traces, {"gold": len(traces), "sampled": 0, "accepted": 0}
        asked = [Conditioning(m.prompts[e], m.policy.start) for e in m.examples]
        traces, sampled = accepted(m.task, m.examples, asked, m.sampling("rollouts"), m.bench)
        solved = len({t.example.id for t in traces})
        return traces, {"gold": 0, "sampled": sampled, "accepted": len(traces), "solved": solved}
