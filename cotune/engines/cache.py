"""Generations kept across runs in one SQLite file: what an engine made once is not made again.

A completion is found by everything it depends on: the engine with its versions and settings, the model's weights, the
adapter's content, the prompt's token ids, the decoding, the index of the sample, and, where the rows of a batch move
each other's last bits, the whole batch. So a hit has the bytes that generating again would have, and whatever is not
surely the same is a miss. Holds JSON, nothing that could run; deleting the file is always safe.

Several processes may use one file. Trouble with it in the middle of a run (a full disk, a lock held for a minute) costs
the cache, not the run. Knows nothing of budgets: the bench books a hit as if it had been generated.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from cotune.engines.base import Engine, Request, Sampling
from cotune.errors import UsageError
from cotune.values import full_digest

logger = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds to wait for another process that writes
_AT_ONCE = 500  # keys of one query; SQLite's own limit is higher in every version
_SOURCES = ("engines", "models")  # whose code decides what a completion is


class GenerationCache:
    """Raises UsageError when the file cannot be opened or is something else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._broken = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=_PATIENCE)
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS completions (key TEXT PRIMARY KEY, row TEXT NOT NULL)")
                self._file.execute("SELECT key, row FROM completions LIMIT 0")
        except (OSError, sqlite3.Error) as error:
            raise UsageError(
                f"{path} cannot be used as a cache ({error}). Give --cache another file, or delete this one if it is a "
                "damaged cache."
            ) from error

    def get(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What is kept under these keys. A row that cannot be read is taken out: a miss."""
        found: dict[str, dict[str, Any]] = {}
        try:
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                query = f"SELECT key, row FROM completions WHERE key IN ({', '.join('?' * len(some))})"
                for key, text in () if self._broken else self._file.execute(query, some).fetchall():
                    if (row := _read(text)) is None:
                        with self._file:
                            self._file.execute("DELETE FROM completions WHERE key = ?", (key,))
                    else:
                        found[key] = row
        except sqlite3.Error as error:
            self._give_up(error)
        return found

    def put(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep rows, all or none. Of two processes that made the same, the first one's stays."""
        texts = [(key, json.dumps(row, ensure_ascii=False)) for key, row in rows.items()]
        try:
            if not self._broken:
                with self._file:
                    self._file.executemany("INSERT OR IGNORE INTO completions VALUES (?, ?)", texts)
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> None:
        self._broken = True
        logger.warning("The cache %s fails (%s): this run goes on without it.", self._path, error)


def _read(text: Any) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (TypeError, ValueError):
        return None
    return row if isinstance(row, dict) and "completion" in row else None


def completion_keys(
    engine: Engine, weights: Sequence[str], contents: Sequence[Any], requests: Sequence[Request], sampling: Sampling
) -> list[list[str]]:
    """The key of each sample of each request of one batch.

    `weights` says which model answers (digest, and a version where they change in memory), `contents` what each prompt
    is to it: its token ids. A greedy answer does not depend on seed, top_p or index.
    """
    greedy = sampling.temperature == 0
    how = asdict(replace(sampling, n=1, seed=0, top_p=1.0) if greedy else replace(sampling, n=1))
    contents = [[ids, r.adapter.digest if r.adapter else None] for ids, r in zip(contents, requests, strict=True)]
    beside = None
    if not engine.rows_apart:
        beside = full_digest([contents, [r.first for r in requests], sampling.n])
        contents = [[*content, place] for place, content in enumerate(contents)]
    common = full_digest([engine.identity(), list(weights), how, beside, source_digest()])
    draws = [[0] * sampling.n if greedy else range(r.first, r.first + sampling.n) for r in requests]
    return [
        [full_digest([common, content, sample]) for sample in samples]
        for content, samples in zip(contents, draws, strict=True)
    ]


@cache
def source_digest() -> str:
    """Of cotune's own code that generates: a completion of another version of it is a miss."""
    package = Path(__file__).parent.parent
    files = sorted(file for room in _SOURCES for file in (package / room).rglob("*.py"))
    return full_digest([[str(file.relative_to(package)), file.read_text(encoding="utf-8")] for file in files])
