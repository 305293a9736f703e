"""Many runs from experiment files: each in a worker process, so that one that dies takes no other with it.

An experiment file is a run config in TOML that says only what differs from the defaults. `strategy`, `model`,
`generator`, `task` and `seed` may be lists, and a table `[grid]` may list values of any other setting by its dotted
name; the file then stands for every combination. A run that is finished is not run again; one that was interrupted
continues. Knows nothing of terminals (`report` is told about every run), nor of how budgets are matched (matching.py).
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.catalog import check_names
from cotune.config import RunConfig, merged, nested, read_toml, resolve
from cotune.errors import CotuneError, UsageError
from cotune.record import FINAL, read_json

LISTED = ("task", "model", "generator", "strategy", "seed")  # outermost first
DIED = "the process died (out of memory, or a crash in native code); run it alone with `cotune run` to see more"


@dataclass(frozen=True, eq=False)
class Experiment:
    """One run to be made, or (config None) one that cannot be made and why.

    `match` names whose budget it is to be given in another run, as `match_budget` of the file or --match-budget says.
    """

    source: str
    config: RunConfig | None
    reason: str = ""
    match: str | None = None


Work = Callable[[Experiment, Path], dict[str, Any]]


def experiments(path: Path, overrides: Mapping[str, Any]) -> list[Experiment]:
    """What a file, or the `.toml` files of a folder by name, stand for; each run once.

    Raises UsageError when there is no experiment file. A file that is wrong becomes an experiment without config.
    """
    files = sorted(path.glob("*.toml")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise UsageError(f"There is no experiment (.toml) at {str(path)!r}. Give a file or a folder that holds some.")
    found: dict[str, Experiment] = {}
    for file in files:
        try:
            for layer in combinations(merged(read_toml(file), overrides)):
                match = layer.pop("match_budget", None)
                if not isinstance(match, str | None):
                    raise UsageError(f"match_budget = {match!r} is not valid: it names a strategy or an experiment.")
                config = resolve(layer)
                check_names(config.strategy, config.task, config.engine)
                found.setdefault(config.run_name, Experiment(file.name, config, match=match))
        except UsageError as error:
            found[str(file)] = Experiment(file.name, None, str(error))
    return list(found.values())


def combinations(layer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{"seed": [0, 1], "task": "math"}` -> one mapping per combination of the listed keys and of the grid.

    Raises UsageError for a grid that is not lists by dotted name.
    """
    listed = {key: layer[key] for key in LISTED if isinstance(layer.get(key), list)}
    grid = layer.get("grid", {})
    if not isinstance(grid, Mapping) or not all(isinstance(values, list) for values in grid.values()):
        raise UsageError(f"grid = {grid!r} is not valid. List values by dotted name, "
                         'for example [grid] "weights.epochs" = [5, 10].')  # fmt: skip
    keys = [*listed, *grid]
    found = []
    for values in itertools.product(*listed.values(), *grid.values()):
        one = {key: value for key, value in layer.items() if key != "grid"}
        for key, value in zip(keys, values, strict=True):
            one = merged(one, nested(key, value))
        found.append(one)
    return found


def finished(experiment: Experiment, out: Path) -> dict[str, Any] | None:
    """The row of a run that needs no more work."""
    if experiment.config is None:
        return None
    path = out / experiment.config.run_name / "summary.json"
    try:
        summary = read_json(path)
    except UsageError:
        return None
    return row_of(experiment, summary, 0.0, skipped=True) if summary.get("status") in FINAL else None


def run_all(
    planned: Sequence[Experiment],
    out: Path,
    jobs: int,
    report: Callable[[dict[str, Any]], None],
    work: Work,
) -> list[dict[str, Any]]:
    """Run what is not finished, `jobs` at a time; one row per experiment, in the order of `planned`.

    A failed run is a row with status "failed" and its reason. Never raises for a run; KeyboardInterrupt ends the
    workers and is passed on (each run continues when it is started again). `work` makes one run in a worker process.
    """
    rows: dict[Experiment, dict[str, Any]] = {}

    def tell(experiment: Experiment, row: dict[str, Any]) -> None:
        rows[experiment] = row
        report(row)

    todo = []
    for experiment in planned:
        if experiment.config is None:
            tell(experiment, row_of(experiment, {"status": "failed", "reason": experiment.reason}))
        elif row := finished(experiment, out):
            tell(experiment, row)
        else:
            todo.append(experiment)
    for experiment in _in_workers(todo, out, jobs, tell, work):
        # A worker died and its pool with it. Which run killed it is not known, so each gets a process of its own.
        if _in_workers([experiment], out, 1, tell, work):
            tell(experiment, row_of(experiment, {"status": "failed", "reason": DIED}))
    return [rows[experiment] for experiment in planned]


