"""OPRO (sheet 10): rounds of new instructions by a proposer that sees the earlier ones with their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from cotune.config import RunConfig
from cotune.proposers import Proposing
from cotune.strategies.base import Work, Workload
from cotune.strategies.prompt_methods.base import Finalist, Ground, proposing


@dataclass(frozen=True)
class Opro:
    """Racing (ours) spares candidates a full evaluation; `prompt.racing = false` is the paper's."""

    teaches: ClassVar[bool] = False
    demonstrations: ClassVar[int] = 0

    rounds: int
    proposing: Proposing

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls(config.prompt.rounds, Proposing.from_config(config))

    def plan(self, load: Workload, driving: int, teaching: int) -> list[Work]:
        calls = self.rounds * self.proposing.candidates * driving
        works = [load.answers("score instructions", calls, load.question + load.reference)]
        return [*works, *proposing(self.proposing, self.rounds, load)]

    def search(self, ground: Ground) -> list[Finalist]:
        self.explore(ground)
        return ground.finalists()

    def explore(self, ground: Ground) -> None:
        """The rounds alone."""
        search = ground.search
        proposer = self.proposing.proposer(ground.task, search.board.examples, ground.generator, ground.bench)
        for _ in range(self.rounds):
            search.round(proposer)
