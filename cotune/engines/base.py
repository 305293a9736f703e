"""What an engine is: rendered prompts in, completions out, each request under its own adapter.

An engine knows nothing of tasks, strategies or budgets. The chat template is applied before it
(models/base.py), so every engine sees the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cotune.values import Adapter, Completion


@dataclass(frozen=True)
class Sampling:
    """How to decode. `temperature` 0 is greedy; a sample draws from its own stream, named by (seed, prompt, index)."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    seed: int = 0
    logprobs: bool = False


@dataclass(frozen=True)
class Request:
    """One rendered prompt (chat template applied, ends where the assistant begins) and who answers it."""

    prompt: str
    adapter: Adapter | None = None


class Engine(Protocol):
    """Generates with one base model."""

    name: str

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """Split into batches (lists of indices into `requests`), deterministic in the requests alone.

        Every index occurs exactly once. The caller generates, books and journals batch by batch, so a
        resumed run sees the same batch compositions as an uninterrupted one.
        """

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions per request, in request order, as one batch."""

    def token_count(self, prompt: str) -> int:
        """Tokens of a rendered prompt, for budgets and plans."""
