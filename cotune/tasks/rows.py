"""Rows out of files and off the hub, as dictionaries with the file and line each came from.

Knows file formats, not tasks: which columns a row needs is passed in. Every unreadable input is a DataError that
names the file, the line and the fix. Nothing is executed: no loader scripts, no pickle.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from cotune.errors import DataError
from cotune.tasks.base import HubSource

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
_MAX_FIELD = 2**27  # characters in one CSV field

Row = dict[str, Any]


def split_file(source: Path, task: str, split: str) -> Path | None:
    """The file of one split in `source/<task>/` where that folder exists, else in `source/`; None without one.

    Raises DataError when the folder is missing, or when the split is there in two formats or an unknown one.
    """
    if not source.is_dir():
        raise DataError(f"There is no data folder {source}; pass one with --data that holds {task}/train.jsonl.")
    folder = source / task if (source / task).is_dir() else source
    named = sorted(p for p in folder.iterdir() if p.is_file() and p.name.split(".")[0] == split)
    known = [p for p in named if p.name.removeprefix(split) in SUFFIXES]
    if len(known) > 1:
        raise DataError(f"{folder} holds {' and '.join(p.name for p in known)}; keep one file for each split.")
    if named and not known:
        raise DataError(f"{named[0]} has an unknown format; use one of {', '.join(SUFFIXES)}.")
    return known[0] if known else None


def read_file(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of one file, each with all of `columns`. Raises DataError."""
    rows = _parquet(path) if path.suffix == ".parquet" else _csv(path) if path.suffix == ".csv" else _jsonl(path)
    return _with(columns, rows, str(path))


def read_lines(lines: Iterable[str], name: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of JSON lines from elsewhere, each with all of `columns`. Raises DataError."""
    try:
        yield from _with(columns, json_lines(lines, name), name)
    except UnicodeDecodeError as failure:
        raise DataError(f"{name} is not UTF-8 ({failure.reason}); is it text?") from failure


def _with(columns: Sequence[str], rows: Iterable[tuple[str, Row]], name: str) -> Iterator[Row]:
    empty = True
    for place, row in rows:
        missing = [c for c in columns if c not in row]
        if missing:
            raise DataError(
                f"{place} lacks {', '.join(map(repr, missing))}; the task needs the columns {', '.join(columns)}"
                f" and the row has {', '.join(map(str, row)) or 'none'}."
            )
        empty = False
        yield row
    if empty:
        raise DataError(f"{name} holds no rows; give it at least one or remove the file.")


def read_hub(source: HubSource, split: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of one split from the hub at its pinned revision, through the local cache. Raises DataError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    for name in source.files[split]:
        try:
            path = hf_hub_download(source.repo, name, repo_type="dataset", revision=source.revision)
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as failure:
            raise DataError(
                f"{source.repo} could not be fetched from the hub ({type(failure).__name__}); go online,"
                f" or pass a local folder of rows with --data DIR."
            ) from failure
        yield from read_file(Path(path), columns)


def json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[str, Row]]:
    """(place, object) of each line that is not blank. Raises DataError with the line number."""
    for count, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as failure:
            raise DataError(f"{name} line {count} is not JSON ({failure}); is the file cut off?") from None
        if not isinstance(row, dict):
            raise DataError(f"{name} line {count} is not a JSON object; each line must be one row.")
        yield f"{name} line {count}", row


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with _open_text(path) as file:
            yield from json_lines(file, str(path))
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as failure:
        raise DataError(f"{path} cannot be read ({failure}); is the file cut off? Copy it again.") from failure


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(_MAX_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path} line {reader.line_num} has more or fewer fields than the header.")
                yield f"{path} line {reader.line_num}", row
    except (csv.Error, UnicodeDecodeError) as failure:
        raise DataError(f"{path} cannot be read as CSV ({failure}); is the file cut off?") from failure


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        count = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    count += 1
                    yield f"{path} row {count}", row
    except (pyarrow.ArrowException, OSError) as failure:
        raise DataError(f"{path} cannot be read as parquet ({failure}); is the file cut off?") from failure
