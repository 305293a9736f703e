"""Generation with Hugging Face transformers, on the machine at hand, each row under its own adapter."""

from __future__ import annotations

from collections.abc import Sequence

from cotune.engines.base import Request, Sampling
from cotune.models.base import BaseModel
from cotune.values import Completion


class TransformersEngine:
    name = "transformers"

    def __init__(
        self, base: BaseModel, *, batch_size: int = 32, max_batch_tokens: int = 32768, threads: int | None = None
    ) -> None:
        self.base = base

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        raise NotImplementedError

    def score(self, requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        raise NotImplementedError

    def token_count(self, prompt: str) -> int:
        return len(self.base.encode(prompt))
