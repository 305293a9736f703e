"""work/progress.json: how far a run is, for who watches it from outside (`cotune watch`).

events.jsonl keeps what is worth keeping; this small file is replaced about once a second and goes with work/. Nothing
depends on it: when it cannot be written, the run goes on without.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cotune.record import write_atomic
from cotune.standing import Standing, folded
from cotune.values import Event

SECONDS_BETWEEN_WRITES = 1.0


class ProgressFile:
    """A listener of one run's events. `clock` gives seconds since the epoch."""

    def __init__(self, run: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = _path(run)
        self._clock = clock
        self._began = clock()
        self._written = self._began - SECONDS_BETWEEN_WRITES
        self._standing = Standing()
        self._last: dict[str, Any] | None = None
        with suppress(OSError):
            self._path.unlink(missing_ok=True)  # of a process that was killed

    def __call__(self, event: Event) -> None:
        now = self._clock()
        if event.kind == "progress":
            row = {"kind": event.kind, "time": round(now, 3), **event.data}
            self._standing = folded(self._standing, row)
            self._last = row | {"rate": self._standing.rate}
        if abs(now - self._written) < SECONDS_BETWEEN_WRITES:  # abs: a clock that is set back must not end this
            return
        self._written = now
        with suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            write_atomic(self._path, json.dumps({"began": self._began, "progress": self._last}) + "\n")


def read(run: Path) -> tuple[float | None, dict[str, Any] | None]:
    """When the process at work began, and its last "progress" event with `time` and `rate`; None where not known."""
    try:
        found = json.loads(_path(run).read_text(encoding="utf-8"))
        began, progress = found["began"], found["progress"]
        return float(began), dict(progress) if isinstance(progress, Mapping) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None, None


def _path(run: Path) -> Path:
    return run / "work" / "progress.json"
