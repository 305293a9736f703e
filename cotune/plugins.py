"""Name -> class tables, imported on demand and open to other packages through entry points.

A table maps a name to "module:attribute". Another package adds a name by declaring an entry point in the group
`cotune.<kind>` (cotune.tasks, cotune.strategies, cotune.engines, cotune.trackers).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from cotune.errors import UsageError


def nearest(word: str, known: Iterable[str]) -> str:
    """`. Did you mean 'x'?`, or the whole list when nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return ". Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return ". Known: " + ", ".join(known) + "."


def names(kind: str, table: Mapping[str, str]) -> dict[str, str]:
    """The table plus what installed packages add to it."""
    return dict(table) | _installed(kind)


@cache  # reading what is installed takes 20 ms and more, and a study asks for every run
def _installed(kind: str) -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group=f"cotune.{kind}")}


def resolve(kind: str, table: Mapping[str, str], name: str) -> Any:
    """The class behind `name`. Raises UsageError with the nearest names."""
    known = names(kind, table)
    if name not in known:
        what = kind.removesuffix("s").replace("_", " ")
        raise UsageError(f"There is no {what} {name!r}{nearest(name, known)}")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)
