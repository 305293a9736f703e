"""Trackers by name, imported on demand: a copy of a run's numbers for the tool in which somebody watches all runs.

Off unless asked for, and no part of a run: they are told what events.jsonl and summary.json hold, change neither, and
one that fails is off from then on. The files stay the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune.plugins import resolve
from cotune.record import FINAL, read_json, read_rows, write_json
from cotune.trackers.base import Tracked, Tracker, flat, numbers, settings

TRACKERS: dict[str, str] = {
    "mlflow": "cotune.trackers.mlflow_tracker:MlflowTracker",
    "wandb": "cotune.trackers.wandb_tracker:WandbTracker",
    "tensorboard": "cotune.trackers.tensorboard_tracker:TensorboardTracker",
}
IDS = "trackers.json"  # in the run folder: what each tracker calls this run
Row = Mapping[str, Any]


class Trackers:
    """All trackers of one run. They begin with its first event, so a command that was mistyped leaves nothing in them.

    Each process that works on the run tells them every row of events.jsonl, from the first on: what a killed one could
    not send is there again. `warn` is told, once, of each that fails; nothing is raised.
    """

    def __init__(self, names: Sequence[str], run: Path, config: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self._run, self._config, self._warn = run, config, warn
        self._waiting = list(dict.fromkeys(names))
        self._on: dict[str, Tracker] = {}

    def row(self, row: Row) -> None:
        """One that has just been written to events.jsonl."""
        if self._waiting:
            self._begin()
        else:
            self._tell(lambda tracker: _log(tracker, row))

    def end(self, summary: Row) -> None:
        """`summary` as in summary.json; of a run that did not get so far only its status."""
        if self._waiting and summary["status"] in FINAL:  # it went on without a new event
            self._begin()
        self._tell(lambda tracker: tracker.end(str(summary["status"]), results(summary)))
        self._on = {}

    def _begin(self) -> None:
        waiting, self._waiting = self._waiting, []
        for name in waiting:
            with self._guarded(name):
                ids = read_json(self._run / IDS) if (self._run / IDS).exists() else {}
                tracked = Tracked(self._run.resolve(), settings(self._config), ids.get(name))
                tracker = resolve("trackers", TRACKERS, name)(tracked)
                self._on[name] = tracker
                write_json(self._run / IDS, ids | {name: tracker.id})
                for row in read_rows(self._run / "events.jsonl"):
                    _log(tracker, row)

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._on.items()):
            with self._guarded(name):
                what(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._on.pop(name, None)
            fix = f" Install it: pip install 'cotune[{name}]'." if isinstance(error, ImportError) else ""
            said = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
            self._warn(f"Tracker {name} is off, the run goes on without it. {said}.{fix}")


def _log(tracker: Tracker, row: Row) -> None:
    if found := numbers(row):
        tracker.log(found, int(row["i"]), int(row.get("tuning_tokens", 0)), float(row["time"]))


def results(summary: Row) -> dict[str, float]:
    """The numbers of a summary, like "final/score" and "final/cost/tuning/tokens"."""
    return flat({key: value for key, value in summary.items() if key != "seed"}, "final/")
