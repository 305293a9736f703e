"""A plan for each difficulty bin, chosen on train by utility, and whether that is worth more than one plan for all.

Source: Snell et al. (arXiv 2408.03314; sheet 03): the best plan of each bin, judged by two-fold cross-validation. Ours:
bins told by a probe that is part of the answer (probing.py); another number of samples for each bin, which the price of
tokens in the utility decides; and bins only where what they gain is more than its standard error. The paper measures
what a choice would gain; here it is handed over, so the folds say whether, and all questions say which.

Axis letters: P plans, W draws (several of one question), Q questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.aggregation import Floats, Ints
from cotune.compare.stats import mean_of
from cotune.difficulty.probing import bin_of, fitted_edges

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Choice:
    """`one` is the best plan for all, `plans` those of the bins that `edges` part, `bins` [W] where each draw is.

    `gain` is the utility of a choice by bins above that of one plan, a question, each on the other fold's questions,
    and `error` its standard error over questions: infinite where there are no two folds.
    """

    one: int
    plans: tuple[int, ...]
    edges: tuple[float, ...]
    bins: Ints
    gain: float
    error: float

    @property
    def parts(self) -> bool:
        """Whether the bins are worth having: some has another plan, and the gain is above its standard error."""
        return any(plan != self.one for plan in self.plans) and self.gain > self.error


def best_plan(utility: Floats, offered: Mask) -> int:
    """The offered plan [P] with the best mean of `utility` [P, W]; of equal ones the first."""
    means = [mean_of(row) if may else -math.inf for row, may in zip(utility, offered, strict=True)]
    return means.index(max(means))


def plans_of_bins(utility: Floats, bins: Ints, count: int, offered: Mask) -> tuple[int, ...]:
    """The best offered plan of every bin; of a bin without a draw the best of all draws."""
    every = best_plan(utility, offered)
    return tuple(best_plan(utility[:, bins == b], offered) if (bins == b).any() else every for b in range(count))


def halved(ease: Floats, random: np.random.Generator) -> Ints:
    """Fold 0 or 1 of each question, [Q]: of every two that are next to each other in ease, one each, at random.

    So both folds have as many easy questions as hard ones, as where every bin is halved (the paper); here a question
    can be in several bins, with different draws.
    """
    order = random.permutation(len(ease))
    order = order[np.argsort(-ease[order], kind="stable")]
    flips = random.integers(2, size=(len(ease) + 1) // 2)
    fold = np.empty(len(ease), dtype=np.int64)
    fold[order] = (np.arange(len(ease)) + np.repeat(flips, 2)[: len(ease)]) % 2
    return fold


def choose_by_difficulty(
    utility: Floats, samples: Ints, question: Ints, ease: Floats, probe: int, count: int, random: np.random.Generator
) -> Choice:
    """Of P plans with these `samples` [P], in the order in which equals are taken; `utility` [P, W].

    Draw w is of `question[w]` and its first `probe` samples say `ease[w]`. A bin's plan has at least the samples of the
    probe, which are paid for; one plan for all needs no probe. All draws of a question are in one fold. The edges are
    those of all draws: they know no score.
    """
    edges = fitted_edges(ease, count)
    bins = np.array([bin_of(edges, e) for e in ease.tolist()], dtype=np.int64)
    everything = np.ones(len(samples), dtype=bool)
    probed = samples >= probe
    asked, place = np.unique(question, return_inverse=True)
    fold = halved(np.array([mean_of(ease[place == q]) for q in range(len(asked))]), random)[place]
    gain, error = 0.0, math.inf
    if len(asked) > 1:
        gained = np.empty(len(question))
        for half in (0, 1):
            on, judged = fold != half, np.flatnonzero(fold == half)
            one = best_plan(utility[:, on], everything)
            plans = np.array(plans_of_bins(utility[:, on], bins[on], len(edges) + 1, probed))
            gained[judged] = utility[plans[bins[judged]], judged] - utility[one, judged]
        of_question = np.array([mean_of(gained[place == q]) for q in range(len(asked))])
        gain, error = mean_of(of_question), float(of_question.std(ddof=1)) / math.sqrt(len(asked))
    return Choice(
        best_plan(utility, everything),
        plans_of_bins(utility, bins, len(edges) + 1, probed),
        edges,
        bins,
        gain,
        error,
    )
