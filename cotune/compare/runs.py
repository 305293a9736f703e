"""Run folders read back for a comparison: finished ones with their rows, all others with the reason why not.

Knows the files of record.py and nothing of statistics or tables. A folder that cannot be read becomes a run with
status "damaged": it stays visible and takes part in no number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cotune.cells import LEVERS, levers_of, named
from cotune.errors import CotuneError
from cotune.record import read_json, read_rows, run_folders
from cotune.values import digest

CELLS = tuple(named(LEVERS[:2]))  # prompt / weights
UNFINISHED = "no summary.json yet: still running, or interrupted; the same command again continues it"


@dataclass(frozen=True, eq=False)
class Run:
    """`status` is done, no-data, failed, unfinished, damaged or no-metric; only a done run has `scores`.

    `scores` maps example id -> score in [0, 1]; `cells` maps each cell of its levers (cells.py) to such scores, empty
    for a run of one lever. They are of `metric`. `folder` is where it was read from.
    """

    name: str
    status: str
    reason: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    cells: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    metric: str = "score"
    folder: Path = Path()

    @property
    def task(self) -> str:
        return str(self.config.get("task", "?"))

    @property
    def model(self) -> str:
        return str(self.config.get("model", "?"))

    @property
    def engine(self) -> str:
        """The engine that ran, or the one asked for when the run did not get that far."""
        return str(self.summary.get("engine") or self.config.get("engine", "?"))

    @property
    def strategy(self) -> str:
        return str(self.config.get("strategy", "?"))

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def hardware(self) -> str:
        """What the model was run on; empty when the run does not say."""
        made = self.summary.get("hardware")
        return " ".join(map(str, made)) if isinstance(made, list) else ""


def read_all(paths: Iterable[Path], metric: str | None = None) -> list[Run]:
    """Every run folder among `paths` and one level below, each once, sorted by name; scores as in `read_run`.

    Raises UsageError for a path that does not exist or holds no run.
    """
    folders = {folder.resolve(): folder for folder in run_folders(paths)}
    return sorted(
        (read_run(folder, metric) for folder in folders.values()), key=lambda r: (r.task, r.model, r.strategy, r.name)
    )


def read_run(folder: Path, metric: str | None = None) -> Run:
    """Never raises for what a kill or a full disk can leave behind.

    `metric` names one of the task's, for example "token_f1"; None: its headline. A run without it is "no-metric".
    """
    return replace(_read(folder, metric), folder=folder)


def rows_of(run: Run, name: str, problems: list[str]) -> list[dict[str, Any]]:
    """Rows of one of the run's JSON-lines files, without those that are no objects; damage is told in `problems`."""
    try:
        rows = read_rows(run.folder / name)
    except (CotuneError, OSError, ValueError, RecursionError) as error:
        problems.append(f"{run.name}: {name} could not be read ({type(error).__name__}).")
        return []
    return [row for row in rows if isinstance(row, dict)]


def _read(folder: Path, metric: str | None) -> Run:
    name = folder.resolve().name
    config: dict[str, Any] = {}
    try:
        config = read_json(folder / "config.json")
        if missing := {"strategy", "model", "task", "seed"} - config.keys():
            raise CotuneError(f"config.json lacks {', '.join(sorted(missing))}. Run it again in another folder.")
        if not (folder / "summary.json").exists():
            return Run(name, "unfinished", UNFINISHED, config)
        summary = read_json(folder / "summary.json")
        if summary["status"] != "done":
            return Run(name, str(summary["status"]), str(summary.get("reason") or ""), config, summary)
        if metric and metric not in summary["metrics"]:
            return Run(name, "no-metric", f"it has {', '.join(summary['metrics'])}, not {metric}", config, summary)
        scores = _by_id(read_rows(folder / "predictions.jsonl"), metric)
        _check(scores, summary, metric)
        names = list(named(levers_of(summary["cells"]))) if summary.get("cells") else []
        cells = _cells(names, read_rows(folder / "crossed.jsonl"), scores, metric) if names else {}
        return Run(name, "done", "", config, summary, scores, cells, metric or str(summary["headline"]))
    except CotuneError as error:
        return Run(name, "damaged", str(error), config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, RecursionError, OSError) as error:
        config = config if isinstance(config, dict) else {}
        return Run(name, "damaged", f"{type(error).__name__}: {error}".splitlines()[0], config)


def _by_id(rows: Iterable[Mapping[str, Any]], metric: str | None) -> dict[str, float]:
    scores: dict[str, float] = {}
    for row in rows:
        if row["id"] in scores:
            raise CotuneError(f"Example {row['id']!r} occurs twice in the rows. Run it again in another folder.")
        score = float(row["metrics"].get(metric, 0.0) if metric else row["score"])  # as the summary counts
        if not 0 <= score <= 1:
            raise CotuneError(f"The score {score} of example {row['id']!r} is not in [0, 1]. Run it again elsewhere.")
        scores[str(row["id"])] = score
    return scores


def _check(scores: Mapping[str, float], summary: Mapping[str, Any], metric: str | None) -> None:
    """The rows must say what the summary says: n, and correct + wrong + truncated + errored = n, and the mean."""
    n, _ = summary["n"], summary["headline"]
    if not scores or len(scores) != n or sum(summary["outcomes"].values()) != n:
        raise CotuneError(
            f"predictions.jsonl has {len(scores)} rows but the summary says n = {n} with outcomes "
            f"{dict(summary['outcomes'])}. Run it again in another folder."
        )
    if digest(list(scores)) != summary["comparable"]["test_ids_digest"]:
        raise CotuneError("predictions.jsonl holds other examples than the summary. Run it again in another folder.")
    if abs(sum(scores.values()) / n - (summary["metrics"][metric] if metric else summary["score"])) > 1e-9:
        raise CotuneError("predictions.jsonl and summary.json disagree on the score. Grade again: cotune regrade RUN.")


def _cells(
    names: Sequence[str], rows: Iterable[Mapping[str, Any]], ours: Mapping[str, float], metric: str | None
) -> dict[str, dict[str, float]]:
    """Scores by id of all cells, `ours` the last. Raises CotuneError when a cell does not have every example."""
    rows = list(rows)
    cells = {cell: _by_id((row for row in rows if row["cell"] == cell), metric) for cell in names[:-1]}
    for cell, scores in cells.items():
        if scores.keys() != ours.keys():
            raise CotuneError(f"crossed.jsonl lacks rows of the cell {cell}. Run it again in another folder.")
    return {**cells, names[-1]: dict(ours)}
