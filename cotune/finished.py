"""What one does with a finished run: answer new rows with what it tuned, and grade its completions again.

Knows the run folder and everything that a run is made of; tunes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cotune.bench import Bench, MemoryStore, ignore
from cotune.config import RunConfig, resolve
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.experiment import Listener, base_model, decoding, engine_factory, generator_model, scores
from cotune.ledger import Ledger
from cotune.record import json_line, read_json, read_rows, write_atomic, write_json
from cotune.strategies import load_tuned
from cotune.tasks import task as make_task
from cotune.tasks.base import Task, UnusableRow
from cotune.tasks.grading import GRADER_VERSION
from cotune.tasks.rows import read_file
from cotune.values import Example, Grade


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


def predict(folder: Path, rows: Path, output: Path, listen: Listener = ignore) -> dict[str, Any]:
    """Answer `rows` (the task's official format) with the tuned prompt and adapter of a run, into `output`.

    Rows without their answer fields are answered without a grade. Every input row gives one line of output, unusable
    ones with `error`. Raises CotuneError for a run or a file that cannot be used.
    """
    config, _ = open_run(folder)
    task = make_task(config.task)
    examples, answered, errors = _examples(task, rows)
    model = base_model(config, config.model)
    build = engine_factory(config)
    bench = Bench(model, build(model), build, Ledger(), MemoryStore(), config.seed, listen, "predict")
    tuned = load_tuned(folder / "tuned", generator_model(config, model))
    with bench.ledger.measuring():
        conditionings = tuned.condition(examples, bench)
        done = evaluate(task, examples, conditionings, decoding(config, task), bench, label="predict")
    lines: dict[int, dict[str, Any]] = {number: {"row": number, "error": reason} for number, reason in errors.items()}
    columns = (examples, conditionings, done.completions, done.grades)
    for (number, graded), example, c, completion, grade in zip(answered.items(), *columns, strict=True):
        prediction = {"prediction": grade.prediction, "completion": completion.text, "truncated": completion.truncated}
        line: dict[str, Any] = {"row": number, "id": example.id, **prediction, "instruction": c.prompt.instruction}
        if graded:
            line |= {"outcome": grade.outcome.value, "score": grade.score}
        lines[number] = line
    write_atomic(output, "".join(json_line(lines[number]) for number in sorted(lines)))
    scores = [g.score for g, graded in zip(done.grades, answered.values(), strict=True) if graded]
    return {
        "rows": len(lines),
        "unusable": len(errors),
        "graded": len(scores),
        "score": sum(scores) / len(scores) if scores else None,
        "output": str(output),
    }


def _examples(task: Task, rows: Path) -> tuple[list[Example], dict[int, bool], dict[int, str]]:
    """Examples, which row (from 1) each is from and whether it has its answer, and the reason of unusable rows."""
    if not rows.is_file():
        raise UsageError(f"There is no file {str(rows)!r}. Give rows in the format of {task.name} to --input.")
    asked = [column for column in task.columns if column not in task.unanswered]
    examples: list[Example] = []
    answered: dict[int, bool] = {}
    errors: dict[int, str] = {}
    for number, row in enumerate(read_file(rows, asked), 1):
        known = all(row.get(column) not in (None, "") for column in task.unanswered)
        try:
            example = task.parse(row if known else {**row, **task.unanswered}, f"row-{number}")
        except (UnusableRow, TypeError, ValueError, KeyError, AttributeError, IndexError) as reason:
            errors[number] = str(reason)
            continue
        examples.append(example)
        answered[number] = known
    return examples, answered, errors


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
    grade: Grade = task.grade(example, row["completion"], row["truncated"])
    new: dict[str, Any] = {
        "prediction": grade.prediction,
        "outcome": grade.outcome.value,
        "score": grade.score,
        "metrics": dict(grade.metrics),
        "note": grade.note,
    }
    old: Mapping[str, Any] = {key: row[key] for key in new}
    if old != new:
        changed.append({"id": row["id"], "cell": row.get("cell"), "before": old, "after": new})
    return {**row, **new}
