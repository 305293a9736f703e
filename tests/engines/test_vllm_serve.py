"""The openai engine against vLLM's own server on loopback: runs, the Transformers engine's answers, its errors."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cotune.config import RunConfig, resolve
from cotune.engines.base import Request, Sampling
from cotune.engines.openai_engine import OpenAIEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import CotuneError
from cotune.experiment import run
from cotune.models.base import BaseModel
from cotune.models.black_box import BlackBox
from cotune.openai_client import ChatClient
from cotune.record import read_rows
from cotune.tasks import task as make_task
from cotune.tasks.data import load as load_data
from cotune.values import Prompt

CONTEXT = 2048
SECRET = "sk-a-sentinel-that-nobody-may-see"
STARTS_WITHIN = 600  # seconds; one minute on two cores, three when they are busy
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def url(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `vllm serve FOLDER` starts. (That command looks for a package called vllm; the build for CPUs is not.)"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm-serve") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base.folder),
               "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--api-key", SECRET,
               "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), "--max-num-seqs", "16",
               "--generation-config", "vllm"]  # fmt: skip
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        ends = time.monotonic() + STARTS_WITHIN
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < ends, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its engine is a process of its own
        process.wait()


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def small(url: str, strategy: str, **more: Any) -> RunConfig:
    limits = {"limit_train": 16, "limit_val": 8, "limit_test": 24}
    prompt = {"rounds": 1, "candidates": 4, "search_examples": 8, "minibatch": 4, "finalists": 2}
    named = {"strategy": strategy, "model": "tiny", "task": "micro-gsm8k", "engine": "openai", "noise_examples": 0}
    return resolve(named, limits, {"openai": {"base_url": url}, "prompt": prompt}, more)


def server_engine(url: str, name: str = "tiny") -> OpenAIEngine:
    return OpenAIEngine(BlackBox(name, ChatClient(url, attempts=1)))


def test_zero_shot_answers_as_the_transformers_engine_does(url: str, tmp_path: Path) -> None:
    config = small(url, "zero-shot", limit_test=200)
    served = run(config, tmp_path, "served")
    local = run(resolve(config.model_dump(), {"engine": "transformers"}), tmp_path, "local")
    ours, theirs = (read_rows(r.folder / "predictions.jsonl") for r in (local, served))
    equal = sum(a["completion"] == b["completion"] for a, b in zip(ours, theirs, strict=True))
    assert equal >= 0.98 * 200  # in float32 only near-ties fall differently
    assert [row["prompt_tokens"] for row in theirs] == [row["prompt_tokens"] for row in ours]
    assert served.summary["cost"]["measuring"]["prompt_tokens"] == local.summary["cost"]["measuring"]["prompt_tokens"]
    assert served.summary["cost"]["measuring"]["flops"] is None
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("proposer", ["edits", "self", "openai"])
def test_prompt_only_runs_with_every_proposer(url: str, tmp_path: Path, proposer: str) -> None:
    spec = f"openai:{url}#tiny" if proposer == "openai" else proposer
    prompt = {"method": "opro+bootstrap", "proposer": spec, "demonstration_sets": 1}
    result = run(small(url, "prompt-only", prompt=prompt), tmp_path)
    tuning = result.summary["cost"]["tuning"]
    assert result.summary["status"] == "done" and result.summary["n"] == 24
    assert tuning["prompt_tokens"] > 20 * tuning["calls"] and tuning["generated_tokens"] > tuning["calls"]
    assert SECRET not in "".join(path.read_text() for path in result.folder.glob("*.json*"))


def test_samples_and_log_probabilities(url: str, base: BaseModel, reference: TransformersEngine) -> None:
    engine = server_engine(url)
    task = make_task("micro-gsm8k")
    rows = load_data(task, None, seed=0, limit_test=8, val_max=8).test()
    messages = [task.messages(Prompt(task.seed_instruction), example) for example in rows]
    asked, local = ([Request(model.render(m)) for m in messages] for model in (engine.base, base))
    sampling = Sampling(32, logprobs=True)
    for [theirs], [ours] in zip(engine.generate(asked, sampling), reference.generate(local, sampling), strict=True):
        assert theirs.text == ours.text
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-3)
        assert theirs.generated_tokens == len(ours.token_ids) + (not ours.truncated)  # a server bills the end of a turn
    drawn = engine.generate(asked, Sampling(32, temperature=1.0, n=4, seed=5))
    assert all(len(row) == 4 for row in drawn)
    assert any(len({completion.text for completion in row}) > 1 for row in drawn)
    assert drawn == engine.generate(asked, Sampling(32, temperature=1.0, n=4, seed=5))  # vLLM heeds the seed


def test_what_the_server_says_of_itself_and_refuses(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server_engine(url)
    assert engine.base.context_length == CONTEXT
    assert engine.base.digest == server_engine(url).base.digest
    long, short = (Request(json.dumps([{"role": "user", "content": "two " * n}])) for n in (CONTEXT, 1))
    [[refused], [taken]] = engine.generate([long, short], Sampling(8))
    assert (refused.text, refused.truncated, refused.prompt_tokens) == ("", True, 0)
    assert taken.prompt_tokens > 0
    with pytest.raises(CotuneError, match=r"It has no model 'tinny'; it offers: tiny\."):
        server_engine(url, "tinny").generate([short], Sampling(8))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key")
    with pytest.raises(CotuneError, match=r"status 401\. Set OPENAI_API_KEY to a valid key"):
        engine.generate([short], Sampling(8))
    with pytest.raises(CotuneError, match="status 401"):
        engine.base.client.models()
