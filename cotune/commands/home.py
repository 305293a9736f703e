"""export, predict, serve: what one does with a finished run. Parse flags, call one function, print."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cotune.commands.run import Json, Quiet, calm_libraries, emit_report
from cotune.errors import UsageError
from cotune.output import drawn, emit, note

if TYPE_CHECKING:
    from cotune.opened import Place

Source = Annotated[Path, typer.Argument(metavar="RUN|BUNDLE", help="A finished run folder, or what export wrote.")]
Model = Annotated[
    str | None,
    typer.Option(metavar="NAME|HUB_ID|PATH", help="Where the same base model is now. Default: as in the run."),
]
Generator = Annotated[
    str | None,
    typer.Option(metavar="NAME|HUB_ID|PATH", help="Where the same generator is now. Default: as in the run."),
]
Engine = Annotated[str | None, typer.Option(metavar="NAME", help="auto, transformers or vllm. Default: the run's.")]
Here = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of runner or vllm, as runner.batch_size=8; repeatable."),
]
Static = Annotated[
    bool, typer.Option("--static", help="Bundles of joint runs: one prompt and adapter for all questions.")
]


def _place(model: str | None, generator: str | None, engine: str | None, sets: list[str] | None) -> Place:
    from cotune.catalog import check_names
    from cotune.config import parse_set
    from cotune.opened import Place

    check_names(engine=engine)
    return Place(model, generator, engine, parse_set(sets or []))


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the bundle.")],
    groups: Annotated[
        str,
        typer.Option(metavar="N[,N...]", help="Joint runs: also a prompt and adapter for each of N groups of queries."),
    ] = "1",
    model: Model = None,
    generator: Generator = None,
    engine: Engine = None,
    sets: Here = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a bundle to take home: prompt, PEFT adapter, chat frame, card; of a joint run also what makes them."""
    counts = sorted({int(part) if part.strip().isdecimal() else 0 for part in groups.split(",")})
    if counts[0] < 1:
        raise UsageError(f"--groups {groups!r} is not a number of groups, nor several like 1,2,4.")
    place = _place(model, generator, engine, sets)
    calm_libraries(quiet)
    from cotune import export as exports
    from cotune.compare.render import drawing
    from cotune.progress import listener
    from cotune.wording import EXPORT_LEGEND, export_sheet, export_text

    with listener(quiet) as listen, redirect_stdout(sys.stderr):
        report = exports.export(run, out, counts, listen, place)

    def table(report: dict[str, Any]) -> str:
        return drawn(drawing([export_sheet(report)], EXPORT_LEGEND), terminal=sys.stdout.isatty())

    emit_report(report, table if report["joint"] else export_text, as_json)


def predict(
    source: Source,
    input: Annotated[str, typer.Option(metavar="rows.jsonl", help="Rows in the task's own format; - is stdin.")],
    output: Annotated[str, typer.Option(metavar="out.jsonl", help="A new file, one JSON line per row; - is stdout.")],
    model: Model = None,
    generator: Generator = None,
    engine: Engine = None,
    sets: Here = None,
    static: Static = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer new rows with what a run has tuned. The same command again continues an interrupted one."""
    if as_json and output == "-":
        raise UsageError("--output - prints the rows, which are JSON already. Leave --json out, or give a file.")
    place = _place(model, generator, engine, sets)
    calm_libraries(quiet)
    from cotune import predict as predicting
    from cotune.progress import listener
    from cotune.wording import nested_text

    with listener(quiet) as listen, redirect_stdout(sys.stderr):
        report, lines = predicting.predict(source, input, output, listen, place, static)
    if output == "-":
        emit(lines)
    else:
        emit_report(report, nested_text, as_json)


def serve(
    source: Source,
    host: Annotated[str, typer.Option(help="Others than loopback let anyone ask who can reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8000,
    model: Model = None,
    generator: Generator = None,
    engine: Engine = None,
    sets: Here = None,
    static: Static = False,
    quiet: Quiet = False,
) -> None:
    """Answer OpenAI-style chat completions with what a run has tuned; prompt and adapter are applied here."""
    place = _place(model, generator, engine, sets)
    calm_libraries(quiet)
    from importlib.util import find_spec

    if not find_spec("starlette") or not find_spec("uvicorn"):
        raise UsageError("cotune serve needs starlette and uvicorn: pip install -c constraints.txt -e '.[serve]'.")
    from cotune.opened import open_any
    from cotune.serve import app

    with redirect_stdout(sys.stderr), app.bind(host, port) as listening:
        opened = open_any(source, place, static)
        address = f"[{host}]" if ":" in host else host
        if host not in app.LOOPBACK:
            note(f"There is no key: whoever reaches {host} can ask.")
        note(f"Serving {opened.name} at http://{address}:{listening.getsockname()[1]}/v1 until Ctrl-C.")
        app.run(opened, listening, host, quiet)
