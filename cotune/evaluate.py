"""The only source of a score: render, generate, grade.

Every strategy, on every split, is scored by this one function, so that prompt frame, decoding and grader are the same
for all. It does not know which split the examples are from or why they are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cotune.bench import Bench
from cotune.engines.base import Request, Sampling
from cotune.tasks.base import Task
from cotune.values import Completion, Conditioning, Evaluation, Example, Grade


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

    `sampling.n` must be 1. The journal knows completions by `version` too: another one generates them anew. Each batch
    is graded when it is answered, so that the progress display has the score so far.
    Raises BudgetExhausted (while tuning) like Bench.generate.
    """
    rendered = [
        bench.base.render(task.messages(c.prompt, example)) for example, c in zip(examples, conditionings, strict=True)
    ]
    requests = [Request(text, c.adapter) for text, c in zip(rendered, conditionings, strict=True)]
    grades: dict[int, Grade] = {}

    def grade(batch: Sequence[int], answered: Sequence[list[Completion]]) -> Mapping[str, float]:
        for i, (completion,) in zip(batch, answered, strict=True):
            grades[i] = task.grade(examples[i], completion.text, completion.truncated)
        return {"score": sum(g.score for g in grades.values()) / len(grades)}

    rows = bench.generate(requests, sampling, version=version, label=label, each=grade)
    completions = tuple(row[0] for row in rows)
    in_order = tuple(grades[i] for i in range(len(examples)))
    return Evaluation(tuple(examples), tuple(conditionings), tuple(rendered), completions, in_order)
