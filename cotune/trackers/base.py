"""What a tracker is, and which numbers it is given. Knows no tool."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_NOT_NUMBERS = ("i", "time", "stage", "kind", "tuning_tokens")  # where in the run a row is


@dataclass(frozen=True)
class Tracked:
    """One run. `folder` is its run folder, `settings` its config in dotted names, `known` what the tracker called this
    run when an earlier process worked on it (None: never seen).
    """

    folder: Path
    settings: Mapping[str, Any]
    known: str | None


class Tracker(Protocol):
    """One run in one tool. Made by `Class(tracked)`, which goes on with `tracked.known` rather than make a second one.

    Anything that it raises turns it off and is told; no method may end the process or wait for a person.
    """

    id: str

    def log(self, numbers: Mapping[str, float], i: int, tokens: int, time: float) -> None:
        """The numbers of row `i` of events.jsonl, at so many tuning tokens and seconds since the epoch.

        The axis of every curve is the tuning tokens. Rows that an earlier process logged come again.
        """
        ...

    def end(self, status: str, results: Mapping[str, float]) -> None:
        """`status` is done, no-data, failed or interrupted; nothing is logged after it."""
        ...


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event by "stage/kind/name", like {"tune/step/loss": 1.2}; texts and flags are left out."""
    where = "/".join(str(row[key]) for key in ("stage", "kind") if row.get(key))
    return flat({key: value for key, value in row.items() if key not in _NOT_NUMBERS}, f"{where}/")


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested mappings, by their keys joined with "/", of signs that every tool takes in a name."""
    found: dict[str, float] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= flat(inner, f"{prefix}{key}/")
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            found[re.sub(r"[^\w\-./]", "_", f"{prefix}{key}")] = float(inner)
    return found


def settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config, as in config.json, by dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
