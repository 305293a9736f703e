"""The only source of a score: render, generate, aggregate, grade.

Every strategy, on every split, is scored by this one function, so that prompt frame, decoding and grader are the same
for all. It does not know which split the examples are from or why they are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cotune.bench import Bench
from cotune.chains import draw
from cotune.engines.base import Request, Sampling
from cotune.plans import decided, judged, sampling_of, scored
from cotune.tasks.base import Task
from cotune.values import GREEDY, Completion, Conditioning, Evaluation, Example, Grade, Samples


def evaluate(
    task: Task,
    examples: Sequence[Example],
    conditionings: Sequence[Conditioning],
    sampling: Sampling,
    bench: Bench,
    label: str = "",
    version: str = "",
) -> Evaluation:
    """One graded answer per example, in order: a completion, or several made into one by the example's plan.

    `sampling` decodes greedy plans, and its `n` must be 1. Examples whose plans sample alike are generated together.
    The journal knows completions by `version` too: another one generates them anew. Each batch is graded when it is
    answered, so that the progress display has the score so far.
    Raises BudgetExhausted (while tuning) like Bench.generate, UsageError for a plan that cannot be carried out.
    """
    chats = [task.messages(c.prompt, example) for example, c in zip(examples, conditionings, strict=True)]
    rendered = [bench.base.render(chat) for chat in chats]
    requests = [Request(text, c.adapter) for text, c in zip(rendered, conditionings, strict=True)]
    of = {plan: (sampling_of(plan, sampling), plan.chain) for plan in dict.fromkeys(c.plan for c in conditionings)}
    grades: dict[int, Grade] = {}
    spoken: dict[int, Completion] = {}
    drawn: dict[int, tuple[Samples, dict[str | None, float]]] = {}

    def answer(i: int, completions: list[Completion]) -> None:
        plan = conditionings[i].plan
        if plan == GREEDY:
            (spoken[i],) = completions
            grades[i] = task.grade(examples[i], spoken[i].text, spoken[i].truncated)
            return
        scores = scored(plan, rendered[i], completions, conditionings[i].verifier, bench)
        samples = decided(task, examples[i], plan, completions, scores)
        spoken[i] = samples.completions[samples.chosen]
        grades[i], worth = judged(task, examples[i], samples)
        drawn[i] = samples, worth

    for wanted in dict.fromkeys(of.values()):
        group = [i for i, c in enumerate(conditionings) if of[c.plan] == wanted]

        def grade(
            batch: Sequence[int], answered: Sequence[list[Completion]], group: list[int] = group
        ) -> Mapping[str, Any]:
            for place, completions in zip(batch, answered, strict=True):
                answer(group[place], completions)
            return {"score": sum(g.score for g in grades.values()) / len(grades)}

        asked = [chats[i] for i in group], [requests[i] for i in group]
        draw(bench, *asked, *wanted, version=version, label=label, each=grade)
    everything = range(len(examples))
    return Evaluation(
        tuple(examples),
        tuple(conditionings),
        tuple(rendered),
        tuple(spoken[i] for i in everything),
        tuple(grades[i] for i in everything),
        tuple(drawn[i][0] if i in drawn else None for i in everything),
        tuple(drawn[i][1] if i in drawn else None for i in everything),
    )
