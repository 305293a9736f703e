"""What a report shows beside the numbers: answers, prompts and provenance, read from run folders.

Reads the files of record.py and nothing else: no model, no benchmark rows. A file that is damaged or missing gives
nothing and is named in `problems`, never an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.compare.escape import clean
from cotune.compare.runs import Run, rows_of
from cotune.compare.tables import Group
from cotune.errors import CotuneError
from cotune.record import read_json

LONGEST = 2000  # characters of a completion, an instruction or a reference that a report keeps
ROOM = 20_000_000  # characters of different texts in one report; beyond it, runs keep their grades alone
DEMONSTRATIONS = 5
GENERATED = 3  # most frequent prompts shown of a run that writes one for each example


@dataclass(frozen=True)
class Wording:
    """The prompt of a run. `share`: of how many answers it is the prompt, "" when of all."""

    text: str
    share: str = ""
    demonstrations: tuple[tuple[str, str], ...] = ()


def cut(text: Any) -> str:
    """Clean text of at most `LONGEST` characters, saying where it was cut."""
    whole = "" if text is None else str(text)
    kept = clean(whole[:LONGEST], newlines=True)
    return kept if len(whole) <= LONGEST else f"{kept}\n… cut: {len(whole):,} characters in all"


def json_of(path: Path) -> Mapping[str, Any]:
    """An object, empty when the file is missing or damaged."""
    try:
        value = read_json(path)
    except (CotuneError, OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def seed_prompt(group: Group) -> str | None:
    """The instruction that every strategy began with: from what was saved, else from answers of the seed prompt."""
    done = [run for row in group.rows for run in row.runs if run.status == "done"]
    for run in done:
        told = json_of(run.folder / "tuned" / "tuned.json")
        start = told.get("seed") if told.get("kind") != "fixed" else None
        start = told.get("prompt") if run.strategy == "zero-shot" else start
        if isinstance(start, Mapping) and isinstance(start.get("instruction"), str):
            return str(start["instruction"])
    asked = next((run.config.get("seed_instruction") for run in done), None)
    if isinstance(asked, str):
        return asked
    for run in done:
        name = "predictions.jsonl" if run.strategy == "zero-shot" else "crossed.jsonl"
        for row in rows_of(run, name, []):
            if str(row.get("cell", "seed")).startswith("seed") and isinstance(row.get("instruction"), str):
                return str(row["instruction"])
    return None


def prompts(run: Run, problems: list[str]) -> list[Wording]:
    """The prompt that was tuned; of a run that writes one for each example, the most frequent."""
    told = json_of(run.folder / "tuned" / "tuned.json")
    fixed = told.get("prompt")
    if isinstance(fixed, Mapping) and isinstance(fixed.get("instruction"), str):
        demos = [d for d in fixed.get("demonstrations") or () if isinstance(d, Mapping)]
        shown = [(cut(d.get("question")), cut(d.get("answer"))) for d in demos]
        return [Wording(cut(fixed["instruction"]), "", tuple(shown))]
    rows = rows_of(run, "predictions.jsonl", problems)
    counted = Counter(str(row["instruction"]) for row in rows if row.get("instruction") is not None)
    total = sum(counted.values())
    often = sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:GENERATED]
    return [Wording(cut(text), "" if n == total else f"{n} of {total} examples") for text, n in often]


def examples(group: Group, problems: list[str]) -> dict[str, Any] | None:
    """Every test example with every run's answer to it, in columns; None without a finished run.

    `texts` holds each different text once; prediction, completion, prompt (the instruction) and note of a run are
    columns of indices into it, or None where the texts did not fit into `ROOM` (later seeds go first). `outcome` has
    a letter for each example: c, w, t, e, or ? for another.
    """
    rows = [row for row in group.rows if row.arm is not None]
    if not rows:
        return None
    ids = list(rows[0].runs[0].scores)
    texts: dict[str, int] = {}
    room = ROOM
    columns: dict[tuple[int, int], dict[str, Any]] = {}
    references: list[int | None] = [None] * len(ids)
    order = sorted(
        ((place, at, run) for at, row in enumerate(rows) for place, run in enumerate(_by_seed(row.runs))),
        key=lambda found: found[:2],
    )
    for place, at, run in order:
        found = {str(r.get("id")): r for r in rows_of(run, "predictions.jsonl", problems)}
        answers = [found.get(i, {}) for i in ids]
        kept: dict[str, list[int] | None] = {}
        if room > 0:
            before = len(texts)
            for ours, name in _TEXTS:
                kept[ours] = [texts.setdefault(cut(a.get(name)), len(texts)) for a in answers]
            references = [
                texts.setdefault(cut(a.get("reference")), len(texts)) if known is None else known
                for a, known in zip(answers, references, strict=True)
            ]
            room -= sum(len(text) for text in list(texts)[before:])
        else:
            kept = dict.fromkeys((ours for ours, _ in _TEXTS), None)
            problems.append(f"{run.name}: grades only in the example browser; its texts would make the file too large.")
        scores = [run.scores[i] for i in ids]
        columns[at, place] = {
            "row": at,
            "seed": run.seed,
            "run": clean(run.name),
            "outcome": "".join(_letter(a.get("outcome")) for a in answers),
            "score": None if all(s in (0, 1) for s in scores) else [round(s, 4) for s in scores],
            "right": "".join("1" if s == 1 else "0" for s in scores),
            **kept,
        }
    return {
        "title": clean(f"{group.task} · {group.model} · {group.engine}"),
        "metric": clean(group.metric),
        "rows": [clean(row.strategy) for row in rows],
        "ids": [clean(i) if len(i) <= 200 else clean(i[:200]) + "…" for i in ids],
        "references": references,
        "runs": [columns[key] for key in sorted(columns)],
        "texts": list(texts),
    }


_TEXTS = (("prediction", "prediction"), ("completion", "completion"), ("prompt", "instruction"), ("note", "note"))


def _by_seed(runs: Sequence[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: (run.seed if isinstance(run.seed, int) else 0, run.name))


def _letter(outcome: Any) -> str:
    return str(outcome)[0] if outcome in ("correct", "wrong", "truncated", "errored") else "?"
