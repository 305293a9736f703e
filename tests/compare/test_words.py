"""The sentences, case by case."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cotune.cells import LEVERS
from cotune.compare import words
from cotune.compare.crossed import Arm
from cotune.compare.stats import Estimate, Finding

FOUND = Finding(Estimate(0.031, 0.009, 0.053, 0.011, 500), "McNemar mid-p", 0.004, 0.005, 0.024, 0.1, "g", "", 0.004)
NOT = replace(FOUND, estimate=Estimate(0.003, -0.012, 0.018, 0.008, 500), p=0.7, p_holm=1.0)


def test_a_star_is_better_or_worse_and_the_interval_reads_along() -> None:
    assert words.difference("joint", "sequential", FOUND, 1) == (
        "joint is better than sequential by 3.1 points (95% 0.9 to 5.3)."
    )
    worse = replace(FOUND, estimate=Estimate(-0.031, -0.053, -0.009, 0.011, 500))
    assert words.difference("joint", "sequential", worse, 1) == (
        "joint is worse than sequential by 3.1 points (95% 0.9 to 5.3)."
    )


def test_no_star_says_what_could_have_been_seen() -> None:
    assert words.difference("joint", "sequential", NOT, 1) == (
        "joint against sequential: no difference shown (+0.3 points, 95% -1.2 to 1.8); "
        "this design could have seen 2.4 points."
    )


def test_a_star_lost_to_holm_says_why() -> None:
    assert words.difference("joint", "sequential", replace(FOUND, p_holm=0.06), 15) == (
        "joint against sequential: no difference shown (+3.1 points, 95% 0.9 to 5.3; below 0.05 alone (p 0.004), "
        "not among the 15 shown (p 0.060)); this design could have seen 2.4 points."
    )


def test_test_and_interval_on_two_sides_of_the_edge_say_so() -> None:
    wide = replace(FOUND, estimate=Estimate(0.02, -0.0004, 0.04, 0.01, 500), p=0.049, p_holm=0.049)
    assert "(95% -0.0 to" not in words.difference("a", "b", wide, 1)
    assert "; the test and the interval, made apart, fall on two sides)" in words.difference("a", "b", wide, 1)
    narrow = replace(FOUND, p=0.051, p_holm=0.051)
    assert "95% 0.9 to 5.3; the test and the interval, made apart, fall on two sides)" in words.difference(
        "a", "b", narrow, 1
    )


def test_equal_scores_and_missing_intervals() -> None:
    same = replace(NOT, estimate=Estimate(0.0, -0.01, 0.01, 0.0, 500), p=1.0, detectable=0.015)
    assert words.difference("a", "b", same, 1) == (
        "a scores the same as b on every example: no difference shown; this design could have seen 1.5 points."
    )
    one = replace(same, estimate=Estimate(0.0, -0.7, 0.7, None, 1), detectable=1.0)
    assert words.difference("a", "b", one, 1).startswith("a scores the same as b on the one example there is: no")
    alike = replace(NOT, estimate=Estimate(0.5, None, None, 0.0, 3), p=0.25, p_holm=0.25, detectable=None)
    assert words.difference("a", "b", alike, 1) == (
        "a against b: no difference shown (+50.0 points, no interval: too few or too equal examples)."
    )
    sure = replace(alike, p=0.001, p_holm=0.001)
    assert "by 50.0 points (every example differs alike: no interval)" in words.difference("a", "b", sure, 1)


def test_interaction_is_more_or_less_than_the_sum() -> None:
    less = replace(FOUND, estimate=Estimate(-0.05, -0.08, -0.01, 0.02, 200))
    assert words.interaction("joint", less, 1) == (
        "joint: prompt and weights together gain 5.0 points less than the sum of what each gains alone "
        "(95% 1.0 to 8.0)."
    )
    assert words.interaction("joint", NOT, 1).startswith(
        "joint: no interaction of prompt and weights shown (+0.3 points"
    )
    none = replace(NOT, estimate=Estimate(0.0, None, None, 0.0, 200))
    assert words.interaction("joint", none, 1) == "joint: no interaction of prompt and weights on any example."


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        ((1, 1), "one seed: other seeds are not covered"),
        ((2, 2), "two seeds: other seeds are not covered"),
        ((1, 2), "a has one seed: its other seeds are not covered; b has two seeds: its other seeds are not covered"),
        ((5, 1), "b has one seed: its other seeds are not covered"),
        ((5, 3), ""),
        ((3, 0), ""),
        ((1, 0), "one seed: other seeds are not covered"),
    ],
)
def test_which_seeds_are_not_covered(seeds: tuple[int, int], sentence: str) -> None:
    arms = [
        (name, Arm(np.tri(max(1, count), 4), tunes_nothing=not count)) for name, count in zip("ab", seeds, strict=True)
    ]
    assert words.uncovered(arms) == sentence
    said = words.difference("a", "b", replace(FOUND, uncovered=sentence), 1)
    assert said.endswith(f"{sentence[1:]}." if sentence else "5.3).")


def test_p_shows_which_side_of_5_percent() -> None:
    shown = {0.0496: "0.0496", 0.0504: "0.0504", 0.0004: "<0.001", 0.12345: "0.123", 1.0: "1.000"}
    assert {p: words.p_value(p) for p in shown} == shown
    assert words.p_value(None) == ""


def test_the_answer_names_who_is_better_worse_and_not_shown_to_be_either() -> None:
    worse = replace(FOUND, estimate=Estimate(-0.02, -0.03, -0.01, 0.005, 500))
    more = replace(FOUND, estimate=Estimate(0.08, 0.06, 0.1, 0.01, 500))
    assert words.answer("z", [("a", FOUND)]) == "a is better than z by 3.1 points (95% 0.9 to 5.3)"
    assert words.answer("z", [("a", FOUND), ("b", more), ("c", worse), ("d", NOT)]) == (
        "a and b are better than z by 3.1 to 8.0 points; c is worse than z by 2.0 points (95% 1.0 to 3.0); "
        "no difference from z is shown for d"
    )
    assert words.answer("z", [("a", FOUND), ("b", FOUND)]) == "a and b are better than z by 3.1 points each"
    assert words.answer("z", [("a", NOT)]) == "no difference is shown between z and a"
    assert words.answer("z", [("a", NOT), ("b", NOT)]) == "no difference is shown between z and any of a and b"
    lost = replace(FOUND, p_holm=0.06)
    assert words.answer("z", [(n, lost) for n in "abcdefg"]) == (
        "no difference is shown between z and any of a, b, c and 4 more"
    )


@pytest.mark.parametrize(
    ("of", "mean", "said"),
    [
        (("plan",), 0.031, "x, averaged over prompt and weights seed and tuned: tuning the plan gains 3.1 points"),
        (("plan",), -0.031, "x, averaged over prompt and weights seed and tuned: tuning the plan loses 3.1 points"),
        (
            ("prompt", "plan"),
            -0.031,
            "x, averaged over weights seed and tuned: prompt and plan together gain 3.1 points less than the sum of "
            "what each gains without the other",
        ),
        (
            ("prompt", "weights", "plan"),
            0.031,
            "x: what prompt and weights gain beyond their sum is 3.1 points more once the plan is tuned too",
        ),
    ],
)
def test_an_effect_of_levers(of: tuple[str, ...], mean: float, said: str) -> None:
    ends = (0.009, 0.053) if mean > 0 else (-0.053, -0.009)
    found = replace(FOUND, estimate=Estimate(mean, *ends, 0.011, 500))
    assert words.effect("x", of, LEVERS, found, 7) == f"{said} (95% 0.9 to 5.3)."


def test_no_effect_shown_and_none_at_all() -> None:
    assert words.effect("x", ("plan",), ("prompt", "plan"), NOT, 3) == (
        "x, averaged over prompt seed and tuned: no effect of the plan shown (+0.3 points, 95% -1.2 to 1.8); "
        "this design could have seen 2.4 points."
    )
    none = replace(NOT, estimate=Estimate(0.0, None, None, 0.0, 500), uncovered="one seed: other seeds are not covered")
    assert words.effect("x", ("prompt", "plan"), ("prompt", "plan"), none, 3) == (
        "x: no interaction of prompt and plan on any example. One seed: other seeds are not covered."
    )
