"""MATH equality in a process of its own, which is killed at a time limit.

An answer can be a tower of powers or crash the parser; that costs one comparison here, never the run. One child
per process is started when first needed and lives on; it speaks JSON lines over its pipes, is not a fork (so it
never holds the parent's torch), and ends with its parent. What is equal is decided in equality.py, not here.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Lock

from cotune.tasks.notation import number

MAX_CHARACTERS = 2000  # of one answer; the longest reference has 180
LIMIT_S = 2.0  # of processor time for one comparison, so that a busy machine changes no grade
WALL_FACTOR = 5  # and at most this many times as long on the clock
START_S = 60.0  # importing sympy on a busy machine
MEMORY_BYTES = 2 * 2**30  # of address space, for the child


class GraderFailed(Exception):
    """A comparison that could not be made: too long an answer, too slow, or the child died. Costs one grade."""


class Grader:
    """Holds the child. Safe to use from several threads; a forked process starts its own child."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._lock = Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def equal(self, reference: str, prediction: str) -> bool:
        """Whether the two answers are equal. Raises GraderFailed."""
        with self._lock:
            if self._child is None or self._owner != os.getpid():
                self._start()
            try:
                answer = self._ask({"reference": reference, "prediction": prediction})
            except GraderFailed:
                self.close()
                raise
        if "error" in answer:
            raise GraderFailed(f"the comparison failed ({answer['error']})")
        return bool(answer["equal"])

    def close(self) -> None:
        """Kill the child, if this process has one; the next comparison starts another."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.communicate()

    def _start(self) -> None:
        package = Path(__file__).parents[2]
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "cotune.tasks.grader", str(self.limit_s)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path}, bufsize=0,
        )  # fmt: skip
        self._owner = os.getpid()
        try:
            self._read(START_S)
        except GraderFailed:
            self.close()
            raise

    def _ask(self, question: dict[str, str]) -> dict[str, object]:
        assert self._child is not None and self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(question).encode() + b"\n")
        except OSError:
            raise GraderFailed("the grader process died") from None
        return self._read(WALL_FACTOR * self.limit_s)

    def _read(self, limit_s: float) -> dict[str, object]:
        assert self._child is not None and self._child.stdout is not None
        stream, line, until = self._child.stdout, b"", time.monotonic() + limit_s
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stream], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise GraderFailed(f"the comparison took longer than {limit_s:g} s on the clock")
            chunk = os.read(stream.fileno(), 65536)
            if not chunk:
                if self._child.wait() == -signal.SIGPROF:
                    raise GraderFailed(f"the comparison took longer than {self.limit_s:g} s")
                raise GraderFailed("the grader process died during the comparison")
            line += chunk
        answer: dict[str, object] = json.loads(line)
        return answer


_GRADER = Grader()
atexit.register(_GRADER.close)


def compare(reference: str, prediction: str) -> bool:
    """Whether two MATH answers are equal; the easy cases without the child. Raises GraderFailed."""
    if reference.strip() == prediction.strip():
        return True
    if len(prediction) > MAX_CHARACTERS:
        raise GraderFailed(f"the answer is longer than {MAX_CHARACTERS} characters")
    left, right = number(reference), number(prediction)
    if left is not None and right is not None:
        return left == right
    return _GRADER.equal(reference, prediction)


def _serve(limit_s: float) -> None:
    """The child: one JSON question a line in, one JSON answer a line out, until the parent goes away."""
    import logging
    import resource

    from cotune.tasks.equality import equal, warm_up

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warm_up()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # ends this process, also when the parent is gone
        try:
            answer: dict[str, object] = {"equal": equal(**json.loads(line))}
        except Exception as failure:
            answer = {"error": type(failure).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
