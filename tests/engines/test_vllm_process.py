"""vLLM in a process of its own: killed, stopped, taking turns. Each start takes about a minute."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cotune.config import RunConfig, resolve
from cotune.engines import vllm_server
from cotune.engines.base import Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine
from cotune.engines.vllm_engine import VllmEngine
from cotune.engines.vllm_server import Server
from cotune.errors import CotuneError
from cotune.experiment import run
from cotune.models.base import BaseModel, load
from cotune.models.lora import LoraFactors
from cotune.record import read_rows

pytestmark = pytest.mark.timeout(1500)  # seconds; a minute or two where nothing else runs
VLLM = {"cache_gib": 0.25, "sequences": 16, "adapters": 4, "between": "stop"}


def children() -> list[int]:
    """Engine processes of this one that live."""
    return [s.child.pid for s in vllm_server._SERVERS.values() if s.child is not None and alive(s.child.pid)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def resident_bytes(pids: list[int]) -> int:
    found = (re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids if alive(pid))
    return sum(1024 * int(match[1]) for match in found if match)


def config(**changed: object) -> RunConfig:
    small = {"strategy": "zero-shot", "model": "tiny", "task": "micro-gsm8k", "engine": "vllm", "limit_test": 1100}
    return resolve(small, {"vllm": VLLM}, changed)


def test_a_killed_engine_fails_the_run_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,100 rows are two batches; the engine's process is killed in the middle of the second."""
    whole = run(config(), tmp_path / "whole").folder
    real, calls = Server.run, []

    def killing(self: Server, *args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            assert self.child is not None
            threading.Timer(0.3, os.kill, (self.child.pid, signal.SIGKILL)).start()
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Server, "run", killing)
    [victim] = children()
    with pytest.raises(CotuneError, match="tiny was ended by SIGKILL"):
        run(config(), tmp_path / "killed")
    monkeypatch.undo()
    killed = tmp_path / "killed" / whole.name
    failed = json.loads((killed / "summary.json").read_text())
    assert failed["status"] == "failed" and "The same command goes on" in failed["reason"]
    assert not alive(victim) and children() == []
    journal = read_rows(killed / "work/journal.jsonl")
    assert [len(row["value"]["rows"]) for row in journal] == [1024]  # the finished batch
    log = Path(re.findall(r"log is (\S+)\.$", failed["reason"])[0])
    assert log.exists()
    log.unlink()

    asked: list[int] = []

    def noting(self: Server, prompts: list[list[int]], *rest: object) -> object:
        asked.append(len(prompts))
        return real(self, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Server, "run", noting)
    assert run(config(), tmp_path / "killed").summary["status"] == "done"
    assert asked == [76]  # only what was missing
    assert (killed / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()


def test_stopping_returns_the_memory_and_one_of_two_is_there(
    base: BaseModel, reference: TransformersEngine, adapter: Callable[[int], LoraFactors]
) -> None:
    engine, other = (
        VllmEngine(model, max_rank=8, cache_gib=0.25, sequences=16, adapters=4, residents="in turn")
        for model in (base, load("tiny-4m"))
    )
    requests = [Request(f"What is {i} + 4 ?", adapter(i % 3)) for i in range(8)]

    def said(by: VllmEngine | TransformersEngine) -> list[tuple[int, ...]]:
        return [row[0].token_ids for row in by.generate(requests, Sampling(16))]

    assert said(engine) == said(reference)
    server = engine._running()
    assert server.child is not None
    pid, guard = server.child.pid, server.child.guard
    folders = [Path(lora.lora_path) for lora in server.loaded.values()]
    held = resident_bytes([pid])
    engine.release()
    assert held > 200e6 and resident_bytes([pid]) == 0 and not alive(pid)
    assert not guard.stands  # nobody is left who would kill that number
    assert server.loaded == {} and not any(folder.exists() for folder in folders)
    assert said(engine) == said(reference)
    assert server.child is not None and server.child.pid != pid

    # An adapter that fails is an error here too, and the process goes on.
    lora_a, lora_b = next(iter(adapter(0).factors.values()))
    stranger = LoraFactors({"model.layers.0.self_attn.nope": (lora_a, lora_b)}, 1.0)
    with pytest.raises(CotuneError, match="take --engine transformers"):
        engine.generate([Request("x", stranger)], Sampling(4))
    assert said(engine) == said(reference)

    # The other model takes its place.
    pid = server.child.pid
    other.generate([Request("x")], Sampling(4))
    beside = other._running().child
    assert beside is not None and children() == [beside.pid] and not alive(pid)

    os.kill(beside.pid, signal.SIGKILL)  # while it waits for work
    with pytest.raises(CotuneError, match=r"by SIGKILL \(on Linux often for want of memory\)\. Finished") as failure:
        other.generate([Request("x")], Sampling(4))
    Path(re.findall(r"log is (\S+)\.$", str(failure.value))[0]).unlink()


def test_the_process_ends_with_ours(tmp_path: Path) -> None:
    """A stand-in for vLLM's process: kill -9 of its owner must reach it, while it starts too."""
    code = """
import multiprocessing, os, signal, time
from cotune.engines.vllm_process import Guard
if __name__ == "__main__":
    guard = Guard()
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(120,))
    process.start()
    print(process.pid, flush=True)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "owner.py").write_text(code)
    done = subprocess.run([sys.executable, str(tmp_path / "owner.py")], stdout=subprocess.PIPE, text=True)
    pid = int(done.stdout)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
