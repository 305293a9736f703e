"""Run folders written by hand, file by file, as record.py lays them out. For tests of what only reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.config import dump, resolve
from cotune.values import digest


def rows_of(scores: Mapping[str, float], **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "prompt": "0" * 16,
            "instruction": "Solve it.",
            "completion": f"The answer is {i}.",
            "prediction": i,
            "reference": i,
            "outcome": "correct" if score == 1 else "wrong",
            "score": score,
            "metrics": {"accuracy": score},
            "prompt_tokens": 10,
            "generated_tokens": 5,
            "note": "",
            **more,
        }
        for i, score in scores.items()
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_run(
    out: Path,
    strategy: str,
    scores: Mapping[str, float] | None = None,
    *,
    name: str | None = None,
    status: str | None = "done",
    reason: str = "",
    task: str = "micro-gsm8k",
    model: str = "tiny",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    cells: Mapping[str, Mapping[str, float]] | None = None,
    comparable: Mapping[str, Any] | None = None,
    tuning: Mapping[str, float] | None = None,
    serving: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """`status` None leaves an unfinished run; `cells` maps the crossed cells, all but the last, to scores by id; `more`
    is laid on the summary of a done run.
    """
    config = resolve({"strategy": strategy, "model": model, "task": task, "seed": seed}, settings or {})
    folder = out / (name or config.run_name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(dump(config), encoding="utf-8")
    facts = {"run": folder.name, "strategy": strategy, "model": model, "task": task, "seed": seed}
    summary: dict[str, Any] = {"status": status, **facts, "reason": reason}
    if status == "done":
        assert scores is not None
        write_rows(folder / "predictions.jsonl", rows_of(scores))
        mean = sum(scores.values()) / len(scores)
        correct = sum(score == 1 for score in scores.values())
        spent = {"calls": 1, "tokens": 0, "flops": 0.0, "seconds": 0.0}
        summary |= {
            "engine": "transformers",
            "headline": "accuracy",
            "n": len(scores),
            "score": mean,
            "metrics": {"accuracy": mean},
            "outcomes": {"correct": correct, "wrong": len(scores) - correct, "truncated": 0, "errored": 0},
            "cells": None,
            "cost": {
                "tuning": spent | dict(tuning or {}),
                "measuring": spent | {"tokens": 15 * len(scores), "flops": 3e7, "seconds": 2.0},
            },
            **({"serving": serving} if serving else {}),
            "peak_memory_bytes": 1000,
            "comparable": {
                "task": task,
                "data_digest": "d0",
                "test_ids_digest": digest(list(scores)),
                "decoding_digest": "c0",
                "grader_version": "1",
                **(comparable or {}),
            },
            "notes": [],
            **(more or {}),
        }
        if cells:
            rows = [row for cell in cells for row in rows_of(cells[cell], cell=cell)]
            write_rows(folder / "crossed.jsonl", rows)
            summary["cells"] = {cell: sum(cells[cell].values()) / len(cells[cell]) for cell in cells}
            last = "/".join(max(settings) for settings in zip(*(cell.split("/") for cell in cells), strict=True))
            summary["cells"][last] = mean
    if status:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder
