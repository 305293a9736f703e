"""The control: the seed prompt, nothing tuned."""

from __future__ import annotations

from typing import ClassVar, Self

from cotune.bench import Bench
from cotune.config import RunConfig
from cotune.strategies.base import Problem, Work, Workload
from cotune.values import Tuned


class ZeroShot:
    levers: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls()

    def plan(self, load: Workload) -> list[Work]:
        return []

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        return start
