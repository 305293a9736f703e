"""What must be equal before scores may stand side by side: refused where it is not, or compared and marked.

Knows the digests in the summaries and nothing of statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cotune.compare.runs import Run
from cotune.errors import UsageError

COMPARABLE = {  # and how it is called in a refusal or a mark
    "data_digest": "data",
    "test_ids_digest": "test examples",
    "decoding_digest": "decoding",
    "grader_version": "grader version",
}
ALLOW = "--allow-mixed compares them all the same and marks the table"


def differences(runs: Sequence[Run]) -> dict[str, str]:
    """Of finished runs, what differs -> which runs have which, in words; empty when they are comparable."""
    found = {}
    for field, word in COMPARABLE.items():
        sides: dict[str, list[str]] = {}
        for run in runs:
            sides.setdefault(str(run.summary.get("comparable", {}).get(field)), []).append(run.name)
        if len(sides) > 1:
            found[word] = "; ".join(f"{word} {value}: {_names(names)}" for value, names in sorted(sides.items()))
    return found


def refuse(runs: Sequence[Run]) -> None:
    """Raises UsageError naming what differs between which runs."""
    for word, sides in differences(runs).items():
        raise UsageError(
            f"These runs of {runs[0].task} with {runs[0].model} cannot be compared, because their {word} differ. "
            f"{sides}. Give only runs of one kind, or {ALLOW}."
        )


def shared(runs: Sequence[Run]) -> list[Run]:
    """The runs, the finished ones with those examples alone whose id all of them have.

    Outcomes are counts of all examples of a run; where some are left out, they are not known.
    Raises UsageError when there is no such example.
    """
    done = [run for run in runs if run.status == "done"]
    if not done:
        return list(runs)
    kept = [i for i in done[0].scores if all(i in run.scores for run in done)]
    if not kept:
        raise UsageError(
            f"These runs of {done[0].task} with {done[0].model} have no test example in common, so there is nothing to "
            "compare. Give only runs of one kind."
        )

    def only(run: Run) -> Run:
        if run.status != "done" or len(run.scores) == len(kept):
            return run
        few = {cell: _of(scores, kept) for cell, scores in run.cells.items()}
        return replace(run, scores=_of(run.scores, kept), cells=few, summary={**run.summary, "outcomes": None})

    return [only(run) for run in runs]


def marks(runs: Sequence[Run], examples: int) -> tuple[str, ...]:
    """A sentence for each difference, and what was compared; nothing for runs that are comparable."""
    found = differences(runs)
    if not found:
        return ()
    said = tuple(f"Mixed runs, {word} differ. {sides}." for word, sides in found.items())
    most = max(int(run.summary["n"]) for run in runs)
    return (*said, f"Compared by the {examples} of {most} examples whose ids all of these runs have.")


def _of(scores: Mapping[str, float], ids: Sequence[str]) -> dict[str, float]:
    return {i: scores[i] for i in ids}


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
