"""One client for every server with OpenAI's chat-completions interface: `vllm serve`, a hosted one, and the like.

Requests at a time, pacing, retries, and what goes wrong in one sentence. The key is read from OPENAI_API_KEY for each
request, is sent nowhere but to the server, and is cut out of whatever the server says. Knows nothing of engines,
budgets or the run folder.
"""

from __future__ import annotations

import json
import math
import os
import re
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from queue import SimpleQueue
from typing import Any

import httpx

from cotune.errors import CotuneError, UsageError

KEY = "OPENAI_API_KEY"
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_CONNECT = 10.0  # seconds, at most, until a server takes the connection
_SHORTEST_KEY = 8  # characters; shorter ones are dummies ("EMPTY"), and words of ordinary answers
_SHOWN = 300  # characters of what a server says
_OFFERED = 10  # model names shown
_TOO_LONG = re.compile(r"context.?(length|size|window)|prompt is too long|inputs?\W+tokens", re.I)
_FILTERED = re.compile(r"content.?filter|content management policy|data_inspection_failed", re.I)
_UNPAID = "insufficient_quota"  # comes as 429, and no waiting helps


@dataclass(frozen=True)
class Reply:
    """What came back. Tokens are as the server counts them, None where it does not.

    `truncated`: cut at the length limit, or by a content filter. `logprobs` are None where there are none. `model` is
    what the server says has answered. `refused` is why it would not take the prompt (too long, filtered), else empty.
    """

    text: str = ""
    truncated: bool = False
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    logprobs: tuple[float, ...] | None = None
    model: str = ""
    refused: str = ""


