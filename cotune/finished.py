"""A finished run: what it was and how it ended, and its completions graded again. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cotune.config import RunConfig, resolve
from cotune.errors import UsageError
from cotune.experiment import scores
from cotune.plans import regraded
from cotune.record import json_line, read_json, read_rows, write_atomic, write_json
from cotune.tasks import task as make_task
from cotune.tasks.base import Task
from cotune.tasks.grading import GRADER_VERSION
from cotune.values import Example


def open_run(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """Config and summary of a run that is done. Raises UsageError otherwise."""
    if not folder.is_dir():
        raise UsageError(f"There is no run folder {str(folder)!r}. Give the folder of a finished run.")
    config, summary = resolve(read_json(folder / "config.json")), read_json(folder / "summary.json")
    if summary["status"] != "done":
        raise UsageError(
            f"{folder} is not done ({summary['status']}: {summary.get('reason', '')}). Run it again first."
        )
    return config, summary


def regrade(folder: Path) -> dict[str, Any]:
    """Grade the saved completions again with the grader of this version; predictions and summary are updated.

    What changed is appended to regrades.jsonl, so nothing is lost. Raises UsageError for a run that is not done.
    """
    config, summary = open_run(folder)
    task = make_task(config.task)
    before = summary["comparable"]["grader_version"]
    changed: list[dict[str, Any]] = []
    files: dict[str, list[dict[str, Any]]] = {}
    for name in ("predictions.jsonl", "crossed.jsonl"):
        rows = read_rows(folder / name)
        files[name] = [_regraded(task, row, changed) for row in rows]
    for name, rows in files.items():
        if rows:
            write_atomic(folder / name, "".join(json_line(row) for row in rows))
    summary |= scores(files["predictions.jsonl"], files["crossed.jsonl"])
    summary["comparable"]["grader_version"] = GRADER_VERSION
    if changed:
        with (folder / "regrades.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_line({"from": before, "to": GRADER_VERSION, "changed": changed}))
    write_json(folder / "summary.json", summary)
    return {
        "run": folder.name,
        "rows": sum(map(len, files.values())),
        "changed": len(changed),
        "score": summary["score"],
        "from": before,
        "to": GRADER_VERSION,
    }


def _regraded(task: Task, row: dict[str, Any], changed: list[dict[str, Any]]) -> dict[str, Any]:
    example = Example(row["id"], "", row["reference"], choices=tuple(row.get("choices", ())))
    if "samples" in row:
        grade, follows = regraded(task, example, row)
    else:
        grade, follows = task.grade(example, row["completion"], row["truncated"]), {}
    new: dict[str, Any] = {
        "prediction": grade.prediction,
        "outcome": grade.outcome.value,
        "score": grade.score,
        "metrics": dict(grade.metrics),
        "note": grade.note,
        **follows,
    }
    old: Mapping[str, Any] = {key: row[key] for key in new}
    if old != new:
        changed.append({"id": row["id"], "cell": row.get("cell"), "before": old, "after": new})
    return {**row, **new}
