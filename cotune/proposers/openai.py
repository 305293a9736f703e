"""Proposals by any server with OpenAI's chat-completions interface.

The key is read from OPENAI_API_KEY for each request and written nowhere. Replies are kept in the journal, so a resumed
run does not ask again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import httpx

from cotune.bench import Bench
from cotune.errors import CotuneError
from cotune.ledger import Spent
from cotune.proposers.meta_prompt import MetaPrompt, read_reply
from cotune.search import Proposal, Scored
from cotune.tasks.base import Message
from cotune.values import Prompt, digest

MAX_NEW_TOKENS = 256  # of one proposal (ours)
_RETRIED = {408, 409, 429, 500, 502, 503, 504}
_ATTEMPTS = 5
_LONGEST_WAIT = 30.0  # seconds
_FRAME_TOKENS = 64  # at most, for the server's chat template around the one message


class OpenAIProposer:
    """`candidates` requests a round at `url`/chat/completions.

    Tokens are booked as the server counts them; its FLOPs are unknown and booked as 0 (ours).
    """

    def __init__(
        self,
        url: str,
        model: str,
        meta_prompt: MetaPrompt,
        candidates: int,
        temperature: float,
        *,
        first_wait: float = 1.0,
        timeout: float = 120.0,
    ) -> None:
        self._url = url.rstrip("/") + "/chat/completions"
        self._model = model
        self._meta_prompt = meta_prompt
        self._candidates = candidates
        self._temperature = temperature
        self._first_wait = first_wait
        self._timeout = timeout

    def propose(self, round: int, history: Sequence[Scored], best: Prompt, bench: Bench) -> list[Proposal]:
        messages = self._meta_prompt.messages(
            history,
            bench.rng("exemplars", round),
            most_history=self._meta_prompt.history,
            most_exemplars=self._meta_prompt.exemplars,
        )
        origin = f"openai:{self._model}"
        replies = [self._journaled(messages, round, i, bench) for i in range(self._candidates)]
        return [read_reply(r["text"], r["truncated"], origin, best) for r in replies]

    def _journaled(self, messages: list[Message], round: int, index: int, bench: Bench) -> dict[str, Any]:
        body = {
            "model": self._model,
            "messages": messages,
            "temperature": self._temperature,
            "max_tokens": MAX_NEW_TOKENS,
        }
        # The server's own count is known only afterwards, but no tokenizer makes more tokens than bytes.
        most = len(messages[0]["content"].encode()) + _FRAME_TOKENS
        bench.ledger.allow(most + MAX_NEW_TOKENS, 0.0)
        key = digest(["openai", self._url, body, bench.stage, bench.seed, round, index])
        reply = bench.store.recall(key)
        if reply is None:
            began = time.perf_counter()
            reply = self._read(self._ask(body)) | {"seconds": time.perf_counter() - began}
            if reply["prompt_tokens"] is None:  # a server that does not count: by our own tokenizer
                reply["prompt_tokens"] = bench.engine.token_count(messages[0]["content"])
                reply["generated_tokens"] = min(bench.engine.token_count(reply["text"]), MAX_NEW_TOKENS)
            bench.store.remember(key, reply)
        bench.ledger.book(
            Spent(
                calls=1,
                prompt_tokens=reply["prompt_tokens"],
                generated_tokens=reply["generated_tokens"],
                seconds=reply["seconds"],
            )
        )
        return dict(reply)

    def _ask(self, body: dict[str, Any]) -> httpx.Response:
        """One answer, after retries with growing waits. Raises CotuneError."""
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        wait = self._first_wait
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                response = httpx.post(self._url, json=body, headers=headers, timeout=self._timeout)
            except httpx.TransportError as error:
                problem = f"cannot be reached ({type(error).__name__})"
            else:
                if response.status_code == 200:
                    return response
                problem = f"answers with status {response.status_code}"
                if response.status_code not in _RETRIED:
                    raise self._failed(problem, response.status_code)
                wait = _asked_wait(response, wait)
            if attempt < _ATTEMPTS:
                time.sleep(min(wait, _LONGEST_WAIT))
                wait *= 2
        raise self._failed(f"{problem}, {_ATTEMPTS} times")

    def _failed(self, problem: str, status: int | None = None) -> CotuneError:
        fix = {
            401: "Set OPENAI_API_KEY to a valid key.",
            403: "Set OPENAI_API_KEY to a key that may use this model.",
            404: "Check base URL (it usually ends in /v1) and model name in prompt.proposer.",
        }.get(status or 0, "Check the server, then give the same command again: finished work is kept.")
        return CotuneError(f"The proposer {self._model!r} at {self._url} {problem}. {fix}")

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        try:
            content = response.json()
            choice = content["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
            usage = content.get("usage") or {}
            return {
                "text": str(text or ""),
                "truncated": reason == "length",
                "prompt_tokens": usage.get("prompt_tokens"),
                "generated_tokens": usage.get("completion_tokens") or 0,
            }
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise self._failed("does not answer in the form of chat completions") from None


def _asked_wait(response: httpx.Response, default: float) -> float:
    """Seconds the server asks to wait, where it says so in seconds."""
    try:
        return float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return default
