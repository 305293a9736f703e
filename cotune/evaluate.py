"""The only source of a score: render, generate, aggregate, grade.

Every strategy, on every split, is scored by this one function, so that prompt frame, decoding and grader are the same
for all. It does not know which split the examples are from or why they are scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

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

    asked = [(c.plan, sampling) for c in conditionings]
    verifiers = [c.verifier for c in conditionings]
    complete(task, examples, chats, requests, asked, verifiers, bench, answer, so_far, version, label)
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


def complete(
    task: Task,
    examples: Sequence[Example],
    chats: Sequence[Chat],
    requests: Sequence[Request],
    asked: Sequence[tuple[AnyPlan, Sampling]],
    verifiers: Sequence[Verifier | None],
    bench: Bench,
    answer: Answer,
    so_far: Callable[[], Mapping[str, Any]] = dict,
    version: str = "",
    label: str = "",
) -> None:
    """The completions of every question under its plan, `asked` with what decodes where the plan is greedy.

    Questions that sample alike are generated together. Under a plan by difficulty that is first the probe, and then,
    for those whose bin's plan has more samples, the others: their prompts are read a second time, no sample is rated
    twice by one scorer. `answer` is called for a question as soon as it has all of its completions, `so_far` for the
    progress display. Raises like `evaluate`.
    """
    probes: dict[int, tuple[Told, list[Completion], tuple[float | None, ...]]] = {}
    rest: dict[int, tuple[Request, tuple[Sampling, int]]] = {}
    of = {pair: sampling_of(*pair) for pair in dict.fromkeys(asked)}

    def rate(i: int, plan: AnyPlan, completions: list[Completion]) -> tuple[float | None, ...]:
        return scored(plan, requests[i].prompt, completions, verifiers[i], bench)

    def take(i: int, completions: list[Completion]) -> None:
        plan = asked[i][0]
        if isinstance(plan, PlanByDifficulty):
            take_probed(i, plan, completions)
        elif plan == GREEDY:
            answer(i, completions, None)
        else:
            answer(i, completions, decided(task, examples[i], plan, completions, rate(i, plan, completions)))

    def take_probed(i: int, plan: PlanByDifficulty, completions: list[Completion]) -> None:
        if i not in probes:
            ratings = rate(i, plan, completions)
            probes[i] = told(task, examples[i], plan, completions, ratings), completions, ratings
            more = plan.plans[probes[i][0].bin].samples - plan.probe
            if more and not all(c.truncated and not c.generated_tokens for c in completions):
                rest[i] = replace(requests[i], first=plan.probe), (replace(of[asked[i]], n=more), 1)
                return
            completions = completions[:1] * more  # none, or no room for an answer, nor for another one
        probed, first, ratings = probes[i]
        own, whole = plan.plans[probed.bin], first + completions
        if own.scorer == plan.scorer:
            scores = ratings + rate(i, own, completions) if completions else ratings
        else:
            scores = rate(i, own, whole)
        answer(i, whole, decided(task, examples[i], own, whole, scores, probed))

    def generate(wanted: Mapping[int, tuple[Request, tuple[Sampling, int]]]) -> None:
        for way in dict.fromkeys(own for _, own in wanted.values()):
            group = [i for i, (_, own) in wanted.items() if own == way]

            def each(
                batch: Sequence[int], answered: Sequence[list[Completion]], group: list[int] = group
            ) -> Mapping[str, Any]:
                for place, completions in zip(batch, answered, strict=True):
                    take(group[place], completions)
                return so_far()

            chosen = [chats[i] for i in group], [wanted[i][0] for i in group]
            draw(bench, *chosen, *way, version=version, label=label, each=each)

    lengths = [1 if isinstance(plan, PlanByDifficulty) else plan.chain for plan, _ in asked]
    generate({i: (requests[i], (of[pair], lengths[i])) for i, pair in enumerate(asked)})
    generate(rest)
