"""What each lever does and what they do together, from scores with every combination of levers seed and tuned.

k levers make 2^k cells (cells.py); the 2x2 of prompt and weights is k = 2, with the inference plan k = 3. Nothing here
knows runs or files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from cotune.cells import LEVERS, Cell, cells
from cotune.compare.crossed import Arm, effect
from cotune.compare.stats import Finding, Floats
from cotune.errors import DataError


def contrast(scores: Mapping[Cell, Floats], levers: Sequence[str], of: Sequence[str]) -> Floats:
    """The effect of the levers `of` in each seed and on each example, [seeds, examples].

    Of one lever: tuned minus seed, averaged over all settings of the other levers (its main effect, not what it does
    alone). Of several: how much the effect of one grows when the other is tuned, and so on; the difference of
    differences that the 2x2 shows, for three levers the difference of two of those. Averaged over the levers left.
    `scores` [seeds, examples] of every cell, seeds and examples in one order; a cell's scores of one seed are those of
    the same run. Effects add up: all tuned - none = sum of the main effects + three-way / 4, for three levers.
    Raises DataError when a cell is missing, is of other levers, has another shape or a score that is missing.
    """
    wanted = list(cells(levers))
    missing = [_name(c, levers) for c in wanted if c not in scores]
    if missing:
        raise DataError(
            f"An attribution to {', '.join(levers)} needs all {len(wanted)} combinations and these are missing: "
            f"{'; '.join(missing)}. Evaluate them, or leave out a lever that was not tuned."
        )
    if len(scores) > len(wanted) or not set(of) <= set(levers) or not of:
        raise DataError(f"An attribution to {', '.join(levers)} is about these levers and no others; name them all.")
    if len({scores[c].shape for c in wanted}) > 1 or not all(np.isfinite(scores[c]).all() for c in wanted):
        raise DataError("Every combination of levers needs a score for each seed and each example, the same ones.")
    grid = np.stack([scores[c] for c in wanted]).reshape((2,) * len(levers) + scores[wanted[0]].shape)
    for lever in reversed(levers):  # in standard order the last lever is the first axis
        grid = grid[1] - grid[0] if lever in of else (grid[0] + grid[1]) / 2
    values: Floats = grid
    return values


def _name(cell: Cell, levers: Sequence[str]) -> str:
    return " + ".join(lever for lever in levers if lever in cell) + " tuned" if cell else "nothing tuned"


def attribution(scores: Mapping[Cell, Floats], levers: Sequence[str] = LEVERS) -> dict[tuple[str, ...], Finding]:
    """The effect of every set of levers, main effects first, by `contrast` and `crossed.effect`.

    Not corrected for their number: `stats.holm` is over all that is shown together.
    """
    sets = [of for order in range(1, len(levers) + 1) for of in itertools.combinations(levers, order)]
    return {of: effect(Arm(contrast(scores, levers, of)), len(of)) for of in sets}
