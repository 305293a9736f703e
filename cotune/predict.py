"""New rows answered with what a run has tuned, from its folder or its bundle: a line of output for each.

What is answered is kept beside the output until all is, so that the same command goes on after an interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cotune.bench import MemoryStore, ignore
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.experiment import Listener
from cotune.opened import Opened, Place, open_any
from cotune.record import json_line, read_rows, write_atomic
from cotune.tasks.base import Task, UnusableRow
from cotune.tasks.rows import Row, read_file, read_lines
from cotune.values import Example

STANDARD = "-"  # stdin, or stdout


class Journal(MemoryStore):
    """Generations in a file, looked up by their content: another run, other rows or other settings find nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        if rows := read_rows(path):
            write_atomic(path, "".join(map(json_line, rows)))  # without a line that a kill has torn
        for row in rows:
            super().remember(row["key"], row["value"])

    def remember(self, key: str, value: Any) -> None:
        super().remember(key, value)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json_line({"key": key, "value": value}))


def predict(
    folder: Path, rows: str, output: str, listen: Listener = ignore, place: Place | None = None, static: bool = False
) -> tuple[dict[str, Any], str]:
    """Answer `rows` (the task's official format) into `output`: the report, and the lines where `output` is "-".

    Rows without their answer fields are answered without a grade. Every input row gives one line of output, unusable
    ones with `error`. Raises CotuneError for a run or a file that cannot be used, and for an output that is there.
    """
    if rows != STANDARD and not Path(rows).is_file():
        raise UsageError(f"There is no file {rows!r}. Give --input rows in the task's own format, or - for stdin.")
    target = Path(output)
    if output != STANDARD and target.exists():
        raise UsageError(f"{output} is there already and is not overwritten. Give --output another file.")
    if output != STANDARD and not target.parent.is_dir():
        raise UsageError(f"{output} cannot be written. Give --output a file in a folder that exists.")
    opened = open_any(folder, place, static)
    examples, answered, errors = _examples(opened.task, rows)
    if output == STANDARD:
        lines, report = _answered(opened, examples, answered, errors, listen, MemoryStore())
        return report, lines
    kept = target.with_name(target.name + ".journal")
    lines, report = _answered(opened, examples, answered, errors, listen, Journal(kept))
    write_atomic(target, lines)
    kept.unlink(missing_ok=True)
    return report | {"output": output}, ""


def _answered(
    opened: Opened,
    examples: list[Example],
    answered: dict[int, bool],
    errors: dict[int, str],
    listen: Listener,
    store: MemoryStore,
) -> tuple[str, dict[str, Any]]:
    bench = opened.bench("predict", listen, store)
    with bench.ledger.measuring():
        conditionings = opened.tuned.condition(examples, bench)
        done = evaluate(opened.task, examples, conditionings, opened.sampling, bench, label="predict")
    lines: dict[int, dict[str, Any]] = {number: {"row": number, "error": reason} for number, reason in errors.items()}
    columns = (examples, conditionings, done.completions, done.grades, done.samples)
    for (number, graded), example, c, completion, grade, samples in zip(answered.items(), *columns, strict=True):
        prediction = {"prediction": grade.prediction, "completion": completion.text, "truncated": completion.truncated}
        line: dict[str, Any] = {"row": number, "id": example.id, **prediction, "instruction": c.prompt.instruction}
        if samples:
            line |= {"samples": len(samples.votes), "agreement": samples.agreement}
            line |= {"bin": samples.told.bin} if samples.told else {}
        if graded:
            line |= {"outcome": grade.outcome.value, "score": grade.score}
        lines[number] = line
    scores = [g.score for g, graded in zip(done.grades, answered.values(), strict=True) if graded]
    report = {
        "rows": len(lines),
        "unusable": len(errors),
        "graded": len(scores),
        "score": sum(scores) / len(scores) if scores else None,
    }
    return "".join(json_line(lines[number]) for number in sorted(lines)), report


def _examples(task: Task, rows: str) -> tuple[list[Example], dict[int, bool], dict[int, str]]:
    """Examples, which row (from 1) each is from and whether it has its answer, and the reason of unusable rows."""
    examples: list[Example] = []
    answered: dict[int, bool] = {}
    errors: dict[int, str] = {}
    for number, row in enumerate(_read(task, rows), 1):
        known = all(row.get(column) not in (None, "") for column in task.unanswered)
        try:
            example = task.parse(row if known else {**row, **task.unanswered}, f"row-{number}")
        except (UnusableRow, TypeError, ValueError, KeyError, AttributeError, IndexError) as reason:
            errors[number] = str(reason)
            continue
        examples.append(example)
        answered[number] = known
    return examples, answered, errors


def _read(task: Task, rows: str) -> Iterable[Row]:
    asked = [column for column in task.columns if column not in task.unanswered]
    return read_lines(sys.stdin, "stdin", asked) if rows == STANDARD else read_file(Path(rows), asked)
