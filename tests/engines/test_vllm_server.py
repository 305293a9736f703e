"""Where a vLLM lives, how it sleeps, and its known failures in words. Only the last tests try to start one."""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cotune.config import resolve
from cotune.engines import vllm_server
from cotune.engines.base import Request, Sampling
from cotune.engines.vllm_engine import VllmEngine
from cotune.engines.vllm_process import how_it_ended, interruptible, logged_error, output_to
from cotune.engines.vllm_server import Residence, Server, explanation
from cotune.errors import CotuneError, UsageError
from cotune.experiment import run
from cotune.models.base import BaseModel
from cotune.models.lora import LoraFactors
from cotune.training import Trainer

GPU, CPU = True, False


@pytest.mark.parametrize(
    ("on_gpu", "gpus", "own", "between", "residents", "chosen"),
    [
        (CPU, 1, None, None, "both", (False, "keep", False)),
        (CPU, 1, None, "stop", "both", (True, "stop", False)),
        (CPU, 1, None, None, "in turn", (True, "stop", True)),
        (CPU, 2, None, None, "both", (True, "keep", False)),
        (GPU, 1, None, None, "both", (True, "sleep", False)),
        (GPU, 1, None, None, "in turn", (True, "sleep", True)),
        (GPU, 1, False, None, "both", (False, "sleep", False)),
        (GPU, 1, False, "keep", "both", (False, "keep", False)),
    ],
)
def test_what_is_not_said_is_chosen(
    on_gpu: bool, gpus: int, own: bool | None, between: Any, residents: Any, chosen: tuple[bool, Any, bool]
) -> None:
    assert Residence.chosen(on_gpu, gpus, own, between, residents) == Residence(*chosen)


