"""vLLM in a process of its own: what it prints, how it ended, and that it ends with us.

Seen with vLLM 0.32: when its process is killed, the caller waits for the answer for ever; when the caller is killed,
the process lives on with all its memory. Knows nothing of models or adapters.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_PREFIX = re.compile(r"^\([^)]*\) [A-Z]+ \S+ \S+ \[[^\]]*\] ?")  # of a line that vLLM logs
_CAUSE = re.compile(r"^[\w.]*(Error|Exception): |^Fatal Python error|^terminate called|^\s*what\(\):")
_SECONDS = 10.0  # for a process to end


class Guard:
    """When ours ends, however that happens, ends the process that was started while it stood, ready or not."""

    def __init__(self) -> None:
        # A shell that is told numbers, waits for the end of its input, which comes with ours, and ends that process.
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", 'while read -r line; do pid=$line; done; [ -n "$pid" ] && kill -9 "$pid"'],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )
        self._before = {child.pid for child in multiprocessing.active_children()}
        self._over = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        """Until there is a new process: tell the shell. (Who starts it tells nobody before it is ready.)"""
        while not self._over.wait(0.05):
            new = [child.pid for child in multiprocessing.active_children() if child.pid not in self._before]
            if new:
                assert self._shell.stdin is not None
                with suppress(OSError, ValueError):  # it was left meanwhile
                    self._shell.stdin.write(f"{new[0]}\n")
                    self._shell.stdin.flush()
                return

    @property
    def stands(self) -> bool:
        return self._shell.poll() is None

    def leave(self) -> None:
        self._over.set()
        self._shell.kill()
        self._shell.wait()
        if self._shell.stdin is not None:
            self._shell.stdin.close()


class Child:
    """The process of one `vllm.LLM`, whose output goes to `log`. `guard` was there before it."""

    def __init__(self, llm: Any, log: Path, guard: Guard) -> None:
        self.log = log
        self.guard = guard
        self._core = llm.llm_engine.engine_core
        self._process = self._core.resources.engine_manager.processes[0]
        self._ending = False
        self._read = 0  # bytes of the log whose errors are dealt with
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def alive(self) -> bool:
        return bool(self._process.is_alive()) and not self._core.resources.engine_dead

    def _watch(self) -> None:
        """When the process dies: raise in whoever waits for its answer."""
        from vllm.v1.engine.exceptions import EngineDeadError

        wait([self._process.sentinel])
        if self._ending:
            return
        self._core.resources.engine_dead = True  # first, so that no call comes to wait behind this
        self._core.outputs_queue.put_nowait(EngineDeadError())
        for answer in list(self._core.utility_results.values()):
            if not answer.done():
                answer.set_exception(EngineDeadError())

    def stop(self) -> None:
        """End the process and wait for it, so that its memory is free."""
        self._ending = True
        self._core.shutdown(timeout=_SECONDS)
        self._process.join(_SECONDS)
        self.guard.leave()

    def ending(self) -> tuple[str, str]:
        """How a dead process ended, and the error in its log ("" where there is none)."""
        self._process.join(_SECONDS)
        # vLLM's own thread waits for it too; where that one is told first, join ends before the exit code is known.
        until = time.monotonic() + 1
        while self._process.exitcode is None and time.monotonic() < until:
            time.sleep(0.01)
        return how_it_ended(self._process.exitcode), logged_error(self.log, self._read)

    def survived(self) -> None:
        """It raised and goes on: what it has logged of that is not why it may die later."""
        self._read = self.log.stat().st_size

    def keep_log(self) -> Path:
        """Copy the log to where it outlives this process."""
        handle, name = tempfile.mkstemp(prefix="cotune-vllm-", suffix=".log")
        os.close(handle)
        return Path(shutil.copyfile(self.log, name))


def how_it_ended(exit_code: int | None) -> str:
    """`exit_code` as multiprocessing gives it: negative for a signal, None when it could not be read."""
    if exit_code is None:
        return "ended"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    why = " (on Linux often for want of memory)" if name == "SIGKILL" else ""
    return f"was ended by {name}{why}"


def logged_error(log: Path, start: int = 0) -> str:
    """The last error that the log tells from byte `start` on, without vLLM's prefix; "" when it tells none."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [_PREFIX.sub("", line).strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if _CAUSE.search(line)), "")


class _CtrlC(BaseException):
    """A KeyboardInterrupt under another name."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends what is inside: vLLM, waiting for its new process, drops a KeyboardInterrupt and waits on."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # it kills, or is somebody else's
        yield
        return

    def raise_it(*_: Any) -> None:
        raise _CtrlC

    try:
        signal.signal(signal.SIGINT, raise_it)
    except ValueError:  # not the main thread, which alone is interrupted
        yield
        return
    try:
        yield
    except _CtrlC:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Descriptors 1 and 2, which a new process inherits, lead to the end of `log`. (Ours do too, meanwhile.)"""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        with log.open("ab") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, ours in zip((1, 2), kept, strict=True):
            os.dup2(ours, descriptor)
            os.close(ours)
