"""PSST: the paper's arithmetic on its six tasks, one survivor, the hard budget, its guarantee, screening's price."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.aggregation import Floats
from cotune.bandits.base import Arm, Learner, Observed, average_return
from cotune.bandits.baselines import UCB, EpsilonGreedy, Softmax, Triple, Uniform
from cotune.bandits.environments import MajorityVote
from cotune.bandits.psst import PSST, allocate, rounds, trim
from cotune.errors import UsageError
from tests.bandits.known import Known, known

PSST_ = PSST(True, None, 0.2)
LEARNERS: tuple[Learner, ...] = (
    PSST_,
    PSST(False, None, 0.2),
    PSST(True, 1, 0.2),
    PSST(True, 4, 0.2),
    Uniform(),
    EpsilonGreedy(0.15),
    Softmax(0.05),
    UCB(0.1),
    Triple(random_n=False),
    Triple(random_n=True),
)


# |P|, Nmax, |A| and R of the six tasks, and the T from which on the first round pulls every prompt (R |A|).
SIX = [(32, 32, 10, 10_240), (25, 32, 10, 8_000), (48, 32, 11, 16_896), (20, 32, 10, 6_400)]


@pytest.mark.parametrize(("prompts", "n_max", "r", "enough"), SIX)
def test_rounds_and_allocation_of_the_papers_tasks(prompts: int, n_max: int, r: int, enough: int) -> None:
    assert rounds(prompts * n_max) == r == math.ceil(math.log2(prompts * n_max))
    sizes = np.full(prompts, n_max)
    assert allocate(enough // r, sizes) == 1
    assert allocate((enough - r) // r, sizes) == 0
    assert allocate(3 * enough // r, sizes) == 3


@pytest.mark.parametrize(("kept", "r"), [(1, 5), (4, 7), (8, 8)])
def test_rounds_after_screening(kept: int, r: int) -> None:
    assert rounds(kept * 32) == r


@pytest.mark.parametrize(
    ("prompts", "n_max"), [(20, 32), (25, 32), (48, 32), (32, 32), (1, 1), (3, 1), (1, 5), (7, 9), (11, 3)]
)
def test_one_arm_is_left_in_every_context(prompts: int, n_max: int) -> None:
    environment = known(3, prompts, n_max)
    learned = PSST_.learn(environment, 200_000, np.random.default_rng(0))
    best = environment.true.reshape(3, -1).argmax(1)
    assert learned.policy == tuple(Arm(int(i) // n_max, int(i) % n_max + 1) for i in best)


def test_every_round_pulls_each_active_prompt_at_its_largest_active_n() -> None:
    """One context, three prompts, N to 4: |A| = 12, R = 4, T = 288: 72 a round, what is left of it goes on."""
    true = np.array([[[9, 8, 1, 1], [7, 1, 6, 1], [1, 1, 5, 4]]], dtype=float)
    environment = Known(true)
    learned = PSST_.learn(environment, 288, np.random.default_rng(0))
    rounds_ = [sorted(environment.log[i:j]) for i, j in ((0, 3), (3, 6), (6, 8), (8, 9))]
    assert rounds_ == [
        [(0, 4, 6), (1, 4, 6), (2, 4, 6)],  # lambda = 72 / 12
        [(0, 2, 8), (1, 3, 8), (2, 4, 8)],  # six arms left: 9 8, 7 6, 5 4; lambda = 72 / 9
        [(0, 2, 24), (1, 1, 24)],  # 9 8, 7; lambda = 72 / 3
        [(0, 2, 36)],  # 9 8; lambda = 72 / 2
    ]
    assert learned.policy == (Arm(0, 1),) and learned.spent == 288
    assert learned.pulls[0].tolist() == [0, 68, 0, 6]
    assert learned.blocks[0].tolist() == [6 * 4 + 68 * 2, 6 * 2 + 68, 6, 6]
    assert learned.queries.max() == 2


def test_without_stockpiling_estimates_are_those_of_the_last_round() -> None:
    environment = Known(np.array([[[9, 8, 1, 1], [7, 1, 6, 1], [1, 1, 5, 4]]], dtype=float))
    learned = PSST(False, None, 0.2).learn(environment, 288, np.random.default_rng(0))
    assert learned.blocks.tolist() == [[72, 36, 0, 0], [0] * 4, [0] * 4]
    assert learned.spent == 288


def test_a_round_that_cannot_pay_for_all_prompts_pulls_some_once() -> None:
    """T = 40 of R |A| = 5 x 32: 8 for the first round is one prompt of four at N = 8."""
    environment = known(2, 4, 8)
    learned = PSST_.learn(environment, 40, np.random.default_rng(0))
    assert environment.log[0][1:] == (8, 1) and environment.log[1][1:] == (8, 1)
    assert learned.spent <= 40 and all(count == 1 for _, n, count in environment.log if n == 8)


def test_arms_without_data_rank_last() -> None:
    environment = Known(np.full((1, 2, 2), -5.0))
    observed = Observed(environment, 8, np.random.default_rng(0))
    observed.pull(1, 2, 2)
    assert {arm.prompt for arm in observed.best()} == {1}
    assert trim(observed, np.ones((1, 2, 2), dtype=bool), True)[0].n in (1, 2)


@given(st.integers(0, len(LEARNERS) - 1), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 400))
def test_no_learner_ever_spends_more_than_its_budget(i: int, p: int, n: int, c: int, budget: int) -> None:
    environment = known(c, p, n)
    learned = LEARNERS[i].learn(environment, budget, np.random.default_rng(0))
    assert learned.spent == sum(size * count for _, size, count in environment.log) <= budget
    assert learned.spent == (learned.pulls * np.arange(1, n + 1)).sum()
    assert len(learned.policy) == c
    assert all(0 <= arm.prompt < p and (arm.n is None or 1 <= arm.n <= n) for arm in learned.policy)


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: learner.name)
def test_a_budget_of_nothing_is_refused(learner: Learner) -> None:
    with pytest.raises(UsageError, match="give at least 1"):
        learner.learn(known(1, 2, 2), 0, np.random.default_rng(0))


def separable() -> MajorityVote:
    right = np.array([[0.95, 1.0], [0.5, 0.5], [0.1, 0.2]])
    return MajorityVote([0, 1], [1.0, 0.0], np.stack([right, 1 - right], -1), 0.2, [(1, 1), (1, 2)], 3, [0, 1])


def guaranteed_budget(values: Floats, delta: float) -> int:
    """The T at which the paper's bound on the chance of a wrong arm in any context, 3 |C| R exp(-T / (h R)), is delta,
    with h = min(2 |P| H1, 8 |C| H2)."""
    contexts, prompts, n_max = values.shape
    ordered = -np.sort(-values.reshape(contexts, -1), axis=1)
    gaps = ordered[:, :1] - ordered[:, 1:]
    mean_n = (values.reshape(contexts, -1).argmax(1) % n_max + 1 + n_max) / 2
    h1 = (mean_n[:, None] / gaps**2).max()
    h2 = (np.arange(2, gaps.shape[1] + 2) * mean_n[:, None] / gaps**2).max()
    r = rounds(prompts * n_max)
    return math.ceil(r * min(2 * prompts * h1, 8 * contexts * h2) * math.log(3 * contexts * r / delta))


def test_the_best_arm_of_a_separable_instance_is_found_at_the_guaranteed_budget() -> None:
    """At delta = 0.001 a wrong arm in any of 20 runs has a chance of at most 0.02."""
    environment = separable()
    values = environment.values(environment.train)
    best = values.reshape(2, -1).argmax(1)
    budget = guaranteed_budget(values, 0.001)
    assert budget < 20_000
    for learner in (PSST_, PSST(False, None, 0.2)):
        for seed in range(20):
            learned = learner.learn(environment, budget, np.random.default_rng(seed))
            assert [arm.prompt * 3 + arm.n - 1 for arm in learned.policy if arm.n] == best.tolist()


def test_choosing_the_prompt_first_loses_where_the_order_flips() -> None:
    """A wide prompt is best with one completion (0.65 to 0.55), the steady one in a vote of 31 (0.65 to 0.71)."""
    right = np.array([[0.3, 1.0], [0.55, 0.55]])
    environment = MajorityVote([0, 1], [1.0, 0.0], np.stack([right, 1 - right], -1), 0, [(1, 0)], 31, [0, 1])
    values = environment.values(environment.train)
    first = PSST(True, 1, 0.2).learn(environment, 20_000, np.random.default_rng(0))
    both = PSST_.learn(environment, 20_000, np.random.default_rng(0))
    assert first.policy[0].prompt == 0 and both.policy[0].prompt == 1
    assert average_return(values, both.policy) > 0.68 > 0.651 > average_return(values, first.policy)
    assert first.blocks[1].sum() == 0  # screening's own data are thrown away
    assert first.pulls[:, 0].min() >= 2000


def test_screening_cannot_pay_for_every_prompt() -> None:
    environment = known(1, 8, 2)
    PSST(True, 2, 0.2).learn(environment, 20, np.random.default_rng(0))
    assert [(n, count) for _, n, count in environment.log[:4]] == [(1, 1)] * 4  # floor(0.2 * 20) of 8 prompts
    assert {p for p, _, _ in environment.log[4:]} <= {p for p, _, _ in environment.log[:4]}


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: learner.name)
def test_the_same_seed_learns_the_same(learner: Learner) -> None:
    one, two = (learner.learn(separable(), 500, np.random.default_rng(7)) for _ in range(2))
    assert (one.policy, one.spent) == (two.policy, two.spent)
    for name in ("pulls", "blocks", "queries"):
        assert (getattr(one, name) == getattr(two, name)).all()


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="keep at least 1"):
        PSST(True, 0, 0.2)
    with pytest.raises(UsageError, match="below 1"):
        PSST(True, 1, 1.0)
