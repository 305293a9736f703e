"""Scores while tuning, against what tuning had spent by then, from the events of one run.

Knows the kinds of events that strategies leave; nothing of how a curve is drawn or written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cotune.compare.runs import Run, rows_of

_VALIDATED = ("start", "epoch", "validation", "finalist")  # kinds of events

Points = tuple[tuple[float, float], ...]
"""(tuning tokens, score in [0, 1]), in the order of the events; tokens count on over the stages of a sequence."""


@dataclass(frozen=True)
class Curve:
    """One run's quality against its budget.

    `validated`: the val score of each epoch (lora-only) or round (joint), before them of the start, or of each finalist
    (prompt-only). `best`, at the same places: the highest so far of the stage at hand, which is the val score of what
    the run hands over if its budget ends there. `searched`: the best prompt of a search after each round, on the train
    examples that it looked at.
    """

    seed: int | None
    validated: Points = ()
    best: Points = ()
    searched: Points = ()

    def record(self) -> dict[str, Any]:
        """The validation scores as columns of JSON."""
        return {
            "tuning_tokens": [int(at) for at, _ in self.validated],
            "val_scores": [score for _, score in self.validated],
            "best_val_scores": [score for _, score in self.best],
        }


def learning(run: Run, problems: list[str]) -> Curve | None:
    """None for a run without such scores. What another version or a torn file may hold is passed over."""
    validated: list[tuple[float, float]] = []
    best: list[tuple[float, float]] = []
    searched: list[tuple[float, float]] = []
    stage: Any = None  # of the last val score
    for event in rows_of(run, "events.jsonl", problems):
        kind, at = event.get("kind"), _number(event.get("tuning_tokens"))
        if at is None:
            continue
        if kind in _VALIDATED and (value := _score(event.get("val_score"))) is not None:
            goes_on = bool(best) and event.get("stage") == stage
            stage = event.get("stage")
            validated.append((at, value))
            best.append((at, max(value, best[-1][1]) if goes_on else value))
        elif (kind == "round" and (value := _score(event.get("best"))) is not None) or (
            (kind, event.get("origin")) == ("candidate", "start")
            and not searched
            and (value := _score(event.get("score"))) is not None
        ):
            searched.append((at, value))
    if len(searched) < 2:  # one point tells of no search
        searched = []
    return Curve(run.seed, tuple(validated), tuple(best), tuple(searched)) if validated or searched else None


def _number(value: Any) -> float | None:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30
    return float(value) if fine else None


def _score(value: Any) -> float | None:
    found = _number(value)
    return found if found is not None and found <= 1 else None
