"""Generation by any server with OpenAI's chat completions: a running `vllm serve`, or a hosted one, as a black box.

A rendered prompt is the JSON of its messages (models/black_box.py); every sample is a request of its own. Nothing here
promises repeatability: the same request may be answered otherwise tomorrow. Knows nothing of tasks or budgets.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any, Literal

from cotune.config import RunConfig
from cotune.engines.base import Request, Sampling, stream_seed
from cotune.errors import CotuneError, UsageError
from cotune.models.base import BaseModel
from cotune.models.black_box import BlackBox
from cotune.openai_client import Reply
from cotune.values import Completion

logger = logging.getLogger(__name__)

_BATCHES = 4  # requests of a batch per request at a time: what a kill can lose, and how long the slowest is waited for


class OpenAIEngine:
    """`limit_name` is what the server calls the most tokens of an answer."""

    name = "openai"
    rows_apart = True
    repeats = False

    def __init__(
        self, base: BlackBox, *, limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    ) -> None:
        self.base = base
        self.limit_name = limit_name
        self._models: set[str] = set()  # that have answered, as the server calls them
        self._told: set[str] = set()

    @classmethod
    def from_config(cls, base: BaseModel, config: RunConfig) -> OpenAIEngine:
        """Raises UsageError for a model that runs here."""
        if not isinstance(base, BlackBox):
            raise UsageError(f"The openai engine answers for a model behind a server, and {base.name} is loaded here.")
        return cls(base, limit_name=config.openai.limit_name)

    @property
    def context_length(self) -> int:
        return self.base.context_length

    def identity(self) -> list[Any]:
        return [self.name, self.limit_name]

    def release(self) -> None:
        """It holds nothing."""

    def token_count(self, prompt: str) -> int:
        """No fewer tokens than the server will count."""
        return self.base.token_count(prompt)

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """Consecutive batches of four requests for each that is on its way at a time."""
        size = max(1, _BATCHES * self.base.client.concurrency // sampling.n)
        everything = list(range(len(requests)))
        return [everything[i : i + size] for i in range(0, len(everything), size)]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions per request, in request order; greedy ones are asked for one by one too.

        A prompt that the server does not take (too long for its context, or filtered) gets a truncated empty
        completion, and a warning says why. Raises UsageError for an adapter, CotuneError when the server fails or
        gives no log-probabilities.
        """
        if any(request.adapter for request in requests):
            raise UsageError(f"{self.base.name} is a black box and takes no adapter. Take --engine transformers.")
        bodies = [self._body(request, sampling, s) for request in requests for s in range(sampling.n)]
        replies = self.base.client.ask_all(bodies)
        self._warn(replies)
        prompts = [request.prompt for request in requests for _ in range(sampling.n)]
        done = [self._completion(p, r, sampling) for p, r in zip(prompts, replies, strict=True)]
        return [done[i : i + sampling.n] for i in range(0, len(done), sampling.n)]

    def _body(self, request: Request, sampling: Sampling, sample: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.base.name,
            "messages": json.loads(request.prompt),
            "temperature": sampling.temperature,
            self.limit_name: sampling.max_new_tokens,
        }
        if sampling.temperature > 0:
            seed = stream_seed(sampling, request.prompt, request.first + sample) >> 32  # some servers take 31 bits
            body |= {"top_p": sampling.top_p, "seed": seed}
        return body | ({"logprobs": True} if sampling.logprobs else {})

    def _completion(self, prompt: str, reply: Reply, sampling: Sampling) -> Completion:
        read, written = reply.prompt_tokens, reply.generated_tokens
        if reply.refused:
            read = written = 0
        elif sampling.logprobs and reply.logprobs is None:
            raise CotuneError(
                f"{self.base.source} gives no log-probabilities. Take another server, or --engine transformers."
            )
        if read is None or written is None:
            self._once("counts no tokens: the most that they can be are booked")
            read, written = self.token_count(prompt), min(len(reply.text.encode()), sampling.max_new_tokens)
        return Completion(reply.text, (), read, reply.truncated, reply.logprobs or (), counted=written)

    def _warn(self, replies: Sequence[Reply]) -> None:
        refused = [reply.refused for reply in replies if reply.refused]
        if refused:
            logger.warning(
                "%s refuses %d of %d prompts, which count as truncated: %s. If they are too long, shorten the prompt, "
                "lower max_new_tokens, or serve a longer context.",
                *(self.base.source, len(refused), len(replies), refused[0].rstrip(".")),
            )
        self._models |= {reply.model for reply in replies if reply.model}
        if len(self._models) > 1:
            self._once(f"has answered with different models: {', '.join(sorted(self._models))}")

    def _once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s %s.", self.base.source, what)
