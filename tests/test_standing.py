"""What events add up to: exact values, and that nothing in a file can raise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.standing import KEPT, Best, Score, Series, Standing, folded, report, standing

RUN: list[dict[str, Any]] = [
    {"kind": "start", "time": 100.0, "strategy": "prompt-only", "tuning_tokens": 0},
    {"kind": "progress", "time": 101.0, "stage": "tune", "label": "search", "done": 10, "of": 40, "score": 0.5,
     "tuning_tokens": 90},
    {"kind": "progress", "time": 103.0, "stage": "tune", "label": "search", "done": 20, "of": 40, "score": 0.25,
     "tuning_tokens": 200, "tuning_flops": 1e9, "tuning_seconds": 2.5},
    {"kind": "candidate", "time": 104.0, "stage": "tune", "text": "Seed.", "score": 0.3, "dropped": False},
    {"kind": "candidate", "time": 105.0, "stage": "tune", "text": "Bad.", "score": 0.9, "dropped": True},
    {"kind": "candidate", "time": 106.0, "stage": "tune", "text": "Good.", "score": 0.5, "dropped": False},
    {"kind": "finalist", "time": 107.0, "stage": "tune", "text": "Good.", "score": 0.5, "val_score": 0.75},
    {"kind": "budget", "time": 108.0, "stage": "tune", "message": "Used up.", "tuning_tokens": 950},
    {"kind": "step", "time": 109.0, "stage": "tune/1-w", "loss": 2.0, "step": 1, "of": 2},
    {"kind": "step", "time": 110.0, "stage": "tune/1-w", "loss": 1.0, "step": 2, "of": 2},
    {"kind": "epoch", "time": 111.0, "stage": "tune/1-w", "val_score": 0.5},
]  # fmt: skip


def after(rows: list[Any], start: Standing | None = None) -> Standing:
    now = start or Standing()
    for row in rows:
        now = folded(now, row)
    return now


def test_the_work_at_hand_and_its_time_left() -> None:
    now = after(RUN[:3])
    assert (now.stage, now.label, now.done, now.of, now.rate) == ("tune", "search", 20, 40, 5.0)
    assert now.eta(103.0) == 4.0
    assert now.eta(104.0) == 3.0  # it counts down between two events
    assert now.eta(999.0) == 2.0  # but not past the batch that is late
    assert after(RUN[:2]).eta(101.0) is None  # one point is no rate


def test_time_left_forgets_what_came_from_the_journal() -> None:
    replayed = [{"kind": "progress", "time": 1.0 + i / 1000, "label": "x", "done": i, "of": 1000} for i in range(500)]
    real = [{"kind": "progress", "time": 2.0 + i, "label": "x", "done": 500 + i, "of": 1000} for i in range(12)]
    assert after(replayed + real).rate == 1.0


def test_other_work_starts_with_no_rate() -> None:
    again = RUN[2] | {"time": 104.0, "done": 8}
    assert after([*RUN[:3], again]).rate is None  # the same label from the beginning: the next evaluation
    assert after([*RUN[:3], again | {"label": "choice"}]).rate is None
    moved = after([*RUN[:3], {"kind": "traces", "stage": "test"}])
    assert (moved.stage, moved.label, moved.done, moved.eta(104.0)) == ("test", "", None, None)


def test_the_rate_that_a_file_brings_along_is_taken() -> None:
    now = folded(Standing(), RUN[1] | {"rate": 10.0})
    assert now.eta(101.0) == 3.0


def test_score_so_far_with_its_interval() -> None:
    score = after(RUN[:3]).score
    assert score == Score("tune search", 0.25, 20, 40)
    assert score is not None
    assert score.interval == pytest.approx((0.1119, 0.4687), abs=1e-4)  # Wilson, 5 of 20
    no_score = {"kind": "progress", "time": 104.0, "stage": "tune", "label": "prompts", "done": 1, "of": 2}
    assert after([*RUN[:3], no_score]).score == score  # the last one stays to be seen
    assert after([RUN[1] | {"score": 1.5}]).score is None


def test_the_best_prompt_is_the_best_that_ran_in_full() -> None:
    assert after(RUN).best == Best("tune", "Good.", 0.5)
    worse = {"kind": "candidate", "stage": "tune/2-p", "text": "Again.", "score": 0.1}
    assert after([*RUN, worse]).best == Best("tune/2-p", "Again.", 0.1)  # other weights, another race
    chosen = {"kind": "chosen", "stage": "tune", "text": "Seed.", "score": 0.3}
    assert after([*RUN[:7], chosen]).best == Best("tune", "Seed.", 0.3)
    epoch = {"kind": "chosen", "stage": "tune/1-w", "epoch": 1, "val_score": 0.5}
    assert after([*RUN, epoch, epoch | {"kind": "stage-result"}]) == after(RUN)


def test_series_are_bounded_and_of_one_stage() -> None:
    now = after(RUN)
    assert now.losses == Series("tune/1-w", (2.0, 1.0), 2)
    assert now.rewards == Series("tune", (0.3, 0.5), 2)
    assert now.val_scores == Series("tune/1-w", (0.5,), 1)
    long = after([{"kind": "step", "stage": "s", "loss": float(i)} for i in range(1000)])
    assert (len(long.losses.values), long.losses.values[-1], long.losses.count) == (KEPT, 999.0, 1000)
    assert after([{"kind": "rollouts", "stage": "s", "mean_score": 0.25}]).rewards.values == (0.25,)


def test_budget_and_warnings() -> None:
    now = after(RUN, standing({"budget": {"tokens": 1000, "flops": None, "seconds": 5}}))
    assert report(now, 120.0)["budget"] == {
        "tokens": {"used": 950.0, "limit": 1000.0},
        "seconds": {"used": 2.5, "limit": 5.0},
    }
    assert (now.warnings, now.warned) == (("Used up.",), 1)
    many = after([{"kind": "warning", "message": m} for m in "aabcde"])
    assert (many.warnings, many.warned) == (("c", "d", "e"), 5)
    assert standing({}).limits == standing({"budget": 3}).limits == {}


def test_the_report_is_plain_json() -> None:
    told = json.loads(json.dumps(report(after(RUN[:4]), 104.0), allow_nan=False))
    assert (told["stage"], told["label"], told["done"], told["of"], told["eta_seconds"]) == (
        "tune",
        "search",
        20,
        40,
        3,
    )
    assert told["elapsed_seconds"] == 4.0
    low, high = told["score"].pop("low"), told["score"].pop("high")
    assert told["score"] == {"what": "tune search", "mean": 0.25, "n": 20, "of": 40}
    assert (low, high) == pytest.approx((0.1119, 0.4687), abs=1e-4)
    assert report(Standing(), 0.0)["elapsed_seconds"] is None


def test_unknown_events_change_nothing_but_the_place() -> None:
    now = after(RUN)
    assert folded(now, {"kind": "of a later version", "stage": "tune/1-w", "score": 0.9, "loss": 3.0}) == now
    for nothing in (None, 3, "x", [], {}):
        assert folded(now, nothing) == now


KEYS = [*sorted({key for row in RUN for key in row}), "rate", "mean_score", "message"]
KINDS = ["progress", "step", "candidate", "chosen", "warning", "rollouts", "finalist", "?", None, 3]
ODD = st.one_of(
    st.none(), st.booleans(), st.text(), st.integers(), st.just(10**400), st.floats(), st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), ODD).map(dict), max_size=8), st.data())
def test_no_data_raises(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    kinds = [row | {"kind": data.draw(st.sampled_from(KINDS))} for row in rows]
    now = after([*rows, *kinds])
    json.dumps(report(now, 5.0), allow_nan=False)


@given(st.lists(st.sampled_from(RUN), max_size=30), st.data())
def test_any_part_of_a_run_will_do(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    """From wherever one begins to look, the present is the same: only what is counted and kept differs."""
    cut = data.draw(st.integers(0, len(rows)))
    assert after(rows[cut:], after(rows[:cut])) == after(rows)
    late, whole = after(rows[cut:]), after(rows)
    if late.done is not None:
        assert (late.stage, late.label, late.done, late.of) == (whole.stage, whole.label, whole.done, whole.of)
