"""A comparison as text: terminal table, Markdown, CSV, JSON, LaTeX. The same groups always give the same bytes.

CSV and JSON carry fractions and plain units, one record per row of the comparison; the others carry the same numbers
rounded, scores in percent. Whatever came from a config, a row or a model is escaped for the format it goes into.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from cotune.compare import checked, escape
from cotune.compare.breakeven import BreakEven, break_evens
from cotune.compare.curves import learning
from cotune.compare.runs import CELLS
from cotune.compare.stats import Estimate, Finding
from cotune.compare.tables import (
    PLANNED,
    Group,
    Overall,
    Row,
    budget_used,
    cost,
    overall,
    overall_record,
    record,
    score_range,
    seeds,
    serving,
    spread,
    tested_record,
)  # fmt: skip
from cotune.compare.words import p_value

if TYPE_CHECKING:
    from rich.console import Console

LEGEND = (
    "Brackets: 95% intervals, each for its number alone; they cover other test examples and, with three or more seeds, "
    "other seeds. Several seeds: each example's mean over them. *: p below 0.05 after Holm's correction over all "
    "differences of its kind here (Δ of tasks, Δ of means over tasks, interactions, effects of levers)."
)


@dataclass(frozen=True)
class Sheet:
    """One table of ready, unescaped cells. The first column is text, the others are aligned right.

    `best` are the rows with the highest score, of a table whose column `score` has it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    best: tuple[int, ...] = ()
    score: int = 0


def sheets(groups: Sequence[Group], whole: bool = False) -> list[Sheet]:
    """Of each group the scores with what they show in words, the tests, the costs, what an answer costs, when what is
    dearer to tune pays, the spread of several runs, the 2x2 where a strategy turned both levers, the 2x2x2 and what
    each lever does where it chose the plan too, and what the checks found, `whole`: also where that is nothing. Then,
    where there are several tasks, their mean.
    """
    out = []
    for group in groups:
        title = group.title
        reasons = [
            f"{row.status}: {row.strategy}, {', '.join(run.name for run in row.runs)}: {row.reason}"
            for row in group.rows
            if row.status != "done"
        ]
        several = any(len(row.runs) > 1 for row in group.rows)
        ranges = ("range over seeds",) if several else ()
        header = ("strategy", "seeds", "n", f"{group.metric} %", *ranges, _against(group.baseline), "status")
        said = [row.sentence for row in group.rows if row.sentence]
        runs = {row.strategy: row.runs for row in group.rows if row.status == "done"}
        found = checked.table(runs, whole)
        fine = ("Checks: nothing found.",) if not found[1] and checked.is_known(runs) else ()
        notes = (*group.notes, *reasons, *said, *fine)
        best = _best([row.score.mean if row.score else None for row in group.rows])
        out.append(Sheet(title, header, tuple(_scores(row, several) for row in group.rows), notes, best, 3))
        tested = tuple((row.strategy, *_tested(row.difference)) for row in group.rows if row.difference)
        if tested:
            out.append(Sheet(f"{title} · tests", (f"against {group.baseline}", *_TESTED), tested, ()))
        drawn = any(row.score and row.score.bootstrap for row in group.rows)
        spreads = tuple(cells for row in group.rows if (cells := _spread(row, drawn)))
        if spreads:
            names = (*_SPREAD, *(("bootstrap 95%", "Δ, bootstrap 95%") if drawn else ()))
            out.append(Sheet(f"{title} · spread", names, spreads, ()))
        done = [row for row in group.rows if row.status == "done"]
        if done:
            limited = any(budget_used(row) is not None for row in done)
            used = ("of its budget %",) if limited else ()
            costs = ("cost, mean per run", *(f"{account} {unit}" for account, unit, _, _ in _COSTS), *used)
            out.append(Sheet(f"{title} · cost", costs, tuple(_costs(row, limited) for row in done), ()))
        served = tuple(_served(row) for row in done if serving(row, "flops") is not None)
        if served:
            names = ("serving, per example", *(name for name, _, _ in _SERVED))
            pairs = break_evens(group)
            paying = tuple(_paying(pair) for pair in pairs if pair.calls is not None)
            never = (_NONE_PAYS,) if pairs and not paying else ()
            out.append(Sheet(f"{title} · serving", names, served, never))
            if paying:
                out.append(Sheet(f"{title} · break-even", _BREAK_EVEN, paying, (_PAYS,)))
        crossed = tuple(_crossed(row) for row in done if row.two_by_two)
        if crossed:
            cells = ("prompt/weights %", *CELLS, "interaction")
            words = tuple(row.interaction_sentence for row in done if row.interaction_sentence)
            out.append(Sheet(f"{title} · 2x2", cells, crossed, words))
        out += _attributions(title, [row for row in done if row.effects])
        if found[1]:
            out.append(Sheet(f"{title} · checks", *found, ()))
    return out + means(overall(groups))


