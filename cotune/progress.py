"""What a run is doing, on stderr: a live panel on a terminal, plain lines with no control codes elsewhere.

A listener of Events. It never touches stdout, and never the run: a closed stderr is not the run's problem.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cotune.compare.escape import clean, short
from cotune.standing import folded, standing
from cotune.values import Event

Listener = Callable[[Event], None]

SECONDS_BETWEEN_LINES = 10.0
_FREQUENT = ("progress", "step")  # these come many times a second; the others are worth a line each
_LINE = 160


@contextmanager
def listener(quiet: bool = False, prefix: str = "", config: Mapping[str, Any] | None = None) -> Iterator[Listener]:
    """The right listener for this stderr. `quiet` keeps only warnings. `prefix` starts every plain line.

    `config` is the run's, as in config.json: its title and its budget.
    """
    if quiet:
        yield _only_warnings(prefix)
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _live(config or {}) as listen:
            yield listen
    else:
        yield plain(prefix)


def describe(event: Event) -> str:
    """One clean line for any event: its stage, its kind and its plain values."""
    data: Mapping[str, Any] = event.data
    apart = ("stage", "label", "done", "of", "message", "text", "tuning_tokens", "tuning_flops", "tuning_seconds")
    shown = {k: v for k, v in data.items() if k not in apart and v not in (None, {}, "")}
    parts = [str(data.get("stage") or ""), str(data.get("label") or event.kind)]
    if "done" in data:
        parts.append(f"{data['done']}/{data.get('of', '?')}")
    if "message" in data:
        parts.append(str(data["message"]))
    parts += [f"{key} {_value(value)}" for key, value in shown.items()]
    parts.append(str(data.get("text") or ""))  # a prompt: long, so it is what is cut off
    line = "  ".join(part for part in parts if part)
    return clean(line) if "message" in data else short(line, _LINE)  # a message has its fix at the end


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (BrokenPipeError, ValueError):  # nobody listens any more
        return


def _only_warnings(prefix: str) -> Listener:
    def listen(event: Event) -> None:
        if event.kind == "warning":
            _write(prefix + describe(event))

    return listen


def plain(
    prefix: str, clock: Callable[[], float] = time.monotonic, write: Callable[[str], object] = _write
) -> Listener:
    """A line for each event, but of those that come many times a second only one in SECONDS_BETWEEN_LINES."""
    last = -SECONDS_BETWEEN_LINES

    def listen(event: Event) -> None:
        nonlocal last
        finished = event.kind == "progress" and event.data.get("done") == event.data.get("of")
        if event.kind in _FREQUENT and not finished and clock() - last < SECONDS_BETWEEN_LINES:
            return
        if event.kind in _FREQUENT:
            last = clock()
        write(prefix + describe(event))

    return listen


@contextmanager
def _live(config: Mapping[str, Any]) -> Iterator[Listener]:
    """The panel stays below; what is worth a line scrolls by above it."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from cotune.panel import RunPanel, View, title_of

    now = folded(standing(config), {"time": time.time()})
    title = title_of(config)
    console = Console(stderr=True, highlight=False, emoji=False)
    panel = RunPanel(lambda: View(title, "running", now, time.time()))
    with Live(panel, console=console, transient=True, refresh_per_second=4) as live:

        def listen(event: Event) -> None:
            nonlocal now
            now = folded(now, {"kind": event.kind, "time": time.time(), **event.data})
            if event.kind not in _FREQUENT:
                whole = "message" in event.data  # its fix is at the end
                live.console.print(Text(describe(event)), no_wrap=not whole, overflow=None if whole else "ellipsis")

        yield listen
