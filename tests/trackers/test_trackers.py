"""What every tracker is told, that one that fails harms nothing, and that none is part of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from cotune import experiment
from cotune.cli import app
from cotune.config import RunConfig, resolve
from cotune.record import read_rows
from cotune.trackers import TRACKERS, Trackers, results
from cotune.trackers.base import Tracked, numbers, settings
from cotune.values import Event


class Kept:
    """A tracker that keeps what it is told, for all runs of a test in one list."""

    told: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, run: Tracked) -> None:
        self.id = run.known or f"id-{len(self.told)}"
        self.told.append(("begin", self.id, run.folder.name, run.settings["seed"]))

    def log(self, numbers: Mapping[str, float], i: int, tokens: int, time: float) -> None:
        self.told.append(("log", i, tokens, time, dict(numbers)))

    def end(self, status: str, results: Mapping[str, float]) -> None:
        self.told.append(("end", status, dict(results)))


class Broken(Kept):
    def log(self, numbers: Mapping[str, float], i: int, tokens: int, time: float) -> None:
        raise OSError("No space left on device")


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kept, "told", [])
    here = {"kept": f"{__name__}:Kept", "broken": f"{__name__}:Broken", "absent": "cotune.no_such_module:X"}
    for name, target in here.items():
        monkeypatch.setitem(TRACKERS, name, target)


@pytest.fixture
def config(random_model_dir: Path) -> RunConfig:
    small = {"limit_train": 4, "limit_val": 2, "limit_test": 4, "decoding": {"max_new_tokens": 4}}
    prompt = {"proposer": "edits", "rounds": 1, "candidates": 2, "demonstrations": 0, "search_examples": 2}
    names = {"strategy": "prompt-only", "model": str(random_model_dir), "task": "micro-cosmosqa"}
    return resolve(small, names, {"prompt": prompt})


def logged() -> list[tuple[Any, ...]]:
    return [said for said in Kept.told if said[0] == "log"]


def test_numbers_of_a_row_are_named_by_stage_and_kind() -> None:
    row = {"i": 3, "time": 1.5, "kind": "step", "stage": "tune/1", "loss": 2, "of": None, "text": "x", "kept": True,
           "measures": {"norm": 0.5, "name": "y"}, "tuning_tokens": 7}  # fmt: skip
    assert numbers(row) == {"tune/1/step/loss": 2.0, "tune/1/step/measures/norm": 0.5}
    assert numbers({"i": 0, "time": 1.0, "kind": "warning", "message": "5", "tuning_tokens": 0}) == {}
    assert settings({"a": {"b": None, "c": [1]}, "d": "e"}) == {"a.b": None, "a.c": [1], "d": "e"}
    summary = {"status": "done", "seed": 4, "score": 0.5, "checks": {"val in train": 1}, "noise": {"promised": True}}
    assert results(summary) == {"final/score": 0.5, "final/checks/val_in_train": 1.0}


def test_a_run_tells_what_its_files_hold_and_one_that_fails_harms_nothing(config: RunConfig, tmp_path: Path) -> None:
    plain = experiment.run(config, tmp_path / "plain", "run").folder
    events: list[Event] = []
    names = ("broken", "absent", "kept", "kept")
    result = experiment.run(config, tmp_path / "tracked", "run", events.append, trackers=names)
    rows = read_rows(result.folder / "events.jsonl")
    assert Kept.told[:2] == [("begin", "id-0", "run", 0), ("begin", "id-1", "run", 0)]
    assert logged() == [
        ("log", row["i"], row["tuning_tokens"], row["time"], found) for row in rows if (found := numbers(row))
    ]
    assert len(logged()) > 3
    assert Kept.told[-1] == ("end", "done", results(result.summary))
    assert json.loads((result.folder / "trackers.json").read_text()) == {"broken": "id-0", "kept": "id-1"}
    assert {p.name for p in result.folder.iterdir()} - {p.name for p in plain.iterdir()} == {"trackers.json"}
    for name in ("config.json", "predictions.jsonl"):
        assert (result.folder / name).read_bytes() == (plain / name).read_bytes()
    assert [r | {"time": 0} for r in read_rows(plain / "events.jsonl")] == [r | {"time": 0} for r in rows]
    assert [str(e.data["message"]) for e in events if e.kind == "warning" and "Tracker" in str(e.data["message"])] == [
        "Tracker broken is off, the run goes on without it. OSError: No space left on device.",
        "Tracker absent is off, the run goes on without it. ModuleNotFoundError: No module named "
        "'cotune.no_such_module'. Install it: pip install 'cotune[absent]'.",
    ]
    # Finished already: only reported, so nothing is told again.
    told = list(Kept.told)
    experiment.run(config, tmp_path / "tracked", "run", trackers=("kept",))
    assert Kept.told == told


def test_a_resumed_run_goes_on_in_the_same_place(config: RunConfig, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "candidate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(config, tmp_path, "run", stop, trackers=("kept",))
    assert Kept.told[-1] == ("end", "interrupted", {})
    seen = {said[1] for said in logged()}
    Kept.told.clear()
    folder = experiment.run(config, tmp_path, "run", trackers=("kept",)).folder
    assert Kept.told[0] == ("begin", "id-0", "run", 0)
    assert [said[1] for said in logged()] == [r["i"] for r in read_rows(folder / "events.jsonl") if numbers(r)]
    assert seen < {said[1] for said in logged()}  # what came before, again
    assert Kept.told[-1][:2] == ("end", "done")


def test_a_failed_run_ends_as_failed(config: RunConfig, tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        experiment.run(config, tmp_path, "run", fail, trackers=("kept",))
    assert Kept.told[-1] == ("end", "failed", {})


def test_a_damaged_note_of_ids_is_a_warning_too(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text("{")
    said: list[str] = []
    trackers = Trackers(["kept"], tmp_path, {"seed": 0}, said.append)
    trackers.row({"i": 0, "time": 1.0, "kind": "start", "train": 4, "tuning_tokens": 0})
    trackers.end({"status": "done", "score": 1.0})
    assert len(said) == 1
    assert "trackers.json is damaged" in said[0]
    assert Kept.told == []


def test_names_are_looked_up_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = ["run", "--strategy", "zero-shot", "--model", "tiny", "--task", "micro-gsm8k", "--out", str(tmp_path)]
    wrong = CliRunner().invoke(app, [*command, "--tracker", "mlfow"])
    assert wrong.exit_code == 2
    assert "There is no tracker 'mlfow'. Did you mean 'mlflow'?" in wrong.stderr
    monkeypatch.setenv("COTUNE_TRACKERS", "mlflow wndb")
    wrong = CliRunner().invoke(app, command)
    assert wrong.exit_code == 2
    assert "There is no tracker 'wndb'" in wrong.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.toml").write_text("seed = [0, 1]")
    asked: list[Any] = []
    monkeypatch.setattr("cotune.study.run_all", lambda planned, out, jobs, report, work: asked.append(work) or [])
    assert CliRunner().invoke(app, ["study", str(tmp_path / "x.toml"), "--tracker", "kept"]).exit_code == 0
    assert asked[0].keywords["trackers"] == ("kept",)
    listed = CliRunner().invoke(app, ["list", "trackers"])
    assert [line.split()[0] for line in listed.stdout.splitlines()][:3] == ["mlflow", "wandb", "tensorboard"]
