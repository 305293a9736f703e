"""A server with OpenAI's chat completions on loopback, that answers as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


def reply_of(text: str | None, reason: str = "stop", **message: Any) -> Body:
    """A chat completion of 100 tokens read and 7 written."""
    return {
        "model": "some-model",
        "choices": [{"message": {"content": text, **message}, "finish_reason": reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7},
    }


class ChatServer(ThreadingHTTPServer):
    """`replies` (status, body and perhaps headers) are given first, in order of arrival, then what `answer` makes of
    the request. `seen` lists what arrived: path, body, Authorization; `times` when."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[tuple[Any, ...]] = []
        self.answer: Callable[[Body], Any] = lambda body: reply_of("#### 2")
        self.models: Any = {"data": [{"id": "some-model", "owned_by": "tests", "created": time.time()}]}
        self.seen: list[tuple[str, Body, str | None]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def gaps(self) -> list[float]:
        """Seconds between one arrival and the next."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that does not wait for its answer is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.times.append(time.monotonic())
            self.server.seen.append((self.path, body, self.headers.get("Authorization")))
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            reply = self.server.replies.pop(0) if self.server.replies else None
        if reply is None:
            reply = (200, self.server.answer(body))
        with self.server.lock:
            self.server.at_once -= 1
        self._send(*reply)

    def do_GET(self) -> None:
        known = self.path == "/v1/models" and self.server.models is not None
        self._send(*((200, self.server.models) if known else (404, b"<html>nothing here</html>")))

    def _send(self, status: int, reply: Any, headers: Mapping[str, str] | None = None) -> None:
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def serving() -> Iterator[ChatServer]:
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
