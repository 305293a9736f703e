"""The 2x2x2 of runs that chose their inference plan: its cells, every effect, what is said of it, in every format."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from reference.run_folders import write_run

from cotune.cells import LEVERS, named
from cotune.compare.render import as_csv, as_json, as_latex, as_markdown, sheets
from cotune.compare.report import as_html
from cotune.compare.stats import holm
from cotune.compare.tables import Group, compare

IDS = [f"e{i:02}" for i in range(20)]
EFFECTS = [of for k in (1, 2, 3) for of in itertools.combinations(LEVERS, k)]


def table(seed: int) -> dict[str, dict[str, float]]:
    """Prompt and weights each solve 4 of 20 more; the plan too, once the weights are tuned; seeds differ a little."""
    easy = {(): 4, ("prompt",): 8, ("weights",): 8, ("prompt", "weights"): 12}
    grid = {}
    for cell, tuned in named(LEVERS).items():
        right = easy[tuple(lever for lever in LEVERS[:2] if lever in tuned)] + 4 * ({"weights", "plan"} <= tuned)
        grid[cell] = {name: float((i + seed) % 20 < right) for i, name in enumerate(IDS)}
    return grid


def write(folder: Path, grid: Mapping[str, Mapping[str, float]], strategy: str, seed: int = 0, **settings: str) -> None:
    *others, (_, ours) = grid.items()
    given = {"sequential": settings} if settings else {}
    write_run(folder, strategy, ours, seed=seed, cells=dict(others), settings=given)


@pytest.fixture
def groups(tmp_path: Path) -> list[Group]:
    """Zero-shot, three seeds of p,w,i, one run of w,i and one of joint with its 2x2."""
    write_run(tmp_path, "zero-shot", table(0)["seed/base/seed"])
    for seed in range(3):
        write(tmp_path, table(seed), "sequential", seed, stages="p,w,i")
    write(tmp_path, {c: table(0)[c] for c in named(("weights", "plan"))}, "sequential", stages="w,i")
    write(tmp_path, {c: table(0)[f"{c}/tuned"] for c in named(LEVERS[:2])}, "joint")
    return compare([tmp_path])


def test_effects_are_those_of_the_cells(groups: list[Group]) -> None:
    rows = {row.strategy: row for row in groups[0].rows}
    three = next(row for label, row in rows.items() if "p,w,i" in label)
    assert {cell: round(20 * score) for cell, score in (three.cells or {}).items()} == {
        "seed/base/seed": 4, "tuned/base/seed": 8, "seed/tuned/seed": 8, "tuned/tuned/seed": 12,
        "seed/base/tuned": 4, "tuned/base/tuned": 8, "seed/tuned/tuned": 12, "tuned/tuned/tuned": 16,
    }  # fmt: skip
    means = {of: found.estimate.mean for of, found in three.effects.items()}
    assert list(means) == EFFECTS
    by_hand = [0.2, 0.3, 0.1, 0, 0, 0.2, 0]  # the plan: 0.2 with tuned weights, 0 without, 0.1 on average
    assert list(means.values()) == pytest.approx(by_hand, abs=1e-12)
    assert three.interaction is three.two_by_two is None
    two = next(row for label, row in rows.items() if "w,i" in label and row is not three)
    assert list(two.effects) == [("weights",), ("plan",), ("weights", "plan")]
    assert two.effects["weights", "plan"].estimate.mean == pytest.approx(0.2)
    assert rows["joint"].effects == {} and rows["joint"].interaction is not None


def test_holm_is_over_all_effects_shown_and_over_nothing_else(groups: list[Group]) -> None:
    found = [effect for row in groups[0].rows for effect in row.effects.values()]
    assert len(found) == 7 + 3
    assert [effect.p_holm for effect in found] == holm([effect.p for effect in found])
    (interaction,) = (row.interaction for row in groups[0].rows if row.interaction)
    assert interaction.p_holm == interaction.p


def test_the_tables_hold_cells_and_effects(groups: list[Group]) -> None:
    shown = {sheet.title.rpartition(" · ")[2]: sheet for sheet in sheets(groups)}
    cells, effects = shown["2x2x2"], shown["levers"]
    assert cells.header[0] == "prompt/weights/plan %" and len(cells.header) == 3
    assert [row[0] for row in cells.rows] == list(named(LEVERS))
    columns = np.array([row[1:] for row in cells.rows]).T.tolist()
    assert ["20.0", "40.0", "40.0", "60.0", "20.0", "40.0", "60.0", "80.0"] in columns
    assert ["20.0", "", "40.0", "", "20.0", "", "60.0", ""] in columns  # the prompt was not turned
    assert [row[1] for row in effects.rows if "p,w,i" in row[0]] == [" x ".join(of) for of in EFFECTS]
    assert all(len(row) == len(effects.header) for row in effects.rows)
    weights = next(row for row in effects.rows if row[1] == "weights" and "p,w,i" in row[0])
    assert re.fullmatch(r"\+30\.0 \[[-0-9.]+, [-0-9.]+\]\*?", weights[2])
    assert [row[0] for row in shown["2x2"].rows] == ["joint"]


def test_one_sentence_for_each_effect_in_every_format(groups: list[Group]) -> None:
    said = [sentence for row in groups[0].rows for sentence in row.effect_sentences]
    assert len(said) == 10
    assert said[1].startswith(
        "sequential (stages=p,w,i), averaged over prompt and plan seed and tuned: tuning the weights gains 30.0 points "
    )
    assert said[5].endswith(  # weights and plan
        "weights and plan together gain 20.0 points more than the sum of what each gains without the other "
        "(95% 9.4 to 30.6)."
    )
    assert said[6].startswith("sequential (stages=p,w,i): no interaction of prompt, weights and plan shown (")
    assert said[7].endswith("One seed: other seeds are not covered.")
    for text in (as_markdown(groups), as_html(groups), as_latex(groups)):
        assert text.count("seed and tuned: ") >= 8
    value = json.loads(as_json(groups))["groups"][0]
    assert [e["effect_sentence"] for e in value["effects"]] == said
    assert [e["levers"] for e in value["effects"] if "p,w,i" in e["strategy"]] == [list(of) for of in EFFECTS]
    for row in (r for r in csv.DictReader(io.StringIO(as_csv(groups))) if "p,w,i" in r["strategy"]):
        assert float(row["cell_seed_tuned_tuned"]) == 0.6
        assert row["cell_seed_tuned"] == row["interaction"] == ""


def test_seeds_with_other_cells_have_none_together(tmp_path: Path) -> None:
    """Runs from before the plan's cells were measured stand beside new ones of the same settings."""
    write(tmp_path, table(0), "sequential", 0, stages="p,w,i")
    write(tmp_path, {c: table(1)[f"{c}/tuned"] for c in named(LEVERS[:2])}, "sequential", 1, stages="p,w,i")
    (row,) = compare([tmp_path])[0].rows
    assert (row.cells, row.effects, row.interaction) == (None, {}, None)


def test_a_cell_that_is_missing_or_unknown_is_damage(tmp_path: Path) -> None:
    grid = table(0)
    write(tmp_path, grid, "sequential", 0, stages="p,w,i")
    (folder,) = tmp_path.iterdir()
    rows = (folder / "crossed.jsonl").read_text().splitlines(keepends=True)
    (folder / "crossed.jsonl").write_text("".join(rows[:-1]))
    (row,) = compare([tmp_path])[0].rows
    assert (row.status, "lacks rows of the cell seed/tuned/tuned" in row.reason) == ("damaged", True)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"cells": {"<b>": 1.0}}))
    (row,) = compare([tmp_path])[0].rows
    assert (row.status, "are not those of levers" in row.reason) == ("damaged", True)
