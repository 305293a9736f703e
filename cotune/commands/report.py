"""compare, difficulty, show, watch, list, doctor: the commands that only read. Parse flags, call a function, print."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from cotune.commands.run import Data, Json, Out
from cotune.output import drawn, emit, emit_json, note

Format = Literal["table", "markdown", "csv", "json", "latex", "html"]
Kind = Literal["strategies", "tasks", "models", "engines", "trackers"]


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders, or folders that hold some.")],
    format: Annotated[Format, typer.Option(help="How to write it.")] = "table",
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="STRATEGY", help="What differences are taken to (or a variant's label). Default: zero-shot."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Another metric of the task, like token_f1. Default: its headline."),
    ] = None,
    study: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="Of the folders, only the runs that this study stands for.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE.toml", help="What the study was run with, if anything.")
    ] = None,
    allow_mixed: Annotated[
        bool,
        typer.Option("--allow-mixed", help="Compare runs with other data, decoding or grader, and mark the table."),
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write there instead of stdout.")] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the plots of the HTML report there, a file each.")
    ] = None,
    plots_format: Annotated[
        Literal["svg", "png"], typer.Option("--plots-format", help="PNG needs cotune[png], SVG nothing.")
    ] = "svg",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Put finished runs side by side: scores, paired differences tested and in words, 2x2, cost."""
    from cotune.compare import render, report, tables
    from cotune.errors import UsageError

    if file and not study:
        raise UsageError("--config says what a study was run with. Add --study FILE|DIR.")
    chosen = "json" if as_json else format
    if chosen == "html" and not out and sys.stdout.isatty():
        raise UsageError("An HTML report is a file, not for a terminal. Add --out report.html.")
    groups = tables.compare(_of_study(folders, study, file) if study else folders, baseline, metric, allow_mixed)
    if chosen == "table":
        text = drawn(render.as_table(groups), terminal=not out and sys.stdout.isatty())
    else:
        text = {
            "markdown": render.as_markdown,
            "csv": render.as_csv,
            "json": render.as_json,
            "latex": render.as_latex,
            "html": report.as_html,
        }[chosen](groups)
    if plots:
        drawn_plots = report.drawings(groups)
        save_all(plots, drawn_plots if plots_format == "svg" else _pngs(drawn_plots))
    if out:
        save(out, text)
    else:
        emit(text)


def _pngs(drawings: Mapping[str, str]) -> dict[str, bytes]:
    from cotune.compare.png import png

    return {f"{name.removesuffix('.svg')}.png": png(svg) for name, svg in drawings.items()}


def _of_study(folders: list[Path], study: Path, file: Path | None) -> list[Path]:
    """The run folders of a study, matched runs too. Those not there are counted on stderr; UsageError when none is."""
    from cotune import matching
    from cotune.config import read_toml
    from cotune.errors import UsageError
    from cotune.study import experiments

    planned = experiments(study, read_toml(file) if file else {})
    again = f"Run them: cotune study {study}{f' --config {file}' if file else ''} --out DIR."
    for e in planned:
        if e.config is None:
            note(f"{e.source} cannot be used: {e.reason}")
    names = {e.config.run_name for e in planned if e.config}
    there = [folder / name for folder in folders for name in sorted(names) if (folder / name).is_dir()]
    missing = len(names - {path.name for path in there})
    if not there:
        raise UsageError(f"None of the {len(names)} runs of {study} is there. {again}")
    if missing:
        note(f"{missing} of the {len(names)} runs of {study} are not there. {again}")
    return [*there, *matching.of_study(planned, folders)]


def save(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole; a device or a pipe is written to. Raises UsageError when that is not possible."""
    from cotune.errors import UsageError
    from cotune.record import write_atomic

    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            write_atomic(path.resolve(), content)  # through a link, not over it
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}). Choose another --out.") from None


def save_all(folder: Path, contents: Mapping[str, str] | Mapping[str, bytes]) -> None:
    """File name -> content, into a folder that is made where it is missing. Raises UsageError when it cannot be."""
    from cotune.errors import UsageError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made a folder ({error.strerror}). Choose another --plots.") from None
    for name, content in contents.items():
        save(folder / name, content)


def difficulty(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run under a plan of 8 samples or more.")],
    chains: Annotated[
        Path | None, typer.Argument(metavar="[CHAINS]", help="A run that answered the same questions in chains.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What choosing the inference plan by difficulty would gain on a run's samples, and with CHAINS on revisions."""
    from cotune.compare.render import drawing
    from cotune.difficulty import telling
    from cotune.difficulty.runs import of_run

    found = of_run(run, chains)
    if as_json:
        emit_json(telling.record(found))
    else:
        emit(drawn(drawing(telling.sheets(found), telling.LEGEND), terminal=sys.stdout.isatty()))


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    as_json: Json = False,
) -> None:
    """Show one run: settings, learning curves, the tuned prompt, ten rows."""
    from cotune import show as telling

    told = telling.story(run)
    if as_json:
        emit_json(told)
    else:
        emit(telling.text(told))


def watch(
    path: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run folder, or a folder that holds some.")],
    interval: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print how things stand now, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: JSON (shape: docs/commands.md).")] = False,
) -> None:
    """Watch runs of another terminal until they end: stage, score so far, curves, budget, time left."""
    from cotune.errors import UsageError
    from cotune.watch import Watch, follow_live, follow_plain

    if as_json and not once:
        raise UsageError("--json is one answer, and watching has no end. Give --once with it.")
    watching = Watch(path)
    on_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if as_json:
        emit_json(watching.json())
    elif once:
        if on_terminal and watching.running:
            emit(drawn(lambda console: console.print(watching.picture()), terminal=True))
        else:
            emit("\n".join(watching.lines()))
    elif on_terminal:
        follow_live(watching, interval)
    else:
        follow_plain(watching, interval, emit)
    if not watching.running and watching.code:
        raise typer.Exit(watching.code)


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: Json = False,
) -> None:
    """List what there is to choose from."""
    from cotune.catalog import listing

    rows = listing(kind)
    if as_json:
        emit_json({kind: rows})
        return
    width = max(len(row["name"]) for row in rows)
    emit("\n".join(f"{row['name']:<{width}}  {row['about']}".rstrip() for row in rows))


def doctor(data: Data = None, out: Out = Path("results"), as_json: Json = False) -> None:
    """Check the installation and this machine: what would fail, and the fix."""
    from cotune import doctor as doctoring
    from cotune.compare.escape import clean

    checks = doctoring.examine(data, out)
    result = doctoring.summary(checks)
    if as_json:
        emit_json(result)
    else:
        lines = []
        for check in checks:
            lines.append(f"{check.status:<4}  {check.name:<14}  {clean(check.found)}")
            lines += [f"{'':<22}fix: {clean(check.fix)}"] if check.fix else []
        emit("\n".join(lines))
    if not result["ok"]:
        raise typer.Exit(1)
