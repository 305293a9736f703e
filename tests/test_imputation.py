"""Missing scores, told from prompts that score alike: by hand, and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.imputation import Scores, impute

NAN = np.nan


def test_a_missing_score_is_that_of_the_prompts_that_agree() -> None:
    table = np.array(
        [
            [1.0, 1.0, 0.0, 0.0, 1.0, 0.0],
            [0.0, 0.0, 1.0, 1.0, 0.0, 1.0],
            [1.0, 1.0, 0.0, NAN, NAN, NAN],  # as the first
            [0.0, NAN, 1.0, 1.0, NAN, NAN],  # as the second
        ]
    )
    filled, variance = impute(table)
    assert filled[2].tolist() == table[0].tolist()
    assert filled[3].tolist() == table[1].tolist()
    assert np.array_equal(variance > 0, np.isnan(table))


def test_doubt_is_where_alike_prompts_differ_and_less_where_more_of_them_agree() -> None:
    table = np.array(
        [
            [1.0, 1.0, 0.0, 1.0, 1.0],
            [1.0, 1.0, 0.0, 1.0, NAN],
            [1.0, 1.0, 0.0, 0.0, NAN],
            [1.0, 1.0, NAN, NAN, NAN],
        ]
    )
    _, variance = impute(table)
    differ, many_agree, one_alone = variance[3, 3], variance[3, 2], variance[3, 4]
    assert differ > many_agree > 0 and one_alone > 0
    _, more = impute(np.vstack([table, [[1.0, 1.0, 0.0, 1.0, 1.0]]]))
    assert more[3, 4] < one_alone and more[3, 2] < many_agree


def test_where_nobody_ran_it_is_the_prompts_own_mean_with_a_score_of_a_half() -> None:
    filled, variance = impute(np.array([[1.0, 1.0, NAN]]))
    assert filled[0, 2] == pytest.approx(2.5 / 3)
    assert variance[0, 2] == pytest.approx(2.5 / 3 * (1 - 2.5 / 3) + 0.02)


def test_a_filled_fraction_is_one_that_somebody_scored() -> None:
    table = np.array([[0.25, 0.5, 1.0], [0.25, 0.6, 0.75], [0.25, 0.5, 0.8], [0.25, NAN, NAN]])
    filled, _ = impute(table)
    assert filled[3].tolist() == [0.25, 0.5, 0.8]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 5])
def test_as_plain_loops_have_it(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.integers(0, levels, (7, 11)) / (levels - 1)
    table[rng.random((7, 11)) < 0.5] = NAN
    table[:, 0] = rng.integers(0, levels, 7) / (levels - 1)  # every prompt ran somewhere
    table[:, 5] = NAN  # where nobody did
    filled, variance = impute(table)
    for i in range(7):
        for e in range(11):
            assert (filled[i, e], variance[i, e]) == pytest.approx(slowly(table, i, e)), (i, e)


def slowly(table: Scores, i: int, e: int) -> tuple[float, float]:
    if not np.isnan(table[i, e]):
        return float(table[i, e]), 0.0
    ran = [s for s in table[i] if not np.isnan(s)]
    own = (sum(ran) + 0.5) / (len(ran) + 1)
    told: list[tuple[float, float]] = []  # score, weight
    for k in range(len(table)):
        pairs = [(a, b) for a, b in zip(table[i], table[k], strict=True) if not np.isnan(a + b)]
        if k != i and pairs and not np.isnan(table[k, e]):
            apart = (sum(abs(a - b) for a, b in pairs) + 0.5) / (len(pairs) + 1)
            told.append((float(table[k, e]), (1 - apart) ** 8))
    mass = sum(w for _, w in told)
    mean = (sum(s * w for s, w in told) + 0.3 * own) / (mass + 0.3)
    square = (sum(s * s * w for s, w in told) + 0.3 * own) / (mass + 0.3)
    median, below = own, 0.0
    for score, weight in sorted(told):
        below += weight
        if below >= mass / 2 - 1e-12:
            median = score
            break
    return median, square - mean**2 + 0.02 / (1 + mass)
