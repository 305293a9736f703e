"""How the verifier of an inference plan is trained: on the model's own completions of train examples, as graded.

Snell et al. (arXiv 2408.03314; sheet 03): a binary classifier with cross-entropy against soft targets, stopped early on
a tenth of the questions. Ours: an outcome verifier, linear in the frozen model's state (verifier.py), whose targets are
the grader's scores of whole completions (the paper estimates those of steps by rollouts); completions without an answer
are kept, because they must rank low; learning rate, batch and epochs. Why no LoRA under the head: docs/inference.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cotune.bench import Bench
from cotune.config import VerifierConfig
from cotune.engines.base import Request, Sampling
from cotune.ledger import Spent, forward_flops
from cotune.methods.base import graded
from cotune.methods.objectives import soft_cross_entropy
from cotune.scorers import VERIFIER
from cotune.tasks.base import Task
from cotune.training import Cost, Settings, Trainer, shuffled_batches
from cotune.values import Example, InferencePlan, Tuned
from cotune.verifier import Row, VerifierHead, read, reading_tokens


@dataclass(frozen=True, eq=False)
class Judged:
    """A completion of question `example` as the head sees it, states [D], and the grader's score."""

    state_D: Tensor
    score: float
    example: str


def verifier_for(
    plan: InferencePlan,
    candidates: Sequence[Tuned],
    settings: VerifierConfig,
    task: Task,
    train: Sequence[Example],
    limit: int,
    bench: Bench,
) -> VerifierHead | None:
    """A verifier of what `candidates` answer under `plan`; None for a plan whose scorer is another.

    With several candidates they take turns with the train examples (ours): it must rank the completions of any of them.
    `limit` is the most tokens of a completion. Where all completions score alike there is nothing to tell apart, and it
    gives every completion the same chance. Emits "verifier".
    Raises BudgetExhausted when no epoch could be paid for.
    """
    if plan.scorer != VERIFIER:
        return None
    bench = bench.at("verifier")
    order = list(train)
    bench.rng("examples").shuffle(order)
    chosen = order[: settings.examples]
    judged = _judged(plan, candidates, settings, task, chosen, limit, bench)
    held = {e.id for e in chosen[: max(1, round(settings.held_out * len(chosen)))]} if len(chosen) > 1 else set()
    learned, held_out = [j for j in judged if j.example not in held] or judged, [j for j in judged if j.example in held]
    scores = [j.score for j in learned]
    facts: dict[str, Any] = {
        "examples": len(chosen),
        "completions": len(judged),
        "held_out": len(held),
        "mean_score": sum(scores) / len(scores),
        "constant": len(set(scores)) == 1,
    }
    if facts["constant"]:
        head = _constant(learned)
        bench.emit("verifier", **facts)
        return head
    head, epoch = _trained(learned, held_out or learned, settings, bench)
    bench.emit("verifier", **facts, epoch=epoch, **_told_apart(head, held_out))
    return head


def _judged(
    plan: InferencePlan,
    candidates: Sequence[Tuned],
    settings: VerifierConfig,
    task: Task,
    examples: Sequence[Example],
    limit: int,
    bench: Bench,
) -> list[Judged]:
    """Own completions of the examples, graded and read. What was read is kept as a checkpoint."""
    base = bench.base
    requests: dict[int, Request] = {}
    for number, candidate in enumerate(candidates):
        mine = range(number, len(examples), len(candidates))
        conditionings = candidate.condition([examples[i] for i in mine], bench)
        for i, c in zip(mine, conditionings, strict=True):
            requests[i] = Request(base.render(task.messages(c.prompt, examples[i])), c.adapter)
    asked = [requests[i] for i in range(len(examples))]
    n = settings.samples if plan.temperature > 0 else 1
    sampling = Sampling(limit, plan.temperature, plan.top_p, n, seed=bench.seed_for("rollouts"))
    rows: list[Row] = []
    about: list[tuple[float, str]] = []
    answered = bench.generate(asked, sampling, label="rollouts")
    for example, request, completions in zip(examples, asked, answered, strict=True):
        context = tuple(base.encode(request.prompt))
        for completion in completions:
            if len(context) + len(completion.token_ids) <= base.context_length:
                rows.append((context, completion.token_ids))
                about.append((graded(task, example, completion), example.id))
    states_BD = _read(rows, bench)
    return [Judged(state_D, *of) for state_D, of in zip(states_BD, about, strict=True)]


