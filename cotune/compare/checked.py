"""What the checks of run folders found, row by row: the `checks` and `noise` of the summaries, worst over seeds.

Knows nothing of how it was found (checks.py, noise.py). What a run does not have is None, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cotune.compare.runs import Run

SHARE, COUNT = "share", "count"
# Name in JSON and CSV -> heading, unit, and the most that is not worth a word.
COLUMNS: dict[str, tuple[str, str, float]] = {
    "check_truncated": ("cut off %", SHARE, 0),
    "check_unread": ("no answer found %", SHARE, 0),
    "check_near_duplicates": ("near duplicates", COUNT, 0),
    "check_prompts_copying_val": ("prompts with val text", COUNT, 0),
    "check_prompts_copying_test": ("prompts with test text", COUNT, 0),
    "check_dead_adapters": ("dead adapters %", SHARE, 0),
    "check_times_measured": ("times measured", COUNT, 1),
    "check_grades_differ": ("grades that differ again %", SHARE, 0),
}


def worst(runs: Sequence[Run]) -> dict[str, float | None]:
    """Each column's largest value among the runs of a row; None where one of them does not have it."""
    return {name: _worst(runs, read) for name, read in _READ.items()}


def _worst(runs: Sequence[Run], read: Callable[[Mapping[str, Any], Run], Any]) -> float | None:
    try:
        return max(float(read(run.summary["checks"], run)) for run in runs)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _near_duplicates(checks: Mapping[str, Any], run: Run) -> int:
    """Measured examples that are near to one of another split, of the split with the most."""
    measured = f"{run.config.get('measured', 'test')} in "
    return max(int(n) for where, n in checks["near_duplicates"].items() if where.startswith(measured))


def _grades_differ(_: Mapping[str, Any], run: Run) -> float:
    noise = run.summary["noise"]
    return float(noise["grades_differ"] if "grades_differ" in noise else {True: 0.0}[noise["promised"]])


_READ: dict[str, Callable[[Mapping[str, Any], Run], Any]] = {
    "check_truncated": lambda checks, _: checks["truncated"],
    "check_unread": lambda checks, _: checks["unread"],
    "check_near_duplicates": _near_duplicates,
    "check_prompts_copying_val": lambda checks, _: checks["prompts_copying"]["val"],
    "check_prompts_copying_test": lambda checks, _: checks["prompts_copying"]["test"],
    "check_dead_adapters": lambda checks, _: checks["adapters"]["without_effect"] / checks["adapters"]["examples"],
    "check_times_measured": lambda checks, _: checks["times_measured"],
    "check_grades_differ": _grades_differ,
}


def table(
    runs: Mapping[str, Sequence[Run]], whole: bool = False
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows of cells, of the runs by row: the columns in which one has something worth a word, `whole`: all
    that are known. A row of which nothing is known has empty cells; no rows at all when there is nothing to show.
    """
    rows = [(label, worst(some)) for label, some in runs.items()]
    columns = [
        name
        for name, (_, _, least) in COLUMNS.items()
        if any((value := found[name]) is not None and (whole or value > least) for _, found in rows)
    ]
    if not columns:
        return (), ()
    header = ("checks, worst of the runs", *(COLUMNS[name][0] for name in columns))
    return header, tuple((label, *(_cell(name, found[name]) for name in columns)) for label, found in rows)


def is_known(runs: Mapping[str, Sequence[Run]]) -> bool:
    """Whether any row has been checked."""
    return any(value is not None for some in runs.values() for value in worst(some).values())


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if COLUMNS[name][1] == SHARE else f"{value:.0f}"
