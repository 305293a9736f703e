"""Straight-through Gumbel-softmax: the gradient of term 1 through the prompt itself, the paper's comparison to term 2.

"Categorical Reparameterization with Gumbel-Softmax" (arXiv 1611.01144) for the estimator; that MetaTuner tried it and
found it much worse is all that sheet 02 knows. Knows nothing of schedules.

Axes: B rows, T tokens, P prompt tokens of one row, V vocabulary, D width of M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.models.base import BaseModel
from cotune.models.likelihood import right_padded


@dataclass(frozen=True)
class Relaxed:
    """A prompt that was sampled from G, as tokens: `start` is where it begins in M's question, `seed` names its noise,
    `temperature` is that of the softmax.
    """

    prompt: tuple[int, ...]
    start: int
    seed: int
    temperature: float


def same_vocabulary(generator: BaseModel, actor: BaseModel) -> bool:
    """Whether a token id means the same to G and to M: only then can M read G's distribution over tokens."""
    vocabulary: dict[str, int] = generator.tokenizer.get_vocab()
    return vocabulary == actor.tokenizer.get_vocab()


def gumbels_given(logits_PV: Tensor, tokens_P: Tensor, rng: torch.Generator) -> Tensor:
    """Perturbed logits l + g, g Gumbel noise, given that token p is the largest of row p.

    The largest one is logsumexp(l) plus a Gumbel variable, the others are truncated below it (Maddison et al. 2014,
    arXiv 1411.0030, "top-down"). So prompts that an engine sampled can be relaxed afterwards, without sampling again
    inside the training step.
    """
    noise_PV = torch.rand(logits_PV.shape, generator=rng, dtype=torch.float64).to(logits_PV.device)
    gumbel_PV = -torch.log(-torch.log(noise_PV.clamp(1e-12, 1 - 1e-12)))
    logits_PV = logits_PV.double()
    chosen_P1 = tokens_P[:, None]
    largest_P1 = logits_PV.logsumexp(-1, keepdim=True) + gumbel_PV.gather(-1, chosen_P1)
    others_PV = -torch.logaddexp(-largest_P1, -(logits_PV + gumbel_PV))
    return others_PV.scatter(-1, chosen_P1, largest_P1)


def straight_through(logits_PV: Tensor, relaxed: Relaxed) -> Tensor:
    """Rows that are one-hot at the prompt's tokens and have the gradient of softmax((l + g) / temperature), [P, V]."""
    tokens_P = torch.tensor(relaxed.prompt, device=logits_PV.device)
    perturbed_PV = gumbels_given(logits_PV, tokens_P, torch.Generator().manual_seed(relaxed.seed))
    soft_PV = (perturbed_PV / relaxed.temperature).softmax(-1).to(logits_PV.dtype)
    hard_PV = functional.one_hot(tokens_P, logits_PV.shape[-1]).to(soft_PV)
    return hard_PV + soft_PV - soft_PV.detach()


def prompt_logits(model: nn.Module, queries: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """logits_PV of each prompt token of each row, teacher-forced: the distribution that G draws it from."""
    device = next(model.parameters()).device
    ids_BT = right_padded([[*q, *p] for q, p in zip(queries, prompts, strict=True)], device)
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return [
        logits_BTV[b, len(q) - 1 : len(q) - 1 + len(p)].float()
        for b, (q, p) in enumerate(zip(queries, prompts, strict=True))
    ]


def relaxed_embeddings(
    actor: nn.Module, rows: Sequence[Sequence[int]], relaxed: Sequence[Relaxed], one_hots: Sequence[Tensor]
) -> Tensor:
    """M's input embeddings of `rows` (right-padded), prompt tokens through their straight-through rows, [B, T, D]."""
    embedding = actor.get_input_embeddings()  # type: ignore[operator]
    table_VD: Tensor = embedding.weight
    embedded_BTD: Tensor = embedding(right_padded(rows, table_VD.device))
    out = []
    for b, (r, one_hot_PV) in enumerate(zip(relaxed, one_hots, strict=True)):
        soft_PD = one_hot_PV[:, : len(table_VD)].to(table_VD) @ table_VD
        out.append(torch.cat([embedded_BTD[b, : r.start], soft_PD, embedded_BTD[b, r.start + len(r.prompt) :]]))
    return torch.stack(out)
