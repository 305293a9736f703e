"""Each failure signature of a joint run: said where it is, not said of a healthy run."""

from __future__ import annotations

from typing import Any

import pytest

from cotune.diagnosis import warnings

Event = dict[str, Any]


def prompts(**changes: Any) -> Event:
    return {"kind": "generated_prompts", "examples": 20, "distinct": 9, "fallbacks": 0, "fixed": False} | changes


def adapters(**changes: Any) -> Event:
    return {"kind": "adapters", "examples": 20, "relative_norm": 0.05, "variation": 0.4, "fixed": False} | changes


def steps(actor: list[float], prompt: list[float]) -> list[Event]:
    """Losses per example; half of the examples have a target."""
    return [
        {"kind": "step", "actor_loss": a, "answered": 1.0, "prompt_loss": p * 0.5, "taught": 0.5}
        for a, p in zip(actor, prompt, strict=True)
    ]


def scores(*values: float | None) -> list[Event]:
    return [{"kind": "validation", "val_score": v} for v in values]


FALLING, RISING, FLAT = [3.0, 3.0, 2.0, 2.0, 1.0, 1.0], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0], [1.0] * 6
START = {"kind": "start", "val_score": 0.45}
HEALTHY = [prompts(), adapters(), *steps(FALLING, FALLING), START, *scores(0.2, 0.4, 0.5)]


def test_a_healthy_run_and_other_strategies_have_no_warning() -> None:
    assert warnings(HEALTHY) == [] and warnings([]) == []
    assert warnings([{**START, "stage": "tune/1-w"}, *scores(0.2)]) == []  # a score of another stage
    assert warnings([{"kind": "step", "loss": 1.0}, {"kind": "validation", "val_score": 0.1}]) == []


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([prompts(distinct=1)], "All 20 queries get the same prompt"),
        ([prompts(distinct=1, fallbacks=20)], "writes no usable prompt"),
        ([adapters(relative_norm=2e-4)], "hardly do anything: their update has 0.02% of"),
        ([adapters(variation=0.001)], "nearly the same for every query"),
        (steps(FALLING, RISING), "The adapter branch improves (loss -67%) while the prompt branch decays (+200%)"),
        (steps(RISING, FALLING), "The prompt branch improves"),
        (
            [*steps(FALLING, FALLING), START, *scores(0.2, 0.4)],
            "Training made the val score worse (45.0 before, 40.0 at",
        ),
        ([*steps(FALLING, FLAT), *scores(0.2, 0.5, 0.3)], "falls (best 50.0, last 30.0) while the loss falls too"),
    ],
)
def test_a_signature_is_named(events: list[Event], says: str) -> None:
    found = warnings(events)
    assert len(found) == 1 and says in found[0]


@pytest.mark.parametrize(
    "events",
    [
        [prompts(distinct=1, fixed=True)],  # meant to be one
        [prompts(distinct=1, examples=4)],  # too few to say
        [prompts(distinct=1), prompts()],  # over by the end
        [adapters(variation=0.0, fixed=True)],
        [adapters(variation=0.0, examples=2)],
        steps(FALLING[:5], RISING[:5]),  # too short to say
        [*steps(FALLING, FLAT), *scores(None, None, None)],
        [*steps(FALLING, FLAT), *scores(0.5, 0.5, 0.48)],
        [*steps(RISING, FLAT), *scores(0.2, 0.5, 0.3)],
    ],
)
def test_what_looks_alike_but_is_none(events: list[Event]) -> None:
    assert warnings(events) == []


def test_a_verifier_that_tells_nothing_apart_is_named() -> None:
    def said(**told: Any) -> list[str]:
        facts = {"constant": False, "mean_score": 0.3, "held_out": 20, "held_out_auc": 0.8, "held_out_auc_within": None}
        return warnings([{"kind": "verifier"} | facts | told])

    assert said() == said(held_out_auc=None) == said(held_out=2, held_out_auc=0.2) == []
    assert "scored 0, so it rates every one alike" in said(constant=True, mean_score=0.0)[0]
    assert "higher in 44% of the pairs, no more than chance" in said(held_out_auc=0.44)[0]
