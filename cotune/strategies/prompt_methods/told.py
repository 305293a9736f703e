"""Answers to single examples, as a model that improves prompts is told of them (gepa, cfpo)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cotune.evaluate import evaluate
from cotune.strategies.prompt_methods.base import Ground
from cotune.values import Completion, Example, Grade, Outcome, Prompt


@dataclass(frozen=True)
class Told:
    example: Example
    completion: Completion
    grade: Grade


def answered(ground: Ground, prompt: Prompt, examples: Sequence[Example]) -> list[Told]:
    """Each example answered under `prompt`. Raises BudgetExhausted."""
    conditionings = replace(ground.start, prompt=prompt).condition(examples, ground.bench)
    done = evaluate(ground.task, examples, conditionings, ground.sampling, ground.bench, label="search")
    return [Told(*row) for row in zip(done.examples, done.completions, done.grades, strict=True)]


def feedback(example: Example, grade: Grade) -> str:
    """How one answer was graded, what was read from it, what is right."""
    if grade.outcome is Outcome.CORRECT:
        return "Correct."
    read = f"The answer read from it is {grade.prediction!r}" if grade.prediction else "No answer can be read from it"
    cut = " It was cut off at the length limit." if grade.outcome is Outcome.TRUNCATED else ""
    return f"Wrong (score {grade.score:.2f}).{cut} {read}; the correct answer is {example.reference!r}."
