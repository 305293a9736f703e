"""The only source of a score: render, generate, grade.

Every strategy, on every split, is scored by this one function, so that prompt frame, decoding and grader are the same
for all. It does not know which split the examples are from or why they are scored.
"""

from __future__ import annotations

from collections.abc import Sequence

from cotune.bench import Bench
from cotune.engines.base import Request, Sampling
from cotune.tasks.base import Task
from cotune.values import Conditioning, Evaluation, Example


def evaluate(
    task: Task,
    examples: Sequence[Example],
    conditionings: Sequence[Conditioning],
    sampling: Sampling,
    bench: Bench,
    label: str = "",
    version: str = "",
) -> Evaluation:
    """One graded completion per example, in order.

    `sampling.n` must be 1. The journal knows completions by `version` too: another one generates them anew.
    Raises BudgetExhausted (while tuning) like Bench.generate.
    """
    rendered = [
        bench.base.render(task.messages(c.prompt, example)) for example, c in zip(examples, conditionings, strict=True)
    ]
    requests = [Request(text, c.adapter) for text, c in zip(rendered, conditionings, strict=True)]
    completions = [row[0] for row in bench.generate(requests, sampling, version=version, label=label)]
    grades = [task.grade(e, c.text, c.truncated) for e, c in zip(examples, completions, strict=True)]
    return Evaluation(tuple(examples), tuple(conditionings), tuple(rendered), tuple(completions), tuple(grades))
