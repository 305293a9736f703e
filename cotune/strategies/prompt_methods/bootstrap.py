"""BootstrapFewShot with random search (BetterTogether, sheet 01): demonstrations for the best prompt so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from cotune.config import RunConfig
from cotune.strategies.base import Work, Workload
from cotune.strategies.prompt_methods.base import Finalist, Ground


@dataclass(frozen=True)
class Bootstrap:
    """A round: the best prompt is its own teacher, then `sets` sets of its accepted answers are raced (paper: once)."""

    rounds: int
    demonstrations: int
    sets: int

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls(config.prompt.rounds, config.prompt.demonstrations, config.prompt.demonstration_sets)

    @property
    def teaches(self) -> bool:
        return self.demonstrations > 0 and self.sets > 0

    def plan(self, load: Workload, driving: int, teaching: int) -> list[Work]:
        if not self.teaches:
            return []
        with_demos = load.question + self.demonstrations * (load.question + load.reference)
        calls = self.rounds * (self.sets + 2) * driving
        return [
            Work.generation("own demonstrations", self.rounds * teaching, load.question, load.limit),
            load.answers("score demonstrations", calls, with_demos),
        ]

    def search(self, ground: Ground) -> list[Finalist]:
        if self.teaches and ground.teaching:
            proposer = ground.demonstrations(self.demonstrations, self.sets)
            for _ in range(self.rounds):
                ground.search.round(proposer)
        return ground.finalists()
