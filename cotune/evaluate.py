"""The only source of a score: render, generate, aggregate, grade.

Every strategy, on every split, is scored by this one function, so that prompt frame, decoding and grader are the same
for all. It does not know which split the examples are from or why they are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from cotune.bench import Bench
from cotune.chains import Chat, draw
from cotune.engines.base import Request, Sampling
from cotune.plans import decided, judged, sampling_of, scored, told
from cotune.tasks.base import Task
from cotune.values import (
    GREEDY,
    AnyPlan,
    Completion,
    Conditioning,
    Evaluation,
    Example,
    Grade,
    PlanByDifficulty,
    Samples,
    Told,
    Verifier,
)

Answer = Callable[[int, list[Completion], Samples | None], None]
"""Sees a question's place, all of its completions, and what its plan made of them (None: it is greedy)."""


@dataclass(frozen=True)
class Question:
    """An example as the model is asked it, under a plan; `sampling` decodes where that is greedy."""

    example: Example
    chat: Chat
    request: Request
    plan: AnyPlan
    sampling: Sampling
    verifier: Verifier | None

    @classmethod
    def of(cls, task: Task, example: Example, c: Conditioning, sampling: Sampling, bench: Bench) -> Self:
        chat = task.messages(c.prompt, example)
        return cls(example, chat, Request(bench.base.render(chat), c.adapter), c.plan, sampling, c.verifier)


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
    questions = [Question.of(task, e, c, sampling, bench) for e, c in zip(examples, conditionings, strict=True)]
    grades: dict[int, Grade] = {}
    spoken: dict[int, Completion] = {}
    drawn: dict[int, tuple[Samples, dict[str | None, float]]] = {}

    def answer(i: int, completions: list[Completion], samples: Samples | None) -> None:
        if samples is None:
            (spoken[i],) = completions
            grades[i] = task.grade(examples[i], spoken[i].text, spoken[i].truncated)
            return
        spoken[i] = samples.completions[samples.chosen]
        grades[i], worth = judged(task, examples[i], samples)
        drawn[i] = samples, worth

    def so_far() -> Mapping[str, Any]:
        return {"score": sum(g.score for g in grades.values()) / len(grades)} if grades else {}

    complete(task, questions, bench, answer, so_far, version, label)
    everything = range(len(examples))
    return Evaluation(
        tuple(examples),
        tuple(conditionings),
        tuple(q.request.prompt for q in questions),
        tuple(spoken[i] for i in everything),
        tuple(grades[i] for i in everything),
        tuple(drawn[i][0] if i in drawn else None for i in everything),
        tuple(drawn[i][1] if i in drawn else None for i in everything),
    )


def complete(
    task: Task,
    questions: Sequence[Question],
    bench: Bench,
    answer: Answer,
    so_far: Callable[[], Mapping[str, Any]] = dict,
    version: str = "",
    label: str = "",
) -> None:
    """The completions of every question under its plan.

    Questions that sample alike are generated together. Under a plan by difficulty that is first the probe, and then,
    for those whose bin's plan has more samples, the others: their prompts are read a second time, no sample is rated
    twice by one scorer. `answer` is called for a question as soon as it has all of its completions, `so_far` for the
    progress display. Raises like `evaluate`.
    """
    probes: dict[int, tuple[Told, list[Completion], tuple[float | None, ...]]] = {}
    rest: dict[int, tuple[Request, tuple[Sampling, int]]] = {}
    ways = {pair: sampling_of(*pair) for pair in dict.fromkeys((q.plan, q.sampling) for q in questions)}

    def rate(q: Question, plan: AnyPlan, completions: list[Completion]) -> tuple[float | None, ...]:
        return scored(plan, q.request.prompt, completions, q.verifier, bench)

    def take(i: int, completions: list[Completion]) -> None:
        q = questions[i]
        if isinstance(q.plan, PlanByDifficulty):
            take_probed(i, q, q.plan, completions)
        elif q.plan == GREEDY:
            answer(i, completions, None)
        else:
            answer(i, completions, decided(task, q.example, q.plan, completions, rate(q, q.plan, completions)))

    def take_probed(i: int, q: Question, plan: PlanByDifficulty, completions: list[Completion]) -> None:
        if i not in probes:
            ratings = rate(q, plan, completions)
            probes[i] = told(task, q.example, plan, completions, ratings), completions, ratings
            more = plan.plans[probes[i][0].bin].samples - plan.probe
            if more and not all(c.truncated and not c.generated_tokens for c in completions):
                way = replace(ways[q.plan, q.sampling], n=more)
                rest[i] = replace(q.request, first=plan.probe), (way, 1)
                return
            completions = completions[:1] * more  # none, or no room for an answer, nor for another one
        probed, first, ratings = probes[i]
        own, whole = plan.plans[probed.bin], first + completions
        if own.scorer == plan.scorer:
            scores = ratings + rate(q, own, completions) if completions else ratings
        else:
            scores = rate(q, own, whole)
        answer(i, whole, decided(task, q.example, own, whole, scores, probed))

    def generate(wanted: Mapping[int, tuple[Request, tuple[Sampling, int]]]) -> None:
        for way in dict.fromkeys(own for _, own in wanted.values()):
            group = [i for i, (_, own) in wanted.items() if own == way]

            def each(
                batch: Sequence[int], answered: Sequence[list[Completion]], group: list[int] = group
            ) -> Mapping[str, Any]:
                for place, completions in zip(batch, answered, strict=True):
                    take(group[place], completions)
                return so_far()

            chosen = [questions[i].chat for i in group], [wanted[i][0] for i in group]
            draw(bench, *chosen, *way, version=version, label=label, each=each)

    def way_of(q: Question) -> tuple[Sampling, int]:
        return ways[q.plan, q.sampling], 1 if isinstance(q.plan, PlanByDifficulty) else q.plan.chain

    generate({i: (q.request, way_of(q)) for i, q in enumerate(questions)})
    generate(rest)