class ChatClient:
    """`concurrency` requests at a time to `base_url`, evenly spaced below the limits per minute (None: no limit).

    One request takes at most `timeout` seconds and is tried `attempts` times, after waits of `first_wait` seconds,
    twice that, and so on up to `longest_wait`. A server that asks for a longer wait ends the run.
    """

    def __init__(
        self,
        base_url: str,
        *,
        concurrency: int = 8,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        timeout: float = 120.0,
        attempts: int = 5,
        longest_wait: float = 120.0,
        first_wait: float = 1.0,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.concurrency = concurrency
        self._pace = _Pace(requests_per_minute, tokens_per_minute)
        self._timeout = timeout
        self._attempts = attempts
        self._longest_wait = longest_wait
        self._first_wait = first_wait

    def ask_all(self, bodies: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """One reply per chat-completions body, in order.

        The first request that fails ends all of them and raises its CotuneError. Ctrl-C ends it at once too: the
        threads are daemons, and what they wait for is nobody's any more.
        """
        replies: list[Reply] = [Reply()] * len(bodies)
        done: SimpleQueue[tuple[int, Reply | Exception]] = SimpleQueue()
        todo, lock, stop = iter(enumerate(bodies)), threading.Lock(), threading.Event()

        def work() -> None:
            i = -1
            try:
                with self._http() as http:  # of this thread alone, so no other closes it under a request
                    while not stop.is_set():
                        with lock:
                            i, body = next(todo, (-1, None))
                        if body is None:
                            return
                        done.put((i, self._ask(http, body, stop)))
            except Exception as error:
                done.put((i, error))

        threads = [threading.Thread(target=work, daemon=True) for _ in bodies[: self.concurrency]]
        for thread in threads:
            thread.start()
        try:
            for _ in bodies:
                i, outcome = done.get()
                if isinstance(outcome, Exception):
                    raise outcome
                replies[i] = outcome
        finally:
            stop.set()
        for thread in threads:
            thread.join()
        return replies

    def models(self) -> list[dict[str, Any]]:
        """What the server's list of models says; empty where there is none for this key. Raises CotuneError."""
        with self._http() as http:
            response = self._send(http, "GET", "/models", None, threading.Event())
        if response.status_code == 401:
            raise self._status(response, None)
        try:
            return [entry for entry in response.json()["data"] if isinstance(entry["id"], str)]
        except (ValueError, KeyError, TypeError, RecursionError):
            return []

    def failed(self, problem: str, model: object, fix: str) -> CotuneError:
        """One sentence about this server, and the fix."""
        return CotuneError(f"{f'{model!r} at ' if model else ''}{self.base_url} {problem}. {fix}")

    @cached_property
    def _certificates(self) -> ssl.SSLContext:
        """Read once: it takes longer than a request on the same machine."""
        return httpx.create_ssl_context()

    def _http(self) -> httpx.Client:
        timeout = httpx.Timeout(self._timeout, connect=min(self._timeout, _CONNECT))
        return httpx.Client(timeout=timeout, verify=self._certificates)

    def _ask(self, http: httpx.Client, body: Mapping[str, Any], stop: threading.Event) -> Reply:
        response = self._send(http, "POST", "/chat/completions", body, stop)
        if response.status_code == 200:
            reply = self._read(response, body)
            self._pace.spent((reply.prompt_tokens or 0) + (reply.generated_tokens or 0))
            return reply
        said = _said(response)
        if response.status_code in (400, 413, 422) and (_TOO_LONG.search(said) or _FILTERED.search(said)):
            return Reply(truncated=True, refused=said[:_SHOWN])
        raise self._status(response, body["model"])

    def _send(
        self, http: httpx.Client, method: str, path: str, body: Mapping[str, Any] | None, stop: threading.Event
    ) -> httpx.Response:
        """The first response that is not worth another try. Raises CotuneError when there is none."""
        model = body and body["model"]
        wait, asked, problem = self._first_wait, 0.0, ""
        for attempt in range(self._attempts):
            pause = self._pace.turn()
            if attempt and not asked:  # a wait that was asked for is in the pace: it holds for all requests
                pause = max(pause, min(wait, self._longest_wait))
                wait *= 2
            asked = 0.0
            if stop.wait(pause):
                raise CotuneError("Stopped, because another request failed.")
            try:
                response = http.request(method, self.base_url + path, json=body, headers=_headers())
            except (httpx.RequestError, httpx.InvalidURL) as error:
                # Never the error's own words: they may hold a header.
                problem = f"cannot be reached ({type(error).__name__})"
                if isinstance(error, httpx.ReadTimeout):
                    problem = f"does not answer within {self._timeout:g} s"
                if body is None:  # the first contact: a wrong address is said at once
                    raise self.failed(problem, None, "Check that the server is running, and openai.base_url.") from None
            else:
                if response.status_code not in _RETRIED or _UNPAID in response.text:
                    return response
                problem = f"answers with status {response.status_code}"
                asked = _asked_wait(response)
                self._pace.hold(asked)
                if asked > self._longest_wait:
                    fix = "Give the same command again later, or raise openai.longest_wait: finished work is kept."
                    raise self.failed(f"{problem} and asks for a wait of {asked:.0f} s", model, fix)
        fix = "Check the server, then give the same command again: finished work is kept."
        raise self.failed(f"{problem}, {self._attempts} times", model, fix)

    def _status(self, response: httpx.Response, model: object) -> CotuneError:
        """What a status other than 200 means."""
        status, said = response.status_code, _said(response)
        problem = f"answers with status {status}"
        if status in (401, 403):  # without its words: some show part of the key
            wrong = "a key that may use this model" if status == 403 else "a valid key"
            return self.failed(problem, model, f"Set {KEY} to {wrong}." if _key() else f"Set {KEY}: no key was sent.")
        if _UNPAID in response.text:
            return self.failed(f"{problem} ({_UNPAID})", model, "The account behind the key has no credit left.")
        if said:
            problem += f": {said[:_SHOWN].rstrip('.')}"
        return self.failed(problem, model, self._fix(status, model))

    def _fix(self, status: int, model: object) -> str:
        try:
            offered = sorted(entry["id"] for entry in self.models()) if model else []
        except CotuneError:
            offered = []
        if offered and model not in offered:
            more = f" and {len(offered) - _OFFERED} more" if len(offered) > _OFFERED else ""
            return f"It has no model {model!r}; it offers: {_redacted(', '.join(offered[:_OFFERED]))}{more}."
        if status == 404 or 300 <= status < 400:
            return "Check base URL (it usually ends in /v1) and model name."
        return "Change what the server objects to, then give the same command again: finished work is kept."

    def _read(self, response: httpx.Response, body: Mapping[str, Any]) -> Reply:
        def unreadable(why: str) -> CotuneError:
            return self.failed(
                f"does not answer in the form of chat completions ({why})",
                body["model"],
                "Check base URL (it usually ends in /v1).",
            )

        try:
            content = response.json()
        except (ValueError, RecursionError):
            raise unreadable("not JSON") from None
        if isinstance(content, dict) and content.get("error"):
            raise self.failed(
                f"answers with an error: {_said(response)[:_SHOWN].rstrip('.')}", body["model"], "Check the server."
            )
        try:
            if not content["choices"]:
                raise unreadable("no choices")
            choice = content["choices"][0]
            message, reason, usage = choice["message"], choice.get("finish_reason"), content.get("usage") or {}
            text = message.get("content") or message.get("refusal") or ""  # a refusal is an answer: a wrong one
            if not isinstance(text, str):
                raise unreadable("no text")
            return Reply(
                text=_redacted(text),
                truncated=reason in ("length", "content_filter"),
                prompt_tokens=_count(usage.get("prompt_tokens")),
                generated_tokens=_count(usage.get("completion_tokens")),
                logprobs=_logprobs(choice.get("logprobs"), text, ended=reason == "stop"),
                model=_redacted(str(content.get("model") or "")),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise unreadable("parts are missing") from None


class _Pace:
    """When the next request may start: even spacing, and no earlier than a server has asked for."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._spacing = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def turn(self) -> float:
        """Takes the next turn; seconds until it comes."""
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._spacing
            return at - now

    def spent(self, tokens: int) -> None:
        """Tokens are known only afterwards, so it is the later requests that wait for them."""
        if self._per_token:
            with self._lock:
                self._next = max(self._next, time.monotonic()) + tokens * self._per_token

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _key() -> str:
    return os.environ.get(KEY, "").strip()


def _headers() -> dict[str, str]:
    key = _key()
    if not key.isascii() or not key.isprintable():  # httpx would repeat it in its error
        raise UsageError(f"{KEY} has characters that no key has. Set it again, without quotes and line breaks.")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _redacted(text: str) -> str:
    """Without the key, and without the half characters that JSON allows and no file takes."""
    key = _key()
    text = text.replace(key, "[key]") if len(key) >= _SHORTEST_KEY else text
    return text.encode("utf-8", "replace").decode("utf-8")


def _said(response: httpx.Response) -> str:
    """The server's own words about an error, on one line, without what would move a terminal's cursor."""
    try:
        content = json.loads(response.text)
        error = content.get("error") or content.get("detail") or content
        said = error if isinstance(error, str) else str(error.get("message") or error)
        if isinstance(error, dict) and isinstance(error.get("code"), str) and error["code"] not in said:
            said += f" ({error['code']})"
    except (ValueError, AttributeError, RecursionError):
        said = "" if "<html" in response.text.lower() else response.text
    return _redacted("".join(c for c in " ".join(said.split()) if c.isprintable()))


def _asked_wait(response: httpx.Response) -> float:
    """Seconds that Retry-After asks for (a number of them, or a date); 0 where it does not."""
    asked = response.headers.get("retry-after", "")
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _logprobs(given: Any, text: str, ended: bool) -> tuple[float, ...] | None:
    """One per token of the text. The token that ends the turn, which some servers list, is no part of it."""
    if not given or given.get("content") is None:
        return None
    tokens = list(given["content"])
    written = sum(len(bytes(t["bytes"]) if t.get("bytes") else t["token"].encode()) for t in tokens)
    if ended and tokens and written > len(text.encode("utf-8", "replace")):
        tokens.pop()
    values = tuple(float(t["logprob"]) for t in tokens)
    if not all(map(math.isfinite, values)):
        raise ValueError("a log-probability that is no number")
    return values
