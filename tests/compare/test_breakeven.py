"""When what is dearer to tune and cheaper to serve pays, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reference.run_folders import write_run

from cotune.compare.breakeven import BreakEven, break_evens
from cotune.compare.render import as_csv, as_json, as_latex, as_markdown, sheets
from cotune.compare.tables import Group, compare

SCORES = {"a": 1.0, "b": 0.0}


def run(out: Path, strategy: str, tuning: float | None, serving: float | None, seed: int = 0) -> None:
    parts = {"prompts": None, "adapters": None, "answers": {"flops": serving, "seconds": 1.0}}
    served = {"examples": 2, **parts, "flops": serving, "seconds": 1.0}
    spent = {"tokens": 10, "flops": tuning, "seconds": 1.0}
    write_run(out, strategy, SCORES, seed=seed, tuning=spent, serving=served)  # type: ignore[arg-type]


@pytest.fixture
def group(tmp_path: Path) -> Group:
    """prompt-only costs 300 to tune on the mean of two seeds; lora-only 1000, joint 5000."""
    run(tmp_path, "zero-shot", 0.0, 50.0)
    run(tmp_path, "prompt-only", 200.0, 60.0, seed=0)
    run(tmp_path, "prompt-only", 400.0, 80.0, seed=1)
    run(tmp_path, "lora-only", 1000.0, 40.0)
    run(tmp_path, "joint", 5000.0, 90.0)
    (found,) = compare([tmp_path])
    return found


def test_each_pair_is_the_quotient_of_the_differences(group: Group) -> None:
    found = {(pair.dearer, pair.other): (pair.tuning, pair.serving, pair.calls) for pair in break_evens(group)}
    assert found == {
        ("prompt-only", "zero-shot"): (300.0, -20.0, None),  # its prompt is longer: it never pays
        ("lora-only", "zero-shot"): (1000.0, 10.0, 100.0),
        ("lora-only", "prompt-only"): (700.0, 30.0, pytest.approx(70 / 3)),
        ("joint", "zero-shot"): (5000.0, -40.0, None),
        ("joint", "prompt-only"): (4700.0, -20.0, None),
        ("joint", "lora-only"): (4000.0, -50.0, None),
    }


def test_at_the_break_even_both_have_cost_the_same() -> None:
    pair = BreakEven("a", "b", tuning=1000.0 - 400.0, serving=9.0 - 6.0)
    assert pair.calls == 200.0
    assert 1000 + pair.calls * 6 == 400 + pair.calls * 9
    assert BreakEven("a", "b", 600.0, 0.0).calls is None


def test_without_known_flops_there_is_none(tmp_path: Path) -> None:
    run(tmp_path, "zero-shot", None, None)
    run(tmp_path, "prompt-only", None, None)
    run(tmp_path, "lora-only", 10.0, 5.0)
    (group,) = compare([tmp_path])
    assert break_evens(group) == []
    assert not [sheet for sheet in sheets([group]) if sheet.title.endswith("break-even")]


def test_where_nothing_pays_a_sentence_says_so(tmp_path: Path) -> None:
    run(tmp_path, "zero-shot", 0.0, 5.0)
    run(tmp_path, "lora-only", 10.0, 5.0)
    told = [sheet for sheet in sheets(compare([tmp_path])) if any("break-even" in n.lower() for n in sheet.notes)]
    assert [(sheet.title.split(" · ")[-1], sheet.notes[0].split(".")[0]) for sheet in told] == [
        ("serving", "Break-even: none")
    ]


def test_what_pays_is_a_table_in_every_format_and_all_pairs_are_in_json(group: Group) -> None:
    (sheet,) = [sheet for sheet in sheets([group]) if sheet.title.endswith("break-even")]
    assert sheet.rows == (
        ("lora-only", "zero-shot", "1e+03", "10", "100"),
        ("lora-only", "prompt-only", "7e+02", "30", "23"),
    )
    assert "answers until it pays" in as_markdown([group]) and "answers until it pays" in as_latex([group])
    pairs = json.loads(as_json([group]))["groups"][0]["break_even"]
    assert len(pairs) == 6
    assert pairs[1] == {
        "dearer_to_tune": "lora-only",
        "instead_of": "zero-shot",
        "tuning_flops_more": 1000.0,
        "serving_flops_saved": 10.0,
        "answers": 100.0,
    }
    assert pairs[0]["answers"] is None
    assert "break" not in as_csv([group])
