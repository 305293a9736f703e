"""A study: what an experiment file stands for, and that no run can take another with it."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from reference.run_folders import write_run

from cotune.config import parse_budget, read_toml
from cotune.errors import UsageError
from cotune.study import DIED, Experiment, combinations, experiments, row_of, run_all

FILE = 'model = "tiny"\ntask = ["micro-gsm8k", "micro-math"]\nstrategy = ["zero-shot", "joint"]\nseed = [0, 1]\n'


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def note_run(experiment: Experiment, out: Path) -> dict[str, Any]:
    """Stands for a run: leaves a file; joint runs kill their process, or fail, as the config asks."""
    assert experiment.config is not None
    (out / f"{experiment.config.run_name}.note").touch()
    if experiment.config.seed_instruction == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if experiment.config.seed_instruction == "fail":
        raise RuntimeError("asked to")
    return row_of(experiment, {"status": "done"})


def test_lists_stand_for_every_combination(tmp_path: Path) -> None:
    planned = experiments(write(tmp_path / "x.toml", FILE), {"limit_test": 5})
    told = [(e.config.task, e.config.strategy, e.config.seed) for e in planned if e.config]
    assert told == [(t, s, n) for t in ("micro-gsm8k", "micro-math") for s in ("zero-shot", "joint") for n in (0, 1)]
    assert all(e.config and e.config.limit_test == 5 for e in planned)
    assert combinations({"seed": [], "task": "math"}) == []
    assert combinations({"joint": {"rank": 2}}) == [{"joint": {"rank": 2}}]


def test_a_grid_lists_any_setting(tmp_path: Path) -> None:
    text = (
        FILE.replace("[0, 1]", "0") + '[weights]\nepochs = 2\n[grid]\n"weights.rank" = [2, 4]\n"joint.share" = [0.5]\n'
    )
    planned = experiments(write(tmp_path / "x.toml", text), {})
    told = [(e.config.task, e.config.strategy, e.config.weights.rank) for e in planned if e.config]
    assert told == [(t, s, r) for t in ("micro-gsm8k", "micro-math") for s in ("zero-shot", "joint") for r in (2, 4)]
    assert {(e.config.weights.epochs, e.config.joint.share) for e in planned if e.config} == {(2, 0.5)}
    for wrong in ("grid = 3\n" + FILE, FILE + '[grid]\n"weights.rank" = 2\n', FILE + "[grid.weights]\nrank = [2]\n"):
        (only,) = experiments(write(tmp_path / "y.toml", wrong), {})
        assert "List values by dotted name" in only.reason


def test_a_budget_is_written_with_units() -> None:
    assert parse_budget([]) == {}
    assert parse_budget(["tokens=2M", "flops=1.5P"]) == {"budget": {"tokens": 2_000_000, "flops": 1.5e15}}
    assert parse_budget(["tokens=1.5k"]) == {"budget": {"tokens": 1500}}
    assert parse_budget(["seconds=1.5h"]) == parse_budget(["seconds=90m"]) == {"budget": {"seconds": 5400.0}}
    assert parse_budget(["flops=1e15"]) == {"budget": {"flops": 1e15}}
    with pytest.raises(UsageError, match="'matched=5' is not valid"):  # a setting, and no limit
        parse_budget(["matched=5"])


def test_a_folder_is_its_files_by_name_each_run_once(tmp_path: Path) -> None:
    write(tmp_path / "b.toml", 'model = "tiny"\ntask = "micro-math"\nstrategy = ["joint", "zero-shot"]')
    write(tmp_path / "a.toml", 'model = "tiny"\ntask = "micro-math"\nstrategy = "joint"')
    write(tmp_path / "readme.md", "not an experiment")
    planned = experiments(tmp_path, {})
    assert [(e.source, e.config.strategy) for e in planned if e.config] == [
        ("a.toml", "joint"),
        ("b.toml", "zero-shot"),
    ]


def test_a_folder_without_experiments_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no experiment"):
        experiments(tmp_path, {})


def test_a_wrong_file_is_a_failed_row_and_the_others_go_on(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", 'model = "tiny"\ntask = "micro-math"\nstrategy = "joint"\nrankk = 1')
    write(tmp_path / "b.toml", 'model = "tiny"\ntask = "micro-math"\nstrategy = "joint"')
    rows = run_all(experiments(tmp_path, {}), tmp_path, 1, lambda row: None, note_run)
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert "There is no setting 'rankk'" in rows[0]["reason"]


def test_a_finished_run_is_not_run_again_and_a_failed_one_is(tmp_path: Path) -> None:
    planned = experiments(write(tmp_path / "x.toml", FILE), {})
    names = [e.config.run_name for e in planned if e.config]
    out = tmp_path / "out"
    write_run(out, "zero-shot", {"a": 1.0}, task="micro-math")
    write_run(out, "joint", status="no-data", reason="none", task="micro-math")
    write_run(out, "joint", status="failed", reason="x", task="micro-math", seed=1)
    told: list[dict[str, Any]] = []
    rows = run_all(planned, out, 1, told.append, note_run)
    assert [row["run"] for row in rows] == names
    assert [(row["strategy"], row["status"]) for row in rows if row["skipped"]] == [
        ("zero-shot", "done"),
        ("joint", "no-data"),
    ]
    assert sorted(map(str, told)) == sorted(map(str, rows))
    assert len(list(out.glob("*.note"))) == 6


def test_a_run_that_dies_takes_no_other_with_it(tmp_path: Path) -> None:
    planned = experiments(write(tmp_path / "x.toml", FILE), {})
    for wish in ("die", "fail"):
        text = f'model = "tiny"\ntask = "micro-math"\nstrategy = "joint"\nseed_instruction = "{wish}"'
        planned[1:1] = experiments(write(tmp_path / "y.toml", text), {})
    rows = run_all(planned, tmp_path, 2, lambda row: None, note_run)
    assert [row["status"] for row in rows] == ["done", "failed", "failed", *["done"] * 7]
    assert (rows[1]["reason"], rows[2]["reason"]) == ("RuntimeError: asked to", DIED)


def beat(experiment: Experiment, out: Path) -> dict[str, Any]:
    """Stands for a long run: touches a file as long as its process lives, at most two minutes."""
    for _ in range(2400):
        (out / "beat").touch()
        time.sleep(0.05)
    return row_of(experiment, {"status": "done"})


def beat_on(out: Path) -> None:
    run_all(experiments(write(out / "x.toml", FILE), {})[:1], out, 1, lambda _row: None, beat)


def test_no_run_goes_on_behind_a_study_that_is_killed(tmp_path: Path) -> None:
    study = multiprocessing.get_context("spawn").Process(target=beat_on, args=(tmp_path,))
    study.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "beat").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    study.kill()
    study.join()
    last = -1
    while (now := (tmp_path / "beat").stat().st_mtime_ns) != last and time.monotonic() < deadline:
        last = now
        time.sleep(2)
    assert now == last


def test_rows_are_json(tmp_path: Path) -> None:
    (experiment,) = experiments(write(tmp_path / "x.toml", 'model = "tiny"\ntask = "math"\nstrategy = "joint"'), {})
    assert json.loads(json.dumps(row_of(experiment, {"status": "done"})))["skipped"] is False


def test_a_file_lies_on_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared" / "all.toml", 'model = "tiny"\nseed = [0, 1]\n[joint]\nrank = 2\nepochs = 7\n')
    text = 'extends = "../shared/all.toml"\ntask = "micro-math"\nstrategy = "joint"\n[joint]\nrank = 4\n'
    (tmp_path / "study").mkdir()
    write(tmp_path / "study" / "x.toml", text)
    planned = experiments(tmp_path / "study", {})
    told = [(e.config.seed, e.config.joint.rank, e.config.joint.epochs) for e in planned if e.config]
    assert told == [(0, 4, 7), (1, 4, 7)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('extends = "x.toml"', "extends itself"),
        ('extends = "nowhere.toml"', "nowhere.toml' that .*x.toml extends"),
        ("extends = 3", "names one file"),
    ],
)
def test_a_wrong_extends_is_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    (planned,) = experiments(write(tmp_path / "x.toml", text), {})
    assert planned.config is None
    assert re.search(said, planned.reason)


STUDIES = sorted(
    p for p in (Path(__file__).parent.parent / "experiments").iterdir() if p.is_dir() and p.name != "shared"
)


@pytest.mark.parametrize("folder", STUDIES, ids=lambda p: p.name)
@pytest.mark.parametrize("laid_on", ["", "qwen.toml", "qwen-3b.toml"])
def test_every_study_of_ours_can_be_used(folder: Path, laid_on: str) -> None:
    overrides = read_toml(folder.parent / "shared" / laid_on) if laid_on else {}
    planned = experiments(folder, overrides)
    assert [e.reason for e in planned if e.config is None] == []
    assert all(e.config.model == "qwen-3b" for e in planned if laid_on and e.config)


def test_contestants_of_a_study_differ_in_what_their_names_say() -> None:
    """An ablation that changes nothing would be the same run as another file, and be dropped."""
    for folder in STUDIES:
        sources = {e.source for e in experiments(folder, {})}
        assert sources == {p.name for p in folder.glob("*.toml")}, folder.name
