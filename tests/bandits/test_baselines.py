"""Each baseline's rule on hand-made numbers; what they have in common is in test_psst.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cotune.bandits.base import Arm, average_return
from cotune.bandits.baselines import UCB, EpsilonGreedy, Sequential, Softmax, Triple, Uniform
from cotune.errors import UsageError
from tests.bandits.known import Known, known


class Fixed(np.random.Generator):
    """A generator whose next uniform number is known."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, *args: object, **kwargs: object) -> float:  # type: ignore[override]
        return self.value


def test_epsilon_greedy_exploits_unless_the_draw_is_below_epsilon() -> None:
    means, tried = np.array([0.1, 0.7, 0.3]), np.ones(3, dtype=np.int64)
    assert {EpsilonGreedy(0.15).choose(means, tried, Fixed(0.15)) for _ in range(9)} == {1}
    below = Fixed(0.1499)
    assert {EpsilonGreedy(0.15).choose(means, tried, below) for _ in range(60)} == {0, 1, 2}


def test_softmax_splits_the_unit_interval_by_exp_of_mean_over_tau() -> None:
    means = np.array([0.0, 0.05, 0.1])
    weights = np.exp([0.0, 1.0, 2.0])
    edges = np.cumsum(weights / weights.sum())
    for i, edge in enumerate(edges[:2]):
        assert Softmax(0.05).choose(means, np.ones(3, dtype=np.int64), Fixed(edge - 1e-9)) == i
        assert Softmax(0.05).choose(means, np.ones(3, dtype=np.int64), Fixed(edge + 1e-9)) == i + 1


def test_ucb_takes_untried_arms_first_and_then_the_largest_bound() -> None:
    random = np.random.default_rng(0)
    assert UCB(0.1).choose(np.array([9.0, 0.0, 1.0]), np.array([5, 0, 1]), random) == 1
    means, tried = np.array([0.5, 0.47]), np.array([90, 10])
    bounds = means + 0.1 * np.sqrt(math.log(100) / tried)
    assert bounds[1] > bounds[0]
    assert UCB(0.1).choose(means, tried, random) == 1
    assert UCB(0.01).choose(means, tried, random) == 0
    assert {UCB(1.0).choose(np.zeros(3), np.zeros(3, dtype=np.int64), random) for _ in range(60)} == {0, 1, 2}


def test_uniform_pulls_every_prompt_equally_at_the_largest_n() -> None:
    environment = known(2, 3, 4)
    learned = Uniform().learn(environment, 12 * 5 + 11, np.random.default_rng(0))
    assert sorted(environment.log) == [(p, 4, 5) for p in range(3)] and learned.spent == 60
    best = environment.true.reshape(2, -1).argmax(1)
    assert learned.policy == tuple(Arm(int(i) // 4, int(i) % 4 + 1) for i in best)


def test_uniform_below_one_pull_per_prompt() -> None:
    environment = known(1, 3, 4)
    learned = Uniform().learn(environment, 11, np.random.default_rng(0))
    assert [call[1:] for call in environment.log] == [(4, 1)] * 2
    assert learned.policy[0].prompt in {call[0] for call in environment.log}
    environment = known(1, 3, 4)
    Uniform().learn(environment, 2, np.random.default_rng(0))
    assert [call[1:] for call in environment.log] == [(2, 1)]


@pytest.mark.parametrize("learner", [EpsilonGreedy(0.15), Softmax(0.05), UCB(0.1)], ids=lambda learner: learner.name)
def test_sequential_learners_pull_one_by_one_until_nothing_is_affordable(learner: Sequential) -> None:
    environment = known(2, 3, 4)
    assert learner.learn(environment, 101, np.random.default_rng(0)).spent == 101
    assert all(count == 1 for _, _, count in environment.log)


def test_no_policy_names_an_arm_without_data() -> None:
    """All utilities are below 0, what an untried arm counts as while learning."""
    environment = Known(-1 - np.arange(12.0).reshape(1, 3, 4) / 12)
    learned = EpsilonGreedy(0.0).learn(environment, 3, np.random.default_rng(0))
    arm = learned.policy[0]
    assert arm.n is not None and learned.blocks[arm.prompt, arm.n - 1] > 0


def test_triple_halves_the_prompts_with_one_completion_a_pull() -> None:
    """Five prompts: R = 3, T = 90: 30 a round over 5, 3 and 2 prompts."""
    true = np.arange(10.0).reshape(1, 5, 2)
    environment = Known(true)
    learned = Triple(random_n=False).learn(environment, 90, np.random.default_rng(0))
    assert [(n, count) for _, n, count in environment.log] == [(1, 6)] * 5 + [(1, 10)] * 3 + [(1, 15)] * 2
    assert learned.policy == (Arm(4, 1),)
    learned = Triple(random_n=True).learn(Known(true), 90, np.random.default_rng(0))
    assert learned.policy == (Arm(4, None),)
    assert average_return(true, learned.policy) == 8.5  # the mean over N of 8 and 9


def test_settings_that_cannot_be() -> None:
    for make in (lambda: EpsilonGreedy(1.5), lambda: Softmax(0), lambda: UCB(0)):
        with pytest.raises(UsageError):
            make()
