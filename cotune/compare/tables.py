"""From run folders to one comparison: groups, rows, what may not be put side by side. Numbers only, no formats.

Runs of one task, model and engine form a group; within it, runs that differ only in their seed form one row. A missing
number is None, never 0. Knows nothing of how a table is drawn (render.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.compare.labels import variant_labels
from cotune.compare.runs import CELLS, Run, read_all
from cotune.compare.stats import Estimate, mean_score, over_tasks, paired
from cotune.errors import UsageError

STRATEGY_ORDER = ("zero-shot", "prompt-only", "lora-only", "sequential", "joint")
BASELINE = "zero-shot"
# What must be equal before scores may stand side by side, and how it is called in the refusal.
COMPARABLE = {
    "data_digest": "data",
    "test_ids_digest": "test examples",
    "decoding_digest": "decoding",
    "grader_version": "grader version",
}


@dataclass(frozen=True)
class Row:
    """The done runs of one variant of one strategy, or one run that is not done (then only `reason` says more).

    `score` is over examples, each example's score being its mean over the runs (seeds) of this row; so are
    `difference` (to the baseline row, example by example), `cells` and `interaction`. `cost` is the mean per run.
    """

    strategy: str
    status: str
    runs: tuple[Run, ...]
    reason: str = ""
    score: Estimate | None = None
    difference: Estimate | None = None
    is_baseline: bool = False
    cells: Mapping[str, float] | None = None
    interaction: Estimate | None = None


@dataclass(frozen=True)
class Group:
    task: str
    model: str
    engine: str
    metric: str
    baseline: str | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Overall:
    """One row's strategy over all tasks of a model, every task counting alike.

    `relative_gain` is the mean over tasks of (score - baseline's) / baseline's: how the MetaTuner paper reports its
    10.15% (sheet 02). None for the baseline, and where a baseline's score is 0.
    """

    model: str
    engine: str
    baseline: str
    strategy: str
    tasks: tuple[str, ...]
    score: float
    difference: Estimate | None
    relative_gain: float | None


def compare(paths: Iterable[Path], baseline: str | None = None) -> list[Group]:
    """Group and compare all run folders among `paths` and one level below.

    `baseline` names the strategy, or one variant as its row calls it, that differences are taken to; None: zero-shot.
    A group without a finished run of it uses its first row instead and says so in its notes.
    Raises UsageError when there is no run, when no run is called that, or when a group mixes data, test examples,
    decoding or grader versions.
    """
    runs = read_all(paths)
    grouped: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.task, run.model, _engine(run, runs)), []).append(run)
    labels = {run: label for part in grouped.values() for run, label in variant_labels(part).items()}
    known = {run.strategy for run in runs} | set(labels.values())
    if baseline and baseline not in known:
        raise UsageError(
            f"No run is called {baseline!r}. Give --baseline one of: {'; '.join(sorted(known, key=_rank))}."
        )
    return [_group(key, grouped[key], labels, baseline or BASELINE) for key in sorted(grouped)]


def overall(groups: Sequence[Group]) -> list[Overall]:
    """Where one model has several tasks with one baseline: the rows that are done, once, on every one of them."""
    out = []
    for model, engine, baseline in dict.fromkeys((g.model, g.engine, g.baseline) for g in groups):
        alike = [g for g in groups if (g.model, g.engine, g.baseline) == (model, engine, baseline)]
        if baseline is None or len(alike) < 2:
            continue
        done = [{row.strategy: row for row in g.rows if row.status == "done"} for g in alike]
        for strategy in done[0]:
            if all(strategy in rows for rows in done):
                out.append(_overall(alike, strategy, [rows[strategy] for rows in done], [r[baseline] for r in done]))
    return out


def _overall(groups: Sequence[Group], strategy: str, rows: Sequence[Row], base: Sequence[Row]) -> Overall:
    scores, theirs = [_score(row) for row in rows], [_score(row) for row in base]
    differences = [row.difference for row in rows if row.difference]
    gains = [(ours - their) / their for ours, their in zip(scores, theirs, strict=True)] if all(theirs) else []
    return Overall(
        groups[0].model,
        groups[0].engine,
        str(groups[0].baseline),
        strategy,
        tuple(g.task for g in groups),
        sum(scores) / len(scores),
        over_tasks(differences) if differences else None,
        sum(gains) / len(gains) if gains and differences else None,
    )


def _score(row: Row) -> float:
    assert row.score is not None  # rows that are done have one
    return row.score.mean


def _engine(run: Run, runs: Sequence[Run]) -> str:
    """A run that died before its engine was chosen stands beside its siblings when they all used one engine."""
    if run.engine != "auto":
        return run.engine
    siblings = {r.engine for r in runs if (r.task, r.model) == (run.task, run.model)} - {"auto"}
    return siblings.pop() if len(siblings) == 1 else "auto"


def _rank(strategy: str) -> tuple[int, str]:
    known = STRATEGY_ORDER.index(strategy) if strategy in STRATEGY_ORDER else len(STRATEGY_ORDER)
    return known, strategy


def _group(key: tuple[str, str, str], runs: Sequence[Run], labels: Mapping[Run, str], wanted: str) -> Group:
    done = [run for run in runs if run.status == "done"]
    refuse_mixtures(done)
    pooled: dict[str, list[Run]] = {}
    for run in done:
        pooled.setdefault(labels[run], []).append(run)
    order = sorted(pooled, key=lambda label: (*_rank(pooled[label][0].strategy), label))
    named = [label for label in order if label == wanted]
    variants = [label for label in order if pooled[label][0].strategy == wanted]
    base = next(iter(named + variants + order), None)
    notes = []
    if base and not named and not variants:
        notes.append(f"No finished run of {wanted}: differences are to {base}.")
    elif not named and len(variants) > 1:
        notes.append(f"Several variants of {wanted}: differences are to {base}.")
    if any(run.config.get("measured") == "val" for run in done):
        notes.append("Measured on val, where strategies may also have chosen: for choosing settings, not for a claim.")
    rows = [_row(label, pooled[label], pooled[base] if base else [], label == base) for label in order]
    rows += [Row(labels[run], run.status, (run,), run.reason) for run in runs if run.status != "done"]
    rows.sort(key=lambda r: (_rank(r.runs[0].strategy), r.strategy, r.status != "done", r.runs[0].seed or 0))
    metric = str(done[0].summary["headline"]) if done else "score"
    return Group(*key, metric, base, tuple(rows), tuple(notes))


def refuse_mixtures(runs: Sequence[Run]) -> None:
    """Raises UsageError naming what differs between which runs."""
    for field, word in COMPARABLE.items():
        sides: dict[str, list[str]] = {}
        for run in runs:
            sides.setdefault(str(run.summary.get("comparable", {}).get(field)), []).append(run.name)
        if len(sides) > 1:
            named = "; ".join(f"{word} {value}: {_names(names)}" for value, names in sorted(sides.items()))
            raise UsageError(
                f"These runs of {runs[0].task} with {runs[0].model} cannot be compared, because their {word} differ. "
                f"{named}. Give only runs of one kind."
            )


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _row(label: str, runs: Sequence[Run], base: Sequence[Run], is_baseline: bool) -> Row:
    scores = _pool([run.scores for run in runs])
    difference = None
    if not is_baseline:
        reference = _pool([run.scores for run in base])
        difference = paired([scores[i] - reference[i] for i in scores])
    cells = interaction = None
    if all(run.cells for run in runs):
        grid = {cell: _pool([run.cells[cell] for run in runs]) for cell in CELLS}
        cells = {cell: mean_score(list(grid[cell].values())).mean for cell in CELLS}
        neither, prompt, weights, both = (grid[cell] for cell in CELLS)
        interaction = paired([(both[i] - prompt[i]) - (weights[i] - neither[i]) for i in scores])
    estimate = mean_score(list(scores.values()))
    return Row(label, "done", tuple(runs), "", estimate, difference, is_baseline, cells, interaction)


def _pool(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over runs of each example's score. All parts have the same ids: test_ids_digest was compared."""
    return {i: sum(part[i] for part in parts) / len(parts) for i in parts[0]}


def cost(row: Row, account: str, unit: str) -> float | None:
    """Mean per run of one cost, for example ("tuning", "tokens"); None when a run does not report it."""
    return _mean(row, lambda run: run.summary["cost"][account][unit])


def peak_memory(row: Row) -> float | None:
    """Bytes, mean per run."""
    return _mean(row, lambda run: run.summary["peak_memory_bytes"])


def serving(row: Row, *path: str) -> float | None:
    """Mean per run of one number of the summary's `serving`, for example ("answers", "seconds"), per example."""

    def read(run: Run) -> Any:
        value = run.summary["serving"]
        for key in path:
            value = value[key]
        return value

    return _mean(row, read)


def _mean(row: Row, read: Callable[[Run], Any]) -> float | None:
    if row.status != "done":
        return None
    try:
        return sum(float(read(run)) for run in row.runs) / len(row.runs)
    except (KeyError, TypeError):
        return None


def score_range(row: Row) -> tuple[float, float] | None:
    """Lowest and highest score of the row's runs: how far one seed may be from the next."""
    scores = [float(run.summary["score"]) for run in row.runs if row.status == "done"]
    return (min(scores), max(scores)) if scores else None


def outcomes(row: Row) -> dict[str, int] | None:
    """Grades of all runs of the row together: correct + wrong + truncated + errored = n x runs."""
    if row.status != "done":
        return None
    names = ("correct", "wrong", "truncated", "errored")
    return {name: sum(run.summary["outcomes"].get(name, 0) for run in row.runs) for name in names}


def seeds(row: Row) -> list[int]:
    """One per run: a seed that was run twice (under two names) is there twice."""
    return sorted(run.seed for run in row.runs if run.seed is not None)


def record(group: Group, row: Row) -> dict[str, Any]:
    """One flat row of CSV and JSON: fractions and plain units; None where there is no number."""
    score, difference, interaction = row.score, row.difference, row.interaction
    least, most = score_range(row) or (None, None)
    counted = outcomes(row) or {}
    return {
        "task": group.task,
        "model": group.model,
        "engine": group.engine,
        "strategy": row.strategy,
        "status": row.status,
        "runs": len(row.runs),
        "seeds": seeds(row),
        "n": score and score.n,
        "metric": group.metric if score else None,
        "score": score and score.mean,
        "score_low": score and score.low,
        "score_high": score and score.high,
        "score_least_run": least,
        "score_most_run": most,
        "standard_error": score and score.standard_error,
        "baseline": group.baseline if difference else None,
        "difference": difference and difference.mean,
        "difference_low": difference and difference.low,
        "difference_high": difference and difference.high,
        "difference_excludes_zero": difference and difference.excludes_zero,
        **{f"cell_{cell.replace('/', '_')}": row.cells and row.cells[cell] for cell in CELLS},
        "interaction": interaction and interaction.mean,
        "interaction_low": interaction and interaction.low,
        "interaction_high": interaction and interaction.high,
        **{
            f"{account}_{unit}": cost(row, account, unit)
            for account in ("tuning", "measuring")
            for unit in ("tokens", "flops", "seconds")
        },
        "peak_memory_bytes": peak_memory(row),
        **{
            f"serving_{part}_{unit}": serving(row, part, unit)
            for part in ("prompts", "adapters", "answers")
            for unit in ("flops", "seconds")
        },
        **{f"serving_{unit}": serving(row, unit) for unit in ("flops", "seconds")},
        **{name: counted.get(name) for name in ("correct", "wrong", "truncated", "errored")},
        "run_names": [run.name for run in row.runs],
        "reason": row.reason or None,
    }
