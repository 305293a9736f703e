"""The one weight-training loop: accumulation, schedule, clipping, checkpoints, resume. Given a loss.

It knows nothing of tasks, adapters or strategies: parameters are named tensors, items are opaque, and the loss of some
items is a sum that the caller computes. `lora-only`, `sequential` and `joint` all train through `Trainer.run`.

AdamW without weight decay, linear warm-up then cosine decay to zero: ours, the papers name neither (sheets 01, 02).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from cotune.bench import Bench
from cotune.errors import BudgetExhausted, CotuneError
from cotune.ledger import Spent

Item = TypeVar("Item")

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of one parameter


@dataclass(frozen=True)
class Cost:
    """What one item costs to train on once: tokens through the model(s), FLOPs by the ledger's formula."""

    tokens: int
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.flops + other.flops)


@dataclass(frozen=True)
class Settings:
    """See WeightsConfig / JointConfig for units and sources."""

    learning_rate: float
    batch_size: int
    micro_batch_size: int
    warmup: float
    max_grad_norm: float
    checkpoint_every: int


def learning_rate(peak: float, warmup: float, step: int, total_steps: int) -> float:
    """Rate of 0-based `step`: linear over the first `warmup` share of the steps, then cosine to 0 (ours)."""
    rising = math.ceil(warmup * total_steps)
    if step < rising:
        return peak * (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, total_steps - rising))
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def shuffled_batches(items: Sequence[Item], batch_size: int, rng: random.Random) -> list[list[Item]]:
    """One epoch: every item once, in an order drawn from `rng`; the last batch may be smaller."""
    order = list(items)
    rng.shuffle(order)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


