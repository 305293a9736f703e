"""The account that all learners share: what a pull says about other arms, what it costs, what is reported of it."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.bandits.base import Arm, Observed, average_return
from tests.bandits.known import Known, known


def test_one_pull_serves_all_contexts_and_all_smaller_n() -> None:
    environment = known(2, 2, 4)
    observed = Observed(environment, 100, np.random.default_rng(0))
    observed.pull(1, 4, 3)  # queries 0, 1, 0
    observed.pull(1, 2)  # query 0
    learned = observed.learned(observed.best())
    assert learned.spent == 14 and observed.left == 86
    assert learned.pulls.tolist() == [[0, 0, 0, 0], [0, 1, 0, 3]]
    assert learned.blocks.tolist() == [[0, 0, 0, 0], [3 * 4 + 2, 3 * 2 + 1, 3, 3]]
    assert learned.queries.tolist() == [[0, 0, 0, 0], [2, 2, 2, 2]]
    assert observed.means(-9.0)[:, 0].tolist() == [[-9.0] * 4] * 2
    assert observed.means(-9.0)[:, 1] == pytest.approx(environment.true[:, 1])
    assert observed.context_means(1)[1] == pytest.approx(environment.true[1, 1])


def test_queries_are_those_of_pulls_that_are_large_enough() -> None:
    observed = Observed(known(1, 1, 4), 100, np.random.default_rng(0))
    observed.pull(0, 3)  # query 0
    observed.pull(0, 1, 2)  # queries 0, 1
    assert observed.learned(observed.best()).queries.tolist() == [[2, 1, 1, 0]]


def test_forgetting_keeps_what_was_spent() -> None:
    observed = Observed(known(1, 1, 2), 10, np.random.default_rng(0))
    observed.pull(0, 2, 2)
    observed.forget()
    learned = observed.learned(observed.best())
    assert learned.spent == 4 and learned.pulls.tolist() == [[0, 2]] and learned.blocks.tolist() == [[0, 0]]


def test_what_cannot_be_paid_is_refused() -> None:
    observed = Observed(known(1, 1, 4), 7, np.random.default_rng(0))
    observed.pull(0, 4)
    with pytest.raises(ValueError, match="exceed the 3 that are left"):
        observed.pull(0, 4)


def test_the_average_return_weighs_contexts_alike() -> None:
    values = Known(np.array([[[1.0, 2.0]], [[3.0, 6.0]]])).values(np.array([0]))
    assert average_return(values, (Arm(0, 2), Arm(0, 1))) == 2.5
    assert average_return(values, (Arm(0, None), Arm(0, 2))) == 3.75
