"""A trained verifier: how likely a completion is right, read off what the frozen base model makes of it.

The scorer `verifier` of best-of-N and weighted best-of-N (Snell et al., arXiv 2408.03314; sheet 03). It reads the
rendered prompt and the completion, never the reference. How it is trained is in methods/verifier.py.

Ours:

- It judges a completion as a whole (an outcome verifier); the paper's judges every step, and takes the last.
- It is linear in the base model's last hidden state behind the completion; the paper fine-tunes a copy of the model. It
  reads without an adapter, so that one verifier ranks what any adapter has said.

Axes: B rows, D width of the model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from cotune.bench import Bench
from cotune.errors import UsageError
from cotune.ledger import Spent, forward_flops
from cotune.models.base import BaseModel
from cotune.models.likelihood import end_states
from cotune.scorers import VERIFIER
from cotune.values import AnyPlan, Completion, digest

_FILE = "verifier.safetensors"
_ROWS = 32  # read at once

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""The token ids of a prompt and of a completion of it."""


@dataclass(frozen=True, eq=False)
class VerifierHead:
    """P(right) = sigmoid(weight . state + bias), with the state of `read`. `weight_D` [D] and `bias` [] are float32."""

    weight_D: Tensor
    bias: Tensor

    @cached_property
    def digest(self) -> str:
        return digest([self.weight_D.tolist(), self.bias.item()])

    def score(self, prompt: str, completions: Sequence[Completion], bench: Bench) -> list[float | None]:
        """P(right) of each completion, in [0, 1]; None for one that does not fit the context behind its prompt.

        Equal completions are read once. Booked like generation that reads so many tokens, and kept in the journal.
        Raises BudgetExhausted before reading, UsageError when the model has another width.
        """
        base = bench.base
        context = tuple(base.encode(prompt))
        fitting = [c.token_ids for c in completions if len(context) + len(c.token_ids) <= base.context_length]
        rows = [(context, ids) for ids in dict.fromkeys(fitting)]
        found = dict(zip((ids for _, ids in rows), self._scored(rows, bench), strict=True))
        return [found.get(c.token_ids) for c in completions]

    def _scored(self, rows: Sequence[Row], bench: Bench) -> list[float]:
        base = bench.base
        tokens = reading_tokens(rows)
        flops = forward_flops(base.parameters_count, tokens)
        bench.ledger.allow(tokens, flops)
        key = digest(["verifier", self.digest, base.digest, rows])
        known = bench.store.recall(key)
        if known is None:
            began = time.perf_counter()
            scores = self.chances(read(base, rows)).tolist() if rows else []
            known = {"scores": scores, "seconds": time.perf_counter() - began}
            bench.store.remember(key, known)
        bench.ledger.book(Spent(prompt_tokens=tokens, flops=flops, seconds=known["seconds"]))
        return list(known["scores"])

    def chances(self, states_BD: Tensor) -> Tensor:
        """P(right) of each row, [B] in float64: far from 1/2 float32 would make ties of what differs."""
        width = self.weight_D.shape[0]
        if states_BD.shape[1] != width:
            raise UsageError(
                f"The verifier was trained on a model of width {width}, and this one has {states_BD.shape[1]}. Use the "
                "model of the run that trained it."
            )
        return torch.sigmoid(states_BD.double() @ self.weight_D.double() + self.bias.double())

    def save(self, folder: Path) -> None:
        save_file({"weight": self.weight_D.contiguous(), "bias": self.bias.contiguous()}, folder / _FILE)


def read(base: BaseModel, rows: Sequence[Row]) -> Tensor:
    """states_BD: the base model's last hidden state behind each completion, scaled to mean square 1; on the CPU."""
    with torch.no_grad():
        states = [end_states(base.model, [c + y for c, y in rows[i : i + _ROWS]]) for i in range(0, len(rows), _ROWS)]
        states_BD = torch.cat(states)
        return functional.rms_norm(states_BD, states_BD.shape[-1:]).cpu()


def reading_tokens(rows: Sequence[Row]) -> int:
    return sum(len(context) + len(completion) for context, completion in rows)


def loaded_verifier(folder: Path, plan: AnyPlan) -> VerifierHead | None:
    """The verifier that was saved with this plan; None for a plan that needs none.

    Raises UsageError for a file that is missing or damaged.
    """
    if VERIFIER not in plan.scorers:
        return None
    try:
        tensors = load_file(folder / _FILE)
        weight_D, bias = tensors["weight"], tensors["bias"]
        if weight_D.dim() != 1 or bias.dim() != 0 or not (weight_D.isfinite().all() and bias.isfinite()):
            raise ValueError("no finite vector with a bias")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{folder / _FILE} is missing or damaged ({error}). Run the tuning again.") from None
    return VerifierHead(weight_D, bias)
