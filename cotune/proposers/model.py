"""A model that runs here as a writer of prompts: the base model itself, or another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from cotune.bench import Bench
from cotune.engines.base import Engine, Request, Sampling
from cotune.models.base import BaseModel
from cotune.proposers.writing import Reply
from cotune.tasks.base import Message


@dataclass(frozen=True)
class ModelWriter:
    """It answers without an adapter, also when the prompt that is tuned runs under one (ours).

    `limit` is the most tokens of a reply; a short context gives it half of its own.
    """

    name: str
    model: BaseModel
    engine: Engine
    temperature: float
    limit: int

    def at(self, temperature: float) -> Self:
        return replace(self, temperature=temperature)

    @property
    def _new_tokens(self) -> int:
        return min(self.limit, self.model.context_length // 2)

    def fits(self, messages: Sequence[Message]) -> bool:
        rendered = self.model.render(list(messages))
        return self.engine.token_count(rendered) <= self.model.context_length - self._new_tokens

    def write(self, messages: Sequence[Message], count: int, bench: Bench, *names: object) -> list[Reply]:
        sampling = Sampling(self._new_tokens, self.temperature, n=count, seed=bench.seed_for(*names))
        requests = [Request(self.model.render(list(messages)))]
        [replies] = bench.generate(requests, sampling, base=self.model, engine=self.engine, label="propose")
        return [Reply(r.text, r.truncated) for r in replies]
