"""Learning from own right and wrong completions, sampled once before training: in pairs (dpo) or one by one (kto).

A completion is right when the grader says so. Answers that were cut off are left out: they have no end to learn, and
being too long is not the mistake that a pair should show (ours). The student of sheet 08 learns from a teacher's
completions; here the model is its own teacher (point 6 there).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from cotune.errors import NoData
from cotune.methods import objectives
from cotune.methods.base import Material
from cotune.models.likelihood import completion_log_probs
from cotune.supervision import TokenRow, Trace, token_row
from cotune.training import Cost, shuffled_batches
from cotune.values import Example, Outcome


@dataclass(frozen=True)
class Pair:
    """A right and a wrong completion of one example, with their log-probabilities before training."""

    right: TokenRow
    wrong: TokenRow
    reference_right: float = 0.0
    reference_wrong: float = 0.0


@dataclass(frozen=True)
class Judged:
    """A completion, whether it is right, and `other`: the completion of another example behind this one's prompt.

    The references are log-probabilities before training.
    """

    row: TokenRow
    right: bool
    other: TokenRow
    reference: float = 0.0
    reference_other: float = 0.0


Item = TypeVar("Item", Pair, Judged)


class _Preferences(ABC, Generic[Item]):
    """What both share: sampling, grading, batches of the same size, every item weighing the same."""

    parameters: Mapping[str, nn.Parameter] = {}
    updates = 1
    micro_batch_size: int

    def __init__(self, material: Material) -> None:
        """Emits "preferences". Raises NoData, and BudgetExhausted before work that the budget cannot pay."""
        self._material = material
        self.micro_batch_size = material.config.micro_batch_size
        self._items: list[Item] = self._with_references(self._chosen())
        self.steps = -(-len(self._items) // material.config.batch_size)

    def batches(self, epoch: int, done: int, meta: MutableMapping[str, Any]) -> Iterable[Sequence[Item]]:
        rng = self._material.bench.rng("epoch", epoch)
        return shuffled_batches(self._items, self._material.config.batch_size, rng)[done:]

    def weight(self, item: Item) -> float:
        return 1.0

    @abstractmethod
    def _paired(self, example: Example, right: list[TokenRow], wrong: list[TokenRow]) -> list[Any]:
        """What one example gives."""

    def _chosen(self) -> list[Any]:
        m, base = self._material, self._material.policy.base
        found: list[Any] = []
        counts = dict.fromkeys(("right", "wrong", "cut_off", "over_context", "mixed"), 0)
        answered = m.sample(m.examples, m.policy.start, "rollouts")
        for example, completions in zip(m.examples, answered, strict=True):
            sides: dict[bool, list[TokenRow]] = {True: [], False: []}
            rendered = m.taught(example)
            for text in dict.fromkeys(c.text for c in completions if not c.truncated):
                row = token_row(base, rendered, Trace(example, text))
                fits = len(row) <= base.context_length
                counts["over_context"] += not fits
                if fits:
                    sides[m.task.grade(example, text).outcome is Outcome.CORRECT].append(row)
            counts["cut_off"] += sum(c.truncated for c in completions)
            counts["right"] += len(sides[True])
            counts["wrong"] += len(sides[False])
            counts["mixed"] += bool(sides[True] and sides[False])
            found += self._paired(example, sides[True], sides[False])
        sampled = len(m.examples) * m.config.samples
        kept = self._usable(found)
        m.bench.emit(
            "preferences", method=m.config.method, examples=len(m.examples), sampled=sampled, **counts, kept=len(kept)
        )
        if not kept:
            raise NoData(
                f"There is nothing to prefer: of {sampled} own completions {counts['right']} different ones are right "
                f"and {counts['wrong']} wrong, and {counts['mixed']} of {len(m.examples)} examples have both. Raise "
                "weights.samples or weights.temperature, tune the prompt first, or set weights.method = 'sft'."
            )
        return kept

    def _usable(self, found: list[Any]) -> list[Any]:
        return found

    @abstractmethod
    def _with_references(self, items: list[Any]) -> list[Item]: ...

    def _known(self, rows: Sequence[TokenRow]) -> dict[TokenRow, float]:
        """log p of whole completions before training, each read once."""
        distinct = list(dict.fromkeys(rows))
        return dict(zip(distinct, (float(found.sum()) for found in self._material.reference(distinct)), strict=True))

    def _policy(self, rows: Sequence[TokenRow], model: nn.Module) -> Tensor:
        """log p of whole completions, [B]."""
        return completion_log_probs(model, [r.context for r in rows], [r.completion for r in rows]).sum(1)


class Dpo(_Preferences[Pair]):
    """Direct Preference Optimization (sheet 08) on pairs of one example's completions.

    Of an example with both, every completion is in a pair: right and wrong ones are paired in the order in which they
    were sampled, and the scarcer side begins again (ours).
    """

    def loss(self, items: Sequence[Pair]) -> tuple[Tensor, dict[str, float]]:
        with self._material.policy.training() as model:
            right_B, wrong_B = self._policy([r for i in items for r in (i.right, i.wrong)], model).view(-1, 2).unbind(1)
        reference_right_B = right_B.new_tensor([i.reference_right for i in items])
        reference_wrong_B = right_B.new_tensor([i.reference_wrong for i in items])
        beta = self._material.config.beta
        loss_B = objectives.dpo(right_B, wrong_B, reference_right_B, reference_wrong_B, beta)
        margin_B = (right_B - reference_right_B - wrong_B + reference_wrong_B).detach()
        return loss_B.sum(), {"preferred": float((margin_B > 0).sum()), "margin": beta * float(margin_B.sum())}

    def cost(self, item: Pair) -> Cost:
        return self._material.policy.cost(item.right) + self._material.policy.cost(item.wrong)

    def name_of(self, item: Pair) -> str:
        return item.right.example

    def _paired(self, example: Example, right: list[TokenRow], wrong: list[TokenRow]) -> list[Pair]:
        if not right or not wrong:
            return []
        return [Pair(right[i % len(right)], wrong[i % len(wrong)]) for i in range(max(len(right), len(wrong)))]

    def _with_references(self, items: list[Pair]) -> list[Pair]:
        known = self._known([r for i in items for r in (i.right, i.wrong)])
        return [replace(i, reference_right=known[i.right], reference_wrong=known[i.wrong]) for i in items]


class Kto(_Preferences[Judged]):
    """Kahneman-Tversky Optimization: every completion counts, paired or not.

    lambda_D and lambda_U make up for unequal numbers of right and wrong completions, at the lower end of the range that
    the paper gives (lambda_D n_D / (lambda_U n_U) = 1). z_0 is estimated from the whole batch, so micro-batches are
    batches here.
    """

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        self.micro_batch_size = material.config.batch_size
        right = sum(item.right for item in self._items)
        wrong = len(self._items) - right
        self._lambda = {True: max(1.0, wrong / right), False: max(1.0, right / wrong)}

    def loss(self, items: Sequence[Judged]) -> tuple[Tensor, dict[str, float]]:
        with self._material.policy.now() as model:
            others_B = self._policy([i.other for i in items], model)
        with self._material.policy.training() as model:
            policy_B = self._policy([i.row for i in items], model)
        reference_B = policy_B.new_tensor([i.reference for i in items])
        kl = objectives.reference_point(others_B, policy_B.new_tensor([i.reference_other for i in items]))
        is_right_B = torch.tensor([i.right for i in items], device=policy_B.device)
        loss_B = objectives.kto(policy_B, reference_B, is_right_B, kl, self._material.config.beta)
        lambda_B = policy_B.new_tensor([self._lambda[i.right] for i in items])
        return (lambda_B * loss_B).sum(), {"reference_point": float(kl) * len(items)}

    def cost(self, item: Judged) -> Cost:
        policy = self._material.policy
        return policy.cost(item.row) + policy.reading_cost(item.other)

    def name_of(self, item: Judged) -> str:
        return item.row.example

    def _paired(self, example: Example, right: list[TokenRow], wrong: list[TokenRow]) -> list[Judged]:
        return [Judged(row, True, row) for row in right] + [Judged(row, False, row) for row in wrong]

    def _usable(self, found: list[Judged]) -> list[Judged]:
        """Each with the completion of the next one of another example; nothing when only one side is there."""
        if len({item.right for item in found}) < 2:
            return []
        return [replace(item, other=self._other(item, [*found[i:], *found[:i]])) for i, item in enumerate(found)]

    def _other(self, item: Judged, behind: Sequence[Judged]) -> TokenRow:
        for next_item in behind:
            other = replace(item.row, completion=next_item.row.completion)
            if next_item.row.example != item.row.example and len(other) <= self._material.policy.base.context_length:
                return other
        return item.row

    def _with_references(self, items: list[Judged]) -> list[Judged]:
        known = self._known([r for i in items for r in (i.row, i.other)])
        return [replace(i, reference=known[i.row], reference_other=known[i.other]) for i in items]
