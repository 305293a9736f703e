"""LoRA the slow way: the dense update added to the weights, one row at a time. An oracle, no product code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


def dense_logits(
    model: nn.Module, ids_T: Tensor, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float
) -> Tensor:
    """Logits [T, V] of one unpadded row under W + scaling * B A. Differentiable in A and B."""
    weights = dict(model.named_parameters())
    for name, (lora_a, lora_b) in factors.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scaling * (lora_b @ lora_a)
    return functional_call(model, weights, kwargs={"input_ids": ids_T[None], "use_cache": False}).logits[0]


def decode_one(
    model: nn.Module,
    prompt: Sequence[int],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scaling: float,
    ends: set[int],
    max_new_tokens: int,
    uniforms: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> tuple[list[int], list[float], bool]:
    """(tokens, log-probabilities, ended): no padding, no cache, no batch. `uniforms` None is greedy."""
    ids, logprobs = list(prompt), []
    for step in range(max_new_tokens):
        with torch.no_grad():
            logits = dense_logits(model, torch.tensor(ids), factors, scaling)[-1].double()
        if uniforms is None:
            token = int(logits.argmax())
        else:
            probs = (logits / temperature).softmax(-1).tolist()
            total, token = probs[0], 0
            while total <= uniforms[step]:
                token += 1
                total += probs[token]
        if token in ends:
            return ids[len(prompt) :], logprobs, True
        ids.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
    return ids[len(prompt) :], logprobs, False
