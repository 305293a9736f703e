"""The cells that a run of several levers measures: every combination of levers seed and tuned, and what each is called.

Knows names alone: neither what a lever is nor what is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from cotune.errors import DataError

Cell = frozenset[str]  # the levers that are tuned in it
LEVERS = ("prompt", "weights", "plan")
_MEASURED = (LEVERS[:2], ("prompt", "plan"), ("weights", "plan"), LEVERS)


def cells(levers: Sequence[str]) -> Iterator[Cell]:
    """All 2^k cells in standard order: none, the first, the second, both, the third, ..."""
    for tuned in itertools.product((False, True), repeat=len(levers)):
        yield frozenset(lever for lever, t in zip(levers, reversed(tuned), strict=True) if t)


def named(levers: Sequence[str]) -> dict[str, Cell]:
    """Name -> cell, in standard order; the last, all tuned, is what the run hands over.

    A name says prompt and weights, "seed/base" to "tuned/tuned", and of a run that chose its inference plan the plan
    too, "seed/base/seed" to "tuned/tuned/tuned". A lever that was not turned stays "seed" or "base" in all of them.
    """
    said = LEVERS if "plan" in levers else LEVERS[:2]
    return {
        "/".join("tuned" if lever in tuned else "base" if lever == "weights" else "seed" for lever in said): tuned
        for tuned in cells(levers)
    }


def levers_of(names: Iterable[str]) -> tuple[str, ...]:
    """The levers whose cells, all of them or all but the last, have these names. Raises DataError when none have."""
    given = set(names)
    for levers in _MEASURED:
        every = list(named(levers))
        if given in (set(every), set(every[:-1])):
            return levers
    raise DataError(f"The cells {', '.join(sorted(given))} are not those of levers that a run can turn. Run it again.")
