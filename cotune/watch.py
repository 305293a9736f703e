"""`cotune watch`: runs of other processes, read from their folders again and again. Writes nothing into them.

A run folder has all of it: events.jsonl what has happened, work/progress.json how far the work at hand is, the lock
whether anybody is at it, summary.json how it ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cotune.compare.escape import clean
from cotune.errors import UsageError
from cotune.output import emit
from cotune.panel import RunPanel, RunsTable, View, duration, title_of
from cotune.progress import describe, plain
from cotune.progress_file import read as read_progress
from cotune.record import FINAL, being_worked_on, read_json, run_folders
from cotune.standing import Standing, folded, number, report, standing
from cotune.values import Event
from cotune.wording import summary_lines

RUNNING, INTERRUPTED, GONE = "running", "interrupted", "gone"
GRACE_S = 5.0  # between two runs of a study nobody holds a lock for a moment


class Followed:
    """One run folder, read on from where the last look ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.config: Mapping[str, Any] = {}
        self.state = RUNNING
        self.summary: Mapping[str, Any] = {}
        self.standing = Standing()
        self._offset = 0
        self._progress_time = 0.0

    def look(self) -> list[dict[str, Any]]:
        """Read what is new; returns those events, with the last "progress" if that is new, in order of time.

        What is torn or damaged is passed over.
        """
        if not self.config and (config := _mapping(self.folder / "config.json")):
            self.config, self.standing = config, standing(config)
        # In this order: a run that ends in between has its summary by the time that its lock is free.
        busy = being_worked_on(self.folder)
        rows = self._events()
        began, progress = read_progress(self.folder)
        if progress and (at := _time(progress)) > self._progress_time:
            self._progress_time = at
            rows = sorted([*rows, progress], key=_time)
        for row in rows:
            self.standing = folded(self.standing, row)
        if began is not None:  # of the process at work, where events may be of one that was interrupted
            self.standing = replace(self.standing, began=began)
        self.judge(busy)
        return rows

    def judge(self, busy: bool) -> None:
        """Set `state` and `summary`; `busy` is whether somebody holds the lock."""
        self.summary = _mapping(self.folder / "summary.json")
        status = str(self.summary.get("status") or "")
        if status in FINAL or (status and not busy):
            self.state = status
        elif busy:  # also one that failed, when somebody is at it again
            self.state = RUNNING
        else:
            self.state = INTERRUPTED if self.folder.is_dir() else GONE

    def _events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        try:
            if path.stat().st_size < self._offset:  # another run was made in this place
                self._offset, self.standing = 0, standing(self.config)
            with path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._offset += len(whole) + len(newline)
        return [row for line in whole.split(b"\n") if (row := _row(line))]

    def view(self, now: float) -> View:
        """What a renderer needs."""
        final = None
        if self.state == "done" and (score := number(self.summary.get("score"))) is not None:
            final = score
        return View(title_of(self.config, self.name), self.state, self.standing, now, final)

    def ending(self) -> str:
        """One clean sentence on a run that nobody is at."""
        if self.state == INTERRUPTED:
            return clean(f"{self.name}: interrupted; the same command continues it.")
        if self.state == GONE:
            return clean(f"{self.name}: its folder was removed.")
        if self.state == "done":
            try:
                return clean(f"{self.name}: done, {summary_lines(self.summary)[0].strip()}")
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                return clean(f"{self.name}: done, but its summary.json is damaged.")
        reason = self.summary.get("reason")
        return clean(f"{self.name}: {self.state}" + (f", {reason}" if reason else ""))

    def json(self, now: float) -> dict[str, Any]:
        """One entry of `--json`."""
        result: dict[str, Any] | None = None
        if self.state == "done":
            n = self.summary.get("n")
            result = {
                "headline": str(self.summary.get("headline")),
                "score": number(self.summary.get("score")),
                "n": n if isinstance(n, int) else None,
            }
        return {
            "run": self.name,
            "folder": str(self.folder),
            "status": self.state,
            "reason": self.summary.get("reason") or None if self.state != RUNNING else None,
            **{key: self.config.get(key) for key in ("strategy", "model", "task", "seed")},
            **report(self.standing, now),
            "result": result,
        }

    @property
    def code(self) -> int:
        """Exit code of a run that nobody is at: 0 done (or no-data), 1 failed or interrupted."""
        return 0 if self.state in FINAL else 1