def means(told: Sequence[Overall]) -> list[Sheet]:
    """One sheet for each model and engine, and one of its tests."""
    out = []
    for model, engine, baseline in dict.fromkeys((o.model, o.engine, o.baseline) for o in told):
        rows = [o for o in told if (o.model, o.engine, o.baseline) == (model, engine, baseline)]
        names = ("strategy", "mean score %", _against(baseline), f"gain relative to {baseline} %")
        mixed = rows[0].mixed
        title = f"mean of {len(rows[0].tasks)} tasks · {model} · {engine}{' · MIXED RUNS' if mixed else ''}"
        note = f"Every task counts alike: {', '.join(rows[0].tasks)}. Relative gains are averaged over tasks."
        said = [o.sentence for o in rows if o.sentence]
        said = [f"Mixed runs, see the tables of: {', '.join(mixed)}.", *said] if mixed else said
        best = _best([o.score.mean for o in rows])
        out.append(Sheet(title, names, tuple(_mean(o) for o in rows), (note, *said), best, 1))
        tested = tuple((o.strategy, *_tested(o.difference)) for o in rows if o.difference)
        if tested:
            out.append(Sheet(f"{title} · tests", (f"against {baseline}", *_TESTED), tested, ()))
    return out


def _best(scores: Sequence[float | None]) -> tuple[int, ...]:
    """Where the highest score is, if there is another one to be higher than."""
    known = [score for score in scores if score is not None]
    return tuple(i for i, score in enumerate(scores) if score == max(known)) if len(known) > 1 else ()


def _against(baseline: str | None) -> str:
    return f"Δ {baseline} %" if baseline else "Δ %"


def _scores(row: Row, several: bool) -> tuple[str, ...]:
    score, difference = row.score, row.difference
    return (
        row.strategy,
        ",".join(str(seed) for seed in seeds(row)),
        str(score.n) if score else "",
        estimate(score, "z.1f") if score else "-" if row.status == "no-data" else "",
        *((_range(row),) if several else ()),
        _difference(difference),
        "baseline" if row.is_baseline else row.status,
    )


def _range(row: Row) -> str:
    least, most = score_range(row) or (0.0, 0.0)
    return f"{100 * least:.1f} to {100 * most:.1f}" if len(row.runs) > 1 else ""


def _mean(over: Overall) -> tuple[str, ...]:
    difference, gain = over.difference, over.relative_gain
    return (
        over.strategy,
        estimate(over.score, "z.1f"),
        _difference(difference),
        estimate(gain.estimate, "+z.1f") if gain else "baseline" if difference is None else "",
    )


_TESTED = ("test", "p", "exact p", "p, Holm", "effect", "could have seen")


def _tested(tested: Finding | None) -> tuple[str, ...]:
    if tested is None:
        return ("",) * len(_TESTED)
    effect = "" if tested.effect is None else f"{tested.effect_name} {tested.effect:+z.2f}"
    seen = "" if tested.detectable is None else f"{100 * tested.detectable:.1f}"
    return (tested.test, p_value(tested.p), p_value(tested.p_exact), p_value(tested.p_holm), effect, seen)


_SPREAD = ("spread, points", "runs", "between seeds (SD)", "examples (SE)", "engine noise (SD)")


def _spread(row: Row, drawn: bool) -> tuple[str, ...]:
    """Empty for a row with nothing to tell beyond its interval."""
    parts = spread(row)
    if not parts or (len(row.runs) < 2 and parts.engine is None):
        return ()
    shown = ("" if value is None else f"{100 * value:.2f}" for value in (parts.seeds, parts.examples, parts.engine))
    ends = (_bootstrap(row.score), _bootstrap(row.difference.estimate if row.difference else None)) if drawn else ()
    return (row.strategy, str(len(row.runs)), *shown, *ends)


def _bootstrap(value: Estimate | None) -> str:
    if value is None or value.bootstrap is None:
        return ""
    low, high = value.bootstrap
    return f"{100 * low:z.1f} to {100 * high:z.1f}"


