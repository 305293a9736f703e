"""What commands print for a person, from the values that --json prints as they are. Every line is made harmless."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.cells import LEVERS
from cotune.compare.escape import clean
from cotune.compare.render import Sheet, count, estimate, two_digits
from cotune.compare.stats import Estimate, wilson
from cotune.values import of_n


def run_text(folder: Path, summary: Mapping[str, Any]) -> str:
    """A run that has ended without an error."""
    what = f"{summary['strategy']} on {summary['task']} with {summary['model']}, seed {summary['seed']}"
    lines = [f"{what}: {summary['status']}"]
    if summary["status"] == "done":
        lines += summary_lines(summary)
    else:
        lines.append(f"  {summary.get('reason')}")
    lines += [f"  folder {folder}", f"  more: cotune show {folder}"]
    return _lines(lines)


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Score with its interval, outcomes, 2x2 and cost of one done run, in a few lines."""
    n, score = summary["n"], summary["score"]
    low, high = wilson(score, n)
    counted = ", ".join(f"{count} {name}" for name, count in summary["outcomes"].items() if count)
    interval = f"95% interval {100 * low:.1f} to {100 * high:.1f}, n = {n}"
    lines = [f"  {summary['headline']} {100 * score:.1f}% ({interval}): {counted}"]
    others = {k: v for k, v in summary["metrics"].items() if k != summary["headline"]}
    if others:
        lines.append("  also " + ", ".join(f"{name} {100 * value:.1f}%" for name, value in others.items()))
    lines += plan_lines(summary.get("plan") or {})
    if summary.get("cells"):
        cells = ", ".join(f"{cell} {100 * value:.1f}%" for cell, value in summary["cells"].items())
        size = "2x2x2" if len(summary["cells"]) > 4 else "2x2"
        levers = "/".join(LEVERS[: len(next(iter(summary["cells"])).split("/"))])
        lines.append(f"  {size} ({levers}) {cells}")
    lines += cost_lines(summary)
    lines += noise_lines(summary.get("noise") or {"promised": True})
    lines += [f"  note: {note}" for note in summary.get("notes") or ()]
    return lines


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The inference plan, and the score at every smaller number of samples; nothing for a greedy run."""
    lines = []
    if bins := plan.get("bins"):
        lines.append(f"  plan by difficulty: {plan['samples']:.1f} samples per example, those of the probe among them")
        for b in bins:
            share, score = 100 * b["share"], 100 * b["score"]
            lines.append(f"    bin {b['bin'] + 1}, {share:.0f}% of examples, {score:.1f}%: {_plan(b['plan'])}")
        return lines
    lines += [f"  plan: {_plan(p)}" for p in plan.get("plans", ())]
    if plan.get("curve"):
        points = ", ".join(f"{_how_many(p)}: {100 * p['score']:.1f}%" for p in plan["curve"])
        lines.append(f"    by number of samples, from the same draws: {points}")
    return lines


def _how_many(point: Mapping[str, Any]) -> str:
    in_a_row = point.get("chain", 1)
    return f"{point['samples']} ({in_a_row} in a row)" if in_a_row > 1 else str(point["samples"])


def _plan(plan: Mapping[str, Any]) -> str:
    by = f" by {plan['scorer']}" if plan["scorer"] else ""
    drawn = f"temperature {plan['temperature']:g}, top_p {plan['top_p']:g}"
    rows = f" in chains of {plan['chain']}" if "chain" in plan else ""
    return f"{of_n(plan['aggregation'], plan['samples'])}{rows}{by} ({drawn})"


def cost_lines(summary: Mapping[str, Any]) -> list[str]:
    """What tuning and measuring took, and what one answer takes."""
    lines = []
    for account, spent in summary["cost"].items():
        lines.append(f"  {account}: {spent['tokens']:,} tokens, {_flops(spent['flops'])}, {spent['seconds']:.1f} s")
        if calls := spent.get("cached_calls"):
            lines[-1] += f" (of these {spent['cached_tokens']:,} tokens of {calls:,} calls from the cache)"
    return lines + serving_lines(summary.get("serving") or {})


def noise_lines(noise: Mapping[str, Any]) -> list[str]:
    """What a second look at the same evaluation gave; nothing where the engine promises the same and was not asked."""
    if "examples" in noise:
        completions, grades = 100 * noise["completions_differ"], 100 * noise["grades_differ"]
        return [
            f"  noise: {noise['examples']} examples answered twice, {completions:.1f}% of completions and "
            f"{grades:.1f}% of grades differ, scores by {noise['mean_score_difference']:.3f} on average"
        ]
    return [] if noise["promised"] else ["  noise: not measured, and the engine does not promise to repeat itself"]


_SERVED = {"prompts": "writing its prompt", "adapters": "making its adapter", "answers": "answering"}


def serving_lines(serving: Mapping[str, Any]) -> list[str]:
    """What one answer takes, part by part, and how large the generating parts are; nothing for runs without it."""
    lines = []
    for part, doing in _SERVED.items():
        if cost := serving.get(part):
            tokens = f"{cost['read_tokens']:,.0f} tokens read"
            if "written_tokens" in cost:
                tokens += f", {cost['written_tokens']:,.0f} written"
            lines.append(f"    {doing}: {cost['seconds']:.2g} s, {_flops(cost['flops'])}, {tokens}")
    if lines:
        lines.insert(0, f"  serving: {serving['seconds']:.2g} s and {_flops(serving['flops'])} per example")
    for part, size in (serving.get("parameters") or {}).items():
        name = part.replace("_", " ")
        lines.append(f"    {name}: {size['trained']:,} parameters trained of {size['total']:,}")
    return lines


def export_text(report: Mapping[str, Any]) -> str:
    """What was exported of a run with one prompt for all."""
    (row,) = report["rows"]
    held = f"{row['adapters']} adapter of {row['adapter_bytes']:,} bytes" if row["adapters"] else "no adapter"
    return _lines([f"{report['out']}: one prompt, {held}", f"  more: {Path(report['out']) / 'README.md'}"])


EXPORT_LEGEND = (
    "Brackets: 95% intervals over val examples (Δ: paired by example). Bytes: of all "
    "adapters held; for one per example, of those generated for val. FLOPs: per example, for its prompt and adapter."
)


def export_sheet(report: Mapping[str, Any]) -> Sheet:
    """What each number of groups scores, loses, holds and generates."""
    n = report["n"]

    def interval(row: Mapping[str, Any], key: str, form: str) -> str:
        if row[key] is None:
            return ""
        return estimate(Estimate(row[key], row[f"{key}_low"], row[f"{key}_high"], None, n), form)

    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        parts = [part for part in ("prompts", "adapters") if row["serving"] and row["serving"][part]]
        flops = sum(row["serving"][part]["flops"] for part in parts) if parts else None
        return (
            "one per example" if row["groups"] is None else str(row["groups"]),
            interval(row, "score", "z.1f"),
            interval(row, "difference", "+z.1f"),
            str(row["adapters"]),
            count(row["adapter_bytes"]),
            two_digits(flops),
        )

    measured = f"measured on {report['split']}, n = {n}" if n else "not measured, there are no val examples"
    header = ("groups", f"{report['metric']} %", "Δ to one per example %", "adapters", "bytes", "FLOPs to generate")
    rows = [*([report["per_example"]] if report["per_example"] else []), *report["rows"]]
    return Sheet(f"{report['out']}: {measured}", header, tuple(map(cells, rows)), ())


def study_line(row: Mapping[str, Any]) -> str:
    """One run of a study."""
    line = f"{row['status']:<7} {_named(row)}"
    if row["score"] is not None:
        line += f": {row['metric']} {100 * row['score']:.1f}%"
    if row["reason"]:
        line += f": {row['reason']}"
    return line + (" (was finished before)" if row["skipped"] else f" ({row['seconds']:.0f} s)")


def study_plan_text(costs: Mapping[str, Any]) -> str:
    """What each run of a study would cost at most, and the sum."""
    lines = []
    for row in costs["runs"]:
        ending = _cost(row) if row["status"] == "planned" else row["reason"]
        lines.append(f"{row['status']:<8} {_named(row)}" + (f": {ending}" if ending else ""))
    return _lines([*lines, f"at most, all together: {_cost(costs['total'])}"])


def _named(row: Mapping[str, Any]) -> str:
    """A run at another's budget has no name before that one has spent it."""
    if not row["matched"]:
        return str(row["run"] or row["experiment"])
    own = "{task} {strategy} {model} s{seed}".format_map(row)
    return f"{row['run'] or own} @ {row['matched']}'s budget"


