"""The openai engine and whole runs through it, against a server on loopback that answers as told."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import Body, ChatServer, reply_of, serving
from toy import bench
from typer.testing import CliRunner, Result

from cotune.cli import app
from cotune.config import resolve
from cotune.engines import engine as make_engine
from cotune.engines.base import Request, Sampling
from cotune.engines.openai_engine import OpenAIEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import BudgetExhausted, CotuneError, UsageError
from cotune.models.base import BaseModel
from cotune.models.black_box import BlackBox
from cotune.models.lora import LoraFactors
from cotune.openai_client import ChatClient

SECRET = "sk-a-sentinel-that-nobody-may-see"
GREEDY = Sampling(8)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving() as made:
        yield made


def engine_at(server: ChatServer, **settings: Any) -> OpenAIEngine:
    client = ChatClient(server.url, first_wait=0.001, **settings)
    return OpenAIEngine(BlackBox("some-model", client))


def asked(engine: OpenAIEngine, *texts: str) -> list[Request]:
    return [Request(engine.base.render([{"role": "user", "content": text}])) for text in texts]


def content(body: Body) -> str:
    return str(body["messages"][-1]["content"])


# the engine


def test_requests_say_what_sampling_says(server: ChatServer) -> None:
    engine = engine_at(server, concurrency=1)
    messages = [{"role": "system", "content": "Be right."}, {"role": "user", "content": 'Is 1 < 2? "Yes"\n'}]
    request = Request(engine.base.render(messages))
    engine.generate([request], GREEDY)
    greedy = {"model": "some-model", "messages": messages, "temperature": 0.0, "max_tokens": 8}
    assert server.seen[0][1] == greedy
    engine.generate([request], Sampling(8, temperature=0.5, top_p=0.9, n=3, seed=1))
    sampled = [body for _, body, _ in server.seen[1:]]
    seeds = [body.pop("seed") for body in sampled]
    assert sampled == [greedy | {"temperature": 0.5, "top_p": 0.9}] * 3
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**31 for seed in seeds)
    engine.generate([request], Sampling(8, temperature=0.5, n=3, seed=1))
    assert [body["seed"] for _, body, _ in server.seen[4:]] == seeds
    engine.generate([replace(request, first=1)], Sampling(8, temperature=0.5, n=2, seed=1))
    assert [body["seed"] for _, body, _ in server.seen[7:]] == seeds[1:]
    engine.limit_name = "max_completion_tokens"
    engine.generate([request], GREEDY)
    assert server.seen[-1][1]["max_completion_tokens"] == 8


def test_completions_are_in_order_with_the_servers_counts(server: ChatServer) -> None:
    engine = engine_at(server)
    server.answer = lambda body: reply_of(f"{content(body)}!", "length" if content(body) == "b" else "stop")
    done = engine.generate(asked(engine, "a", "b", "c"), Sampling(8, temperature=1.0, n=2))
    assert [[c.text for c in row] for row in done] == [["a!"] * 2, ["b!"] * 2, ["c!"] * 2]
    assert [row[0].truncated for row in done] == [False, True, False]
    assert {(c.prompt_tokens, c.generated_tokens) for row in done for c in row} == {(100, 7)}


def test_batches_are_four_for_each_request_at_a_time(server: ChatServer) -> None:
    engine = engine_at(server, concurrency=2)
    requests = asked(engine, *map(str, range(20)))
    assert engine.plan(requests, GREEDY) == [list(range(8)), list(range(8, 16)), list(range(16, 20))]
    assert [len(batch) for batch in engine.plan(requests, Sampling(8, n=3))] == [2] * 10
    assert [len(batch) for batch in engine.plan(requests, Sampling(8, n=9))] == [1] * 20
    assert server.seen == []


def test_the_ledger_books_what_the_server_counts_and_asks_before(server: ChatServer) -> None:
    engine = engine_at(server)
    requests = asked(engine, "a", "b")
    at = bench(engine.base, engine, tokens=10_000)
    at.generate(requests, Sampling(8, temperature=1.0, n=3))
    spent = at.ledger.tuning
    assert (spent.calls, spent.prompt_tokens, spent.generated_tokens, spent.flops) == (6, 600, 42, 0.0)
    at.generate(requests, Sampling(8, temperature=1.0, n=3))  # from the journal
    assert (spent.prompt_tokens, len(server.seen)) == (1200, 6)
    most = sum(len(r.prompt) + 64 for r in requests) + 2 * 8
    for limit, refused in ((most - 1, True), (most, False)):
        at = bench(engine.base, engine, tokens=limit)
        if refused:
            with pytest.raises(BudgetExhausted):
                at.generate(requests, GREEDY)
        else:
            at.generate(requests, GREEDY)
    assert len(server.seen) == 8


def test_a_server_that_does_not_count_is_booked_at_most(server: ChatServer, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_at(server)
    server.answer = lambda _: {"choices": [{"message": {"content": "zwölf"}}]}
    [[completion], _] = engine.generate(asked(engine, "a", "b"), GREEDY)
    assert (completion.prompt_tokens, completion.generated_tokens) == (
        engine.token_count(asked(engine, "a")[0].prompt),
        6,
    )
    assert caplog.text.count("counts no tokens") == 1


def test_prompts_that_are_not_taken_count_as_truncated(server: ChatServer, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_at(server, concurrency=1)
    server.replies = [(400, {"error": {"message": f"exceeds the available context size {SECRET}"}})]
    [[long], [short]] = engine.generate(asked(engine, "a", "b"), Sampling(8, logprobs=False))
    assert (long.text, long.truncated, long.prompt_tokens, long.generated_tokens) == ("", True, 0, 0)
    assert short.text == "#### 2"
    assert "refuses 1 of 2 prompts, which count as truncated: exceeds the available context size [key]" in caplog.text


def test_logprobs_or_an_error(server: ChatServer) -> None:
    engine = engine_at(server)
    with pytest.raises(CotuneError, match="gives no log-probabilities"):
        engine.generate(asked(engine, "a"), Sampling(8, logprobs=True))
    assert server.seen[0][1]["logprobs"] is True
    reply = reply_of("ab")
    reply["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -1}, {"token": "b", "logprob": -2}]}
    server.answer = lambda _: reply
    [[completion]] = engine.generate(asked(engine, "a"), Sampling(8, logprobs=True))
    assert completion.logprobs == (-1.0, -2.0)


def test_another_model_behind_the_name_is_told(server: ChatServer, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_at(server)
    engine.generate(asked(engine, "a"), GREEDY)
    assert "different models" not in caplog.text
    server.answer = lambda _: reply_of("2") | {"model": "other-model"}
    engine.generate(asked(engine, "a"), GREEDY)
    engine.generate(asked(engine, "a"), GREEDY)
    assert caplog.text.count("has answered with different models: other-model, some-model.") == 1


def test_no_adapters_and_no_loaded_models(server: ChatServer, random_base: BaseModel) -> None:
    engine = engine_at(server)
    adapter = LoraFactors({"layer": (torch.ones(1, 2), torch.ones(2, 1))}, 1.0)
    with pytest.raises(UsageError, match="takes no adapter"):
        engine.generate([Request("[]", adapter)], GREEDY)
    config = resolve({"strategy": "prompt-only", "model": "some-model", "task": "micro-gsm8k", "engine": "openai"})
    with pytest.raises(UsageError, match="is loaded here"):
        OpenAIEngine.from_config(random_base, config)
    assert isinstance(make_engine(random_base, config), TransformersEngine)  # a proposer beside the black box
    assert isinstance(make_engine(engine.base, config), OpenAIEngine)
    assert server.seen == []


# the black box


def test_a_black_box_is_named_by_what_its_server_says(server: ChatServer) -> None:
    box = engine_at(server).base
    assert engine_at(server).base.digest == box.digest
    server.models["data"][0]["created"] += 1  # as vLLM's does at every start
    assert engine_at(server).base.digest == box.digest
    assert BlackBox("another", box.client).digest != box.digest
    server.models["data"][0]["owned_by"] = "somebody else"
    assert engine_at(server).base.digest != box.digest
    assert SECRET not in repr(box) and "some-model" in repr(box)


def test_the_context_is_the_settings_or_the_servers_or_none(server: ChatServer) -> None:
    assert engine_at(server).base.context_length == 2**31 - 1
    server.models["data"][0]["max_model_len"] = 4096
    box = engine_at(server).base
    assert box.context_length == 4096
    assert BlackBox("some-model", box.client, 512).context_length == 512


def test_weights_and_tokens_of_a_black_box_are_out_of_reach(server: ChatServer) -> None:
    box = engine_at(server).base
    for reach in (lambda: box.model, lambda: box.encode("x"), lambda: box.encode_answer("x"), lambda: box.decode([1])):
        with pytest.raises(UsageError, match="is a black box behind http"):
            reach()
    assert (box.parameters_count, box.special_tokens, box.plain("<|x|>")) == (0, [], "<|x|>")
    assert box.token_count("é") >= 2


# whole runs


def cotune(*args: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert SECRET not in result.output
    return result


def run_args(server: ChatServer, out: Path, strategy: str, *more: object) -> list[object]:
    return ["run", "--engine", "openai", "--model", "some-model", "--strategy", strategy, "--task", "micro-gsm8k",
            "--set", f"openai.base_url={server.url}", "--limit-train", 12, "--limit-val", 6, "--limit-test", 40,
            "--set", "noise_examples=0", "--out", out, "--name", "run", *more]  # fmt: skip


SMALL = ["prompt.rounds=1", "prompt.candidates=2", "prompt.search_examples=6", "prompt.minibatch=3",
         "prompt.demonstration_sets=1", "openai.concurrency=4"]  # fmt: skip
SETS = [word for setting in SMALL for word in ("--set", setting)]


def no_secret_in(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_zero_shot_with_predict_export_show_and_compare(server: ChatServer, tmp_path: Path) -> None:
    server.answer = lambda _: reply_of(f"{SECRET} #### 2")
    noise = ["--set", "noise_examples=5"]
    result = cotune(*run_args(server, tmp_path, "zero-shot", "--json", *noise))
    assert result.exit_code == 0, result.output
    assert len(server.seen) == 45
    summary = json.loads(result.stdout)
    assert (summary["engine"], summary["n"], summary["hardware"]) == ("openai", 40, [])
    measuring = summary["cost"]["measuring"]
    assert (measuring["prompt_tokens"], measuring["generated_tokens"], measuring["flops"]) == (4500, 315, None)
    same = {"completions_differ": 0.0, "grades_differ": 0.0, "mean_score_difference": 0.0}
    assert summary["noise"] == {"promised": False, "examples": 5, **same}
    assert summary["serving"]["answers"]["read_tokens"] == 100
    assert "cannot be verified" in summary["notes"][0]
    first = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
    assert (first["completion"], first["prompt_tokens"], first["generated_tokens"]) == ("[key] #### 2", 100, 7)
    no_secret_in(tmp_path)

    again = cotune(*run_args(server, tmp_path, "zero-shot", *noise))
    assert "unknown FLOPs" in again.stdout
    for command in (["show", tmp_path / "run"], ["compare", tmp_path]):
        assert cotune(*command).exit_code == 0
    [group] = json.loads(cotune("compare", tmp_path, "--json").stdout)["groups"]
    assert group["rows"][0]["measuring_flops"] is None and group["rows"][0]["measuring_tokens"] == 4815
    assert len(server.seen) == 45

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What is 1 + 1?"}\n')
    result = cotune("predict", tmp_path / "run", "--input", rows, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out.jsonl").read_text())["prediction"] == "2"
    server.models = None  # what is taken home needs no server
    seen = len(server.seen)
    assert cotune("export", tmp_path / "run", "--out", tmp_path / "home").exit_code == 0
    assert "to the model's own server" in (tmp_path / "home" / "README.md").read_text()
    assert "Solve the math" in (tmp_path / "home" / "tuned.json").read_text()
    assert len(server.seen) == seen
    again = cotune("predict", tmp_path / "home", "--input", rows, "--output", "-")
    assert again.exit_code == 0, again.output
    assert again.stdout == (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize(
    ("method", "proposer"),
    [("opro+bootstrap", "self"), ("opro+bootstrap", "edits"), ("opro+bootstrap", "openai")]
    + [(method, "self") for method in ("opro", "bootstrap", "mipro")]
    + [(method, proposer) for method in ("cfpo", "gepa") for proposer in ("self", "edits", "openai")],
)
def test_prompt_only_with_every_method_and_proposer(
    server: ChatServer, tmp_path: Path, method: str, proposer: str
) -> None:
    for package in {"mipro": ["optuna"], "gepa": ["gepa"]}.get(method, []):
        pytest.importorskip(package)

    def answer(body: Body) -> Any:
        if "write a new instruction for the assistant" in content(body):
            return reply_of(f"```\nCount to {body.get('seed', 1)}, {SECRET}.\n```")
        if "PART: CHANGE" in content(body):
            return reply_of(f"details: count to {body.get('seed', 1)}")
        if "new instruction" in content(body) or "Rewrite its part" in content(body):
            return reply_of(f"<instruction>Count to {body.get('seed', 1)}, {SECRET}.</instruction>")
        right = re.search("seed|Count|think|step", str(body["messages"][0]["content"]))
        return reply_of("#### 2" if right else "?")

    server.answer = answer
    spec = f"openai:{server.url}#proposer-model" if proposer == "openai" else proposer
    chosen = ("--set", f"prompt.method={method}", "--set", f"prompt.proposer={spec}")
    result = cotune(*run_args(server, tmp_path, "prompt-only", "--json", *SETS, *chosen))
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["cost"]["tuning"]["prompt_tokens"] == 100 * summary["cost"]["tuning"]["calls"]
    assert summary["cost"]["tuning"]["calls"] + 40 == len(server.seen)
    models = {body["model"] for _, body, _ in server.seen}
    assert models == ({"some-model", "proposer-model"} if proposer == "openai" else {"some-model"})
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    origins = {event["origin"] for event in events if event["kind"] == "candidate"}
    by = {"bootstrap": "gold-demonstrations", "mipro": "mipro"}.get(method, proposer)
    assert any(origin.startswith({"openai": "openai:proposer-model"}.get(by, by)) for origin in origins)
    no_secret_in(tmp_path)


def test_a_failed_run_keeps_its_finished_batches_and_no_key(
    server: ChatServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answered: list[Body] = []

    def answer(body: Body) -> Any:
        answered.append(body)
        return reply_of("#### 2") if len(answered) <= 20 else {"error": {"message": f"no more for {SECRET}"}}

    server.answer = answer
    args = run_args(server, tmp_path, "zero-shot", "--set", "openai.concurrency=2")
    for debug in ((), ("--debug",)):
        result = cotune(*args, *debug)
        assert result.exit_code == 1
        assert "answers with an error: no more for [key]" in result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert len((tmp_path / "run" / "work" / "journal.jsonl").read_text().splitlines()) == 2  # of 8 requests each
    no_secret_in(tmp_path)
    assert SECRET not in caplog.text

    server.answer = lambda _: reply_of("#### 2")
    server.seen.clear()
    assert cotune(*args).exit_code == 0
    # Distinct ones, because a request of the failed run may still have been on its way.
    assert len({json.dumps(body["messages"]) for _, body, _ in server.seen}) == 40 - 16


@pytest.mark.parametrize(
    ("strategy", "more", "sentence"),
    [
        ("lora-only", [], "lora-only tunes weights, and some-model is a black box behind"),
        ("joint", [], "joint tunes weights, and some-model is a black box behind"),
        ("sequential", ["--set", "sequential.stages=p,w"], "sequential tunes weights, and some-model is a black box"),
        ("prompt-only", ["--set", "budget.flops=1e9"], "The FLOPs of some-model are unknown"),
    ],
)
def test_what_needs_weights_is_refused_before_any_request(
    server: ChatServer, tmp_path: Path, strategy: str, more: list[str], sentence: str
) -> None:
    for plan in ([], ["--plan"]):
        result = cotune(*run_args(server, tmp_path, strategy, *more, *plan))
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: {sentence}")
        assert result.stderr.count("\n") == 1
    assert server.seen == []
    assert list(tmp_path.iterdir()) == []


def test_prompt_stages_in_turn_need_no_weights(server: ChatServer, tmp_path: Path) -> None:
    args = run_args(server, tmp_path, "sequential", *SETS, "--set", "sequential.stages=p,p", "--limit-test", "4")
    result = cotune(*args, "--set", "prompt.proposer=edits")
    assert result.exit_code == 0, result.output


def test_a_policy_here_learns_token_prompts_for_it(server: ChatServer, tmp_path: Path) -> None:
    learned = ["prompt.method=rlprompt", "rlprompt.tokens=2", "rlprompt.samples=3", "rlprompt.steps=2"]
    sets = [word for setting in learned for word in ("--set", setting)]
    args = run_args(server, tmp_path, "prompt-only", *SETS, *sets, "--generator", "tiny", "--limit-test", "4")
    assert cotune(*args, "--plan").exit_code == 0
    assert server.seen == []
    result = cotune(*args)
    assert result.exit_code == 0, result.output
    asked = {body["messages"][0]["content"] for _, body, _ in server.seen}
    assert len(asked) >= 3  # the seed prompt and token prompts
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["cost"]["tuning"]["trained_tokens"] == 2 * 3 * 2


def test_a_plan_asks_nothing(server: ChatServer, tmp_path: Path) -> None:
    server.models = None
    result = cotune(*run_args(server, tmp_path, "prompt-only", "--plan", "--json"))
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["parameters"], plan["tuning_at_most"]["flops"]) == (None, None)
    assert plan["tuning_at_most"]["tokens"] > plan["mean_tokens"]["question"] > 64
    file = tmp_path / "x.toml"
    file.write_text(
        f'engine = "openai"\nmodel = "some-model"\ntask = "micro-gsm8k"\nstrategy = ["zero-shot", "prompt-only"]\n'
        f'limit_train = 12\n[openai]\nbase_url = "{server.url}"\n'
    )
    result = cotune("study", file, "--plan", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("unknown FLOPs") == 6
    assert server.seen == []


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            "openai.base_url=http://user:hidden@host/v1",
            "openai.base_url is not valid: a server's address takes no user",
        ),
        ("openai.base_url=https://host/v1?key=hidden", "openai.base_url is not valid"),
        ("prompt.proposer=openai:https://hidden@host/v1#m", "prompt.proposer is not valid"),
        ("openai.base_url=localhost:8000", "an address starts with http:// or https://"),
        ("openai.concurrency=0", "openai.concurrency = 0 is not valid"),
        ("openai.timeout=0", "openai.timeout = 0 is not valid"),
        ("openai.key=hidden", "There is no setting 'openai.key'"),
    ],
)
def test_settings_hold_no_secret(server: ChatServer, tmp_path: Path, setting: str, sentence: str) -> None:
    result = cotune(*run_args(server, tmp_path, "zero-shot", "--set", setting))
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "hidden" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_server_must_be_named_and_there(tmp_path: Path) -> None:
    args = ["run", "--engine", "openai", "--model", "m", "--strategy", "zero-shot", "--task", "micro-gsm8k",
            "--limit-train", 4, "--limit-val", 4, "--limit-test", 4, "--out", tmp_path, "--quiet"]  # fmt: skip
    result = cotune(*args)
    assert (result.exit_code, "--set openai.base_url=http://localhost:8000/v1" in result.stderr) == (2, True)
    result = cotune(*args, "--set", "openai.base_url=http://127.0.0.1:9/v1")
    assert result.exit_code == 1
    assert "http://127.0.0.1:9/v1 cannot be reached (ConnectError). Check that the server is running" in result.stderr
