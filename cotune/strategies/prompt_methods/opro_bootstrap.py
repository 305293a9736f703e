"""OPRO's instructions, then demonstrations for the best of them: the two levers of a prompt in turn (ours)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from cotune.config import RunConfig
from cotune.strategies.base import Work, Workload
from cotune.strategies.prompt_methods.base import Finalist, Ground
from cotune.strategies.prompt_methods.bootstrap import Bootstrap
from cotune.strategies.prompt_methods.opro import Opro


@dataclass(frozen=True)
class OproBootstrap:
    """`prompt.rounds` of OPRO and one of bootstrapping, on one board."""

    opro: Opro
    bootstrap: Bootstrap

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls(Opro.from_config(config), replace(Bootstrap.from_config(config), rounds=1))

    @property
    def teaches(self) -> bool:
        return self.bootstrap.teaches

    @property
    def demonstrations(self) -> int:
        return self.bootstrap.demonstrations

    def plan(self, load: Workload, driving: int, teaching: int) -> list[Work]:
        return [*self.opro.plan(load, driving, teaching), *self.bootstrap.plan(load, driving, teaching)]

    def search(self, ground: Ground) -> list[Finalist]:
        self.opro.explore(ground)
        return self.bootstrap.search(ground)