def _costs(row: Row, limited: bool) -> tuple[str, ...]:
    share = budget_used(row)
    used = ("" if share is None else f"{100 * share:.0f}",) if limited else ()
    return (row.strategy, *(show(cost(row, account, key)) for account, _, key, show in _COSTS), *used)


def _served(row: Row) -> tuple[str, ...]:
    return (row.strategy, *(show(serving(row, *path)) for _, path, show in _SERVED))


_BREAK_EVEN = ("dearer to tune", "instead of", "more FLOPs to tune", "fewer FLOPs per answer", "answers until it pays")
_PAYS = (
    "The dearer to tune costs less in all once it has given that many answers, in FLOPs and whatever either scores. Of "
    "any other two rows the dearer to tune takes no fewer FLOPs per answer: it never pays."
)
_NONE_PAYS = "Break-even: none. Of any two rows the dearer to tune takes no fewer FLOPs per answer: it never pays."


def _paying(pair: BreakEven) -> tuple[str, ...]:
    return (pair.dearer, pair.other, two_digits(pair.tuning), two_digits(pair.serving), count(pair.calls))


def _crossed(row: Row) -> tuple[str, ...]:
    cells = row.two_by_two or {}
    return (row.strategy, *(f"{100 * cells[cell]:.1f}" for cell in CELLS), _difference(row.interaction))


_SEED_PLAN = (
    "Plan seed: answered anew under the plan that the run began with. That is greedy unless plan.* says otherwise, and "
    "a greedy answer is not the first of the tuned plan's samples."
)


def _attributions(title: str, rows: Sequence[Row]) -> list[Sheet]:
    """The cells of the runs that chose their plan, a column for each strategy; then what each set of levers does."""
    if not rows:
        return []
    grids = [row.cells or {} for row in rows]
    cells = tuple(
        (cell, *(f"{100 * grid[cell]:.1f}" if cell in grid else "" for grid in grids))
        for cell in PLANNED
        if any(cell in grid for grid in grids)
    )
    effects = tuple(
        (row.strategy, " x ".join(of), _difference(tested), *_tested(tested))
        for row in rows
        for of, tested in row.effects.items()
    )
    said = tuple(sentence for row in rows for sentence in row.effect_sentences)
    strategies = tuple(row.strategy for row in rows)
    return [
        Sheet(f"{title} · 2x2x2", ("prompt/weights/plan %", *strategies), cells, (_SEED_PLAN,)),
        Sheet(f"{title} · levers", ("strategy", "of", "effect, points", *_TESTED), effects, said),
    ]


def _difference(tested: Finding | None) -> str:
    return estimate(tested.estimate, "+z.1f") + ("*" if tested.significant else "") if tested else ""


def estimate(value: Estimate, form: str) -> str:
    """In percent, with its interval where it has one."""
    text = format(100 * value.mean, form)
    if value.low is None or value.high is None:
        return text
    return f"{text} [{100 * value.low:z.1f}, {100 * value.high:z.1f}]"


def count(value: float | None) -> str:
    """Three significant digits with k, M, G."""
    if value is None:
        return ""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"


def two_digits(value: float | None) -> str:
    """Two significant digits."""
    return "" if value is None else f"{value:.2g}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


_COSTS: tuple[tuple[str, str, str, Callable[[float | None], str]], ...] = tuple(
    (account, unit, key, show)
    for account in ("tuning", "measuring")
    for unit, key, show in (("tokens", "tokens", count), ("FLOPs", "flops", two_digits), ("s", "seconds", _seconds))
)
_SERVED: tuple[tuple[str, tuple[str, ...], Callable[[float | None], str]], ...] = (
    ("prompt s", ("prompts", "seconds"), two_digits),
    ("adapter s", ("adapters", "seconds"), two_digits),
    ("answer s", ("answers", "seconds"), two_digits),
    ("FLOPs", ("flops",), two_digits),
    ("read", ("answers", "read_tokens"), count),
    ("written", ("answers", "written_tokens"), count),
)


def as_table(groups: Sequence[Group]) -> Callable[[Console], None]:
    """Draws on a Rich console."""
    return drawing(sheets(groups), LEGEND)


