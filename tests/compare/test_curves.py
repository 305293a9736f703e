"""Quality against budget, read off the events of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reference.run_folders import write_rows, write_run

from cotune.compare.curves import learning
from cotune.compare.runs import Run, read_run


def run_with(out: Path, *events: dict[str, Any]) -> Run:
    folder = write_run(out, "sequential", {"a": 1.0})
    write_rows(folder / "events.jsonl", [{"i": i, "time": 0.0, **event} for i, event in enumerate(events)])
    return read_run(folder)


def val(kind: str, at: int, score: float | None, stage: str = "tune") -> dict[str, Any]:
    return {"kind": kind, "stage": stage, "val_score": score, "tuning_tokens": at}


def test_the_best_so_far_holds_until_a_better_one(tmp_path: Path) -> None:
    for kind in ("epoch", "validation", "finalist"):  # lora-only, joint, prompt-only
        curve = learning(
            run_with(tmp_path / kind, *(val(kind, at, s) for at, s in ((10, 0.5), (20, 0.25), (30, 0.75)))), []
        )
        assert curve is not None
        assert curve.validated == ((10, 0.5), (20, 0.25), (30, 0.75))
        assert curve.best == ((10, 0.5), (20, 0.5), (30, 0.75))
        assert curve.record() == {
            "tuning_tokens": [10, 20, 30],
            "val_scores": [0.5, 0.25, 0.75],
            "best_val_scores": [0.5, 0.5, 0.75],
        }


def test_a_sequence_goes_on_over_its_stages_and_hands_over_what_the_last_has(tmp_path: Path) -> None:
    """Each stage begins with what the one before it hands over, and returns its own best, higher or not."""
    curve = learning(
        run_with(
            tmp_path,
            val("finalist", 10, 0.5, "tune/0-p"),
            val("finalist", 20, 0.6, "tune/0-p"),
            {"kind": "stage-result", "val_score": 0.6, "tuning_tokens": 20},
            val("start", 50, 0.4, "tune/1-w"),
            val("epoch", 80, 0.5, "tune/1-w"),
            val("epoch", 110, 0.45, "tune/1-w"),
        ),
        [],
    )
    assert curve is not None
    assert curve.best == ((10, 0.5), (20, 0.6), (50, 0.4), (80, 0.5), (110, 0.5))


def test_a_search_that_saw_train_examples_is_apart(tmp_path: Path) -> None:
    events = (
        {"kind": "candidate", "origin": "start", "score": 0.1, "tuning_tokens": 100},
        {"kind": "candidate", "origin": "edits", "score": 0.9, "tuning_tokens": 200},
        {"kind": "round", "best": 0.5, "tuning_tokens": 900},
    )
    curve = learning(run_with(tmp_path / "a", *events), [])
    assert curve is not None
    assert (curve.validated, curve.searched) == ((), ((100, 0.1), (900, 0.5)))
    assert learning(run_with(tmp_path / "b", *events[:2], val("validation", 5, None)), []) is None