class Trainer(Generic[Item]):
    """AdamW over `parameters` for `total_steps` optimizer steps, continuing from its last checkpoint.

    `loss(items)` returns the SUM of losses over the items (a scalar tensor with gradient) and named sums for the log;
    `weight(item)` is the item's share of the mean (for example its number of target tokens), so that the step's
    gradient is sum(loss) / sum(weight) whatever the micro-batch split. `cost(item)` is asked of the ledger before the
    step and booked after it; `name_of(item)` is what messages call it. `extra` tensors (for example a frozen copy) are
    saved and restored, in place, with the parameters. `loss` must not draw from torch's global random state, which no
    checkpoint keeps.

    Gradients, moments and the weights that are updated are float32; a parameter of another dtype gets a float32 copy
    that is rounded into it after each step.
    """

    step: int
    """Optimizer steps done."""

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[Sequence[Item]], tuple[Tensor, dict[str, float]]],
        weight: Callable[[Item], float],
        cost: Callable[[Item], Cost],
        name_of: Callable[[Item], str],
        settings: Settings,
        total_steps: int,
        bench: Bench,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.step = 0
        self._name = name
        self._parameters = dict(parameters)
        self._loss = loss
        self._weight = weight
        self._cost = cost
        self._name_of = name_of
        self._settings = settings
        self._total_steps = total_steps
        self._bench = bench
        self._extra = dict(extra or {})
        self._weights = {  # what AdamW updates
            n: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for n, p in self._parameters.items()
        }
        # One group without weight decay. On a GPU in one kernel: a step of LoRA has hundreds of small tensors, and one
        # kernel after the other for each of them takes as long as a backward pass.
        self._on_gpu = all(w.is_cuda for w in self._weights.values())
        self._optimizer = torch.optim.AdamW(self._weights.values(), weight_decay=0.0, foreach=False, fused=self._on_gpu)

    def restore(self) -> dict[str, Any] | None:
        """Load the last checkpoint if there is one; returns the caller's metadata saved with it.

        Raises CotuneError if it is not a checkpoint of these parameters and this many steps.
        """
        found = self._bench.load_checkpoint(self._name)
        if found is None:
            return None
        tensors, saved = found
        expected = {f"parameters/{n}": p.shape for n, p in self._weights.items()}
        expected |= {f"extra/{n}": t.shape for n, t in self._extra.items()}
        if saved["total_steps"] != self._total_steps or any(
            n not in tensors or tensors[n].shape != shape for n, shape in expected.items()
        ):
            raise CotuneError(
                f"The checkpoint {self._name!r} belongs to another training run (other parameters or number of steps). "
                "Delete the run folder, or give another --out."
            )
        state: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for i, (n, weight) in enumerate(self._weights.items()):
                weight.copy_(tensors[f"parameters/{n}"])
                if f"adamw/{n}/step" in tensors:
                    state[i] = {m: tensors[f"adamw/{n}/{m}"].clone() for m in _MOMENTS}
            for n, tensor in self._extra.items():
                tensor.copy_(tensors[f"extra/{n}"])
        self._optimizer.load_state_dict({"state": state, "param_groups": self._optimizer.state_dict()["param_groups"]})
        self._round()
        self.step = saved["step"]
        return dict(saved["caller"])

    def run(self, batches: Iterable[Sequence[Item]], meta: Mapping[str, Any] | None = None) -> bool:
        """One optimizer step per batch; the caller passes only the batches from `self.step` on, made beforehand or when
        their turn comes.

        Engines give their memory back before the first step. Checkpoints every `checkpoint_every` steps and at the end,
        with `meta` as it is then. Emits "step" events (loss, named losses, gradient norm, learning rate). False when
        the budget ran out before the last batch.
        Raises CotuneError, leaving the last checkpoint, on a NaN or infinite loss or gradient (naming the step, the
        items of the micro-batch or batch, and the fix) and when the GPU's memory does not suffice.
        """
        for i, batch in enumerate(batches):
            if i == 0:
                self._bench.engine.release()
            costs = [self._cost(item) for item in batch]
            tokens, flops = sum(c.tokens for c in costs), sum(c.flops for c in costs)
            try:
                self._bench.ledger.allow(tokens, flops)
            except BudgetExhausted as stop:
                self._bench.emit("budget", where="training", message=str(stop))
                self._save(meta)
                return False
            began = time.perf_counter()
            try:
                log = self._update(batch)
            except torch.OutOfMemoryError as error:
                raise CotuneError(
                    f"The GPU's memory does not suffice for training {self._name!r}. Lower micro_batch_size (now "
                    f"{self._settings.micro_batch_size}; the result does not depend on it), or --set "
                    "runner.gradient_checkpointing=true."
                ) from error
            seconds = time.perf_counter() - began
            self._bench.ledger.book(Spent(trained_tokens=tokens, flops=flops, seconds=seconds))
            self._bench.emit("step", training=self._name, step=self.step, of=self._total_steps, **log)
            self._bench.progress(self._name, self.step, self._total_steps)
            if self.step % self._settings.checkpoint_every == 0:
                self._save(meta)
        self._save(meta)
        return True

    def _update(self, batch: Sequence[Item]) -> dict[str, float]:
        """One optimizer step; returns what to log, per unit of weight."""
        settings = self._settings
        total = sum(self._weight(item) for item in batch)
        if not total > 0:
            raise CotuneError(f"A batch of {self._name!r} has nothing to learn from (its weight is {total}).")
        self._optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for i in range(0, len(batch), settings.micro_batch_size):
            items = batch[i : i + settings.micro_batch_size]
            loss, named = self._loss(items)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise self._diverged("loss", value, items)
            torch.autograd.backward(loss / total)
            self._collect_gradients()
            for key, amount in {"loss": value, **named}.items():
                sums[key] = sums.get(key, 0.0) + amount
        norm = float(nn.utils.clip_grad_norm_(self._weights.values(), settings.max_grad_norm, foreach=self._on_gpu))
        if not math.isfinite(norm):
            raise self._diverged("gradient norm", norm, batch)
        rate = learning_rate(settings.learning_rate, settings.warmup, self.step, self._total_steps)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._round()
        self.step += 1
        return {key: amount / total for key, amount in sums.items()} | {"grad_norm": norm, "learning_rate": rate}

    def _collect_gradients(self) -> None:
        """Add gradients of parameters that have a float32 copy to that copy's, so that sums are float32."""
        for n, weight in self._weights.items():
            parameter = self._parameters[n]
            if parameter is weight or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
            parameter.grad = None

    @torch.no_grad()
    def _round(self) -> None:
        for n, weight in self._weights.items():
            if self._parameters[n] is not weight:
                self._parameters[n].copy_(weight)

    def _save(self, meta: Mapping[str, Any] | None) -> None:
        tensors = {f"parameters/{n}": w.detach().contiguous() for n, w in self._weights.items()}
        tensors |= {f"extra/{n}": t.detach().contiguous() for n, t in self._extra.items()}
        for n, weight in self._weights.items():
            state = self._optimizer.state.get(weight, {})
            tensors |= {f"adamw/{n}/{m}": state[m] for m in _MOMENTS if m in state}
        saved = {"step": self.step, "total_steps": self._total_steps, "caller": dict(meta or {})}
        self._bench.save_checkpoint(self._name, tensors, saved)

    def _diverged(self, what: str, value: float, items: Sequence[Item]) -> CotuneError:
        names = ", ".join(dict.fromkeys(map(self._name_of, items)))
        return CotuneError(
            f"Training {self._name!r} diverged: the {what} is {value} at step {self.step + 1} of {self._total_steps}, "
            f"on {names}. Lower the learning rate (now {self._settings.learning_rate:g}) or max_grad_norm."
        )