def drawing(sheets: Sequence[Sheet], legend: str) -> Callable[[Console], None]:
    """Draws tables on a Rich console, the legend under them."""
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    def draw(console: Console) -> None:
        for sheet in sheets:
            console.print(Text(escape.clean(sheet.title), style="bold"))  # a Table would break it at its own width
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
            for i, name in enumerate(sheet.header):
                table.add_column(Text(escape.clean(name)), justify="right" if i else "left")
            for row in sheet.rows:
                table.add_row(*(Text(escape.clean(cell)) for cell in row))
            console.print(table)
            for line in sheet.notes:
                console.print(Padding(Text(escape.clean(line)), (0, 0, 0, 2)))
            console.print()
        console.print(Text(legend, style="dim"))

    return draw


def as_markdown(groups: Sequence[Group]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(escape.markdown(escape.clean(cell)) for cell in cells) + " |\n"

    out = []
    for sheet in sheets(groups):
        rule = "| --- |" + " ---: |" * (len(sheet.header) - 1) + "\n"
        body = line(sheet.header) + rule + "".join(line(row) for row in sheet.rows)
        notes = "".join(f"\n- {escape.markdown(escape.clean(text))}" for text in sheet.notes)
        out.append(f"### {escape.markdown(escape.clean(sheet.title))}\n\n{body}{notes}{chr(10) if notes else ''}")
    return "\n".join([*out, escape.markdown(LEGEND) + "\n"])


def as_latex(groups: Sequence[Group]) -> str:
    """One `table` per sheet; needs \\usepackage{booktabs}. Bold: the highest score; a star is raised."""

    def line(cells: Sequence[str], bold: int = 0) -> str:
        texts = [escape.latex(escape.clean(cell)) for cell in cells]
        if bold:
            mean, blank, interval = texts[bold].partition(" ")
            texts[bold] = f"\\textbf{{{mean}}}{blank}{interval}"
        texts[1:] = [f"{text[:-1]}$^{{*}}$" if text.endswith("*") else text for text in texts[1:]]
        return " & ".join(texts) + r" \\" + "\n"

    out = []
    for sheet in sheets(groups):
        bold = (_BOLD,) if sheet.best else ()
        notes = " ".join(escape.latex(escape.clean(text)) for text in (*sheet.notes, *bold, LEGEND))
        body = "".join(line(row, sheet.score if i in sheet.best else 0) for i, row in enumerate(sheet.rows))
        out.append(
            "\\begin{table}\n\\centering\n"
            f"\\caption{{{escape.latex(escape.clean(sheet.title))}. {notes}}}\n"
            f"\\begin{{tabular}}{{l{'r' * (len(sheet.header) - 1)}}}\n\\toprule\n{line(sheet.header)}\\midrule\n"
            f"{body}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
        )
    return "% needs \\usepackage{booktabs}\n" + "\n".join(out)


_BOLD = "Bold: the highest score, which says nothing of whether a difference is shown."


def as_csv(groups: Sequence[Group]) -> str:
    """One line per row of the comparison; several seeds or run names in one cell are separated by spaces."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return escape.clean(" ".join(str(v) for v in value) if isinstance(value, list) else value)

    records = [_tidy(record(group, row)) for group in groups for row in group.rows]
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(records[0])
    writer.writerows([cell(value) for value in r.values()] for r in records)
    return buffer.getvalue()


def as_json(groups: Sequence[Group]) -> str:
    value = {
        "groups": [
            {
                "task": group.task,
                "model": group.model,
                "engine": group.engine,
                "metric": group.metric,
                "baseline": group.baseline,
                "notes": list(group.notes),
                "mixed": list(group.mixed),
                "rows": [_tidy(record(group, row)) for row in group.rows],
                "curves": [
                    {"strategy": row.strategy, "run": run.name, "seed": run.seed, **curve.record()}
                    for row in group.rows
                    for run in row.runs
                    if row.status == "done" and (curve := learning(run, [])) and curve.validated
                ],
                "effects": [
                    {"strategy": row.strategy, "levers": list(of)} | _tidy(tested_record("effect", tested, sentence))
                    for row in group.rows
                    for (of, tested), sentence in zip(row.effects.items(), row.effect_sentences, strict=True)
                ],
                "break_even": [_tidy(pair.record()) for pair in break_evens(group)],
            }
            for group in groups
        ],
        "overall": [_tidy(overall_record(over)) for over in overall(groups)],
    }
    return json.dumps(value, ensure_ascii=True, allow_nan=False, indent=2) + "\n"


def _tidy(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers to twelve digits: what comes after them in a logarithm or a quantile differs between machines."""
    return {k: float(f"{v:.12g}") if isinstance(v, float) else v for k, v in record.items()}
