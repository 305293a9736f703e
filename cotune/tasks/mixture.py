"""Tuning on some tasks to be tested on another (sheet 02, generalization table): one task made of several.

Each example is rendered and graded by the task it comes from; train ids are `task/id`. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cotune.tasks.base import Task
from cotune.tasks.data import Dataset, Report
from cotune.values import Example, Grade


class Mixture(Task):
    """`target` for examples of its own, and each of `sources` for those whose id begins with its name.

    Under its name and with its seed instruction stands the target; completions may be as long as the longest limit.
    """

    def __init__(self, target: Task, sources: Sequence[Task]) -> None:
        self.name = target.name  # type: ignore[misc]
        self.seed_instruction = target.seed_instruction  # type: ignore[misc]
        self.max_new_tokens = max(t.max_new_tokens for t in (target, *sources))  # type: ignore[misc]
        self._target = target
        self._sources = {source.name: source for source in sources}

    @property
    def learned(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def parse(self, row: Mapping[str, Any], row_id: str) -> Example:
        return self._target.parse(row, row_id)

    def question_text(self, example: Example) -> str:
        return self._of(example).question_text(example)

    def reference_completion(self, example: Example) -> str:
        return self._of(example).reference_completion(example)

    def vote(self, example: Example, completion: str, truncated: bool = False) -> str | None:
        return self._of(example).vote(example, completion, truncated)

    def grade(self, example: Example, completion: str, truncated: bool = False) -> Grade:
        return self._of(example).grade(example, completion, truncated)

    def _of(self, example: Example) -> Task:
        return self._sources.get(example.id.partition("/")[0], self._target)


def mixed(target: Dataset, sources: Sequence[Dataset], limit_train: int | None, limit_val: int | None) -> Dataset:
    """Train and val of `sources` by turns, as many of each, up to the limits; test of `target`."""

    def turns(split: str, limit: int | None) -> tuple[Example, ...]:
        parts = [[replace(e, id=f"{source.task}/{e.id}") for e in getattr(source, split)] for source in sources]
        return tuple([example for row in zip(*parts, strict=False) for example in row][:limit])

    reports = [s for s in target.report.splits if s.split == "test"]
    for source in sources:
        reports += [
            replace(s, split=f"{source.task}/{s.split}") for s in source.report.splits if s.split in ("train", "val")
        ]
    overlap = {f"{source.task}/{pair}": n for source in sources for pair, n in source.report.overlap.items()}
    warnings = [*target.report.warnings]
    warnings += [f"{source.task}: {warning}" for source in sources for warning in source.report.warnings]
    report = Report(tuple(reports), overlap, tuple(warnings))
    return Dataset(target.task, turns("train", limit_train), turns("val", limit_val), report, target.test)
