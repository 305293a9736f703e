"""MetaTuner, slow and obvious: one example at a time, no padding, dense weight updates, scalar loops over tokens.

Written from sheet 02 (arXiv 2509.24245) alone; the tests hold cotune's batched code to it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def merged(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float) -> nn.Module:
    """A copy of the model with W + scaling * B A written into every named layer (no gradient to the factors)."""
    dense = copy.deepcopy(model)
    modules = dict(dense.named_modules())
    for name, (lora_a, lora_b) in factors.items():
        weight = modules[name].weight
        weight.data = weight.data + scaling * (lora_b @ lora_a).to(weight)
    return dense


def nll(model: nn.Module, context: Sequence[int], completion: Sequence[int]) -> float:
    """Mean of -log p(token) over the completion, one forward pass per token."""
    total = 0.0
    for i, token in enumerate(completion):
        ids = torch.tensor([[*context, *completion[:i]]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        total -= float(torch.log(torch.exp(logits - logits.max())[token] / torch.exp(logits - logits.max()).sum()))
    return total / len(completion)


def hidden(model: nn.Module, depth: int, query: Sequence[int]) -> Tensor:
    """hidden_TD behind layer `depth` of one query."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(query)]), output_hidden_states=True).hidden_states[depth][0]


def theta(h: Tensor, down: Tensor, up: Tensor, shape: tuple[int, int]) -> Tensor:
    """MM(ReLU(MM(W_d, h)), W_u), read as a row vector times W_u and reshaped row by row."""
    z = [max(0.0, sum(w * x for w, x in zip(row, h.tolist(), strict=True))) for row in down.tolist()]
    flat = [sum(z[m] * row[f] for m, row in enumerate(up.tolist())) for f in range(up.shape[1])]
    rows, columns = shape
    return torch.tensor([[flat[i * columns + j] for j in range(columns)] for i in range(rows)], dtype=h.dtype)
