"""The endpoint over HTTP: routes, limits, errors as OpenAI's clients expect them, and the server's life.

Loopback unless told otherwise. The access log has addresses, paths and status codes, never what is asked or answered.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from cotune.bundle import chat_frame
from cotune.errors import UsageError
from cotune.opened import Opened
from cotune.serve.protocol import Refused, example_of, read, reply
from cotune.serve.worker import Worker
from cotune.values import Prompt

BODY_LIMIT = 2**20  # bytes
_SECONDS_TO_FINISH = 30  # of requests on their way when the server is stopped
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def application(opened: Opened, worker: Worker, loopback: bool = True) -> Starlette:
    """Serves one model, by the run's name. On loopback only requests that name it as their host are taken, so that no
    web page can reach it through a name of its own."""
    fields = chat_frame(opened.base, opened.task, Prompt("")).fields
    started = int(time.time())

    async def health(request: Request) -> JSONResponse:
        if not worker.alive:
            raise Refused(503, "The worker has ended. Start the server again.")
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> JSONResponse:
        model = {"id": opened.name, "object": "model", "created": started, "owned_by": "cotune"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(request: Request) -> JSONResponse:
        asked = read(await _body(request), opened.name)
        question = example_of(asked, fields, opened.task.choices)
        future = worker.ask(question, asked.sampling(opened.sampling), asked.drawing(opened.sampling))
        conditioning, completions, samples = await asyncio.wrap_future(future)
        identity = f"chatcmpl-{uuid.uuid4().hex}"
        return JSONResponse(reply(identity, int(time.time()), asked, conditioning, completions, samples))

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.close)

    hosts = [*LOOPBACK, "[::1]"] if loopback else ["*"]
    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={Refused: _refused, HTTPException: _http},
        lifespan=life,
    )


async def _body(request: Request) -> bytes:
    """Raises Refused for one that is not called JSON (what a web page may send anywhere is not), or is too long."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Send the body as application/json.")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise Refused(413, f"The body is longer than {BODY_LIMIT:,} bytes.")
    return bytes(body)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}. There are /v1/chat/completions, /v1/models, /health."
    return JSONResponse(Refused(error.status_code, what).body, error.status_code, error.headers)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before a model is loaded. Raises UsageError when the port is taken or the host not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise UsageError(
            f"{host} port {port} cannot be served on ({why}). Give another --port, or 0 for a free one."
        ) from None


def run(opened: Opened, listening: socket.socket, host: str, quiet: bool) -> None:
    """Serve until Ctrl-C (KeyboardInterrupt) or SIGTERM. What is being answered then is finished first."""
    app = application(opened, Worker(opened), loopback=host in LOOPBACK)
    log = logging.getLogger("uvicorn.access")
    log.addHandler(logging.StreamHandler(sys.stderr))
    log.propagate = False
    settings = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning" if quiet else "info",
        access_log=not quiet,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )
    uvicorn.Server(settings).run(sockets=[listening])
