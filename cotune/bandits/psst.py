"""PSST: prompt scaling via sequential trimming, with its top-K screening (IAPO, arXiv 2508.10030, Algorithm 1).

Rounds of equal budget; in each, every prompt that is still active is pulled at its largest active N, every pull
estimates all contexts and all smaller N, and each context drops the worse half of its arms.

Where the paper is silent or cannot be followed:

- As printed, a round removes ceil(n / 2) of n arms. That leaves none after R = ceil(log2 |A|) rounds unless |A| is a
  power of two. The authors' code keeps ceil(n / 2), and so do we: one arm per context is left, for every |A|.
- The budget is hard. The authors' code pulls every active prompt at least once, also where a round cannot pay for that,
  and overspends. Here (ours) such a round pulls prompts once in random order, as far as its budget goes; arms that were
  not observed rank behind all that were, and among themselves by the same random order, whole prompts together.
- What a round leaves unspent goes to the next (ours): round r may bring the total to floor(r T / R), where the printed
  n_r = floor(T / R) would lose the remainders of all rounds.
- Ties go by the random order of the prompts, then to the smaller N (ours).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cotune.aggregation import Ints
from cotune.bandits.base import Arm, Environment, Learned, Observed
from cotune.errors import UsageError

Active = NDArray[np.bool_]  # [C, P, N], as many arms in every context


class PSST:
    """`stockpiling`: estimates use the data of all rounds (recommended; the proof wants it off), not of the last alone.

    `screened` K keeps in each context the K prompts that are best with one completion, found with the share `screening`
    of the budget; those data are then thrown away (authors' code). None screens nothing. K = 1 is prompt first, then N.
    """

    def __init__(self, stockpiling: bool, screened: int | None, screening: float) -> None:
        if screened is not None and screened < 1:
            raise UsageError(f"Screening cannot keep {screened} prompts; keep at least 1.")
        if not 0 <= screening < 1:
            raise UsageError(f"A screening share of {screening} leaves nothing to trim with; choose 0 to below 1.")
        self.name = ("PSST" if screened is None else f"PSST+K{screened}") + ("" if stockpiling else ", last round only")
        self.stockpiling, self.screened, self.screening = stockpiling, screened, screening

    def learn(self, environment: Environment, budget: int, random: np.random.Generator) -> Learned:
        observed = Observed(environment, budget, random)
        active = np.ones((environment.contexts, environment.prompts, environment.n_max), dtype=bool)
        if self.screened is not None:
            active &= _screen(observed, self.screened, int(self.screening * budget))[:, :, None]
            observed.forget()
        return observed.learned(trim(observed, active, self.stockpiling))


def _screen(observed: Observed, keep: int, budget: int) -> Active:
    """The best `keep` prompts of each context at N = 1, [C, P], from floor(budget / |P|) pulls of every prompt.

    A budget below one pull per prompt pulls as many prompts as it pays for, in random order.
    """
    order = observed.random.permutation(observed.environment.prompts)
    each = budget // len(order)
    for prompt in order if each else order[:budget]:
        observed.pull(int(prompt), 1, max(1, each))
    ranks = np.argsort(-observed.means(-np.inf)[:, order, 0], axis=1, kind="stable")
    kept = np.zeros((observed.environment.contexts, len(order)), dtype=bool)
    np.put_along_axis(kept, order[ranks[:, :keep]], True, axis=1)
    return kept


def rounds(arms: int) -> int:
    """R = ceil(log2 |A|), in whole numbers: so often can |A| be halved, upwards, before one is left."""
    return (arms - 1).bit_length()


def allocate(budget: int, sizes: Ints) -> int:
    """lambda = floor(n_r / M): pulls of every active prompt at its largest active N, `sizes`; M is their sum."""
    return int(budget // sizes.sum())


def trim(observed: Observed, active: Active, stockpiling: bool) -> tuple[Arm, ...]:
    """The arm of each context that is left of its `active` ones when all that is left of the budget is spent."""
    started, budget = observed.spent, observed.left
    of_n = np.arange(1, active.shape[2] + 1)
    total = rounds(int(active[0].sum()))
    for r in range(1, total + 1):
        if not stockpiling:
            observed.forget()
        order = observed.random.permutation(active.shape[1])
        sizes = (active.any(0) * of_n).max(1)  # 0 where no arm of the prompt is active
        _collect(observed, order[sizes[order] > 0], sizes, r * budget // total - (observed.spent - started))
        active = _halve(observed, active, order)
    return tuple(Arm(int(p), int(n) + 1) for _, p, n in np.argwhere(active))


def _collect(observed: Observed, order: Ints, sizes: Ints, room: int) -> None:
    """One round's pulls: lambda of every active prompt, or, where lambda is 0, one each while they fit in `room`."""
    pulls = allocate(room, sizes)
    for prompt in order:
        n = int(sizes[prompt])
        if pulls:
            observed.pull(int(prompt), n, pulls)
        elif n <= room:
            observed.pull(int(prompt), n)
            room -= n


def _halve(observed: Observed, active: Active, order: Ints) -> Active:
    """The better ceil(n / 2) of the n active arms of every context."""
    contexts, kept = len(active), math.ceil(int(active[0].sum()) / 2)
    # The sort is stable, so arms that rank alike stay in the round's order of prompts, the smaller N first.
    unseen = float(np.finfo(np.float64).min)
    rank = np.where(active, -observed.means(unseen), np.inf)[:, order].reshape(contexts, -1)
    left = np.zeros_like(rank, dtype=bool)
    np.put_along_axis(left, np.argsort(rank, axis=1, kind="stable")[:, :kept], True, axis=1)
    out = np.zeros_like(active)
    out[:, order] = left.reshape(active.shape)
    return out
