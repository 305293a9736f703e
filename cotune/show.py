"""One run folder, told to a person: config, learning curves, the tuned prompt, some rows. Works for any status.

Reads the folder and nothing else; no model, no torch. A file that is damaged is said to be, and the rest is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.compare.escape import clean, short
from cotune.compare.labels import changed
from cotune.compare.runs import read_run
from cotune.diagnosis import warnings
from cotune.errors import CotuneError, UsageError
from cotune.record import read_json, read_rows, run_folders
from cotune.sparkline import sparkline
from cotune.wording import summary_lines

EXAMPLES = 10
# What makes a curve: these numbers, and whatever ends in "loss", of any kind of event.
_CURVES = {
    *("score", "val_score", "best", "mean_score", "spread", "diversity", "mean_tokens"),
    *("cosine", "actor_gradient", "prompt_gradient", "relative_norm", "effective_rank", "variation"),
    *("question_length", "solution_length"),
}


def story(path: Path) -> dict[str, Any]:
    """Everything `show` prints, as JSON. Raises UsageError when `path` is no run folder."""
    folder = run_folders([path])
    if len(folder) > 1 or not (path / "config.json").exists():
        names = ", ".join(f.name for f in folder[:3])
        raise UsageError(f"{path} holds {len(folder)} runs. Give one of them, for example {names}.")
    run = read_run(path)
    problems: list[str] = []
    events = _read(lambda: read_rows(path / "events.jsonl"), problems, [])
    rows = _read(lambda: read_rows(path / "predictions.jsonl"), problems, [])
    tuned_file = path / "tuned" / "tuned.json"
    tuned = _read(lambda: read_json(tuned_file) if tuned_file.exists() else None, problems, None)
    return {
        "run": run.name,
        "status": run.status,
        "reason": run.reason or None,
        "config": dict(run.config),
        "changed": changed(run.config),
        "summary": dict(run.summary) or None,
        "curves": curves(events),
        "arms": arms(events),
        "warnings": warnings(events),
        "events": len(events),
        "tuned": tuned,
        "examples": rows[:EXAMPLES],
        "problems": problems,
    }


def _read(read: Any, problems: list[str], otherwise: Any) -> Any:
    try:
        return read()
    except CotuneError as error:
        problems.append(str(error))
        return otherwise


def curves(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One learning curve per stage, kind of event and number that comes more than once, in order of time.

    Candidates that were dropped early are left out: their score is over fewer examples.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        name = f"{event.get('kind')} {event.get('training', '')}".strip()
        for key, value in event.items():
            wanted = key in _CURVES or key.endswith("loss")
            if wanted and not event.get("dropped") and isinstance(value, int | float):
                found.setdefault((str(event.get("stage", "")), name, key), []).append(float(value))
    return [
        {"stage": stage, "kind": kind, "key": key, "values": values}
        for (stage, kind, key), values in found.items()
        if len(values) > 1
    ]


def arms(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Candidates of a bandit with their mean utility at N = 1, 2, ... (null: never seen), and the N that was chosen."""
    chosen = {e.get("stage"): e.get("samples") for e in events if e.get("kind") == "policy" and "learner" in e}
    return [
        {
            "stage": str(e.get("stage", "")),
            "prompt": e.get("text"),
            "utility": e.get("utility", []),
            "chosen": chosen.get(e.get("stage")) if e.get("chosen") else None,
        }
        for e in events
        if e.get("kind") == "arm"
    ]


def text(told: Mapping[str, Any]) -> str:
    """The story for a terminal, every foreign character made harmless."""
    lines = [f"{told['run']}: {told['status']}" + (f" ({told['reason']})" if told["reason"] else "")]
    if told["status"] == "done":
        lines += summary_lines(told["summary"])  # its notes have the warnings
    else:
        lines += [f"  note: {warning}" for warning in told["warnings"]]
    lines += ["", "settings that differ from the defaults"]
    lines += [f"  {key} = {value}" for key, value in told["changed"].items()]
    if told["curves"]:
        lines += ["", "learning curves"]
    for curve in told["curves"]:
        values = curve["values"]
        name = " ".join(filter(None, (curve["stage"], curve["kind"], curve["key"])))
        ends = f"{values[0]:.4g} -> {values[-1]:.4g}, {len(values)} values"
        lines.append(f"  {name:<32} {sparkline(values)}  {ends}")
    lines += ["", *_arms(told["arms"])] if told["arms"] else []
    lines += ["", *_tuned(told["tuned"])]
    if told["examples"]:
        lines += ["", f"first {len(told['examples'])} test rows"]
    for row in told["examples"]:
        lines.append(f"  {row.get('outcome', '?'):<9} {short(row.get('id'), 24)}")
        lines.append(f"    reference   {short(row.get('reference'), 100)}")
        lines.append(f"    prediction  {short('' if row.get('prediction') is None else row['prediction'], 100)}")
        lines.append(f"    completion  {short(row.get('completion'), 100)}")
        if not told["tuned"] or told["tuned"].get("kind") != "fixed":
            lines.append(f"    prompt      {short(row.get('instruction'), 100)}")
        if row.get("note"):
            lines.append(f"    note        {short(row['note'], 100)}")
    lines += ["", *(f"problem: {p}" for p in told["problems"])] if told["problems"] else []
    return "\n".join(clean(line) for line in lines) + "\n"


def _arms(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """N = 1, 2, 4, ..., the largest and the chosen; * marks the best candidate of a column, > the chosen one."""
    largest = max(len(arm["utility"]) for arm in arms)
    powers = {2**i for i in range(largest.bit_length())}
    columns = sorted(powers | {largest} | {arm["chosen"] for arm in arms if arm["chosen"]})
    best = {n: max((u for arm in arms if (u := _at(arm, n)) is not None), default=None) for n in columns}
    lines = ["arms: mean utility by number of samples (* best of its column, > chosen)"]
    lines.append("  " + "".join(f"{f'N = {n}':>9}" for n in columns))
    for arm in arms:
        cells = ["" if (u := _at(arm, n)) is None else f"{u:.3f}{'*' if u == best[n] else ' '}" for n in columns]
        what = "what was at hand" if arm["prompt"] is None else short(arm["prompt"], 80)
        chosen = f"  (N = {arm['chosen']})" if arm["chosen"] else ""
        lines.append(("> " if chosen else "  ") + "".join(f"{cell:>9}" for cell in cells) + f"  {what}{chosen}")
    return lines


def _at(arm: Mapping[str, Any], n: int) -> float | None:
    return arm["utility"][n - 1] if n <= len(arm["utility"]) else None


def _tuned(tuned: Mapping[str, Any] | None) -> list[str]:
    if not tuned:
        return ["nothing tuned was saved"]
    prompt = tuned.get("prompt")
    if not isinstance(prompt, Mapping):
        branches = tuned.get("branches")
        off = isinstance(branches, Mapping) and branches.get("adapter") == "off"
        made = "a prompt" if off else "a prompt and an adapter"
        static = ", one adapter for all" if tuned.get("adapter") else ""
        return [f"tuned: {tuned.get('kind')}, {made} generated for each example{static}"]
    lines = ["tuned prompt" + (" (with an adapter)" if tuned.get("adapter") else "")]
    lines += [f"  {line}" for line in str(prompt.get("instruction", "")).split("\n")]
    for demo in prompt.get("demonstrations") or ():
        lines += [f"  demonstration: {short(demo.get('question'), 100)}", f"    -> {short(demo.get('answer'), 100)}"]
    return lines
