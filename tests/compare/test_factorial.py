"""Main effects and interactions of k levers: exact on constructed tables, against regression, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from cotune.cells import LEVERS, Cell, cells
from cotune.compare.crossed import Arm, effect
from cotune.compare.factorial import attribution, contrast
from cotune.compare.stats import Floats, compare_mean
from cotune.errors import DataError

ALL = list(cells(LEVERS))
SETS = [of for order in (1, 2, 3) for of in itertools.combinations(LEVERS, order)]


def table(seeds: int = 3, examples: int = 8, **effects: float) -> dict[Cell, Floats]:
    """Every example alike but for its ease: 0.3 plus the effect of each tuned set of levers, joined by _."""
    ease = np.linspace(0, 0.1, examples)
    return {
        cell: np.tile(ease, (seeds, 1)) + 0.3 + sum(v for of, v in effects.items() if set(of.split("_")) <= cell)
        for cell in ALL
    }


def random_scores(seed: int, levers: tuple[str, ...] = LEVERS) -> dict[Cell, Floats]:
    random = np.random.default_rng(seed)
    return {cell: random.random((3, 8)) for cell in cells(levers)}


def test_an_additive_table_has_main_effects_and_no_interaction() -> None:
    found = attribution(table(prompt=0.125, weights=0.25, plan=-0.0625))
    means = {of: f.estimate.mean for of, f in found.items()}
    assert list(means) == SETS
    assert [means[lever,] for lever in LEVERS] == pytest.approx([0.125, 0.25, -0.0625])
    assert [means[of] for of in SETS[3:]] == pytest.approx([0] * 4, abs=1e-15)


def test_two_and_three_way_effects_by_hand() -> None:
    """Prompt and weights together add 0.1 more, all three together 0.2 more: averaged over the plan, 0.1 + 0.2 / 2."""
    found = attribution(table(prompt=0.1, prompt_weights=0.1, prompt_weights_plan=0.2))
    means = {of: f.estimate.mean for of, f in found.items()}
    assert means["prompt", "weights", "plan"] == pytest.approx(0.2)
    assert means["prompt", "weights"] == pytest.approx(0.2)
    assert means["prompt", "plan"] == means["weights", "plan"] == pytest.approx(0.1)
    assert means["prompt",] == pytest.approx(0.1 + 0.1 / 2 + 0.2 / 4)
    assert means["weights",] == pytest.approx(0.1 / 2 + 0.2 / 4)
    assert means["plan",] == pytest.approx(0.2 / 4)


def test_all_levers_are_the_sum_of_main_effects_and_a_quarter_of_the_three_way() -> None:
    scores = random_scores(0)
    effects = {of: contrast(scores, LEVERS, of) for of in SETS}
    whole = scores[frozenset(LEVERS)] - scores[frozenset()]
    assert sum(effects[lever,] for lever in LEVERS) + effects[LEVERS] / 4 == pytest.approx(whole)


def test_effects_are_those_of_a_regression_on_plus_and_minus_one() -> None:
    """y = mean + sum over sets of beta prod(x), x = 1 where tuned and -1 where not: an effect of k is 2^k beta."""
    scores = random_scores(1)
    design = np.array([[math.prod(1 if x in cell else -1 for x in of) for of in [(), *SETS]] for cell in ALL])
    beta = np.linalg.lstsq(design, np.stack([scores[c].ravel() for c in ALL]), rcond=None)[0][1:]
    for of, b in zip(SETS, beta, strict=True):
        assert contrast(scores, LEVERS, of).ravel() == pytest.approx(2 ** len(of) * b)


def test_order_of_levers_does_not_matter() -> None:
    scores = random_scores(2)
    for levers in itertools.permutations(LEVERS):
        for of in SETS:
            assert contrast(scores, levers, of[::-1]) == pytest.approx(contrast(scores, LEVERS, of), abs=1e-14)


def test_two_levers_are_the_two_by_two_to_the_bit() -> None:
    scores = random_scores(3, LEVERS[:2])
    neither, prompt, weights, both = scores.values()
    values = (both - prompt) - (weights - neither)
    assert (contrast(scores, LEVERS[:2], LEVERS[:2]) == values).all()
    assert attribution(scores, LEVERS[:2])[LEVERS[:2]] == effect(Arm(values), 2)
    assert list(attribution(scores, LEVERS[:2])) == [("prompt",), ("weights",), ("prompt", "weights")]


@pytest.mark.parametrize(("order", "bound"), [(1, 1.0), (2, 2.0), (3, 4.0)])
def test_intervals_end_where_an_effect_can(order: int, bound: float) -> None:
    """A spread so wide that the ends would lie beyond: three seeds at one end, and two examples far apart."""
    wide = effect(Arm(np.array([[bound, bound], [bound, bound], [-bound, -bound]])), order).estimate
    assert (wide.low, wide.high) == (-bound, bound)
    one = effect(Arm(np.array([[bound, 0.0, bound / 2]])), order)
    assert one == compare_mean(np.array([bound, 0.0, bound / 2]), bound)
    assert one.estimate.high == bound


def test_missing_cells_are_named() -> None:
    scores = random_scores(4)
    del scores[frozenset({"prompt", "plan"})], scores[frozenset()]
    with pytest.raises(DataError, match=r"needs all 8 .* missing: nothing tuned; prompt \+ plan tuned\. Evaluate"):
        attribution(scores)
    # A lever that was never tuned is left out, and four cells are enough.
    four = {cell: values for cell, values in random_scores(4).items() if "plan" not in cell}
    assert len(attribution(four, LEVERS[:2])) == 3


def test_what_cannot_be_paired_is_refused() -> None:
    for bad in (random_scores(5)[frozenset()][:2], np.where(np.eye(3, 8) > 0, np.nan, 0.5)):
        with pytest.raises(DataError, match="a score for each seed and each example"):
            attribution(random_scores(5) | {frozenset(LEVERS): bad})
    with pytest.raises(DataError, match="these levers and no others"):
        attribution(random_scores(6), LEVERS[:2])
    for of in ((), ("temperature",)):
        with pytest.raises(DataError, match="these levers and no others"):
            contrast(random_scores(7), LEVERS, of)


def test_one_seed_is_about_examples_and_three_are_about_seeds_too() -> None:
    scores = random_scores(8)
    assert {f.test for f in attribution(scores).values()} == {"t"}
    assert {f.test for f in attribution({c: v[:1] for c, v in scores.items()}).values()} == {"sign-flip"}
    assert all(f.p_holm is None for f in attribution(scores).values())
