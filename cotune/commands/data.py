"""data check, grade, regrade: rows and grades without a model. Parse flags, call one function, print."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from cotune.commands.run import Data, Json
from cotune.errors import UsageError
from cotune.output import emit, emit_json

group = typer.Typer(no_args_is_help=True, help="Look at benchmark rows.", rich_markup_mode=None)


@group.callback()
def _group() -> None:
    """Look at benchmark rows."""


@group.command()
def check(
    task: Annotated[str | None, typer.Argument(metavar="[TASK]", help="Default: every task the folder holds.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Count rows, unusable rows, overlap between splits, and references that grade as correct.

    Without --data the folder is $COTUNE_DATA. With --json one line per task.
    """
    from cotune.catalog import check_names
    from cotune.tasks import TASKS
    from cotune.tasks import task as make_task
    from cotune.tasks.data import check as check_data
    from cotune.wording import nested_text

    source = data or os.environ.get("COTUNE_DATA") or None
    if task:
        check_names(task=task)
    names = [task] if task else [name for name in TASKS if source and (Path(source) / name).is_dir()]
    if not names:
        raise UsageError(
            "No benchmark rows are known. Name a TASK, or give --data the folder that holds gsm8k/, math/ ..."
        )
    for name in names:
        report = check_data(make_task(name), source)
        going = emit_json(report, indent=None) if as_json else emit(nested_text(report))
        if not going:
            return


def grade(
    task: Annotated[str, typer.Argument(metavar="TASK", help="See: cotune list tasks.")],
    input: Annotated[
        str,
        typer.Option(metavar="rows.jsonl", help="Rows with reference and completion (CosmosQA: choices); - is stdin."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Grades are always JSON lines.")] = False,
) -> None:
    """Grade completions made by any other tool: one JSON line per row with outcome and prediction."""
    from cotune.catalog import check_names
    from cotune.tasks import task as make_task
    from cotune.tasks.data import grade_rows

    check_names(task=task)
    for row in grade_rows(make_task(task), _lines(input)):
        if not emit_json(row, indent=None):
            return


def _lines(source: str) -> Iterator[str]:
    try:
        if source == "-":
            yield from sys.stdin
        else:
            with Path(source).open(encoding="utf-8") as file:
                yield from file
    except OSError as error:
        raise UsageError(f"{source} cannot be read ({error.strerror}). Give a JSON lines file to --input.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not UTF-8 ({error.reason}). Give a JSON lines file to --input.") from None


def regrade(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    as_json: Json = False,
) -> None:
    """Grade the saved completions of a run again with the grader of this version."""
    from cotune import finished
    from cotune.wording import nested_text

    report = finished.regrade(run)
    if as_json:
        emit_json(report)
    else:
        emit(nested_text(report))