def _read(rows: Sequence[Row], bench: Bench) -> Tensor:
    found = bench.load_checkpoint("states")
    if found is not None:
        return found[0]["states"]
    tokens = reading_tokens(rows)
    flops = forward_flops(bench.base.parameters_count, tokens)
    bench.ledger.allow(tokens, flops)
    began = time.perf_counter()
    states_BD = read(bench.base, rows)
    bench.ledger.book(Spent(prompt_tokens=tokens, flops=flops, seconds=time.perf_counter() - began))
    bench.save_checkpoint("states", {"states": states_BD}, {})
    return states_BD


def _constant(learned: Sequence[Judged]) -> VerifierHead:
    """The same chance for every completion: Laplace's rule of succession, so that it is never 0 (ours)."""
    chance = (sum(j.score for j in learned) + 1) / (len(learned) + 2)
    return VerifierHead(torch.zeros_like(learned[0].state_D), torch.tensor(math.log(chance / (1 - chance))))


def _trained(
    learned: Sequence[Judged], held_out: Sequence[Judged], settings: VerifierConfig, bench: Bench
) -> tuple[VerifierHead, int]:
    """The head of the epoch with the smallest loss on `held_out` (ties: the earlier), and that epoch.

    It begins with the mean score for every completion (ours). Its own FLOPs are booked; no token passes the model.
    """
    mean = sum(j.score for j in learned) / len(learned)
    weight_D = nn.Parameter(torch.zeros_like(learned[0].state_D))
    bias = nn.Parameter(torch.tensor(math.log(mean / (1 - mean))))
    named = {"weight": weight_D, "bias": bias}
    best = {name: p.detach().clone() for name, p in named.items()}
    flops = 6.0 * sum(p.numel() for p in named.values())

    def loss(items: Sequence[Judged]) -> tuple[Tensor, dict[str, float]]:
        states_BD, scores_B = torch.stack([j.state_D for j in items]), torch.tensor([j.score for j in items])
        return soft_cross_entropy(states_BD @ weight_D + bias, scores_B).sum(), {}

    steps = math.ceil(len(learned) / settings.batch_size)
    trainer = Trainer[Judged](
        "verifier",
        named,
        loss,
        lambda _: 1.0,
        lambda _: Cost(0, flops),
        lambda item: item.example,
        # Convex, on states of length sqrt(D): no warm-up, no clipping.
        Settings(settings.learning_rate, settings.batch_size, settings.batch_size, 0.0, math.inf, steps),
        settings.epochs * steps,
        bench,
        best,
    )
    meta: dict[str, Any] = trainer.restore() or {"losses": []}
    for number in range(len(meta["losses"]), settings.epochs):
        batches = shuffled_batches(learned, settings.batch_size, bench.rng("epoch", number))
        if not trainer.run(batches[trainer.step - number * steps :], meta):
            break
        with torch.no_grad():
            lost = float(loss(held_out)[0]) / len(held_out)
        if lost < min(meta["losses"], default=math.inf):
            for name, parameter in named.items():
                best[name].copy_(parameter.detach())
        meta["losses"] = [*meta["losses"], lost]
        bench.emit("epoch", epoch=number + 1, of=settings.epochs, held_out_loss=lost)
    losses = meta["losses"]
    if not losses:
        bench.ledger.allow(0, steps * settings.batch_size * flops)  # says which limit it was
    return VerifierHead(best["weight"], best["bias"]), losses.index(min(losses)) + 1


def _told_apart(head: VerifierHead, held_out: Sequence[Judged]) -> dict[str, float | None]:
    """How often it rates the better of two held-out completions higher: of all, and of those of one question, which is
    what best-of-N needs."""
    if not held_out:
        return {"held_out_auc": None, "held_out_auc_within": None}
    chances = head.chances(torch.stack([j.state_D for j in held_out])).numpy()
    scores, of = np.array([j.score for j in held_out]), np.array([j.example for j in held_out])
    return {
        "held_out_auc": auc(chances, scores, np.ones((len(of), len(of)), dtype=bool)),
        "held_out_auc_within": auc(chances, scores, of[:, None] == of[None, :]),
    }


def auc(chances: Any, scores: Any, pairs: Any) -> float | None:
    """The share of `pairs` [B, B] with different `scores` whose better one has the higher of `chances`, equal chances
    counting 1/2; None where no scores differ. With scores 0 and 1 the area under the ROC curve."""
    told = pairs & (scores[:, None] > scores[None, :])
    if not told.any():
        return None
    above, level = chances[:, None] > chances[None, :], chances[:, None] == chances[None, :]
    return float((above[told] + 0.5 * level[told]).mean())
