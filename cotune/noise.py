"""How far an engine repeats itself: the first measured examples are answered again and compared with what was recorded.

An engine that promises the same bytes is taken at its word; of any other, the run records what a second look at the
same evaluation would have said. Knows nothing of how an engine computes.
"""

from __future__ import annotations

from typing import Any

from cotune.bench import Bench
from cotune.engines.base import Sampling
from cotune.evaluate import evaluate
from cotune.tasks.base import Task
from cotune.values import Evaluation

EXAMPLES = 64  # where the engine cannot promise; what a difference of one is worth shows in the number itself


def measure(task: Task, first: Evaluation, sampling: Sampling, bench: Bench, examples: int | None) -> dict[str, Any]:
    """`{"promised": bool}`, and when the evaluation was repeated: how many `examples`, the shares of them whose
    completion (text) or grade (outcome or score) differs, and the mean absolute difference of their scores.

    `examples` None is as many as the engine needs: none, or `EXAMPLES`. The repetition has a place of its own in the
    journal, so it generates anew once, and a resumed run does not repeat it. Prompts and adapters are those of
    `first`; a generator that wrote them is not asked again.
    """
    promised = bench.engine.repeats
    count = min((0 if promised else EXAMPLES) if examples is None else examples, len(first.examples))
    if not count:
        return {"promised": promised}
    conditionings = first.conditionings[:count]
    again = evaluate(task, first.examples[:count], conditionings, sampling, bench, label="noise", version="noise")
    texts = zip(first.completions, again.completions, strict=False)
    grades = list(zip(first.grades, again.grades, strict=False))
    return {
        "promised": promised,
        "examples": count,
        "completions_differ": sum(a.text != b.text for a, b in texts) / count,
        "grades_differ": sum((a.outcome, a.score) != (b.outcome, b.score) for a, b in grades) / count,
        "mean_score_difference": sum(abs(a.score - b.score) for a, b in grades) / count,
    }
