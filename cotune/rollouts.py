"""Rollouts of MetaTuner: prompts sampled per query, scored by the task, the best one kept as G's target (D2).

Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotune.bench import Bench
from cotune.engines.base import Sampling
from cotune.evaluate import evaluate
from cotune.metatuned import MetaTuned, usable
from cotune.values import Conditioning, Example, Prompt


@dataclass(frozen=True)
class Candidate:
    """One sampled prompt of one query: its text, its length in G's tokens, the task's score of M's answer."""

    text: str
    tokens: int
    score: float


def best_prompt(candidates: Sequence[Candidate]) -> str | None:
    """The target p_i of a query, or None if the query teaches nothing (sheet 02, filling the gaps; ours).

    The highest score wins; of equals the shortest, then the one sampled first. A query whose candidates all score the
    same, right or wrong, is left out of D2: nothing in it says which prompt is better.
    """
    if len({c.score for c in candidates}) < 2:
        return None
    return min(candidates, key=lambda c: (-c.score, c.tokens)).text


def pooled(candidates: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """The same prompts tried on several examples: each with its mean score."""
    scores: dict[tuple[str, int], list[float]] = {}
    for row in candidates:
        for c in row:
            scores.setdefault((c.text, c.tokens), []).append(c.score)
    return [Candidate(text, tokens, sum(s) / len(s)) for (text, tokens), s in scores.items()]


def rollouts(
    tuned: MetaTuned, examples: Sequence[Example], sampling: Sampling, answers: Sampling, bench: Bench
) -> dict[str, str]:
    """D2: example id -> best prompt, of `sampling.n` prompts per example, with the adapters as they are now.

    A prompt that is empty or was cut off is not tried, one sampled twice is tried once. `answers` is the decoding of
    every measurement. Raises BudgetExhausted like Bench.generate.
    """
    written = tuned.sample_prompts(examples, sampling, bench)
    adapters = tuned.adapters(examples, bench)
    tried: list[tuple[int, str, int]] = []
    for i, row in enumerate(written):
        lengths: dict[str, int] = {}
        for completion in row:
            if text := usable(completion):
                lengths.setdefault(text, len(completion.token_ids))
        tried += [(i, text, tokens) for text, tokens in lengths.items()]
    evaluation = evaluate(
        tuned.task,
        [examples[i] for i, _, _ in tried],
        [Conditioning(Prompt(text, tuned.seed.demonstrations), adapters[i]) for i, text, _ in tried],
        answers,
        bench,
        label="rollouts",
    )
    candidates: list[list[Candidate]] = [[] for _ in examples]
    for (i, text, tokens), grade in zip(tried, evaluation.grades, strict=True):
        candidates[i].append(Candidate(text, tokens, grade.score))
    if tuned.branches.prompt == "fixed":
        candidates = [pooled(candidates)] * len(examples)
    chosen = {e.id: text for e, c in zip(examples, candidates, strict=True) if (text := best_prompt(c)) is not None}
    scores = [g.score for g in evaluation.grades]
    ranges = [max(own) - min(own) for row in candidates if (own := [c.score for c in row])]
    bench.emit(
        "rollouts",
        examples=len(examples),
        prompts=len(tried),
        distinct=len({text for _, text, _ in tried}),
        kept=len(chosen),
        mean_tokens=sum(tokens for _, _, tokens in tried) / max(1, len(tried)),
        spread=sum(ranges) / max(1, len(ranges)),
        mean_score=sum(scores) / len(scores) if scores else None,
        best_score=sum(max((c.score for c in row), default=0.0) for row in candidates) / max(1, len(examples)),
    )
    return chosen
