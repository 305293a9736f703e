"""What ranks the completions of one question for best-of-N: the table of scorers, imported on demand, and one of them.

A scorer sees the rendered prompt and completions, never the reference. Another package adds one by an entry point in
the group `cotune.scorers`. Two are no classes here: self-consistency reads votes alone, of whatever part of a draw is
at hand (`aggregation.self_consistency`), and a verifier belongs to what was tuned (`Conditioning.verifier`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import ClassVar, Protocol

from cotune.errors import UsageError
from cotune.plugins import names, nearest, resolve
from cotune.values import Completion

SELF_CONSISTENCY = "self-consistency"
VERIFIER = "verifier"
SCORERS = {"log-probability": "cotune.scorers:LogProbability"}


class Scorer(Protocol):
    """`logprobs`: whether it reads the log-probabilities of tokens."""

    logprobs: ClassVar[bool]

    def score(self, prompt: str, completions: Sequence[Completion]) -> Sequence[float | None]:
        """One number of at least 0 for each completion of a rendered prompt, apart from the others; the higher the
        better. None where it cannot say."""


class LogProbability:
    """exp of the mean log-probability of the completion's tokens at temperature 1: their geometric mean probability.

    The exponential keeps the order of the means, so best-of-N is by mean log-probability, and makes them weights that
    can be summed: with sums of logarithms, which are below 0, more completions would count against an answer (ours).
    The token that ends the turn has no part. An empty completion has no mean: None.
    """

    logprobs: ClassVar[bool] = True

    def score(self, prompt: str, completions: Sequence[Completion]) -> list[float | None]:
        return [math.exp(sum(c.logprobs) / len(c.logprobs)) if c.logprobs else None for c in completions]


@cache  # one may hold a model
def scorer(name: str) -> Scorer | None:
    """The scorer of that name, made once; None for self-consistency and a verifier. Raises UsageError with the nearest
    names."""
    if name in (SELF_CONSISTENCY, VERIFIER):
        return None
    known = {*names("scorers", SCORERS), SELF_CONSISTENCY, VERIFIER}
    if name not in known:
        raise UsageError(f"There is no scorer {name!r}{nearest(name, known)}")
    made: Scorer = resolve("scorers", SCORERS, name)()
    return made
