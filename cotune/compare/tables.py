"""From run folders to one comparison: groups, rows, what may not be put side by side. Numbers only, no formats.

Runs of one task, model and engine form a group; within it, runs that differ only in their seed form one row. A missing
number is None, never 0. Knows nothing of how a table is drawn (render.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cotune.cells import LEVERS, levers_of, named
from cotune.compare import checked, crossed, factorial, mixtures, words
from cotune.compare.crossed import Arm
from cotune.compare.labels import variant_labels
from cotune.compare.runs import CELLS, Run, read_all
from cotune.compare.stats import Estimate, Finding, holm, mean_of, standard_error
from cotune.errors import UsageError

STRATEGY_ORDER = ("zero-shot", "prompt-only", "lora-only", "sequential", "joint")
BASELINE = "zero-shot"
PLANNED = tuple(named(LEVERS))  # the cells of prompt / weights / plan


@dataclass(frozen=True)
class Row:
    """The done runs of one variant of one strategy, or one run that is not done (then only `reason` says more).

    `arm` holds the scores [runs, examples]. `score` is over examples, each example's score being its mean over the runs
    (seeds) of this row; so are `difference` (to the baseline row, example by example), `cells`, `interaction` (of a 2x2
    of prompt and weights) and `effects` (of every set of levers, the plan among them). All tests carry Holm's
    correction over all of their kind in the comparison, which the sentences tell in words.
    """

    strategy: str
    status: str
    runs: tuple[Run, ...]
    reason: str = ""
    score: Estimate | None = None
    difference: Finding | None = None
    is_baseline: bool = False
    cells: Mapping[str, float] | None = None
    interaction: Finding | None = None
    effects: Mapping[tuple[str, ...], Finding] = field(default_factory=dict)
    arm: Arm | None = None
    sentence: str = ""
    interaction_sentence: str = ""
    effect_sentences: tuple[str, ...] = ()

    @property
    def two_by_two(self) -> Mapping[str, float] | None:
        """The cells where they are those of prompt and weights, under one plan."""
        return self.cells if self.cells and not self.effects else None


@dataclass(frozen=True)
class Group:
    """Runs of one task, model and engine. `mixed` says what keeps them from being comparable, when that was allowed."""

    task: str
    model: str
    engine: str
    metric: str
    baseline: str | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    mixed: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.task} · {self.model} · {self.engine}{' · MIXED RUNS' if self.mixed else ''}"


@dataclass(frozen=True)
class Overall:
    """One row's strategy over all tasks of a model, every task counting alike.

    `relative_gain` is the mean over tasks of (score - baseline's) / baseline's: how the MetaTuner paper reports its
    10.15% (sheet 02). None for the baseline, and where a baseline's score is 0. Intervals cover other examples of these
    tasks and, with three or more seeds, other seeds; not other tasks. Holm's correction is over the rows of `overall`.
    """

    model: str
    engine: str
    baseline: str
    strategy: str
    tasks: tuple[str, ...]
    score: Estimate
    difference: Finding | None
    relative_gain: Finding | None
    sentence: str = ""
    mixed: tuple[str, ...] = ()  # those of its tasks whose runs are not comparable


def compare(
    paths: Iterable[Path], baseline: str | None = None, metric: str | None = None, allow_mixed: bool = False
) -> list[Group]:
    """Group and compare all run folders among `paths` and one level below.

    `baseline` names the strategy, or one variant as its row calls it, that differences are taken to; None: zero-shot.
    A group without a finished run of it uses its first row instead and says so in its notes. `metric`: of the task's
    metrics, the one to compare; None: the headline. `allow_mixed`: a group that mixes data, test examples, decoding or
    grader versions is compared by the examples that all of its runs have, and marked.
    Raises UsageError when there is no run, when no run is called that or has that metric, or when a group mixes
    what must be equal (with `allow_mixed`: when its runs have no example in common).
    """
    runs = read_all(paths, metric)
    if metric and not any(run.status == "done" for run in runs):
        names = sorted({name for run in runs for name in run.summary.get("metrics") or ()})
        raise UsageError(f"No finished run has the metric {metric!r}. Give --metric one of: {', '.join(names) or '-'}.")
    grouped: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.task, run.model, _engine(run, runs)), []).append(run)
    if allow_mixed:
        grouped = {key: mixtures.shared(part) for key, part in grouped.items()}
    else:
        for part in grouped.values():
            mixtures.refuse([run for run in part if run.status == "done"])
    labels = {run: label for part in grouped.values() for run, label in variant_labels(part).items()}
    known = {run.strategy for run in runs} | set(labels.values())
    if baseline and baseline not in known:
        raise UsageError(
            f"No run is called {baseline!r}. Give --baseline one of: {'; '.join(sorted(known, key=_rank))}."
        )
    return _corrected([_group(key, grouped[key], labels, baseline or BASELINE) for key in sorted(grouped)])


def _corrected(groups: Sequence[Group]) -> list[Group]:
    """Holm's correction over all differences, all interactions and all effects of the groups; then the sentences."""
    rows = [row for group in groups for row in group.rows]
    differences = _holm([row.difference for row in rows])
    interactions = _holm([row.interaction for row in rows])
    effects = iter(_holm([effect for row in rows for effect in row.effects.values()]))
    shown, twos = (sum(t is not None for t in tests) for tests in (differences, interactions))
    many = sum(len(row.effects) for row in rows)
    corrected = iter(zip(rows, differences, interactions, strict=True))
    out = []
    for group in groups:
        told = []
        for row, difference, interaction in (next(corrected) for _ in group.rows):
            sentence = words.difference(row.strategy, str(group.baseline), difference, shown) if difference else ""
            other = words.interaction(row.strategy, interaction, twos) if interaction else ""
            turned = {of: tested for of in row.effects if (tested := next(effects))}
            levers = list(turned)[-1] if turned else ()
            told.append(
                replace(
                    row,
                    difference=difference,
                    interaction=interaction,
                    effects=turned,
                    sentence=sentence,
                    interaction_sentence=other,
                    effect_sentences=tuple(words.effect(row.strategy, of, levers, t, many) for of, t in turned.items()),
                )
            )
        out.append(replace(group, rows=tuple(told)))
    return out


def _holm(tests: Sequence[Finding | None]) -> list[Finding | None]:
    corrected = holm([test.p if test else None for test in tests])
    return [test and replace(test, p_holm=p) for test, p in zip(tests, corrected, strict=True)]


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
    differences = _holm([over.difference for over in out])
    shown = sum(test is not None for test in differences)
    return [
        replace(o, difference=test, sentence=_overall_sentence(o, test, shown) if test else "")
        for o, test in zip(out, differences, strict=True)
    ]


def _overall_sentence(over: Overall, test: Finding, shown: int) -> str:
    sentence = f"Mean of {len(over.tasks)} tasks: {words.difference(over.strategy, over.baseline, test, shown)}"
    gain = over.relative_gain
    return f"{sentence} {words.relative_gain(over.strategy, over.baseline, gain)}" if gain else sentence


def _overall(groups: Sequence[Group], strategy: str, rows: Sequence[Row], base: Sequence[Row]) -> Overall:
    arms = [(_arm_of(ours), _arm_of(theirs)) for ours, theirs in zip(rows, base, strict=True)]
    n = sum(arm.scores.shape[1] for arm, _ in arms)
    scores = [mean_of(ours.per_example) for ours, _ in arms]
    theirs = [mean_of(other.per_example) for _, other in arms]
    own = crossed.of_variance(mean_of(scores), crossed.mean_variance([crossed.variance(a) for a, _ in arms]), n)
    difference = gain = None
    if not rows[0].is_baseline:
        unseen = [words.uncovered([(strategy, a), (str(groups[0].baseline), b)]) for a, b in arms]
        parts = [crossed.variance(ours, other) for ours, other in arms]
        mean = mean_of([a - b for a, b in zip(scores, theirs, strict=True)])
        uncovered = "; ".join(dict.fromkeys(filter(None, unseen)))
        difference = replace(crossed.of_variance(mean, crossed.mean_variance(parts), n), uncovered=uncovered)
        if all(theirs):
            ratios = [crossed.ratio_variance(ours, other) for ours, other in arms]
            found = crossed.mean_variance([r for r in ratios if r])
            gain = crossed.of_variance(mean_of([a / b - 1 for a, b in zip(scores, theirs, strict=True)]), found, n)
    tasks = tuple(g.task for g in groups)
    score = own.estimate
    score = replace(
        score,
        low=None if score.low is None else max(0.0, score.low),
        high=None if score.high is None else min(1.0, score.high),
    )
    model, engine, baseline = groups[0].model, groups[0].engine, str(groups[0].baseline)
    mixed = tuple(g.task for g in groups if g.mixed)
    return Overall(model, engine, baseline, strategy, tasks, score, difference, gain, mixed=mixed)


def _arm_of(row: Row) -> Arm:
    assert row.arm is not None  # rows that are done have one
    return row.arm


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
    pooled: dict[str, list[Run]] = {}
    for run in done:
        pooled.setdefault(labels[run], []).append(run)
    order = sorted(pooled, key=lambda label: (*_rank(pooled[label][0].strategy), label))
    named = [label for label in order if label == wanted]
    variants = [label for label in order if pooled[label][0].strategy == wanted]
    base = next(iter(named + variants + order), None)
    ids = list(done[0].scores) if done else []
    mixed = mixtures.marks(done, len(ids))
    notes = list(mixed)
    if base and not named and not variants:
        notes.append(f"No finished run of {wanted}: differences are to {base}.")
    elif not named and len(variants) > 1:
        notes.append(f"Several variants of {wanted}: differences are to {base}.")
    for label in order:
        if len(again := {run.seed for run in pooled[label]}) < len(pooled[label]):
            notes.append(
                f"{label}: {len(pooled[label])} runs have {len(again)} different seeds. A seed that was run twice "
                "counts twice, which makes the spread of seeds look smaller than it is."
            )
    if any(run.config.get("measured") == "val" for run in done):
        notes.append("Measured on val, where strategies may also have chosen: for choosing settings, not for a claim.")
    if len(hardware := dict.fromkeys(run.hardware for run in done if run.hardware)) > 1:
        notes.append(
            f"Runs were made on different hardware ({', '.join(hardware)}): their seconds do not compare, and "
            "near-ties may go another way."
        )
    arms = {label: _arm(pooled[label], [run.scores for run in pooled[label]], ids) for label in order}
    rows = [_row(label, pooled[label], arms[label], base, arms[base], ids) for label in order] if base else []
    rows += [Row(labels[run], run.status, (run,), run.reason) for run in runs if run.status != "done"]
    rows.sort(key=lambda r: (_rank(r.runs[0].strategy), r.strategy, r.status != "done", r.runs[0].seed or 0))
    metric = done[0].metric if done else "score"
    return Group(*key, metric, base, tuple(rows), tuple(notes), mixed)


def _row(label: str, runs: Sequence[Run], arm: Arm, base: str, theirs: Arm, ids: Sequence[str]) -> Row:
    difference = cells = interaction = None
    effects: dict[tuple[str, ...], Finding] = {}
    if label != base:
        uncovered = words.uncovered([(label, arm), (base, theirs)])
        difference = replace(crossed.difference(arm, theirs), uncovered=uncovered)
    names = tuple(runs[0].cells)
    if names and all(tuple(run.cells) == names for run in runs):
        levers = levers_of(names)
        grid = {cell: _arm(runs, [run.cells[cell] for run in runs], ids) for cell in names}
        cells = {cell: mean_of(grid[cell].per_example) for cell in names}
        scores = {tuned: grid[cell].scores for cell, tuned in named(levers).items()}

        def unseen(of: Sequence[str]) -> str:
            return words.uncovered([(label, Arm(factorial.contrast(scores, levers, of)))])

        if "plan" in levers:
            found = factorial.attribution(scores, levers)
            effects = {of: replace(effect, uncovered=unseen(of)) for of, effect in found.items()}
        else:
            synergy = Arm(factorial.contrast(scores, levers, levers))
            interaction = replace(crossed.effect(synergy, 2), uncovered=unseen(levers))
    score = crossed.estimate_score(arm)
    return Row(label, "done", tuple(runs), "", score, difference, label == base, cells, interaction, effects, arm)


def _arm(runs: Sequence[Run], parts: Sequence[Mapping[str, float]], ids: Sequence[str]) -> Arm:
    """Scores of the runs, paired by id, in the order of `ids`.

    Raises UsageError when a run has other examples.
    """
    for run, scores in zip(runs, parts, strict=True):
        if len(scores) != len(ids) or any(i not in scores for i in ids):
            common = sum(i in scores for i in ids)
            raise UsageError(
                f"{run.name} has rows for {common} of the {len(ids)} test examples of the other runs, and "
                f"{len(scores) - common} of its own: examples are compared in pairs. Run it again in another folder."
            )
    greedy = all((run.config.get("decoding") or {}).get("temperature", 0) == 0 for run in runs)
    tunes_nothing = greedy and all(run.strategy == BASELINE for run in runs)
    return Arm(np.array([[scores[i] for i in ids] for scores in parts], dtype=np.float64), tunes_nothing)


@dataclass(frozen=True)
class Spread:
    """How far a row's score moves for three reasons, each as a standard deviation of one run's score; None if unknown.

    `seeds`: another seed; needs three runs that differ. `examples`: other test examples, the standard error over them.
    `engine`: the same run answered again, see `engine_noise`.
    """

    seeds: float | None
    examples: float | None
    engine: float | None


def spread(row: Row) -> Spread | None:
    """None for a row that is not done."""
    if row.arm is None:
        return None
    seeds = None
    if row.arm.constant:
        seeds = 0.0
    elif row.arm.spread and row.arm.scores.shape[1] > 1:
        seeds = math.sqrt(crossed.variance(row.arm).seeds * row.arm.seeds)
    moved = _mean(row, engine_noise)
    n = row.arm.scores.shape[1]
    error = standard_error(row.arm.per_example)
    return Spread(seeds, error, None if moved is None else math.sqrt(moved / (2 * n)))


def engine_noise(run: Run) -> float:
    """Mean absolute difference of an example's score between two answers of one run, from the summary's `noise`.

    `mean_score_difference` where examples were answered twice, 0 where the engine promises to repeat itself. With d,
    a score of n examples moves with a standard deviation of sqrt(d / 2n): exactly for 0/1 scores, at most that for
    others. Raises KeyError when it is unknown, as it is for other metrics than the headline.
    """
    noise = run.summary["noise"] if run.metric == run.summary["headline"] else {}
    measured = noise.get("mean_score_difference", 0.0 if noise.get("promised") is True else None)
    if not isinstance(measured, int | float) or not 0 <= measured <= 1:
        raise KeyError("noise")
    return float(measured)


def cost(row: Row, account: str, unit: str) -> float | None:
    """Mean per run of one cost, for example ("tuning", "tokens"); None when a run does not report it."""
    return _mean(row, lambda run: run.summary["cost"][account][unit])


def budget_used(row: Row) -> float | None:
    """Mean per run of the share of its tuning budget that it used, of the fullest one if there are several limits.

    None when a run has no budget. Seconds may pass theirs a little.
    """

    def share(run: Run) -> float:
        limits, spent = run.config["budget"], run.summary["cost"]["tuning"]
        return max(float(spent[unit] / limits[unit]) for unit in ("tokens", "flops", "seconds") if limits[unit])

    return _mean(row, share)


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
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def score_range(row: Row) -> tuple[float, float] | None:
    """Lowest and highest score of the row's runs: how far one seed may be from the next."""
    scores = [mean_of(run) for run in row.arm.scores] if row.arm else []
    return (min(scores), max(scores)) if scores else None


def outcomes(row: Row) -> dict[str, int] | None:
    """Grades of all runs of the row together: correct + wrong + truncated + errored = n x runs."""
    if row.status != "done":
        return None
    if any(run.summary["outcomes"] is None for run in row.runs):  # examples were left out of mixed runs
        return None
    names = ("correct", "wrong", "truncated", "errored")
    return {name: sum(run.summary["outcomes"].get(name, 0) for run in row.runs) for name in names}


def seeds(row: Row) -> list[int]:
    """One per run: a seed that was run twice (under two names) is there twice."""
    return sorted(run.seed for run in row.runs if run.seed is not None)


def record(group: Group, row: Row) -> dict[str, Any]:
    """One flat row of CSV and JSON: fractions and plain units; None where there is no number."""
    score = row.score
    least, most = score_range(row) or (None, None)
    counted = outcomes(row) or {}
    parts = spread(row)
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
        **_bootstrap_record("score", score),
        "score_least_run": least,
        "score_most_run": most,
        "standard_error": score and score.standard_error,
        "seed_sd": parts and parts.seeds,
        "example_se": parts and parts.examples,
        "engine_sd": parts and parts.engine,
        "baseline": group.baseline if row.difference else None,
        **tested_record("difference", row.difference, row.sentence),
        **{f"cell_{cell.replace('/', '_')}": row.cells and row.cells.get(cell) for cell in (*CELLS, *PLANNED)},
        **tested_record("interaction", row.interaction, row.interaction_sentence),
        **{
            f"{account}_{unit}": cost(row, account, unit)
            for account in ("tuning", "measuring")
            for unit in ("tokens", "flops", "seconds")
        },
        "budget_used": budget_used(row),
        "peak_memory_bytes": peak_memory(row),
        **{
            f"serving_{part}_{unit}": serving(row, part, unit)
            for part in ("prompts", "adapters", "answers")
            for unit in ("flops", "seconds")
        },
        **{f"serving_{unit}": serving(row, unit) for unit in ("flops", "seconds")},
        **{name: counted.get(name) for name in ("correct", "wrong", "truncated", "errored")},
        **checked.worst(row.runs),
        "mixed": " ".join(group.mixed) or None,
        "run_names": [run.name for run in row.runs],
        "reason": row.reason or None,
    }


