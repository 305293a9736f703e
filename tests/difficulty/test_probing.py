"""Difficulty told by a few samples: exact eases, edges and ties at them, few questions and few different eases."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from cotune.difficulty.probing import bin_of, ease_of, fitted_edges, told
from cotune.values import Told


def test_the_ease_is_minus_the_entropy_or_the_mean_rating() -> None:
    assert ease_of(["4", "4", "5", "6"], None) == pytest.approx(-1.5 * math.log(2))
    assert ease_of(["4"] * 4, None) == 0
    assert ease_of([None, None], None) == pytest.approx(-math.log(2))  # no answer agrees with nothing
    assert ease_of(["4", "5", "6"], [0.5, None, 0.25]) == 0.25  # a missing rating counts 0


def test_the_order_of_the_samples_does_not_matter() -> None:
    assert len({ease_of(votes, None) for votes in permutations(["4", "4", "5", "6", None])}) == 1


def test_who_is_on_an_edge_is_in_the_easier_bin() -> None:
    assert [bin_of((0.5, 0.25), ease) for ease in (0.6, 0.5, 0.4, 0.25, 0.2)] == [0, 0, 1, 1, 2]
    assert bin_of((), 0.3) == 0
    assert told((-0.1,), ["4", "5"], None) == Told(2, -math.log(2), 1)


def test_edges_are_between_quantiles_and_equals_stay_together() -> None:
    assert fitted_edges(np.array([0.0, 1.0, 2.0, 3.0]), 2) == (1.5,)
    assert fitted_edges(np.array([1.0, 1.0, 1.0, 0.0]), 2) == (0.5,)
    eases = np.repeat([0.0, -0.5, -1.0], [90, 5, 5])
    edges = fitted_edges(eases, 5)
    assert list(edges) == sorted(edges, reverse=True)
    assert [bin_of(edges, e) for e in (0.0, -0.5, -1.0)] == [0, 1, 1]  # the last two are one fifth


@pytest.mark.parametrize(("eases", "edges"), [([0.3], ()), ([0.3, 0.3], ()), ([0.0, 1.0], (0.5,))])
def test_fewer_questions_than_bins_are_fewer_bins(eases: list[float], edges: tuple[float, ...]) -> None:
    assert fitted_edges(np.array(eases), 5) == edges


def test_neighbours_among_numbers_are_told_apart() -> None:
    high = math.nextafter(0.5, 1)
    (edge,) = fitted_edges(np.array([0.5, high]), 2)
    assert (bin_of((edge,), high), bin_of((edge,), 0.5)) == (0, 1)
