"""The client of chat-completions servers against a real one on loopback: order, pace, retries, errors, the key."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from chat_server import ChatServer, reply_of, serving

from cotune.errors import CotuneError, UsageError
from cotune.openai_client import ChatClient, Reply

SECRET = "sk-a-sentinel-that-nobody-may-see"
LONG = "This model's maximum context length is 2048 tokens. However, your prompt contains 2049."


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving() as made:
        yield made


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    return SECRET


def client(server: ChatServer, **settings: Any) -> ChatClient:
    return ChatClient(server.url, **({"first_wait": 0.001} | settings))


def body(text: str = "Hi") -> dict[str, Any]:
    return {"model": "some-model", "messages": [{"role": "user", "content": text}], "max_tokens": 8}


def ask(server: ChatServer, **settings: Any) -> Reply:
    [reply] = client(server, **settings).ask_all([body()])
    return reply


def error(server: ChatServer, **settings: Any) -> str:
    with pytest.raises(CotuneError) as caught:
        ask(server, **settings)
    return str(caught.value)


def test_replies_come_in_the_order_of_requests_however_they_arrive(server: ChatServer) -> None:
    four = threading.Barrier(4)

    def answer(asked: dict[str, Any]) -> Any:
        number = int(asked["messages"][0]["content"])
        four.wait(10)  # four are on their way at a time
        time.sleep(0.02 * (3 - number % 4))
        return reply_of(f"answer {number}")

    server.answer = answer
    replies = client(server, concurrency=4).ask_all([body(str(i)) for i in range(12)])
    assert [r.text for r in replies] == [f"answer {i}" for i in range(12)]
    assert server.most_at_once == 4
    assert client(server).ask_all([]) == []


def test_what_a_reply_says(server: ChatServer) -> None:
    assert ask(server) == Reply("#### 2", False, 100, 7, None, "some-model")
    assert server.seen[0] == ("/v1/chat/completions", body(), f"Bearer {SECRET}")
    server.replies = [(200, reply_of("cut", "length")), (200, reply_of("", "content_filter"))]
    assert [ask(server).truncated for _ in range(2)] == [True, True]
    server.replies = [(200, reply_of(None, refusal="I can't.")), (200, {"choices": [{"message": {"content": None}}]})]
    assert ask(server) == Reply("I can't.", False, 100, 7, None, "some-model")
    assert ask(server) == Reply()  # counts nothing, says nothing
    server.replies = [(200, b'{"choices": [{"message": {"content": "half \\ud83d"}}]}')]
    assert ask(server).text == "half ?"  # no file takes half a character


def test_logprobs_are_of_the_text_alone(server: ChatServer) -> None:
    reply = reply_of("é2")
    tokens: list[dict[str, Any]] = [
        {"token": "\ufffd", "bytes": [0xC3], "logprob": -1.0},
        {"token": "\ufffd", "bytes": [0xA9], "logprob": -2.0},
        {"token": "2", "bytes": None, "logprob": -3.0},
    ]
    reply["choices"][0]["logprobs"] = {"content": tokens}
    server.replies = [(200, reply)]
    assert ask(server).logprobs == (-1.0, -2.0, -3.0)
    tokens.append({"token": "<|im_end|>", "bytes": None, "logprob": -4.0})
    server.replies = [(200, reply)]
    assert ask(server).logprobs == (-1.0, -2.0, -3.0)


def test_waits_grow_between_attempts(server: ChatServer) -> None:
    server.replies = [(503, {}), (500, b"oops"), (429, {})]
    assert ask(server, first_wait=0.05).text == "#### 2"
    assert len(server.seen) == 4
    assert all(gap >= least for gap, least in zip(server.gaps, (0.05, 0.1, 0.2), strict=True))
    server.replies = [(500, {})] * 3
    assert "status 500, 3 times" in error(server, attempts=3)
    assert server.replies == []


def test_a_wait_that_the_server_asks_for_holds_for_all_requests(server: ChatServer) -> None:
    server.replies = [(429, {}, {"Retry-After": "0.3"})]
    client(server, concurrency=1).ask_all([body(), body()])
    assert server.gaps[0] >= 0.3
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # whole seconds
    server.times.clear()
    server.replies = [(503, {}, {"Retry-After": soon})]
    ask(server)
    assert 0.5 <= server.gaps[0] <= 2.5
    server.replies = [(429, {}, {"Retry-After": "3600"})]
    assert "asks for a wait of 3600 s. Give the same command again later" in error(server)
    server.replies = [(429, {}, {"Retry-After": "soon"})]
    assert ask(server).text == "#### 2"


def test_the_pace_is_kept(server: ChatServer) -> None:
    began = time.monotonic()
    client(server, requests_per_minute=1200).ask_all([body()] * 6)
    assert time.monotonic() - began >= 5 * 0.05
    server.times.clear()
    client(server, tokens_per_minute=60 * 1070, concurrency=1).ask_all([body()] * 4)  # a reply has 107
    assert min(server.gaps) >= 0.09


def test_a_slow_server_is_not_waited_for_for_ever(server: ChatServer) -> None:
    server.answer = lambda _: time.sleep(0.5)
    assert "does not answer within 0.1 s, 2 times" in error(server, timeout=0.1, attempts=2)


def test_a_connection_that_breaks_is_tried_again(server: ChatServer) -> None:
    server.replies = [(200, b"{}", {"Content-Length": "99", "Connection": "close"}),
                      (200, b"no gzip", {"Content-Encoding": "gzip"})]  # fmt: skip
    assert ask(server).text == "#### 2"
    assert len(server.seen) == 3


def test_a_server_that_is_not_there() -> None:
    nobody = ChatClient("http://127.0.0.1:9/v1", first_wait=0.001)
    with pytest.raises(CotuneError, match=r"'some-model' at http://127.0.0.1:9/v1 cannot be reached .*, 5 times"):
        nobody.ask_all([body()])
    began = time.monotonic()
    with pytest.raises(CotuneError, match="Check that the server is running"):
        ChatClient("http://127.0.0.1:9/v1", first_wait=60).models()
    assert time.monotonic() - began < 5  # the first contact is not tried again


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ((401, {"error": {"message": f"Incorrect API key: {SECRET[:8]}***"}}), "Set OPENAI_API_KEY to a valid key."),
        ((403, {}), "to a key that may use this model"),
        ((404, b"<html>Not Found</html>"), "answers with status 404. Check base URL (it usually ends in /v1)"),
        ((307, b"", {"Location": "/v2"}), "answers with status 307. Check base URL"),
        ((400, {"error": {"message": "temperature must be 1", "code": "unsupported_value"}}),
         "status 400: temperature must be 1 (unsupported_value). Change what the server objects to"),
        ((400, {"detail": f"bad \x1b[31mheader\n Bearer {SECRET}"}), "bad [31mheader Bearer [key]"),
        ((429, {"error": {"message": "Quota", "code": "insufficient_quota"}}), "has no credit left"),
        ((200, {"error": {"message": "Upstream is down"}}), "answers with an error: Upstream is down"),
        ((200, b"<html>"), "form of chat completions (not JSON)"),
        ((200, {"choices": []}), "form of chat completions (no choices)"),
        ((200, []), "form of chat completions (parts are missing)"),
        ((200, {"choices": [{"message": {"content": 5}}]}), "form of chat completions (no text)"),
        ((200, b"[" * 100_000), "form of chat completions (not JSON)"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence_at_the_first_attempt(server: ChatServer, reply: Any, sentence: str) -> None:
    server.replies = [reply]
    said = error(server)
    assert sentence in said
    assert "\n" not in said and SECRET not in said and SECRET[:8] not in said
    assert len(server.seen) == 1


def test_without_a_key_none_is_sent(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    server.replies = [(401, {})]
    assert "Set OPENAI_API_KEY: no key was sent." in error(server)
    assert server.seen[0][2] is None


def test_a_wrong_model_name_lists_what_there_is(server: ChatServer) -> None:
    server.models = {"data": [{"id": f"model-{i:02}"} for i in range(12)]}
    server.replies = [(404, {"error": {"message": "The model does not exist."}})]
    said = error(server)
    assert "It has no model 'some-model'; it offers: model-00, model-01" in said
    assert "model-09 and 2 more." in said


def test_the_list_of_models_may_be_missing(server: ChatServer) -> None:
    assert [entry["id"] for entry in client(server).models()] == ["some-model"]
    for odd in (None, [], {"data": [{"name": "x"}]}, b"<html>", b"[" * 100_000):
        server.models = odd
        assert client(server).models() == []


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_not_taken_is_a_reply(server: ChatServer, status: int) -> None:
    server.replies = [
        (status, {"error": {"message": f"{LONG} {SECRET}"}}),
        (status, {"error": {"code": "content_filter"}}),
    ]
    assert ask(server) == Reply(truncated=True, refused=f"{LONG} [key]")
    assert "content_filter" in ask(server).refused


def test_the_key_is_cut_out_of_answers_too(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = lambda _: reply_of(f"Your key is {SECRET}.") | {"model": SECRET}
    assert ask(server).text == "Your key is [key]."
    assert ask(server).model == "[key]"
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")  # no secret, but a word
    server.answer = lambda _: reply_of("The box is EMPTY.")
    assert ask(server).text == "The box is EMPTY."


@pytest.mark.parametrize("bad", [f"{SECRET}\nX-Other: 1", f"{SECRET}\x00", f"{SECRET}ü"])
def test_a_key_that_cannot_be_sent_is_not_shown(server: ChatServer, monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    if "\x00" in bad:
        monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": bad})  # no process can be started with it
    else:
        monkeypatch.setenv("OPENAI_API_KEY", bad)
    with pytest.raises(UsageError, match="OPENAI_API_KEY has characters") as caught:
        ask(server)
    assert SECRET not in str(caught.value)
    assert server.seen == []
    monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": f" {SECRET}\n"})  # as read from a file
    ask(server)
    assert server.seen[0][2] == f"Bearer {SECRET}"


def test_the_first_failure_ends_the_rest(server: ChatServer) -> None:
    server.replies = [(400, {"error": {"message": "no"}})]
    server.answer = lambda _: (time.sleep(0.05), reply_of("2"))[1]
    with pytest.raises(CotuneError, match="status 400: no"):
        client(server, concurrency=2).ask_all([body()] * 50)
    time.sleep(0.2)
    assert len(server.seen) <= 4


def test_an_interrupt_ends_at_once_while_requests_are_on_their_way(server: ChatServer) -> None:
    server.answer = lambda _: time.sleep(20)
    code = (
        "import sys; from cotune.openai_client import ChatClient\n"
        f"ChatClient({server.url!r}).ask_all([{json.dumps(body())}] * 20)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # a job in the background ignores it
    )
    while len(server.seen) < 8:
        assert process.poll() is None
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=15)
    assert time.monotonic() - began < 5
    assert "KeyboardInterrupt" in shown and SECRET not in shown
