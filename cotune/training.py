"""The one weight-training loop: accumulation, schedule, clipping, checkpoints, resume. Given a loss.

It knows nothing of tasks, adapters or strategies: parameters are named tensors, items are opaque, and the loss of some
items is a sum that the caller computes. `lora-only`, `sequential` and `joint` all train through `Trainer.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from cotune.bench import Bench

Item = TypeVar("Item")


@dataclass(frozen=True)
class Cost:
    """What one item costs to train on once: tokens through the model(s), FLOPs by the ledger's formula."""

    tokens: int
    flops: float


@dataclass(frozen=True)
class Settings:
    """See WeightsConfig / JointConfig for units and sources."""

    learning_rate: float
    batch_size: int
    micro_batch_size: int
    warmup: float
    max_grad_norm: float
    checkpoint_every: int


class Trainer(Generic[Item]):
    """AdamW over `parameters` for `total_steps` optimizer steps, continuing from its last checkpoint.

    `loss(items)` returns the SUM of losses over the items (a scalar tensor with gradient) and named sums for the log;
    `weight(item)` is the item's share of the mean (for example its number of target tokens), so that the step's
    gradient is sum(loss) / sum(weight) whatever the micro-batch split. `cost(item)` is booked per step, before it,
    through the ledger. `extra` tensors (for example a frozen copy) are saved and restored with the parameters.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[Sequence[Item]], tuple[torch.Tensor, dict[str, float]]],
        weight: Callable[[Item], float],
        cost: Callable[[Item], Cost],
        settings: Settings,
        total_steps: int,
        bench: Bench,
        extra: Mapping[str, torch.Tensor] | None = None,
    ) -> None: ...

    step: int  # optimizer steps done

    def restore(self) -> dict[str, Any] | None:
        """Load the last checkpoint if there is one; returns the caller's metadata saved with it."""

    def run(self, batches: Sequence[Sequence[Item]], meta: Mapping[str, Any] | None = None) -> bool:
        """One optimizer step per batch; the caller passes only the batches from `self.step` on.

        Checkpoints every `checkpoint_every` steps and at the end, with `meta`. Emits "step" events (loss, named
        losses, gradient norm, learning rate). False when the budget ran out before the last batch.
        Raises CotuneError on a NaN or infinite loss (naming step and the fix), leaving the last checkpoint.
        """
        raise NotImplementedError
