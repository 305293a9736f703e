"""Rows -> examples -> disjoint train, val and test; and the checks of a data folder and of others' completions.

Rows come from a local folder, from the hub, or from an offline task's own generator. Two splits share a row when
question and context are the same up to case and whitespace; a row is a duplicate within its split when its choices
and reference are the same too (CosmosQA asks some questions again with other choices: both count). Which rows are
taken is decided by a hash of seed and content, so it depends neither on the order nor on the format of the file,
and a bigger limit only adds rows. Knows nothing of models or strategies; `Dataset` gives the test examples only
when asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from cotune.errors import DataError
from cotune.tasks.base import Task, UnusableRow
from cotune.tasks.rows import Row, json_lines, read_file, read_hub, split_file
from cotune.values import Example, Outcome, digest

SPLITS = ("train", "val", "test")
VAL_FRACTION = 0.2  # of train, where there is no val file
VAL_MAX = 500
GENERATED = {"train": 2000, "val": 500, "test": 500}  # rows of an offline task without a limit
# The rows of an offline task and the choice of test rows never change with the run's seed, so that runs with
# different seeds are measured on the same examples.
FIXED_SEED = 0


@dataclass(frozen=True)
class SplitReport:
    """What one split of the source holds. `rows` counts all, `usable` what is left without unusable and repeated."""

    split: str
    rows: int
    usable: int
    unusable: tuple[tuple[str, str], ...]
    duplicates: int
    digest: str


@dataclass(frozen=True)
class Report:
    """`overlap` counts the rows left out because they are in a split that matters more: `train in test` ..."""

    splits: tuple[SplitReport, ...]
    overlap: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """What a run tunes on, and `test()`, which reads the test examples anew each time (raises DataError)."""

    task: str
    train: tuple[Example, ...]
    val: tuple[Example, ...]
    report: Report
    test: Callable[[], tuple[Example, ...]]


def load(
    task: Task,
    source: str | Path | None = None,
    *,
    seed: int = 0,
    limit_train: int | None = None,
    limit_val: int | None = None,
    limit_test: int | None = None,
    val_fraction: float = VAL_FRACTION,
    val_max: int = VAL_MAX,
) -> Dataset:
    """Train and val of `task` from a folder, or from the hub or the task's generator when `source` is None.

    Val is the val file, or else `val_fraction` of train (at most `val_max`), chosen by `seed` before `limit_train`
    applies. Train rows that are in val or test, and val rows that are in test, are left out and counted. A limit
    above what is there takes all of it, with a warning. Raises DataError for anything that cannot be read.
    """
    limits = {"train": limit_train, "val": limit_val, "test": limit_test}
    read = {split: _read(task, source, split, limits[split]) for split in SPLITS}
    if read["train"] is None and (limit_train, limit_val) != (0, 0):
        raise DataError(
            f"{source} holds no train file for {task.name}; add train.jsonl (or .jsonl.gz, .csv, .parquet)."
        )
    reports = tuple(split.report for split in read.values() if split)
    warnings: list[str] = []
    test_keys = {_key(e) for e in read["test"].examples} if read["test"] else set()
    test_size = len(read["test"].examples) if read["test"] else 0
    if read["test"] is None:
        warnings.append("There is no test split.")
    overlap: dict[str, int] = {}

    def without(split: str, examples: Sequence[Example], other: str, keys: set[str]) -> list[Example]:
        kept = [e for e in examples if _key(e) not in keys]
        if len(kept) < len(examples):
            overlap[f"{split} in {other}"] = len(examples) - len(kept)
        return kept

    train = without("train", read["train"].examples if read["train"] else (), "test", test_keys)
    if read["val"]:
        val = _ranked(without("val", read["val"].examples, "test", test_keys), seed)
        train = _ranked(without("train", train, "val", {_key(e) for e in val}), seed)
    else:
        ranked = _ranked(train, seed)
        size = min(val_max, round(val_fraction * len(ranked)))
        while 0 < size < len(ranked) and _key(ranked[size]) == _key(ranked[size - 1]):
            size += 1  # the same question with other choices stays on one side
        val, train = ranked[:size], ranked[size:]

    def limited(split: str, available: int) -> int:
        limit = limits[split]
        if limit is not None and limit > available:
            warnings.append(f"{limit} {split} examples were asked for, there are {available}; all are used.")
        return available if limit is None else min(limit, available)

    train, val = train[: limited("train", len(train))], val[: limited("val", len(val))]
    size = limited("test", test_size)

    def test() -> tuple[Example, ...]:
        split = _read(task, source, "test", limit_test)
        if split is None:
            raise DataError(
                f"{source} holds no test file for {task.name}; add test.jsonl (or .jsonl.gz, .csv, .parquet)."
            )
        return tuple(_ranked(split.examples, FIXED_SEED)[:size])

    return Dataset(task.name, tuple(train), tuple(val), Report(reports, overlap, tuple(warnings)), test)


def content_digest(examples: Iterable[Example]) -> str:
    """Content address of examples, in order and with everything in them."""
    return digest([asdict(e) for e in examples])


def check(task: Task, source: str | Path | None = None) -> dict[str, Any]:
    """What `cotune data check` reports: each split that is there, the overlap, and how many references grade correct.

    Raises DataError when a file cannot be read or no split is there.
    """
    read = {split: _read(task, source, split, None) for split in SPLITS}
    found = {name: split for name, split in read.items() if split}
    if not found:
        raise DataError(f"{source} holds no rows for {task.name}; add {task.name}/test.jsonl (or .csv, .parquet).")
    splits = {}
    for name, split in found.items():
        report = split.report
        parsed = [*split.examples, *split.repeated]
        wrong = [e.id for e in parsed if task.grade(e, task.reference_completion(e)).outcome is not Outcome.CORRECT]
        splits[name] = {
            "rows": report.rows,
            "usable": report.usable,
            "digest": report.digest,
            "duplicates": report.duplicates,
            "unusable": len(report.unusable),
            "unusable_rows": [{"id": row_id, "reason": reason} for row_id, reason in report.unusable],
            "references_correct": len(parsed) - len(wrong),
            "references_wrong": wrong,
        }
    keys = {name: {_key(e) for e in split.examples} for name, split in found.items()}
    pairs = [(a, b) for i, a in enumerate(found) for b in list(found)[i + 1 :]]
    return {"task": task.name, "splits": splits, "overlap": {f"{a}/{b}": len(keys[a] & keys[b]) for a, b in pairs}}


def grade_rows(task: Task, lines: Iterable[str], name: str = "input") -> Iterator[dict[str, Any]]:
    """Grade completions made by any other tool, one JSON row a line, in order (`cotune grade`).

    A row has `reference` (a bare answer or the whole official one) and `completion`; for CosmosQA also `choices`;
    optionally `id` and `truncated`. Raises DataError with the line number.
    """
    for place, row in json_lines(lines, name):
        missing = [c for c in ("reference", "completion") if row.get(c) is None]
        if missing:
            raise DataError(f"{place} lacks {' and '.join(missing)}; each row needs reference and completion.")
        choices = tuple(map(str, row.get("choices") or ()))
        if "label" in task.columns and len(choices) != 4:
            raise DataError(f"{place} has {len(choices)} choices; each row needs the four as a list.")
        if not isinstance(row["completion"], str):
            raise DataError(f"{place} has a completion that is not text; it must be a string.")
        try:
            reference = task.read_reference(str(row["reference"]), choices)
        except UnusableRow as reason:
            raise DataError(f"{place} cannot be graded: {reason}.") from None
        example = Example(str(row.get("id", "")), "", reference, choices=choices)
        grade = task.grade(example, row["completion"], bool(row.get("truncated", False)))
        graded = {"id": row["id"]} if "id" in row else {}
        graded |= {"outcome": grade.outcome.value, "prediction": grade.prediction, "score": grade.score}
        yield graded | {"metrics": dict(grade.metrics)} | ({"note": grade.note} if grade.note else {})


# --- reading one split ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    examples: tuple[Example, ...]
    repeated: tuple[Example, ...]
    report: SplitReport


def _read(task: Task, source: str | Path | None, split: str, limit: int | None) -> _Split | None:
    """One split of the source, parsed; None when the source has no such split."""
    if source is None and hasattr(task, "generate_rows"):
        return _generated(type(task), split, max(limit or 0, GENERATED[split]))
    rows = _rows(task, source, split)
    return None if rows is None else _parsed(task, rows, split)


@lru_cache(maxsize=16)  # a study plans and runs hundreds of configs on the same generated rows
def _generated(kind: Callable[[], Task], split: str, count: int) -> _Split:
    task: Any = kind()
    return _parsed(task, task.generate_rows(split, count, FIXED_SEED), split)


def _parsed(task: Task, rows: Iterable[Row], split: str) -> _Split:
    examples: dict[str, Example] = {}
    unusable: list[tuple[str, str]] = []
    ids: set[str] = set()
    repeated: list[Example] = []
    count = 0
    for count, row in enumerate(rows, 1):
        row_id = f"{split}-{count - 1}"
        try:
            example = task.parse(row, row_id)
            key = _key(example, whole=True)
        except UnusableRow as reason:
            unusable.append((row_id, str(reason)))
            continue
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as failure:
            unusable.append((row_id, f"the row cannot be read ({type(failure).__name__}: {failure})"[:200]))
            continue
        if key in examples:
            repeated.append(example)
            continue
        if example.id in ids:  # another row's identifier: records need unique ones
            example = Example(**asdict(example) | {"id": f"{example.id}#{row_id}"})
        ids.add(example.id)
        examples[key] = example
    kept = tuple(examples.values())
    report = SplitReport(split, count, len(kept), tuple(unusable), len(repeated), content_digest(kept))
    return _Split(kept, tuple(repeated), report)


def _rows(task: Task, source: str | Path | None, split: str) -> Iterable[Row] | None:
    if source is not None:
        path = split_file(Path(source), task.name, split)
        return read_file(path, task.columns) if path else None
    if task.hub is None:
        raise DataError(f"The task {task.name} has no rows of its own; pass a folder with --data DIR.")
    return read_hub(task.hub, split, task.columns) if split in task.hub.files else None


def _key(example: Example, whole: bool = False) -> str:
    """What makes two rows the same: question and context, `whole` also choices and reference, up to case and space.

    Raises ValueError for a lone surrogate, which no file or tokenizer takes.
    """
    parts = [example.question, example.context]
    if whole:
        parts += [*example.choices, example.reference]
    text = "\n".join(" ".join(part.casefold().split()) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()


def _ranked(examples: Sequence[Example], seed: int) -> list[Example]:
    """In an order that only seed and content decide."""

    def rank(example: Example) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}/{_key(example)}".encode()).digest(), _key(example, whole=True)

    return sorted(examples, key=rank)