@pytest.mark.parametrize(
    ("on_gpu", "gpus", "own", "between", "residents", "refused"),
    [
        (CPU, 1, None, "sleep", "both", "sleeps on GPUs only"),
        (CPU, 1, False, "stop", "both", "needs vllm.own_process"),
        (CPU, 1, False, None, "in turn", "needs vllm.own_process"),
        (GPU, 1, None, "keep", "in turn", "'sleep' .* or 'stop', not 'keep'"),
        (GPU, 2, False, None, "both", "tensor_parallel above 1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    on_gpu: bool, gpus: int, own: bool | None, between: Any, residents: Any, refused: str
) -> None:
    with pytest.raises(UsageError, match=refused):
        Residence.chosen(on_gpu, gpus, own, between, residents)


class Recorded:
    """A `vllm.LLM` that notes what is asked of it."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls, self.llm_engine = name, calls, self

    def __getattr__(self, called: str) -> Any:
        def note(*args: Any, **settings: Any) -> list[Any]:
            self.calls.append(f"{self.name} {called}")
            return []

        return note


@pytest.fixture
def sleepers(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Server], list[str]]:
    """Two servers of which one is awake at a time, as on a GPU. (The canary needs a real one.)"""
    calls: list[str] = []
    servers = {n: Server(base, {}, Residence(own_process=False, between="sleep", in_turn=True)) for n in "GM"}

    def start(self: Server) -> None:
        name = next(n for n, server in servers.items() if server is self)
        calls.append(f"{name} start")
        self._llm = Recorded(name, calls)

    monkeypatch.setattr(Server, "_start", start)
    monkeypatch.setattr(Server, "_check", lambda *_: None)
    monkeypatch.setattr(vllm_server, "_SERVERS", {(n,): server for n, server in servers.items()})
    return servers, calls


def test_a_sleeper_wakes_with_an_empty_cache_and_loads_its_adapters_anew(
    sleepers: tuple[dict[str, Server], list[str]], adapter: Callable[[int], LoraFactors]
) -> None:
    servers, calls = sleepers
    one = adapter(0)
    for _ in range(2):
        servers["M"].load({one.digest: one}, 4, [1])
        servers["M"].run([[1]], [None], [servers["M"].loaded[one.digest]])
        vllm_server.put_all_away()
        vllm_server.put_all_away()  # nothing is left to do
        assert servers["M"].loaded == {}
    asleep = ["M remove_lora", "M sleep"]
    awake = ["M wake_up", "M reset_prefix_cache"]
    work = ["M add_lora", "M generate"]
    assert calls == ["M start", *work, *asleep, *awake, *work, *asleep]


def test_one_of_two_is_awake(sleepers: tuple[dict[str, Server], list[str]]) -> None:
    servers, calls = sleepers
    for name in "GMMG":
        servers[name].run([[1]], [None], [None])
    woken = ["G wake_up", "G reset_prefix_cache"]
    generated = "generate"
    assert calls == [
        *("G start", f"G {generated}", "G sleep", "M start", f"M {generated}", f"M {generated}", "M sleep"),
        *(*woken, f"G {generated}"),
    ]


def test_a_joint_run_with_two_models_has_one_vllm_at_a_time_and_none_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up: set[str] = set()
    seen: list[set[str]] = []
    trained = []

    def start(self: Server) -> None:
        def generate(inputs: list[Any], *_: Any, **settings: Any) -> list[Any]:
            seen.append(set(up))
            said = types.SimpleNamespace(finish_reason="stop", token_ids=[5, 6], logprobs=None)
            return [types.SimpleNamespace(outputs=[said]) for _ in inputs]

        up.add(self._model)
        self.child = types.SimpleNamespace(stop=lambda: up.remove(self._model))  # type: ignore[assignment]
        self._llm = Recorded(self._model, [])
        self._llm.generate = generate

    def update(self: Trainer[Any], batch: Any) -> Any:
        trained.append(set(up))
        return real(self, batch)

    real = Trainer._update
    monkeypatch.setattr(Trainer, "_update", update)
    monkeypatch.setattr(Server, "_start", start)
    monkeypatch.setattr(Server, "_check", lambda *_: None)
    monkeypatch.setattr(vllm_server, "_SERVERS", {})
    small = {"limit_train": 4, "limit_val": 2, "limit_test": 2, "decoding": {"max_new_tokens": 8}}
    joint = {"epochs": 1, "rollout_examples": 2, "rollouts": 1, "max_prompt_tokens": 8}
    names = {"strategy": "joint", "model": "tiny", "generator": "tiny-4m", "task": "micro-gsm8k", "engine": "vllm"}
    run(resolve(names, small, {"joint": joint, "vllm": {"residents": "in turn"}}), tmp_path)
    assert {"tiny"} in seen and {"tiny-4m"} in seen and all(len(there) == 1 for there in seen)
    assert trained and all(not there for there in trained)


@pytest.mark.parametrize(
    ("told", "helps"),
    [
        ("libcuda.so.1: cannot open shared object file: No such file or directory", "never both"),
        ("vllm/_C.abi3.so: undefined symbol: _ZN3c10", "never both"),
        ("Failed to infer device type, please set the environment variable", "never both"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "Lower vllm.memory_fraction"),
        ("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory", "vllm.cache_gib"),
        ("To serve at least one request with the model's max seq len (512), 1 GiB KV cache is needed", "max_length"),
        ("Free memory on device (10/80 GiB) is less than desired GPU memory utilization", "vllm.memory_fraction"),
        ("LoRA rank 64 is greater than max_lora_rank 16.", "Lower the rank"),
        ("Expected target modules in ['q_proj'] but received ['nope']", "other target_modules"),
        ("something new", "Take --engine transformers"),
    ],
)
def test_known_failures_name_their_fix(told: str, helps: str) -> None:
    raised = explanation("tiny", RuntimeError(told))
    assert helps in raised and told.split("\n")[0].rstrip(".") in raised
    own = explanation("tiny", RuntimeError("Engine core initialization failed. See root cause above."), told)
    assert helps in own and "See root cause" not in own


def test_a_build_for_another_machine_is_one_sentence(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "vllm", Broken("vllm"))
    with pytest.raises(CotuneError, match=r"vLLM failed with tiny: libcudart.* not built for this machine"):
        Server(base, {}, Residence(own_process=False, between="keep", in_turn=False))._awake()


def test_how_a_process_ended() -> None:
    assert how_it_ended(-9) == "was ended by SIGKILL (on Linux often for want of memory)"
    assert how_it_ended(-11) == "was ended by SIGSEGV"
    assert how_it_ended(1) == "ended with exit code 1"
    assert how_it_ended(None) == "ended"


def test_the_cause_is_the_last_error_that_was_not_dealt_with(tmp_path: Path) -> None:
    log = tmp_path / "log"
    prefix = "(EngineCore pid=12) ERROR 11-25 19:10:10 [core.py:1242] "
    log.write_text(
        f"{prefix}Traceback (most recent call last):\n{prefix}ValueError: the first\n"
        f"{prefix}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\nW1125 Triton is not available\n"
    )
    assert logged_error(log) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert logged_error(log, log.stat().st_size) == ""


def test_what_a_new_process_prints_goes_to_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    with output_to(log):
        os.system("echo out; echo err >&2")
    os.system("echo after")
    assert log.read_text() == "before\nout\nerr\n"
    assert capfd.readouterr().out == "after\n"


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """A job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_ctrl_c_is_not_lost_in_a_start() -> None:
    """vLLM drops the KeyboardInterrupt that comes while it waits for its new process."""
    before = signal.getsignal(signal.SIGINT)
    went_on = False
    with pytest.raises(KeyboardInterrupt), interruptible():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        went_on = True
    assert not went_on and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("gib", "told"),
    [
        (1e-4, r"No available memory for the cache.*or raise .*vllm\.cache_gib"),
        (1e-3, r"at least one request.*Set vllm\.max_length"),
        (1e6, r"Available memory.*Lower .*vllm\.cache_gib"),
    ],
)
def test_a_cache_that_is_too_small_or_too_large_names_the_setting(base: BaseModel, gib: float, told: str) -> None:
    engine = VllmEngine(base, max_rank=None, cache_gib=gib)
    with pytest.raises(CotuneError, match=rf"vLLM failed with tiny: .*{told}"):
        engine.generate([Request("x")], Sampling(4))


def test_a_request_for_later_samples_has_the_seeds_of_these(
    random_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=types.SimpleNamespace))
    engine, sampling = VllmEngine.__new__(VllmEngine), Sampling(4, temperature=1.0, n=4)
    engine.base = random_base
    seeds = [engine._parameters(sampling, Request("x"), s).seed for s in range(4)]
    assert [engine._parameters(sampling, Request("x", first=2), s).seed for s in range(2)] == seeds[2:]
    assert len({*seeds}) == 4