class Watch:
    """The run at `path`, or those of a folder that are not finished, newest first.

    Raises UsageError when `path` is no run folder and holds none.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.clock = clock
        self.single = (path / "config.json").exists()
        self._known: dict[Path, Followed] = {}
        self._alive_at = -GRACE_S
        self.runs: list[Followed] = []
        self.look()

    def look(self) -> list[tuple[Followed, dict[str, Any]]]:
        """Read what is new in all of them; returns the new events."""
        news = []
        runs = list(self.runs)  # the terminal is redrawn from another thread, so the list is replaced as a whole
        first = not self._known
        try:
            found = run_folders([self.path])
        except UsageError:
            if first:
                raise
            found = []  # removed: what was seen stands
        for folder in dict.fromkeys([*self._known, *found]):
            run = self._known.setdefault(folder, Followed(folder))
            if run.state in FINAL and not self.single:
                continue  # nothing will happen there any more, and there may be hundreds
            run.judge(being_worked_on(folder))
            if run not in runs and (self.single or run.state in (RUNNING, INTERRUPTED)):
                runs.append(run)
            if run in runs:
                news += [(run, row) for row in run.look()]
        self.runs = sorted(runs, key=lambda run: (run.state != RUNNING, -(run.standing.began or 0.0)))
        if self.running:
            self._alive_at = self.clock()
        return [] if first else news

    @property
    def running(self) -> list[Followed]:
        """The runs that somebody is at."""
        return [run for run in self.runs if run.state == RUNNING]

    @property
    def over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return not self.running and (self.single or abs(self.clock() - self._alive_at) >= GRACE_S)

    @property
    def code(self) -> int:
        """Exit code once it is over."""
        return max((run.code for run in self.runs), default=0)

    def endings(self) -> list[str]:
        """A sentence for each run that has ended, or one that there is none."""
        ended = [run.ending() for run in self.runs if run.state != RUNNING]
        if ended or self.runs:
            return ended
        states = [run.state for run in self._known.values()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        return [clean(f"No run in {self.path} is going on or waits to be continued: {counts}.")]

    def picture(self) -> RunPanel | RunsTable:
        """For rich; shows the last look at the moment of drawing."""
        if self.single:
            return RunPanel(lambda: self.runs[0].view(self.clock()))
        return RunsTable(lambda: [replace(run.view(self.clock()), title=run.name) for run in self.runs])

    def json(self) -> dict[str, Any]:
        """The shape of `--once --json`."""
        return {"runs": [run.json(self.clock()) for run in self.runs]}

    def lines(self) -> list[str]:
        """The present state, a clean line each run."""
        now = self.clock()
        return [_line(run, now) if run.state == RUNNING else run.ending() for run in self.runs] or self.endings()


def follow_plain(watch: Watch, interval: float, write: Callable[[str], object]) -> None:
    """The present state, then a line for each event worth one, until it is over or `write` says False: nobody reads."""
    heard = True

    def say(line: str) -> None:
        nonlocal heard
        heard = heard and write(line) is not False

    for line in watch.lines():
        say(line)
    ended = {run.name for run in watch.runs if run.state != RUNNING}
    tellers: dict[str, Callable[[Event], None]] = {}
    while heard and not watch.over:
        time.sleep(interval)
        for run, row in watch.look():
            prefix = "" if watch.single else f"{clean(run.name)}: "
            tell = tellers.setdefault(run.name, plain(prefix, write=say))
            tell(_event(row))
        for run in watch.runs:
            if run.state == RUNNING:
                ended.discard(run.name)
            elif run.name not in ended:
                ended.add(run.name)
                say(run.ending())


def follow_live(watch: Watch, interval: float) -> None:
    """The panel or the table on the terminal of stdout, until it is over; then the endings."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, emoji=False)
    if not watch.over:
        with Live(watch.picture(), console=console, transient=True, refresh_per_second=4):
            while not watch.over:
                time.sleep(interval)
                watch.look()
    for line in watch.endings():
        emit(line)


def _line(run: Followed, now: float) -> str:
    known = run.standing
    work = {"stage": known.stage, "label": known.label or "starting"}
    count = {} if known.done is None else {"done": known.done, "of": known.of}
    parts = [f"{run.name}: running  {describe(Event('progress', work | count))}"]
    if known.score:
        low, high = known.score.interval
        parts.append(f"score {100 * known.score.mean:.1f}% ({100 * low:.1f} to {100 * high:.1f}) on {known.score.n}")
    if left := known.eta(now):
        parts.append(f"{duration(left)} left")
    return clean("  ".join(parts))


def _event(row: Mapping[str, Any]) -> Event:
    """As it was emitted; a row of another version may lack anything."""
    return Event(str(row.get("kind", "?")), {k: v for k, v in row.items() if k not in ("kind", "i", "time", "rate")})


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _time(row: Mapping[str, Any]) -> float:
    return number(row.get("time")) or 0.0


def _mapping(path: Path) -> Mapping[str, Any]:
    try:
        value = read_json(path)
    except (UsageError, OSError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