def overall_record(over: Overall) -> dict[str, Any]:
    """One flat row of JSON's `overall`."""
    gain = over.relative_gain and over.relative_gain.estimate
    return {
        "model": over.model,
        "engine": over.engine,
        "baseline": over.baseline,
        "strategy": over.strategy,
        "tasks": list(over.tasks),
        "mixed": list(over.mixed),
        "score": over.score.mean,
        "score_low": over.score.low,
        "score_high": over.score.high,
        **tested_record("difference", over.difference, over.sentence),
        "relative_gain": gain and gain.mean,
        "relative_gain_low": gain and gain.low,
        "relative_gain_high": gain and gain.high,
    }


def tested_record(name: str, tested: Finding | None, sentence: str) -> dict[str, Any]:
    """The columns of one difference or interaction, under its name."""
    e = tested.estimate if tested else None
    return {
        name: e and e.mean,
        f"{name}_low": e and e.low,
        f"{name}_high": e and e.high,
        **_bootstrap_record(name, e),
        f"{name}_excludes_zero": e and e.excludes_zero,
        f"{name}_test": tested and tested.test,
        f"{name}_p": tested and tested.p,
        f"{name}_p_exact": tested and tested.p_exact,
        f"{name}_p_holm": tested and tested.p_holm,
        f"{name}_significant": tested and tested.significant,
        f"{name}_detectable": tested and tested.detectable,
        f"{name}_effect": tested and tested.effect,
        f"{name}_effect_name": (tested and tested.effect_name) or None,
        f"{name}_sentence": sentence or None,
    }


def _bootstrap_record(name: str, value: Estimate | None) -> dict[str, Any]:
    low, high = (value and value.bootstrap) or (None, None)
    return {f"{name}_bootstrap_low": low, f"{name}_bootstrap_high": high}
