"""Where an adaptive race runs next, by hand."""

from __future__ import annotations

import numpy as np

from cotune.adaptive import doubtful, estimates, leader, order, telling

NAN = np.nan
FULL = [[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]


def test_order_is_by_score_then_size_then_place() -> None:
    assert order(np.array(FULL), [9, 5, 1]) == [1, 0, 2]
    assert order(np.array(FULL), [5, 5, 1]) == [0, 1, 2]
    assert estimates(np.array(FULL)) == [0.75, 0.75, 0.0]


def test_new_prompts_run_where_the_best_differ_and_at_first_on_the_first_examples() -> None:
    assert telling(np.array(FULL[:2]), [1, 1], 2) == [1, 3]
    assert telling(np.array([[1.0, NAN, NAN, NAN]]), [1], 2) == [0, 1]


def test_leaders_are_the_best_until_two_are_known_in_full() -> None:
    table = np.array([[1.0, 1.0, NAN], [0.0, 1.0, NAN], [1.0, 1.0, NAN]])
    assert leader(table, [7, 5, 6]) == 2
    table[2] = 1.0
    assert leader(table, [7, 5, 6]) == 0
    table[0] = 1.0
    assert leader(table, [7, 5, 6]) is None
    assert leader(table[2:], [6]) is None  # nobody else is there


def test_doubt_at_the_border_is_settled_where_it_is_largest() -> None:
    known = [[1.0] * 6 + [0.0] * 6, [1.0] * 5 + [0.0] * 7]
    open_ = [1.0, NAN, NAN, NAN, NAN, NAN, 0.0, NAN, NAN, NAN, NAN, NAN]
    [(row, places)] = doubtful(np.array([*known, open_]), [1, 1, 1], 1, 3)
    assert row == 2 and places[0] == 5  # the leader is known; where the two that are differ comes first
    assert len(places) == 3 and not {0, 6} & set(places)  # not where it ran
    assert doubtful(np.array(known), [1, 1], 1, 3) == []  # both are known
    assert doubtful(np.array([*known, open_]), [1, 1, 1], 3, 3) == []  # all of them are finalists


def test_what_is_clearly_behind_is_left_alone() -> None:
    table = np.array([[1.0] * 40, [0.0] * 40, [0.0] * 20 + [NAN] * 20])
    assert doubtful(table, [1, 1, 1], 1, 4) == []