def _cost(row: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{account} {row[f'{account}_tokens']:,.0f} tokens {_flops(row[f'{account}_flops'])}"
        for account in ("tuning", "measuring")
    )


def _flops(value: float | None) -> str:
    return "unknown FLOPs" if value is None else f"{value:.3g} FLOPs"


def nested_text(value: Mapping[str, Any]) -> str:
    """Any report as indented `name: value` lines, by the names that --json and --set use."""
    return _lines(_nested(value, 0))


def _nested(value: Mapping[str, Any], depth: int) -> list[str]:
    """Empty lists and sections are left out; of a long list the first are shown."""
    lines = []
    for key, inner in value.items():
        start = f"{'  ' * depth}{key}:"
        if isinstance(inner, Mapping):
            lines += [start, *_nested(inner, depth + 1)] if inner else []
        elif isinstance(inner, list | tuple):
            lines += _listed(start, inner) if inner else []
        else:
            lines.append(f"{start} {_plain(inner)}")
    return lines


def _listed(start: str, values: Sequence[Any]) -> list[str]:
    """On one line where that is short."""
    shown = [_item(value) for value in values[:_MANY]]
    if len(values) > _MANY:
        shown.append(f"... and {len(values) - _MANY} more")
    if sum(map(len, shown)) <= _SHORT and not isinstance(values[0], Mapping):
        return [f"{start} {', '.join(shown)}"]
    indent = " " * (len(start) - len(start.lstrip()) + 2)
    return [start, *(indent + item for item in shown)]


def _item(value: Any) -> str:
    return ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) if isinstance(value, Mapping) else _plain(value)


_MANY = 12
_SHORT = 80


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lines(lines: list[str]) -> str:
    return "".join(clean(line).rstrip() + "\n" for line in lines)
