"""What the checks found, in every format: worst over seeds, empty where it is not known, shown when worth a word."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from reference.run_folders import write_run

from cotune.compare.render import as_csv, as_json, as_latex, as_markdown, as_table
from cotune.compare.report import as_html
from cotune.compare.tables import compare
from cotune.output import drawn

SCORES = {"a": 1.0, "b": 0.0, "c": 1.0}


def checks(**found: Any) -> dict[str, Any]:
    """As checks.py and noise.py write them, with nothing found but `found`."""
    fine = {
        "near_duplicates": {"val in train": 7, "test in train": 0, "test in val": 0},
        "prompts_copying": {"val": 0, "test": 0},
        "truncated": 0.0,
        "unread": 0.0,
        "times_measured": 1,
        "adapters": None,
    }
    return {"checks": fine | found, "noise": {"promised": True}}


def lines_of(out: Path, title: str) -> list[list[str]]:
    lines = drawn(as_table(compare([out])), terminal=False).splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(title))
    return [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 : lines.index("", start)] if "─" not in line]


def test_only_what_is_worth_a_word_is_shown_and_the_worst_seed_counts(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", SCORES)  # of an older version: no checks at all
    write_run(tmp_path, "prompt-only", SCORES, more=checks(prompts_copying={"val": 0, "test": 2}, times_measured=3))
    for seed, (cut, near) in enumerate([(0.125, 0), (0.25, 4), (0.0, 1)]):
        adapters = {"examples": 16, "without_effect": 4 * seed}
        found = checks(
            adapters=adapters,
            truncated=cut,
            near_duplicates={"val in train": 9, "test in train": near, "test in val": 2},
        )
        write_run(tmp_path, "joint", SCORES, seed=seed, more=found)
    table = lines_of(tmp_path, "· checks")
    assert table == [
        [
            "checks, worst of the runs",
            "cut off %",
            "near duplicates",
            "prompts with test text",
            "dead adapters %",
            "times measured",
        ],
        ["zero-shot"],
        ["prompt-only", "0.0", "0", "2", "3"],
        ["joint", "25.0", "4", "0", "50.0", "1"],
    ]
    groups = compare([tmp_path])
    for text in (as_markdown(groups), as_latex(groups).replace(r"\%", "%")):
        assert "cut off %" in text
        assert "no answer found" not in text
    assert "no answer found" in as_html(groups)  # where there is room, everything
    rows = {row["strategy"]: row for row in json.loads(as_json(groups))["groups"][0]["rows"]}
    of = lambda name: {k.removeprefix("check_"): v for k, v in rows[name].items() if k.startswith("check_")}  # noqa: E731
    assert set(of("zero-shot").values()) == {None}
    assert of("joint") == {
        "truncated": 0.25,
        "unread": 0.0,
        "near_duplicates": 4.0,
        "prompts_copying_val": 0.0,
        "prompts_copying_test": 0.0,
        "dead_adapters": 0.5,
        "times_measured": 1.0,
        "grades_differ": 0.0,
    }
    assert ",0.25,0.0,4.0,0.0,0.0,0.5,1.0,0.0," in as_csv(groups)


def test_nothing_found_is_one_line_and_nothing_known_is_none(tmp_path: Path) -> None:
    write_run(tmp_path / "new", "zero-shot", SCORES, more=checks())
    write_run(tmp_path / "old", "zero-shot", SCORES)
    new, old = (drawn(as_table(compare([tmp_path / name])), terminal=False) for name in ("new", "old"))
    assert "Checks: nothing found." in new
    assert "checks" not in new.replace("Checks: nothing found.", "")
    assert "hecks" not in old


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        ({"promised": True}, 0.0),
        ({"promised": False, "examples": 64, "grades_differ": 0.03125}, 0.03125),
        ({"promised": True, "examples": 8, "grades_differ": 0.125}, 0.125),
        ({"promised": False}, None),
        ({}, None),
        ("x", None),
    ],
)
def test_engine_noise_is_what_was_measured_or_promised(tmp_path: Path, noise: Any, expected: float | None) -> None:
    write_run(tmp_path, "zero-shot", SCORES, more=checks() | {"noise": noise})
    (row,) = json.loads(as_json(compare([tmp_path])))["groups"][0]["rows"]
    assert row["check_grades_differ"] == expected
    assert row["check_truncated"] == 0.0


def test_on_val_its_own_duplicates_count_and_test_was_not_looked_at(tmp_path: Path) -> None:
    found = checks(near_duplicates={"val in train": 3}, prompts_copying={"val": 1})
    write_run(tmp_path, "zero-shot", SCORES, settings={"measured": "val"}, more=found)
    (row,) = json.loads(as_json(compare([tmp_path])))["groups"][0]["rows"]
    assert (row["check_near_duplicates"], row["check_prompts_copying_val"]) == (3.0, 1.0)
    assert row["check_prompts_copying_test"] is None
