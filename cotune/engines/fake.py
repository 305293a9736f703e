"""An engine that answers from a given function: instant, deterministic, first-class.

For tests of strategies and evaluation, which need a model's behaviour but not a model. A token is a word.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from cotune.engines.base import Request, Sampling
from cotune.values import Completion

Answer = Callable[[str, str | None, int], str]
"""(rendered prompt, adapter digest or None, number of the sample) -> completion."""


class FakeEngine:
    """`answer` speaks for the model. Texts longer than `max_new_tokens` words are cut and marked truncated. A prompt
    that leaves no room for so many in the context gets a truncated empty completion.

    A token id is the word's CRC-32; every log-probability is 0. `calls` lists the requests generated so far,
    so that a test can assert what reached the model.
    """

    name = "fake"
    rows_apart = False

    def __init__(
        self, answer: Answer, *, batch_size: int = 32, repeats: bool = True, context_length: int = sys.maxsize
    ) -> None:
        self.answer = answer
        self.repeats = repeats
        self.batch_size = batch_size
        self.context_length = context_length
        self.calls: list[Request] = []

    def identity(self) -> list[Any]:
        return [self.name]

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """Consecutive batches of `batch_size`."""
        everything = list(range(len(requests)))
        return [everything[i : i + self.batch_size] for i in range(0, len(everything), self.batch_size)]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        self.calls += requests
        return [[self._complete(request, sampling, s) for s in range(sampling.n)] for request in requests]

    def _complete(self, request: Request, sampling: Sampling, sample: int) -> Completion:
        count = self.token_count(request.prompt)
        if count + sampling.max_new_tokens > self.context_length:
            return Completion("", (), count, truncated=True)
        # Greedy samples are alike, as with a real model.
        index = 0 if sampling.temperature == 0 else request.first + sample
        text = self.answer(request.prompt, request.adapter.digest if request.adapter else None, index)
        words = text.split()
        truncated = len(words) > sampling.max_new_tokens
        if truncated:
            words = words[: sampling.max_new_tokens]
            text = " ".join(words)
        return Completion(
            text=text,
            token_ids=tuple(zlib.crc32(word.encode()) for word in words),
            prompt_tokens=count,
            truncated=truncated,
            logprobs=(0.0,) * len(words) if sampling.logprobs else (),
        )

    def token_count(self, prompt: str) -> int:
        return len(prompt.split())

    def release(self) -> None:
        """It holds nothing."""
