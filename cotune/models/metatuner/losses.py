"""MetaTuner's trained objective, term by term (arXiv 2509.24245, sheet 02).

sum_{D1} L(M_{F(p~, x_i)}(G_(phi_s, phi_p')(p~, x_i), x_i), y_i) + alpha * sum_{D2} L(G_(phi_s, phi_p)(p~, x_i), p_i)

The prompt inside term 1 is a token sequence, made before; no gradient passes through it. L is the mean negative
log-likelihood over the tokens of the target (ours: the paper does not say whether tokens are summed or averaged).
Knows nothing of tasks, engines or schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.models.base import BaseModel
from cotune.models.likelihood import completion_nll, right_padded
from cotune.models.lora import Factors, attached
from cotune.models.metatuner.encoder import Seam, hidden_after, latent, pool, tapped
from cotune.models.metatuner.generator import MetaTuner
from cotune.models.metatuner.relaxation import Relaxed, prompt_logits, relaxed_embeddings, straight_through


@dataclass(frozen=True)
class JointItem:
    """One training example as tokens.

    `query` is (p~, x_i) as the encoder reads it and `target` the prompt that G should write, p_i of D2, with its end of
    turn; empty where term 2 does not count the example. `question` is (prompt_i, x_i) as M reads it and `completion` is
    y_i with its end of turn; empty where term 1 does not count it. `prompt_query` is what G writes from, if that is not
    `query` (one of the two branches does not see x_i). `relaxed` is the prompt inside `question` where term 1 is to
    reach it (straight-through Gumbel-softmax); such items have no target. `example` is the example's id, for messages.
    """

    query: tuple[int, ...]
    target: tuple[int, ...]
    question: tuple[int, ...]
    completion: tuple[int, ...]
    prompt_query: tuple[int, ...] = ()
    relaxed: Relaxed | None = None
    example: str = ""

    @property
    def written_from(self) -> tuple[int, ...]:
        return self.prompt_query or self.query


def actor_term(actor: BaseModel, factors: Factors, scaling: float, items: Sequence[JointItem]) -> Tensor:
    """Term 1 of each item, nll_B: L(M_theta_i(prompt_i, x_i), y_i), differentiable in `factors` (theta, [B, ...])."""
    with attached(actor.model, factors, scaling):
        return completion_nll(actor.model, [item.question for item in items], [item.completion for item in items])


def prompt_term(tuner: MetaTuner, items: Sequence[JointItem]) -> tuple[Tensor, Tensor, Seam]:
    """Term 2 of each item, nll_B: L(G_(phi_s, phi_p)(p~, x_i), p_i), pooled_BD after layer k, and hidden_BTD there.

    One forward pass serves both branches: h_i is read from the tokens of the query, before the target. The items must
    have targets.
    """
    base, queries = tuner.prompts.base, [i.written_from for i in items]
    with tuner.prompts.trainable(), tapped(base.model, tuner.prompts.depth) as caught:
        nll_B = completion_nll(base.model, queries, [i.target for i in items])
    return nll_B, pool(caught[0].made, [len(query) for query in queries], tuner.pooling), caught[0]


def relaxed_term(tuner: MetaTuner, actor: BaseModel, items: Sequence[JointItem]) -> tuple[Tensor, list[Seam]]:
    """Term 1 of each item, nll_B, differentiable in phi_s and phi_p through the prompt too (all items `relaxed`); and
    where it leaves the encoder.
    """
    base, queries = tuner.prompts.base, [i.written_from for i in items]
    relaxed = [i.relaxed for i in items if i.relaxed]
    with tuner.prompts.trainable(), tapped(base.model, tuner.prompts.depth) as caught:
        logits = prompt_logits(base.model, queries, [r.prompt for r in relaxed])
    if tuner.shares and not any(i.prompt_query for i in items):
        pooled = Seam.at(pool(caught[0].made, [len(query) for query in queries], tuner.pooling))
    else:
        pooled = Seam.at(encode(tuner, items))
    one_hots = [straight_through(logits_PV, r) for logits_PV, r in zip(logits, relaxed, strict=True)]
    rows = [(*i.question, *i.completion) for i in items]
    embeddings_BTD = relaxed_embeddings(actor.model, rows, relaxed, one_hots)
    with attached(actor.model, tuner.adapters(latent(pooled.read)), tuner.scaling):
        questions, completions = [i.question for i in items], [i.completion for i in items]
        nll_B = completion_nll(actor.model, questions, completions, embeddings_BTD)
    return nll_B, [caught[0], pooled]


def encode(tuner: MetaTuner, items: Sequence[JointItem]) -> Tensor:
    """pooled_BD after layer k, differentiable in the encoder, for items that `prompt_term` has not read."""
    model = tuner.encoder.base.model
    ids_BT = right_padded([i.query for i in items], model.device)
    with tuner.encoder.encoding():
        hidden_BTD = hidden_after(model, tuner.encoder.depth, ids_BT)
    return pool(hidden_BTD, [len(i.query) for i in items], tuner.pooling)


Term = Literal["actor", "prompt"]


@dataclass(frozen=True)
class Terms:
    """The two sums of the objective over some items, and over how many; None where a term does not occur.

    `seams` are where they leave the encoder, each read by one term alone.
    """

    actor: Tensor | None
    prompt: Tensor | None
    answered: int = 0
    taught: int = 0
    seams: tuple[tuple[Term, Seam], ...] = ()


def joint_terms(tuner: MetaTuner, actor: BaseModel, items: Sequence[JointItem]) -> Terms:
    """Both sums, from one pass through the shared layers. What a term does not need does not run."""

    def read_by_prompt_term(item: JointItem) -> bool:
        return bool(item.target) and not item.prompt_query and tuner.shares

    taught = [i for i in items if i.target]
    answered = [i for i in taught if i.completion and read_by_prompt_term(i)]
    others = [i for i in items if i.completion and not read_by_prompt_term(i) and not i.relaxed]
    relaxed = [i for i in items if i.completion and i.relaxed]
    prompt: Tensor | None = None
    pooled: list[Tensor] = []
    seams: list[tuple[Term, Seam]] = []
    if taught:
        nll_B, pooled_BD, hidden = prompt_term(tuner, taught)
        prompt = nll_B.sum()
        seams.append(("prompt", hidden))
        pooled.append(pooled_BD[[b for b, i in enumerate(taught) if i.completion and read_by_prompt_term(i)]])
    if others:
        answered += others
        pooled.append(encode(tuner, others))
    sums: list[Tensor] = []
    if answered:
        every = Seam.at(torch.cat(pooled))
        seams.append(("actor", every))
        sums.append(actor_term(actor, tuner.adapters(latent(every.read)), tuner.scaling, answered).sum())
    if relaxed:
        nll_B, ways = relaxed_term(tuner, actor, relaxed)
        sums.append(nll_B.sum())
        seams += [("actor", way) for way in ways]
    answers = torch.stack(sums).sum() if sums else None
    return Terms(answers, prompt, len(answered) + len(relaxed), len(taught), tuple(seams))


def joint_loss(terms: Terms, prompt_weight: float, actor_weight: float = 1.0) -> tuple[Tensor, dict[str, float]]:
    """MetaTuner-J: actor_weight * term 1 + prompt_weight * term 2; each sum and its number of examples, for the log.

    `prompt_weight` is the paper's alpha, its weight of term 1 is 1. Gradients of term 1 reach phi_s and phi_q, those of
    term 2 phi_s and phi_p.
    """
    named = {"actor_loss": (actor_weight, terms.actor), "prompt_loss": (prompt_weight, terms.prompt)}
    present = {name: (weight, term) for name, (weight, term) in named.items() if term is not None}
    if not present:  # no example of this micro-batch is in either sum
        return torch.zeros((), requires_grad=True), {}
    total = torch.stack([weight * term for weight, term in present.values()]).sum()
    counts = {"answered": float(terms.answered), "taught": float(terms.taught)}
    return total, {name: float(term.detach()) for name, (_, term) in present.items()} | counts


def watch_agreement(terms: Terms, shared: Sequence[nn.Parameter], found: Callable[[dict[str, float]], None]) -> bool:
    """Have the backward pass through `terms` say how they pull on phi_s: `found` gets the norm of each term's gradient
    and their cosine. False if a term is missing.

    The cosine is a direct look at the mutual regularisation that the paper claims (sheet 02). Costs two more backward
    passes through the shared layers alone, made when the one of the step has reached them: what lies above is gone by
    then, so the peak of memory stays where it was.
    """
    if terms.actor is None or terms.prompt is None:
        return False
    weights: dict[Term, Tensor] = {}  # of each term in what the backward pass starts from
    pulls: dict[Term, list[Tensor]] = {"actor": [], "prompt": []}
    expected = len(terms.seams)  # a hook that held what it hangs on would never be freed

    def weigh(term: Term, gradient: Tensor) -> None:
        weights[term] = gradient

    def pull(term: Term, made: Tensor, gradient: Tensor) -> None:
        parts = torch.autograd.grad(made, shared, gradient, retain_graph=True, materialize_grads=True)
        pulls[term].append(torch.cat([part.flatten() for part in parts]) / weights[term])
        if sum(map(len, pulls.values())) == expected:
            actor, prompt = (torch.stack(of_term).sum(0) for of_term in pulls.values())
            cosine = functional.cosine_similarity(actor, prompt, dim=0)
            norms = {"actor_gradient": float(actor.norm()), "prompt_gradient": float(prompt.norm())}
            found(norms | {"cosine": float(cosine)})

    terms.actor.register_hook(partial(weigh, "actor"))  # type: ignore[no-untyped-call]
    terms.prompt.register_hook(partial(weigh, "prompt"))  # type: ignore[no-untyped-call]
    for term, (made, read) in terms.seams:
        read.register_hook(partial(pull, term, made))  # type: ignore[no-untyped-call]
    return True
