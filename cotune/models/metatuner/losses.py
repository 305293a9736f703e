"""MetaTuner's trained objective, term by term (arXiv 2509.24245, sheet 02).

sum_{D1} L(M_{F(p~, x_i)}(G_(phi_s, phi_p')(p~, x_i), x_i), y_i) + alpha * sum_{D2} L(G_(phi_s, phi_p)(p~, x_i), p_i)

The prompt inside term 1 is a token sequence, made before; no gradient passes through it. L is the mean negative
log-likelihood over the tokens of the target (ours: the paper does not say whether tokens are summed or averaged).
Knows nothing of tasks, engines or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.models.base import BaseModel
from cotune.models.lora import Factors, attached
from cotune.models.metatuner.encoder import hidden_after, latent, pool, right_padded, tapped
from cotune.models.metatuner.generator import MetaTuner, pad_id


@dataclass(frozen=True)
class JointItem:
    """One training example as tokens.

    `query` is (p~, x_i) as G reads it and `target` the prompt it should write, p_i of D2, with its end of turn; empty
    if the query is not in D2. `question` is (prompt_i, x_i) as M reads it and `completion` is y_i with its end of turn.
    """

    query: tuple[int, ...]
    target: tuple[int, ...]
    question: tuple[int, ...]
    completion: tuple[int, ...]


def completion_nll(
    model: nn.Module, contexts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """L(model(context_b), completion_b): nll_B, the mean of -log p over the tokens of each completion.

    No completion may be empty.
    """
    device = next(model.parameters()).device
    rows = [[*context, *completion] for context, completion in zip(contexts, completions, strict=True)]
    ids_BT, mask_BT = right_padded(rows, pad, device)
    first = min(len(context) for context in contexts)  # no logits for what all rows merely read
    kept = ids_BT.shape[1] - first + 1
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=kept).logits
    labels_BT = ids_BT[:, first:].clone()
    for row, (context, completion) in enumerate(zip(contexts, completions, strict=True)):
        labels_BT[row, : len(context) - first] = -100
        labels_BT[row, len(context) - first + len(completion) :] = -100
    nll_BT = functional.cross_entropy(logits_BTV[:, :-1].float().transpose(1, 2), labels_BT, reduction="none")
    length_B = torch.tensor([len(completion) for completion in completions], device=device)
    return nll_BT.sum(1) / length_B


def actor_term(actor: BaseModel, factors: Factors, scaling: float, items: Sequence[JointItem]) -> Tensor:
    """Term 1 of each item, nll_B: L(M_theta_i(prompt_i, x_i), y_i), differentiable in `factors` (theta, [B, ...])."""
    with attached(actor.model, factors, scaling):
        return completion_nll(
            actor.model, [item.question for item in items], [item.completion for item in items], pad_id(actor)
        )


def prompt_term(tuner: MetaTuner, items: Sequence[JointItem]) -> tuple[Tensor, Tensor]:
    """Term 2 of each item and its latent: (nll_B of L(G_(phi_s, phi_p)(p~, x_i), p_i), pooled_BD after layer k).

    One forward pass serves both branches: h_i is read at the last token of the query, before the target. The items
    must have targets.
    """
    base = tuner.base
    with tuner.prompts.trainable(), tapped(base.model, tuner.prompts.depth) as caught:
        nll_B = completion_nll(base.model, [i.query for i in items], [i.target for i in items], pad_id(base))
    return nll_B, pool(caught[0], [len(i.query) for i in items], tuner.pooling)


def encode(tuner: MetaTuner, items: Sequence[JointItem]) -> Tensor:
    """pooled_BD after layer k, differentiable in phi_s, for items that G is not trained to answer."""
    base = tuner.base
    ids_BT, mask_BT = right_padded([i.query for i in items], pad_id(base), base.model.device)
    with tuner.prompts.encoding():
        hidden_BTD = hidden_after(base.model, tuner.prompts.depth, ids_BT, mask_BT)
    return pool(hidden_BTD, [len(i.query) for i in items], tuner.pooling)


def joint_loss(
    tuner: MetaTuner, actor: BaseModel, items: Sequence[JointItem], prompt_weight: float, actor_weight: float = 1.0
) -> tuple[Tensor, dict[str, float]]:
    """MetaTuner-J: actor_weight * sum of term 1 + prompt_weight * sum of term 2 over the items, and each sum by name.

    `prompt_weight` is the paper's alpha; the paper's first weight is 1 (a step of MetaTuner-I sets one of them to 0).
    Gradients of term 1 reach phi_s and phi_q, those of term 2 phi_s and phi_p. A weight of zero is the single branch:
    the other network does not run.
    """
    taught = [i for i in items if i.target and prompt_weight]
    others = [i for i in items if not (i.target and prompt_weight)] if actor_weight else []
    total = torch.zeros((), device=tuner.base.model.device)
    sums: dict[str, float] = {}
    pooled: list[Tensor] = []
    if taught:
        nll_B, pooled_BD = prompt_term(tuner, taught)
        total = total + prompt_weight * nll_B.sum()
        sums["prompt_loss"] = float(nll_B.detach().sum())
        pooled.append(pooled_BD)
    if others:
        pooled.append(encode(tuner, others))
    if actor_weight:
        factors = tuner.adapters(latent(torch.cat(pooled)))
        nll_B = actor_term(actor, factors, tuner.scaling, [*taught, *others])
        total = total + actor_weight * nll_B.sum()
        sums["actor_loss"] = float(nll_B.detach().sum())
    return total, sums
