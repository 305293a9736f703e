"""The card of a bundle, its README.md: what it is, ten lines that use it, data, scores, costs, remarks, licences.

Says what the run folder recorded and nothing else. Text of models and rows stands in fences that it cannot close; it is
never Markdown of ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.bundle import Aggregate, Bundle, Model
from cotune.cells import LEVERS
from cotune.compare.escape import clean, markdown
from cotune.compare.stats import Estimate, compare_paired, mean_score
from cotune.models.registry import MODELS
from cotune.record import read_json, read_rows
from cotune.revision import KEPT
from cotune.tasks.base import Task
from cotune.values import of_n
from cotune.wording import cost_lines

_UNKNOWN = "not known to cotune; look at the model's own page"


def card(run: Path, bundle: Bundle, task: Task, report: Mapping[str, Any], adapter: bool) -> str:
    """Markdown. `run` is the run folder, `report` what `export` returns, `adapter` whether there is one."""
    summary, data, joint = read_json(run / "summary.json"), read_json(run / "data.json"), bool(report["joint"])
    parts = [
        [f"# {_plain(bundle.run)}", "", _what(bundle, adapter, joint, read_json(run / "tuned" / "tuned.json"))],
        ["## Use it", "", *_use(bundle, adapter, joint)],
        ["## Prompt", "", *_prompt(bundle, joint)],
        ["## Score", "", *_scores(run, summary, data)],
        *([["## One prompt and adapter for all", "", *_static(report)]] if report["per_example"] else []),
        ["## Data", "", *_data(data, task)],
        ["## Cost", "", _fence("\n".join(line.strip() for line in cost_lines(summary)))],
        ["## Remarks", "", *([_fence("\n".join(notes))] if (notes := summary["notes"]) else ["None."])],
        ["## Licences", "", *_licences(bundle, data, task)],
        ["## Made by", "", *_made_by(bundle)],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _what(bundle: Bundle, adapter: bool, joint: bool, tuned: Mapping[str, Any]) -> str:
    model, task = _plain(bundle.model.name), _plain(bundle.task)
    made = f"What `cotune` tuned of {model} for {task} by the strategy {_plain(bundle.strategy)}"
    if joint and not adapter:
        return (
            f"{made}: a generator that writes a prompt for every question (`generator/`), and its static "
            "approximation, one prompt for all (`tuned.json`)."
        )
    if joint and tuned.get("adapter"):
        return (
            f"{made}: a generator that writes a prompt for every question (`generator/`) and one LoRA adapter for all "
            "(`adapter/`); and the static approximation of the prompts, one for all (`tuned.json`)."
        )
    if joint:
        return (
            f"{made}: a generator that writes a prompt and makes a LoRA adapter for every question (`generator/`), and "
            "its static approximation, one prompt and one adapter for all (`tuned.json`, `adapter/`)."
        )
    return f"{made}: a prompt (`tuned.json`){' and a LoRA adapter (`adapter/`)' if adapter else ''}."


def _use(bundle: Bundle, adapter: bool, joint: bool) -> list[str]:
    lines = [
        "With cotune, which applies prompt and adapter itself and refuses another base model:",
        "",
        "    cotune serve DIR                                       # an OpenAI-compatible endpoint on loopback",
        "    cotune predict DIR --input rows.jsonl --output out.jsonl",
        "",
    ]
    if bundle.plan.aggregate or bundle.plan.by_difficulty:
        lines += [*_aggregate(bundle), ""]
    if bundle.model.digest is None:
        return [*lines, "Anything else: send the messages of `bundle.json` to the model's own server."]
    static = " (of the static approximation: what is made for each question needs cotune)" if joint else ""
    return [
        *lines,
        f"With transformers{' and peft' if adapter else ''} alone{static}, in this folder:",
        "",
        _fence(ten_lines(bundle, adapter), "python"),
        "",
        "`sha256sum -c SHA256SUMS` says whether all files are the exported ones.",
    ]


def _aggregate(bundle: Bundle) -> list[str]:
    one, several = bundle.plan.aggregate, bundle.plan.by_difficulty
    if several:
        one, by = several.plans[0], "how far they agree"
        if several.scorer:
            by = f"their mean {_plain(several.scorer)}"
        each = ", ".join(f"bin {b + 1} with {_said(plan)}" for b, plan in enumerate(several.plans))
        what = (
            f"by difficulty: the first {several.probe} completions of a question put it into a bin by {by}, and of the "
            f"bins, easiest first, they answer {each}. All are"
        )
    else:
        assert one is not None
        what = f"with {_said(one)},"
    return [
        f"They answer {what} drawn at temperature {one.temperature:g} and top_p {one.top_p:g}. Anything else gives one "
        "completion, which is not what was measured."
    ]


def _said(plan: Aggregate) -> str:
    by = f" by {_plain(plan.scorer)}" if plan.scorer else ""
    rows = f" in chains of {plan.chain}, each in sight of the latest {KEPT} before it" if plan.chain > 1 else ""
    return f"{of_n(plan.aggregation, plan.samples)} completions{rows}{by}"


def ten_lines(bundle: Bundle, adapter: bool) -> str:
    """Imports, then ten lines (nine without an adapter) that answer one question as `cotune predict` does."""
    packaged = bundle.model.source.startswith("package:")
    base = json.dumps(bundle.model.source)
    if packaged:
        base = f'importlib.resources.files("cotune") / "models/tiny/{bundle.model.source.partition(":")[2]}"'
    at = f', revision="{bundle.model.revision}"' if bundle.model.revision else ""
    values = ", ".join(f'{field}="..."' for field in bundle.chat.fields)
    plan = bundle.plan
    drawn = f"do_sample=True, temperature={plan.temperature}, top_p={plan.top_p}, top_k=0"
    decoding = (
        f"{drawn if plan.temperature else 'do_sample=False'}, max_new_tokens={plan.max_new_tokens}, "
        f"eos_token_id={list(plan.stop_ids)}, pad_token_id={plan.stop_ids[0]}"
    )
    return "\n".join(
        [
            f"import {'importlib.resources, ' if packaged else ''}json, pathlib, string",
            f"import {'peft, ' if adapter else ''}transformers",
            "",
            'bundle = json.loads(pathlib.Path("bundle.json").read_text(encoding="utf-8"))',
            f"base = {base}",
            f"tokenizer = transformers.AutoTokenizer.from_pretrained(base{at})",
            f'model = transformers.AutoModelForCausalLM.from_pretrained(base{at}, dtype="{bundle.model.dtype}")',
            *(['model = peft.PeftModel.from_pretrained(model, "adapter")'] if adapter else []),
            f"model.generation_config = transformers.GenerationConfig({decoding})",
            '*turns, last = bundle["chat"]["messages"]',
            f'turns.append({{**last, "content": string.Template(last["content"]).substitute({values})}})',
            'ids = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt", '
            '**bundle["chat"]["arguments"])',
            'print(tokenizer.decode(model.generate(**ids)[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _prompt(bundle: Bundle, joint: bool) -> list[str]:
    lines = ["Of the static approximation:", ""] if joint else []
    lines.append(_fence(clean(bundle.prompt["instruction"], newlines=True)))
    for shown in bundle.prompt["demonstrations"]:
        lines += ["", "Shown before the question:", "", _fence(clean(shown["question"], newlines=True))]
        lines += ["", _fence(clean(shown["answer"], newlines=True))]
    return lines


def _scores(run: Path, summary: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    """The run's score and, where it has the 2x2, the other cells with the difference to them."""
    split = next(name for name in reversed(data["used"]) if name in ("test", "val"))
    ours = _by_id(read_rows(run / "predictions.jsonl"))
    cells: dict[str, dict[str, float]] = {}
    for row in read_rows(run / "crossed.jsonl"):
        cells.setdefault(row["cell"], {})[row["id"]] = row["score"]
    lines = [
        f"{_plain(summary['headline'])} on {split}, n = {len(ours)}, in percent with 95% intervals"
        + (" (the difference paired by example):" if cells else ":"),
        "",
        "| prompt / weights | score |" + (" this run minus it |" if cells else ""),
        "| --- | --- |" + (" --- |" if cells else ""),
        f"| this run | {_percent(mean_score(list(ours.values())))} |" + ("  |" if cells else ""),
    ]
    for cell, scores in cells.items():
        other = [scores[i] for i in ours]
        lost = compare_paired(list(ours.values()), other).estimate
        settings = [f"{setting} {lever}" for setting, lever in zip(cell.split("/"), LEVERS, strict=False)]
        label = ", ".join(settings) + (" (zero-shot)" if "tuned" not in cell else "")
        lines.append(f"| {label} | {_percent(mean_score(other))} | {_percent(lost, '+')} |")
    if split == "val":
        lines += ["", "Val examples also choose what tuning keeps: expect less on new ones."]
    return lines


