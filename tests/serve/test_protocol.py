"""What a request may say, and the sentence for each thing that it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cotune.engines.base import Sampling
from cotune.serve.protocol import ChatRequest, Refused, example_of, read, reply
from cotune.values import Completion, Conditioning, Prompt

PLAN = Sampling(32, temperature=0.0, top_p=0.9, seed=7)


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "mine", "messages": [{"role": "user", "content": "2 + 2?"}]} | changes


def asked(**changes: Any) -> ChatRequest:
    return read(json.dumps(body(**changes)).encode(), "mine")


@pytest.mark.parametrize(
    ("sent", "status", "param", "said"),
    [
        (b"{", 400, None, "The body is not JSON"),
        (b"[1]", 400, None, "The body is not valid"),
        (b"", 400, None, "The body is not JSON"),
        (b"[" * 100_000, 400, None, "The body is not JSON"),
        ({"model": "mine"}, 400, "messages", "messages is not valid: Field required"),
        (body(model="gpt"), 404, "model", "There is no model 'gpt' here, only 'mine'"),
        (body(tools=[]), 400, "tools", "There is no parameter 'tools' here. Known: model, messages"),
        (body(temperature="0"), 400, "temperature", "temperature is not valid"),
        (body(temperature=9), 400, "temperature", "less than or equal to 5"),
        (body(n=0), 400, "n", "n is not valid"),
        (body(max_tokens=0), 400, "max_tokens", "greater than or equal to 1"),
        (body(max_tokens=2, max_completion_tokens=2), 400, "max_tokens", "mean the same"),
        (body(stop=["a", ""]), 400, "stop", "none of them empty"),
        (body(stop=list("abcde")), 400, "stop", "one to four"),
        (body(stream=True), 400, "stream", "not streamed"),
        (body(messages=[]), 400, "messages", "(there are none)"),
        (body(messages=[{"role": "user", "content": "  "}]), 400, "messages", "The question is empty"),
        (
            body(messages=[{"role": "system", "content": "Be"}, *body()["messages"]]),
            400,
            "messages",
            "'system', 'user'",
        ),
    ],
)
def test_what_is_refused(sent: Any, status: int, param: str | None, said: str) -> None:
    with pytest.raises(Refused) as refused:
        read(sent if isinstance(sent, bytes) else json.dumps(sent).encode(), "mine")
    error = refused.value.body["error"]
    assert refused.value.status == status
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert said in str(error["message"])


def test_the_plan_holds_unless_asked_otherwise() -> None:
    assert asked().sampling(PLAN) == PLAN
    assert asked(seed=3, top_p=0.5, n=2).sampling(PLAN) == Sampling(32, 0.0, 0.9, n=2, seed=7)  # greedy reads neither
    drawn = asked(temperature=0.5, seed=3, max_completion_tokens=5).sampling(PLAN)
    assert drawn == Sampling(5, 0.5, 0.9, seed=3)
    assert asked(temperature=0.5).sampling(PLAN).seed == 7


def test_context_and_choices_are_asked_for_where_the_task_has_them() -> None:
    found = example_of(asked(context="It rained.", choices=["a", "b"]), ("context", "question"), 2)
    assert (found.question, found.context, found.choices) == ("2 + 2?", "It rained.", ("a", "b"))
    for request, fields, choices, said in (
        (asked(), ("context",), 0, "need their context"),
        (asked(context="x"), ("question",), 0, "have no context"),
        (asked(choices=["a"]), ("question",), 4, "have 4 choices"),
        (asked(choices=["a"]), ("question",), 0, "have no choices"),
    ):
        with pytest.raises(Refused, match=said):
            example_of(request, fields, choices)


def test_a_reply_counts_and_cuts() -> None:
    completions = [Completion("one two", (1, 2), 9, truncated=True), Completion("three", (3,), 9, truncated=False)]
    told = reply("id", 0, asked(stop="two", n=2), Conditioning(Prompt("Add.")), completions)
    assert [c["message"]["content"] for c in told["choices"]] == ["one ", "three"]
    assert [c["finish_reason"] for c in told["choices"]] == ["stop", "stop"]
    assert told["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    assert told["cotune"] == {"instruction": "Add.", "adapter": None}
    whole = reply("id", 0, asked(stop="four", n=2), Conditioning(Prompt("Add.")), completions)
    assert [c["finish_reason"] for c in whole["choices"]] == ["length", "stop"]
