"""The endpoint over HTTP without a socket, and the worker behind it: what is answered, together, and refused."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import UsageError
from cotune.opened import Opened, open_any
from cotune.predict import predict
from cotune.serve import worker as workers
from cotune.serve.app import BODY_LIMIT, application, bind
from cotune.serve.protocol import Refused
from cotune.serve.worker import Worker
from cotune.values import Example

QUESTIONS = ["What is 1 + 1?", "What is 20 + 3?", "Ann has 2 pens. How many pens has Ann?"]


@pytest.fixture(scope="module")
def opened(lora_bundle: Path) -> Opened:
    return open_any(lora_bundle)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of the engine got."""
    sizes: list[int] = []
    real = TransformersEngine.generate

    def noted(self: TransformersEngine, requests: Any, sampling: Any) -> Any:
        sizes.append(len(requests))
        return real(self, requests, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", noted)
    return sizes


def visit(opened: Opened, visitor: Callable[[httpx.AsyncClient], Awaitable[Any]], host: str = "127.0.0.1") -> Any:
    async def go() -> Any:
        app = application(opened, Worker(opened))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}:8000") as client,
        ):
            return await visitor(client)

    return asyncio.run(go())


def question(opened: Opened, text: str, **more: Any) -> dict[str, Any]:
    return {"model": opened.name, "messages": [{"role": "user", "content": text}]} | more


def predicted(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    return [json.loads(line) for line in predict(folder, str(rows), "-")[1].splitlines()]


def test_it_answers_as_predict_does(opened: Opened, lora_bundle: Path, tmp_path: Path) -> None:
    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        asks = [client.post("/v1/chat/completions", json=question(opened, q)) for q in QUESTIONS]
        return [await client.get("/health"), await client.get("/v1/models"), *await asyncio.gather(*asks)]

    health, models, *answers = visit(opened, ask)
    assert health.json() == {"status": "ok"}
    assert [entry["id"] for entry in models.json()["data"]] == ["lora-only"]
    expected = predicted(lora_bundle, tmp_path)
    for response, row in zip(answers, expected, strict=True):
        assert response.status_code == 200
        told = response.json()
        assert told["choices"][0]["message"] == {"role": "assistant", "content": row["completion"]}
        assert told["choices"][0]["finish_reason"] == ("length" if row["truncated"] else "stop")
        assert told["usage"]["total_tokens"] == sum(
            told["usage"][count] for count in ("prompt_tokens", "completion_tokens")
        )
        assert told["cotune"] == {"instruction": row["instruction"], "adapter": opened.tuned.adapter.digest}  # type: ignore[attr-defined]


def test_a_joint_run_makes_prompt_and_adapter_for_each_question(joint_run: Path, tmp_path: Path) -> None:
    joint = open_any(joint_run)

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post("/v1/chat/completions", json=question(joint, q)) for q in QUESTIONS]

    told = [response.json() for response in visit(joint, ask)]
    expected = predicted(joint_run, tmp_path)
    assert [t["choices"][0]["message"]["content"] for t in told] == [row["completion"] for row in expected]
    assert [t["cotune"]["instruction"] for t in told] == [row["instruction"] for row in expected]
    assert len({t["cotune"]["adapter"] for t in told}) == 3


def test_samples_by_seed(opened: Opened) -> None:
    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        sampled = {"temperature": 2.0, "n": 3, "max_tokens": 6}
        bodies = [question(opened, QUESTIONS[0], **sampled, seed=seed) for seed in (1, 1, 2)]
        return [await client.post("/v1/chat/completions", json=body) for body in bodies]

    first, again, other = (
        [choice["message"]["content"] for choice in response.json()["choices"]] for response in visit(opened, ask)
    )
    assert first == again != other
    assert len(set(first)) == 3


def test_what_http_refuses(opened: Opened) -> None:
    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        chat = "/v1/chat/completions"
        form = {"Content-Type": "text/plain"}
        return [
            await client.get("/v1/nothing"),
            await client.get(chat),
            await client.post(chat, content=b"{}", headers=form),
            await client.post(chat, content=b"x" * (BODY_LIMIT + 1), headers={"Content-Type": "application/json"}),
            await client.post(chat, json=question(opened, "1 " * 600)),
            await client.post(chat, json=question(opened, "2?", max_tokens=10**9)),
            await client.post(chat, json=question(opened, "2?", context="c")),
        ]

    statuses, said = [], []
    for response in visit(opened, ask):
        statuses.append(response.status_code)
        said.append(response.json()["error"]["message"])
    assert statuses == [404, 405, 415, 413, 400, 400, 400]
    assert "There are /v1/chat/completions" in said[0]
    assert "longer than 1,048,576 bytes" in said[3]
    assert "are too long for" in said[4] and "are too long for" in said[5]

    async def look(client: httpx.AsyncClient) -> httpx.Response:
        return await client.get("/v1/models")

    assert visit(opened, look, host="evil.example").status_code == 400  # a page that calls itself this host


def test_questions_that_wait_are_answered_together(opened: Opened, batches: list[int]) -> None:
    worker = Worker(opened)
    examples = [Example(str(i), q, "") for i, q in enumerate(QUESTIONS)]
    futures = [worker.ask(example, opened.sampling) for example in examples]
    given_up = worker.ask(examples[0], opened.sampling)
    given_up.cancel()
    worker.start()
    together = [future.result(60)[1][0].text for future in futures]
    assert batches == [3]
    assert together == [worker.ask(example, opened.sampling).result(60)[1][0].text for example in examples]
    worker.close()
    assert not worker.alive


def test_one_bad_question_costs_the_others_nothing(opened: Opened, batches: list[int]) -> None:
    worker = Worker(opened)
    good = worker.ask(Example("a", QUESTIONS[0], ""), opened.sampling)
    bad = worker.ask(Example("b", "1 " * 600, ""), opened.sampling)
    worker.start()
    assert good.result(60)[1][0].text
    with pytest.raises(Refused, match="too long") as refused:
        bad.result(60)
    assert refused.value.status == 400 and batches == [1]
    worker.close()


def test_a_fault_is_said_without_the_question(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("loose wire")

    monkeypatch.setattr(TransformersEngine, "generate", broken)
    worker = Worker(opened)
    worker.start()
    with pytest.raises(Refused, match="RuntimeError while answering") as refused:
        worker.ask(Example("a", "secret question", ""), opened.sampling).result(60)
    worker.close()
    assert refused.value.status == 500 and refused.value.body["error"]["type"] == "server_error"
    assert "loose wire" in caplog.text and "secret" not in caplog.text


def test_too_many_are_not_let_in(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MOST_WAITING", 1)
    worker = Worker(opened)
    worker.ask(Example("a", "1?", ""), opened.sampling)
    with pytest.raises(Refused, match="Ask again later") as refused:
        worker.ask(Example("b", "2?", ""), opened.sampling)
    assert refused.value.status == 503


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127.0.0.1 port {port} cannot be served on \(Address already in use\)"):
            bind("127.0.0.1", port)