COSTS = tuple((account, unit) for account in ("tuning", "measuring") for unit in ("tokens", "flops"))


def plan_row(experiment: Experiment, out: Path | None) -> dict[str, Any]:
    """What a run would cost at most, 0 if it is finished in `out`; nothing runs, no weights are loaded.

    An experiment that cannot be planned is a row with status "failed" and its reason.
    """
    from cotune import planning

    status, reason = "planned", experiment.reason or None
    cost: dict[str, float | None] = {f"{account}_{unit}": 0.0 for account, unit in COSTS}
    if experiment.config is None:
        status = "failed"
    elif out and finished(experiment, out):
        status = "finished"
    else:
        try:
            plan = planning.plan(experiment.config)
            cost = {f"{account}_{unit}": plan[f"{account}_at_most"][unit] for account, unit in COSTS}
        except CotuneError as error:
            status, reason = "failed", str(error)
    row = row_of(experiment, {"status": status})
    known = {key: row[key] for key in ("experiment", "run", "matched", "task", "model", "strategy", "seed")}
    return known | cost | {"status": status, "reason": reason}


def plan_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of `plan_row` and their sums; a sum with something unknown in it (the FLOPs of a black box) is None."""
    columns = {f"{account}_{unit}": [row[f"{account}_{unit}"] for row in rows] for account, unit in COSTS}
    total = {key: None if None in values else sum(values) for key, values in columns.items()}
    return {"runs": list(rows), "total": total, "failed": sum(row["status"] == "failed" for row in rows)}


def _in_workers(
    todo: Sequence[Experiment],
    out: Path,
    jobs: int,
    tell: Callable[[Experiment, dict[str, Any]], None],
    work: Work,
) -> list[Experiment]:
    """Run in worker processes; returns those that have no result because a worker died."""
    if not todo:
        return []
    lost = []
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=context, initializer=_begin_worker) as pool:
        try:
            futures: dict[Future[dict[str, Any]], Experiment] = {pool.submit(work, e, out): e for e in todo}
            for future in as_completed(futures):
                try:
                    tell(futures[future], future.result())
                except BrokenProcessPool:
                    lost.append(futures[future])
                except Exception as error:
                    tell(futures[future], row_of(futures[future], _failed(error)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return lost


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # die at once and silently: a run survives that
    os.dup2(2, 1)  # results are printed by the parent alone
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A study that is killed leaves no run going on behind its back: each continues when the study is run again."""
    parent.join()
    os._exit(1)


def run_one(
    experiment: Experiment, out: Path, cache: Path | None = None, trackers: Sequence[str] = ()
) -> dict[str, Any]:
    """The row of one run, made here and now, with a cache of generations in the file `cache`.

    Whatever goes wrong in it is its reason.
    """
    from cotune import experiment as composition
    from cotune.engines.cache import GenerationCache
    from cotune.progress import listener

    assert experiment.config is not None
    began = time.monotonic()
    try:
        with listener(quiet=True, prefix=f"{experiment.config.run_name}: ") as listen:
            kept = GenerationCache(cache) if cache else None
            summary = composition.run(experiment.config, out, None, listen, kept, trackers).summary
    except Exception as error:
        summary = _failed(error)
    sys.stdout.flush()
    return row_of(experiment, summary, time.monotonic() - began)


def _failed(error: Exception) -> dict[str, Any]:
    reason = str(error) if isinstance(error, CotuneError) else f"{type(error).__name__}: {error}"
    return {"status": "failed", "reason": reason}


def row_of(
    experiment: Experiment, summary: Mapping[str, Any], seconds: float = 0.0, skipped: bool = False
) -> dict[str, Any]:
    """What is reported of one run; `summary` needs no more than a status."""
    config = experiment.config
    return {
        "experiment": experiment.source,
        "run": config.run_name if config else None,
        "matched": config.budget.matched if config else None,
        "task": config.task if config else None,
        "model": config.model if config else None,
        "strategy": config.strategy if config else None,
        "seed": config.seed if config else None,
        "status": summary["status"],
        "skipped": skipped,
        "metric": summary.get("headline"),
        "score": summary.get("score"),
        "n": summary.get("n"),
        "seconds": round(seconds, 1),
        "reason": summary.get("reason") or None,
    }
