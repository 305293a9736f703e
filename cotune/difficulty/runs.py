"""The samples of a finished run as attempts, and what choosing the plan by difficulty gains on them.

Reads the run folder alone. Source of what is computed: Snell et al. (arXiv 2408.03314; sheet 03). How a run's samples
are parted is ours: the paper draws 2,048 for the oracle and others to judge by, a run has one draw of N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cotune.compare.runs import read_run
from cotune.difficulty.allocation import ByDifficulty, by_difficulty
from cotune.difficulty.attempts import Attempts, attempts
from cotune.errors import DataError, UsageError
from cotune.record import read_rows

LEAST = 8  # samples a question: 4 tell pass@1, 2 of these are the fewest that can disagree, and 4 judge
_FIX = (
    "Run it again with more, in a folder of its own: --set plan.aggregation=best-of --set plan.samples=16 (best-of has "
    "every sample rated, so that there is more than one plan to choose from)."
)


@dataclass(frozen=True, eq=False)
class OfRun:
    """`found` on a run's samples: `estimated` of each question told its pass@1, the first `few` of these its predicted
    difficulty, and the other `judged` ones what the plans are worth."""

    run: str
    samples: Attempts
    estimated: int
    few: int
    found: ByDifficulty

    @property
    def judged(self) -> int:
        return self.samples.chains - self.estimated


def of_run(folder: Path) -> OfRun:
    """Half of a run's N samples tell the difficulty, a quarter predict it, half judge, at n = 1, 2, 4, ... (ours).

    Bins are halved at random by the run's seed: the same run gives the same numbers.
    Raises UsageError for a run that is not done or drew fewer than `LEAST` samples of some question, or under several
    plans; DataError for rows that are damaged.
    """
    run = read_run(folder)
    if run.status != "done":
        raise UsageError(f"{folder} is no finished run ({run.status}: {run.reason}). Give one that is done.")
    samples = _samples(run.name, read_rows(folder / "predictions.jsonl"))
    n = samples.chains
    estimated, few = n // 2, n // 4
    sizes = [1 << i for i in range((n - estimated).bit_length())]
    random = np.random.default_rng(run.config["seed"])
    return OfRun(run.name, samples, estimated, few, by_difficulty(samples, None, sizes, estimated, few, random))


def _samples(name: str, rows: Sequence[Mapping[str, Any]]) -> Attempts:
    """Every sample with its answer, the answer's score and what the plan's scorer gave it (0 where it gave nothing)."""
    kept = [row["samples"] for row in rows if "samples" in row]
    if len(kept) < len(rows):
        raise UsageError(f"{name} answered with single completions, so there is nothing to spread. {_FIX}")
    if any(row["plan"] != rows[0]["plan"] for row in rows):
        raise UsageError(f"{name} answered under several inference plans. Give a run in which all questions have one.")
    if (least := min(len(k["votes"]) for k in kept)) < LEAST:
        raise UsageError(f"{name} drew {least} samples a question; difficulty needs {LEAST} or more. {_FIX}")
    try:
        rated = all(k.get("scores") for k in kept)
        return attempts(
            [[k["answers"][vote] for vote in k["votes"]] for k in kept],
            [[k["worth"][vote] for vote in k["votes"]] for k in kept],
            [k["generated_tokens"] for k in kept],
            [[score or 0.0 for score in k["scores"]] for k in kept] if rated else None,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"The samples of {name} are damaged ({type(error).__name__}: {error}). Run it again in another folder."
        ) from None
