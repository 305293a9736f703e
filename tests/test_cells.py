"""The cells of two and three levers: which there are, what they are called, and names that are nobody's."""

from __future__ import annotations

import pytest

from cotune.cells import LEVERS, cells, levers_of, named
from cotune.compare.runs import CELLS
from cotune.errors import DataError


def test_cells_are_in_standard_order_and_start_with_the_two_by_two() -> None:
    every = list(cells(LEVERS))
    assert every[:4] == [frozenset(), {"prompt"}, {"weights"}, {"prompt", "weights"}]
    assert every[4:] == [{"plan"} | cell for cell in every[:4]]


def test_without_a_plan_the_names_are_those_of_the_two_by_two() -> None:
    assert list(named(("prompt", "weights"))) == ["seed/base", "tuned/base", "seed/tuned", "tuned/tuned"]
    assert tuple(named(("prompt", "weights"))) == CELLS


def test_with_a_plan_every_name_says_it_and_a_lever_that_was_not_turned_stays() -> None:
    two = list(named(("prompt", "weights")))
    assert list(named(LEVERS)) == [f"{cell}/{plan}" for plan in ("seed", "tuned") for cell in two]
    assert named(LEVERS)["seed/tuned/tuned"] == {"weights", "plan"}
    assert list(named(("prompt", "plan"))) == [
        "seed/base/seed",
        "tuned/base/seed",
        "seed/base/tuned",
        "tuned/base/tuned",
    ]
    assert list(named(("weights", "plan"))) == [
        "seed/base/seed",
        "seed/tuned/seed",
        "seed/base/tuned",
        "seed/tuned/tuned",
    ]


@pytest.mark.parametrize("levers", [LEVERS[:2], LEVERS[1:], LEVERS[::2], LEVERS])
def test_names_say_the_levers_with_and_without_the_last(levers: tuple[str, ...]) -> None:
    every = list(named(levers))
    assert levers_of(every) == levers_of(every[:-1]) == levers


@pytest.mark.parametrize(
    "names", [[], ["seed/base"], ["seed/base", "tuned/base"], ["<b>", "x"], [*CELLS, "seed/base/seed"]]
)
def test_other_names_are_refused(names: list[str]) -> None:
    with pytest.raises(DataError, match="are not those of levers"):
        levers_of(names)