def _by_id(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {row["id"]: row["score"] for row in rows}


def _static(report: Mapping[str, Any]) -> list[str]:
    """What is lost by it, measured on val."""
    lines = [
        f"{_plain(report['metric'])} on {report['split']}, n = {report['n']}, in percent with 95% intervals. The same "
        "examples chose what tuning kept, which flatters all rows alike.",
        "",
        "| prompts and adapters | score | minus one for each question |",
        "| --- | --- | --- |",
    ]
    for row in (report["per_example"], *report["rows"]):
        name = "one for each question" if row["groups"] is None else str(row["groups"])
        lost = "" if row["difference"] is None else _percent(_estimate(row, "difference", report["n"]), "+")
        lines.append(f"| {name} | {_percent(_estimate(row, 'score', report['n']))} | {lost} |")
    return lines


def _estimate(row: Mapping[str, Any], key: str, n: int) -> Estimate:
    return Estimate(row[key], row[f"{key}_low"], row[f"{key}_high"], None, n)


def _percent(value: Estimate, sign: str = "") -> str:
    text = f"{100 * value.mean:{sign}.1f}"
    if value.low is None or value.high is None:
        return text
    return f"{text} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _data(data: Mapping[str, Any], task: Task) -> list[str]:
    lines = ["| split | rows | digest of the rows | used | digest of those |", "| --- | --- | --- | --- | --- |"]
    whole = {split["split"]: split for split in data["splits"]}
    for name, used in data["used"].items():
        rows = whole.get(name, {})
        lines.append(
            f"| {_plain(name)} | {rows.get('rows', '')} | {rows.get('digest', '')} | {used['n']} | {used['digest']} |"
        )
    if task.hub and data["source"] is None and not _generated(data, task):
        lines += ["", f"From the hub: {_plain(task.hub.repo)} at {task.hub.revision}."]
    return lines


def _licences(bundle: Bundle, data: Mapping[str, Any], task: Task) -> list[str]:
    lines = [f"- base model {_plain(bundle.model.name)}: {_licence(bundle.model)}"]
    if bundle.generator:
        lines.append(f"- generator {_plain(bundle.generator.name)}: {_licence(bundle.generator)}")
    rows = "have a licence of their own; look at the page of that data set"
    rows = "made by cotune itself" if _generated(data, task) else rows
    lines.append(f"- rows of {_plain(bundle.task)}: {rows}")
    return [*lines, "", "An adapter is made from the base model's weights: its licence may hold for the adapter too."]


def _generated(data: Mapping[str, Any], task: Task) -> bool:
    return data["source"] is None and hasattr(task, "generate_rows")


def _licence(model: Model) -> str:
    if model.source.startswith("package:"):
        return "packaged with cotune, Apache-2.0"
    listed = next((m for m in MODELS.values() if m.location == model.source), None)
    return f"cotune's list of models says: {_plain(listed.note)}" if listed else _UNKNOWN


def _made_by(bundle: Bundle) -> list[str]:
    model = bundle.model
    weights = f"weights {model.digest} in {model.dtype}" if model.digest else "behind a server, not verifiable"
    return [
        f"- cotune {bundle.cotune['version']}, commit {bundle.cotune['commit'] or 'unknown'}",
        f"- run {_plain(bundle.run)}, config {bundle.config_digest}",
        f"- base model {_plain(model.source)}, revision {model.revision or 'none'}, {weights}",
    ]


def _plain(text: object) -> str:
    """On one line and without a meaning in Markdown or HTML."""
    return markdown(clean(text))


def _fence(text: str, language: str = "") -> str:
    """`text` as it is, in a fence longer than any run of backticks in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
