"""The samples of a finished run as attempts, and what choosing the plan by difficulty gains on them.

A second run of the same questions may have answered in chains: then plans of revisions are among the choices.
Reads run folders alone. Source of what is computed: Snell et al. (arXiv 2408.03314; sheet 03). How a run's samples
are parted is ours: the paper draws 2,048 for the oracle and others to judge by, a run has one draw of N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cotune.aggregation import Floats
from cotune.compare.mixtures import differences
from cotune.compare.runs import Run, read_run
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
    difficulty, and the other `judged` ones what the plans are worth. `chains` are another run's, None where there is
    none, and `prompts` the tokens that each of their attempts has read, [Q, C, L]."""

    run: str
    samples: Attempts
    estimated: int
    few: int
    found: ByDifficulty
    chains_run: str | None = None
    chains: Attempts | None = None
    prompts: Floats | None = None

    @property
    def judged(self) -> int:
        return self.samples.chains - self.estimated


def of_run(folder: Path, revised: Path | None = None) -> OfRun:
    """Half of a run's N samples tell the difficulty, a quarter predict it, half judge, at n = 1, 2, 4, ... (ours).

    A bin that has an n of its own has any up to that half. `revised` is a run that answered the same questions in
    chains, with the same model, prompts and adapters; all of it judges. Its draws are others than those that told the
    difficulty, whatever the seeds (chains.py).
    Bins are halved at random by the first run's seed: the same runs give the same numbers.
    Raises UsageError for a run that is not done or drew fewer than `LEAST` samples of some question, or under several
    plans, and for two that do not go together; DataError for rows that are damaged.
    """
    run, rows = _read(folder)
    if (length := _length(rows)) > 1:
        raise UsageError(
            f"{run.name} answered in chains of {length}. Give a run of parallel samples of the same questions before "
            f"it: cotune difficulty PARALLEL {run.name}."
        )
    if (least := min(len(row["samples"]["votes"]) for row in rows)) < LEAST:
        raise UsageError(f"{run.name} drew {least} samples a question; difficulty needs {LEAST} or more. {_FIX}")
    samples = _attempts(run.name, rows)
    n = samples.chains
    estimated, few = n // 2, n // 4
    sizes = [1 << i for i in range((n - estimated).bit_length())]
    random = np.random.default_rng(run.config["seed"])
    own = range(1, n - estimated + 1)
    if revised is None:
        found = by_difficulty(samples, None, sizes, estimated, few, random, own)
        return OfRun(run.name, samples, estimated, few, found)
    other, chained = _read(revised)
    _go_together(run, rows, other, chained)
    chains, prompts = _attempts(other.name, chained), _prompts(other.name, chained)
    found = by_difficulty(samples, chains, sizes, estimated, few, random, own)
    return OfRun(run.name, samples, estimated, few, found, other.name, chains, prompts)


def _read(folder: Path) -> tuple[Run, list[dict[str, Any]]]:
    run = read_run(folder)
    if run.status != "done":
        raise UsageError(f"{folder} is no finished run ({run.status}: {run.reason}). Give one that is done.")
    rows = read_rows(folder / "predictions.jsonl")
    if any("samples" not in row for row in rows):
        raise UsageError(f"{run.name} answered with single completions, so there is nothing to spread. {_FIX}")
    if any(row["plan"] != rows[0]["plan"] for row in rows):
        raise UsageError(
            f"{run.name} answered under several inference plans. Give a run in which all questions have one."
        )
    return run, rows


def _length(rows: Sequence[Mapping[str, Any]]) -> int:
    return int(rows[0]["plan"].get("chain", 1))


_DRAWN = ("scorer", "temperature", "top_p")


def _go_together(run: Run, rows: Sequence[Mapping[str, Any]], other: Run, chained: Sequence[Mapping[str, Any]]) -> None:
    """Raises UsageError unless nothing but the arrangement of the generations differs between the two."""
    if _length(chained) == 1:
        raise UsageError(f"{other.name} has no chains. Give one as the second run: --set plan.chain=4.")
    differ = list(differences([run, other]))
    differ += [what for what in ("task", "model") if getattr(run, what) != getattr(other, what)]
    differ += ["weights of the model"] * (_weights(run) != _weights(other))
    for what in ("prompt", "adapter"):
        differ += [f"{what}s"] * any(a.get(what) != b.get(what) for a, b in zip(rows, chained, strict=False))
    differ += [f"plan.{what}" for what in _DRAWN if rows[0]["plan"][what] != chained[0]["plan"][what]]
    if differ:
        raise UsageError(
            f"{run.name} and {other.name} cannot be compared, because their {', '.join(differ)} differ. Run one again "
            "with the settings of the other, plan.samples and plan.chain apart."
        )


def _weights(run: Run) -> Any:
    events = read_rows(run.folder / "events.jsonl")
    return next((event.get("model_digest") for event in events if event["kind"] == "start"), None)


def _attempts(name: str, rows: Sequence[Mapping[str, Any]]) -> Attempts:
    """Every sample with its answer, the answer's score and what the plan's scorer gave it (0 where it gave nothing)."""
    kept, length = [row["samples"] for row in rows], _length(rows)

    def chains(column: Sequence[Any]) -> list[Sequence[Any]]:
        return [column[i : i + length] for i in range(0, len(column), length)]

    try:
        rated = all(k.get("scores") for k in kept)
        return attempts(
            [chains([k["answers"][vote] for vote in k["votes"]]) for k in kept],
            [chains([k["worth"][vote] for vote in k["votes"]]) for k in kept],
            [chains(k["generated_tokens"]) for k in kept],
            [chains([score or 0.0 for score in k["scores"]]) for k in kept] if rated else None,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _damaged(name, error) from None


def _prompts(name: str, rows: Sequence[Mapping[str, Any]]) -> Floats:
    try:
        read = np.array([row["samples"]["prompt_tokens"] for row in rows], dtype=np.float64)
        return read.reshape(len(rows), -1, _length(rows))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: Exception) -> DataError:
    return DataError(
        f"The samples of {name} are damaged ({type(error).__name__}: {error}). Run it again in another folder."
    )
