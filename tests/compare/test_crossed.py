"""Several seeds on the same examples: parts of the variance, intervals and tests against slow definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import slow_statistics as slow
from scipy import stats

from cotune.compare.crossed import (
    Arm,
    Variance,
    difference,
    effect,
    estimate_score,
    hierarchical_bootstrap,
    mean_variance,
    of_variance,
    ratio_variance,
    variance,
)
from cotune.compare.stats import compare_paired, mean_score, wilson

RNG = np.random.default_rng(3)
OURS = (RNG.random((4, 12)) < 0.6).astype(float)
THEIRS = (RNG.random((3, 12)) < 0.4).astype(float)


def test_parts_are_those_of_a_two_way_analysis_of_variance() -> None:
    seeds, examples, left = slow.two_way(OURS.tolist())
    found = variance(Arm(OURS))
    assert found.items == pytest.approx(examples / (4 * 12))
    assert found.between == pytest.approx(seeds / (4 * 12))
    assert found.within == pytest.approx(left / (4 * 12))
    assert (found.items_freedom, found.seeds_freedom) == (11, pytest.approx(3))


def test_seeds_of_two_sides_add_with_welchs_degrees_of_freedom() -> None:
    a, b, both = variance(Arm(OURS)), variance(Arm(THEIRS)), variance(Arm(OURS), Arm(THEIRS))
    assert both.between == pytest.approx(a.between + b.between)
    assert both.within == pytest.approx(a.within + b.within)
    assert both.seeds_freedom == pytest.approx((a.between + b.between) ** 2 / (a.between**2 / 3 + b.between**2 / 2))
    paired = OURS.mean(axis=0) - THEIRS.mean(axis=0)
    assert both.items == pytest.approx(paired.var(ddof=1) / 12)


@settings(max_examples=60, deadline=None)
@example(1.0, 879, 1.0, 1.0, 0.9921875, True)  # with the examples' degrees of freedom alone p would be 1e-291
@example(1.0, 274, 1.0, 1.0, 0.9921875, True)
@example(1.0, 88, 1e-38, 1.0, 0.75, True)  # it is the smaller end itself, up to rounding
@given(
    st.floats(1e-6, 1), st.integers(1, 2000), st.floats(0, 1), st.floats(1, 20), st.floats(0.5, 0.999), st.booleans()
)
def test_half_width_and_p_are_each_others_inverse(
    items: float, freedom: int, seeds: float, seeds_freedom: float, confidence: float, some: bool
) -> None:
    v = Variance(items, freedom, seeds if some else 0.0, 0.0, seeds_freedom)
    half = slow.banerjee(items, freedom, v.seeds, seeds_freedom, confidence)
    assert v.half(confidence) == pytest.approx(half)
    assert v.p(half) == pytest.approx(1 - confidence, rel=1e-5)
    assert v.p(-half) == v.p(half)


def test_p_at_the_extremes() -> None:
    v = Variance(1e-4, 500, 1e-4, 0.0, 2.0)
    assert v.p(0.0) == 1.0
    small = v.p(1e6)
    assert small is not None
    assert 0 <= small < 1e-12
    assert Variance(0.0, 10).p(0.5) is None
    assert Variance(0.0, 10).detectable is None


def test_without_seeds_in_it_the_detectable_mean_is_students() -> None:
    found = Variance(0.01, 50).detectable
    assert found is not None
    assert stats.nct.sf(stats.t.ppf(0.975, 50), 50, found / 0.1) == pytest.approx(0.8, abs=1e-5)


def test_one_seed_or_equal_seeds_are_the_examples_alone() -> None:
    for arm in (Arm(OURS[:1]), Arm(np.repeat(OURS[:1], 3, axis=0))):
        assert estimate_score(arm) == mean_score(OURS[0])
        assert difference(arm, Arm(THEIRS[:1])) == compare_paired(OURS[0], THEIRS[0])
    assert Arm(OURS[:1]).blind
    assert not Arm(np.repeat(OURS[:1], 3, axis=0)).blind
    assert not Arm(OURS[:1], tunes_nothing=True).blind


def test_two_seeds_are_not_enough_to_tell_their_spread() -> None:
    arm = Arm(OURS[:2])
    assert arm.blind
    assert not arm.spread
    assert variance(arm).seeds == 0
    found = difference(arm, Arm(THEIRS[:1]))
    assert found.test == "sign-flip"
    assert found.estimate.mean == pytest.approx(OURS[:2].mean() - THEIRS[0].mean())


def test_three_seeds_widen_the_interval_by_their_spread() -> None:
    """Three seeds that are right on 10, 50 and 90 of 100 examples: the mean is 0.5, other seeds anywhere."""
    scores = np.array([[float(i < hits) for i in range(100)] for hits in (10, 50, 90)])
    e = estimate_score(Arm(scores))
    assert e.mean == pytest.approx(0.5)
    assert e.low is not None
    assert e.high is not None
    assert e.low < 0.1 < 0.9 < e.high
    zero = difference(Arm(scores), Arm(np.zeros((1, 100)), tunes_nothing=True))
    assert zero.p is not None
    assert zero.p > 0.05
    assert zero.test == "t"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_or_all_wrong_in_every_seed(value: float) -> None:
    arm = Arm(np.full((3, 20), value))
    assert (estimate_score(arm).low, estimate_score(arm).high) == wilson(value, 20)
    assert difference(arm, Arm(np.full((3, 20), value))).p == 1.0


def test_spread_only_between_seeds_or_only_between_examples() -> None:
    seeds_only = Arm(np.repeat(np.array([[0.0], [1.0], [1.0]]), 10, axis=1))
    assert variance(seeds_only).items == 0
    assert variance(seeds_only).seeds == pytest.approx(1 / 9)
    assert estimate_score(seeds_only).standard_error == pytest.approx(1 / 3)
    # The same examples wrong, other ones each time: every seed's mean is 1/2, so seeds add nothing.
    examples_only = Arm(np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]]))
    assert variance(examples_only).seeds == 0


def test_different_numbers_of_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="same examples on both sides, not 12 and 11"):
        difference(Arm(OURS), Arm(THEIRS[:, 1:]))


def test_one_example_has_no_degrees_of_freedom_and_no_error() -> None:
    one = Arm(np.array([[1.0], [0.0], [1.0]]))
    assert estimate_score(one).n == 1
    assert difference(one, Arm(np.array([[0.0]]))).estimate.low is None
    assert of_variance(0.5, mean_variance([variance(one), variance(Arm(OURS))]), 13).estimate.low is None


def test_interaction_of_one_seed_flips_signs() -> None:
    found = effect(Arm(np.array([[1.0, 0.0, 0.0, 1.0]])), 2)
    assert (found.test, found.p) == ("sign-flip", 0.5)  # of four sign patterns of two ones, two are as far out


def test_variance_of_a_mean_over_tasks_by_hand() -> None:
    """Items 0.01 (9 degrees of freedom) and 0.04 (19); seeds 0.02 (2) and none."""
    over = mean_variance([Variance(0.01, 9, 0.03, 0.01, 2.0), Variance(0.04, 19)])
    assert over.items == pytest.approx(0.05 / 4)
    assert over.items_freedom == pytest.approx(0.05**2 / (0.01**2 / 9 + 0.04**2 / 19))
    assert (over.between, over.within, over.seeds_freedom) == (
        pytest.approx(0.03 / 4),
        pytest.approx(0.01 / 4),
        pytest.approx(2.0),
    )
    one = mean_variance([variance(Arm(OURS), Arm(THEIRS))])
    assert one.half() == pytest.approx(variance(Arm(OURS), Arm(THEIRS)).half())


def test_a_mean_without_variance_has_no_interval() -> None:
    e = of_variance(0.1, Variance(0.0, 5), 6).estimate
    assert (e.mean, e.low, e.high) == (0.1, None, None)


def test_variance_of_a_ratio_is_that_of_small_changes() -> None:
    """Delta method against the spread of the ratio over many resampled sets of examples."""
    rng = np.random.default_rng(4)
    theirs = (rng.random(400) < 0.5).astype(float)
    ours = np.where(rng.random(400) < 0.8, theirs, 1.0)
    found = ratio_variance(Arm(ours[None]), Arm(theirs[None]))
    assert found is not None
    drawn = rng.integers(0, 400, (4000, 400))
    ratios = ours[drawn].mean(axis=1) / theirs[drawn].mean(axis=1)
    assert math.sqrt(found.total) == pytest.approx(float(ratios.std()), rel=0.05)
    assert ratio_variance(Arm(ours[None]), Arm(np.zeros((1, 400)))) is None


scores = st.integers(1, 4).flatmap(
    lambda seeds: st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=6, max_size=6), min_size=seeds, max_size=seeds
    )
)


@settings(max_examples=150, deadline=None)
@given(scores, scores, st.booleans())
def test_whatever_the_scores_there_is_a_number_or_none_and_never_an_error(
    ours: list[list[float]], theirs: list[list[float]], nothing: bool
) -> None:
    a, b = Arm(np.array(ours)), Arm(np.array(theirs), tunes_nothing=nothing)
    found = difference(a, b)
    for tested in (found, effect(a, 2)):
        e = tested.estimate
        assert e.low is None or e.high is None or e.low <= e.mean <= e.high
        assert tested.p is None or 0 <= tested.p <= 1
        assert tested.detectable is None or tested.detectable > 0
        if tested.test == "t" and tested.p is not None:  # one and the same statement
            assert e.excludes_zero == (tested.p < 0.05)
    assert found.estimate.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    e = estimate_score(a)
    assert e.low is not None
    assert e.high is not None
    assert 0 <= e.low <= e.mean <= e.high <= 1


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(1, 20))
@settings(max_examples=150, deadline=None)
def test_what_could_be_seen_exists_wherever_there_is_variance(
    items: float, between: float, within: float, freedom: float
) -> None:
    v = Variance(items, 9, between, within, freedom)
    assert (v.detectable is None) == (v.total == 0)


def test_hierarchical_bootstrap_has_the_quantiles_of_all_equally_likely_draws() -> None:
    ours, theirs = OURS[:3, :4] + RNG.random((3, 4)) / 4, THEIRS[:1, :4]
    means = []
    for items in itertools.product(range(4), repeat=4):
        drawn, base = ours[:, items].mean(axis=1), theirs[:, items].mean()
        means += [np.mean(seeds) - base for seeds in itertools.product(drawn, repeat=3)]
    low, high = hierarchical_bootstrap(Arm(ours), Arm(theirs, tunes_nothing=True))
    for end, share in ((low, 0.025), (high, 0.975)):  # 1,999 of the 6,912 draws: a standard error of 0.35 points
        assert np.quantile(means, share - 0.012) <= end <= np.quantile(means, share + 0.012)


def test_hierarchical_bootstrap_is_shown_where_seeds_can_be_drawn_again() -> None:
    assert difference(Arm(OURS), Arm(THEIRS)).estimate.bootstrap == hierarchical_bootstrap(Arm(OURS), Arm(THEIRS))
    assert estimate_score(Arm(OURS)).bootstrap == hierarchical_bootstrap(Arm(OURS))
    assert effect(Arm(OURS), 2).estimate.bootstrap == hierarchical_bootstrap(Arm(OURS))
    for few in (Arm(OURS[:1]), Arm(OURS[:2]), Arm(np.tile(OURS[0], (3, 1)))):
        assert hierarchical_bootstrap(few) is None
        assert estimate_score(few).bootstrap is None
