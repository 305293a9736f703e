"""run, study: the commands that tune. Parse flags, call one function, print."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cotune.errors import UsageError
from cotune.output import emit, emit_json, note

if TYPE_CHECKING:
    from cotune.config import RunConfig

Json = Annotated[bool, typer.Option("--json", help="Print JSON (shapes: docs/commands.md).")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only warnings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, for example joint.rank=4; repeatable."),
]
Data = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder of benchmark rows. Default: the hub, or generated rows.")
]
Out = Annotated[Path, typer.Option(help="Folder that holds the run folders.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="COTUNE_CACHE",
        help="Keep generations in this file and take from it what another run has made. Default: none.",
    ),
]
Tracker = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        envvar="COTUNE_TRACKERS",
        help="Copy the run's numbers to mlflow, wandb (offline) or tensorboard; repeatable. Default: none.",
    ),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        metavar="UNIT=N", help="Most that tuning may spend: tokens=2M, flops=1e15 or seconds=30m; repeatable."
    ),
]
Limit = typer.Option(metavar="N", min=1)


def run(
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="zero-shot, prompt-only, lora-only, sequential, joint, plan-only, inference-aware."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME|HUB_ID|PATH", help="See: cotune list models.")] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="See: cotune list tasks.")] = None,
    generator: Annotated[
        str | None, typer.Option(metavar="NAME", help="MetaTuner's G. Default: the model itself.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="auto, transformers, vllm or openai. Default: auto.")
    ] = None,
    data: Data = None,
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="Default: 0.")] = None,
    limit_train: Annotated[int | None, Limit] = None,
    limit_val: Annotated[int | None, Limit] = None,
    limit_test: Annotated[int | None, Limit] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Settings; flags win over it.")] = None,
    sets: Set = None,
    budget: Budget = None,
    out: Out = Path("results"),
    name: Annotated[str | None, typer.Option(help="Name of the run folder. Default: from the config.")] = None,
    cache: Cache = None,
    tracker: Tracker = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print config, stages and cost; run nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tune and measure one strategy on one model and task.

    The same command again continues an interrupted run; a finished one is only reported.
    """
    flags = {
        "strategy": strategy,
        "model": model,
        "task": task,
        "generator": generator,
        "engine": engine,
        "data": data,
        "seed": seed,
        "limit_train": limit_train,
        "limit_val": limit_val,
        "limit_test": limit_test,
    }
    from cotune.config import parse_budget

    if name is not None and (not name.strip() or name == ".." or Path(name).name != name):
        raise UsageError(f"--name {name!r} is not one folder name. Use --out for the folder that holds it.")
    resolved = configured(config, sets, flags | parse_budget(budget or []))
    trackers = _trackers(tracker)
    if plan:
        _plan(resolved, out, name, as_json)
        return
    calm_libraries(quiet)
    from cotune import experiment
    from cotune.engines.cache import GenerationCache
    from cotune.progress import listener

    kept = GenerationCache(cache) if cache else None
    with listener(quiet, config=resolved.model_dump(mode="json")) as listen, redirect_stdout(sys.stderr):
        result = experiment.run(resolved, out, name, listen, kept, trackers)
    if as_json:
        emit_json({"folder": str(result.folder), **result.summary})
    else:
        from cotune.wording import run_text

        emit(run_text(result.folder, result.summary))


def configured(file: Path | None, sets: list[str] | None, flags: dict[str, Any]) -> RunConfig:
    """Defaults < model profile < file < --set < flags, with the names looked up before anything heavy is imported."""
    from cotune.catalog import check_names
    from cotune.config import parse_set, read_toml, resolve

    given = {key: value for key, value in flags.items() if value is not None}
    config = resolve(read_toml(file) if file else {}, parse_set(sets or []), given)
    check_names(config.strategy, config.task, config.engine)
    return config


def _trackers(wanted: list[str] | None) -> tuple[str, ...]:
    """Raises UsageError with the nearest names for one that is in no table."""
    from cotune.catalog import check_names

    for name in wanted or ():
        check_names(tracker=name)
    return tuple(wanted or ())


def calm_libraries(quiet: bool) -> None:
    """What these libraries print of their own accord; they read it once, when they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _plan(config: RunConfig, out: Path, name: str | None, as_json: bool) -> None:
    from cotune import planning
    from cotune.wording import nested_text

    with redirect_stdout(sys.stderr):
        planned = planning.plan(config)
    planned = {"folder": str(out / (name or config.run_name)), **planned}
    emit_report(planned, nested_text, as_json)


def emit_report(report: dict[str, Any], text: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """One JSON object, or the same in words."""
    if as_json:
        emit_json(report)
    else:
        emit(text(report))


def study(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="An experiment (.toml), or a folder of them.")],
    data: Data = None,
    file: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE.toml", help="Settings laid on every experiment, under --set."),
    ] = None,
    sets: Set = None,
    budget: Budget = None,
    match_budget: Annotated[
        str | None,
        typer.Option(
            metavar="STRATEGY|EXPERIMENT",
            help="Then run each again, scaled to spend the tuning tokens that this one spent. See docs/commands.md.",
        ),
    ] = None,
    out: Out = Path("results"),
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs at a time.")] = 1,
    cache: Cache = None,
    tracker: Tracker = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what every run would cost at most; run nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run every experiment that has no finished run, and go on after a failed one."""
    from cotune import matching
    from cotune import study as studies
    from cotune.config import merged, parse_budget, parse_set, read_toml
    from cotune.engines.cache import GenerationCache
    from cotune.wording import study_line, study_plan_text

    laid_on = read_toml(file) if file else {}
    flags = parse_budget(budget or []) | ({"data": data} if data else {})
    flags |= {"match_budget": match_budget} if match_budget else {}
    overrides = merged(merged(laid_on, parse_set(sets or [])), flags)
    planned = studies.experiments(path, overrides)
    trackers = _trackers(tracker)
    calm_libraries(quiet)
    pairs = matching.pairs(planned)
    if plan:
        with redirect_stdout(sys.stderr):
            own = [studies.plan_row(experiment, out) for experiment in planned]
            again = [row for pair in pairs if (row := matching.plan_row(pair, out))]
        costs = studies.plan_of([*own, *again])
        emit_report(costs, study_plan_text, as_json)
        if costs["failed"]:
            raise typer.Exit(2)
        return
    told, of = 0, len(planned)

    def report(row: dict[str, Any]) -> None:
        nonlocal told
        told += 1
        if not quiet or row["status"] == "failed":
            note(f"[{told}/{of}] {study_line(row)}")

    if cache:
        GenerationCache(cache)  # that it cannot be used is said once, before anything runs
    work = partial(studies.run_one, cache=cache, trackers=trackers)
    rows = studies.run_all(planned, out, jobs, report, work)
    if pairs:
        with redirect_stdout(sys.stderr):
            equal = matching.matched(pairs, out)
        of += len(equal)
        rows += studies.run_all(equal, out, jobs, report, work)
    failed = sum(row["status"] == "failed" for row in rows)
    if as_json:
        emit_json({"runs": rows, "failed": failed})
    else:
        emit(f"{len(rows) - failed} of {len(rows)} runs are done, {failed} failed. Compare them: cotune compare {out}")
    if failed:
        raise typer.Exit(1)
