"""Completions to learn from: worked answers and the model's own accepted ones, as token rows, and their loss.

Serves weights (as training rows) and prompts (as demonstrations) alike. Knows nothing of adapters, optimizers or
strategies.

Axes: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cotune.bench import Bench
from cotune.engines.base import Request, Sampling
from cotune.models.base import BaseModel
from cotune.models.likelihood import completion_nll
from cotune.tasks.base import Task
from cotune.values import Conditioning, Demonstration, Example, Outcome


@dataclass(frozen=True)
class Trace:
    """A completion that answers its example correctly."""

    example: Example
    completion: str


def gold(task: Task, examples: Sequence[Example]) -> list[Trace]:
    """The worked answer of each row."""
    return [Trace(e, task.reference_completion(e)) for e in examples]


def accepted(
    task: Task, examples: Sequence[Example], conditionings: Sequence[Conditioning], sampling: Sampling, bench: Bench
) -> tuple[list[Trace], int]:
    """The model's own completions that the grader accepts, equal ones of one example once, and how many were sampled.

    BetterTogether, BootstrapFewShot and BootstrapFinetune step 1-2 (sheet 01): the model is its own teacher, the
    metric on the final answer is the only filter. A truncated completion is never accepted, even if its answer is
    already there: it has no end to learn (ours). Raises BudgetExhausted like Bench.generate.
    """
    requests = [
        Request(bench.base.render(task.messages(c.prompt, e)), c.adapter)
        for e, c in zip(examples, conditionings, strict=True)
    ]
    traces = []
    for example, completions in zip(examples, bench.generate(requests, sampling, label="rollouts"), strict=True):
        for text in dict.fromkeys(c.text for c in completions if not c.truncated):
            if task.grade(example, text).outcome is Outcome.CORRECT:
                traces.append(Trace(example, text))
    return traces, len(examples) * sampling.n


def demonstration(task: Task, trace: Trace) -> Demonstration:
    return Demonstration(task.question_text(trace.example), trace.completion.strip())


@dataclass(frozen=True)
class TokenRow:
    """A rendered prompt and what is learned after it, the end of turn included; `example` is the id of its example."""

    context: tuple[int, ...]
    completion: tuple[int, ...]
    example: str

    def __len__(self) -> int:
        return len(self.context) + len(self.completion)


def token_row(base: BaseModel, rendered_prompt: str, trace: Trace) -> TokenRow:
    """Prompt and completion are encoded apart, as they meet in generation."""
    return TokenRow(tuple(base.encode(rendered_prompt)), base.encode_answer(trace.completion), trace.example.id)


def completion_loss(base: BaseModel, rows: Sequence[TokenRow]) -> Tensor:
    """Sum over rows and their completion tokens of -log p(token | all tokens before it), in nats; prompts carry none.

    A row's share does not depend on the others, so sums over any split of the rows agree.
    """
    mean_nll_B = completion_nll(base.model, [r.context for r in rows], [r.completion for r in rows])
    return (mean_nll_B * mean_nll_B.new_tensor([len(r.completion) for r in rows])).sum()
