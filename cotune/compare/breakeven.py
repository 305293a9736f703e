"""From how many answers on what is dearer to tune and cheaper to serve pays. In FLOPs, which no machine's load changes.

Knows nothing of scores: that one of the two answers better is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cotune.compare.tables import Group, cost, serving


@dataclass(frozen=True)
class BreakEven:
    """`dearer` took `tuning` FLOPs more to tune than `other`, and takes `serving` FLOPs fewer (or -more) per answer."""

    dearer: str
    other: str
    tuning: float
    serving: float

    @property
    def calls(self) -> float | None:
        """Answers after which both have cost the same, tuning and serving together; None: never, it saves nothing.

        (tuning of dearer - tuning of other) / (serving of other - serving of dearer): FLOPs / FLOPs per answer.
        """
        return self.tuning / self.serving if self.serving > 0 else None

    def record(self) -> dict[str, Any]:
        """One row of JSON's `break_even`."""
        return {
            "dearer_to_tune": self.dearer,
            "instead_of": self.other,
            "tuning_flops_more": self.tuning,
            "serving_flops_saved": self.serving,
            "answers": self.calls,
        }


def break_evens(group: Group) -> list[BreakEven]:
    """Every two done rows that differ in tuning, in the order of the rows; none of a row whose FLOPs are unknown."""
    priced = [
        (row.strategy, tuning, answer)
        for row in group.rows
        if (tuning := cost(row, "tuning", "flops")) is not None and (answer := serving(row, "flops")) is not None
    ]
    found = []
    for i, (name, tuning, answer) in enumerate(priced):
        for other, other_tuning, other_answer in priced[:i]:
            if tuning > other_tuning:
                found.append(BreakEven(name, other, tuning - other_tuning, other_answer - answer))
            elif tuning < other_tuning:
                found.append(BreakEven(other, name, other_tuning - tuning, answer - other_answer))
    return found
