"""The run folder: torn files, locks, replayed events, atomic results."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from cotune.config import RunConfig, resolve
from cotune.errors import RunLocked, UsageError
from cotune.record import RunFolder, read_json, read_rows, run_folders
from cotune.values import Event


@pytest.fixture
def config() -> RunConfig:
    return resolve({"strategy": "zero-shot", "model": "tiny", "task": "micro-gsm8k"})


def test_journal_survives_a_torn_last_line(tmp_path: Path, config: RunConfig) -> None:
    with RunFolder.open(tmp_path / "run", config) as folder:
        folder.remember("a", {"x": 1.5})
        folder.remember("b", [1, 2])
    journal = tmp_path / "run/work/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])  # killed in the middle of the second line
    with RunFolder.open(tmp_path / "run", config) as folder:
        assert folder.recall("a") == {"x": 1.5}
        assert folder.recall("b") is None
        folder.remember("b", [3])
    with RunFolder.open(tmp_path / "run", config) as folder:
        assert folder.recall("b") == [3]


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UsageError, match="line 2"):
        read_rows(path)


def test_a_last_line_that_is_whole_but_wrong_is_an_error_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UsageError, match="line 2"):
        read_rows(path)


def test_replayed_events_are_written_once(tmp_path: Path, config: RunConfig) -> None:
    for _ in range(2):
        with RunFolder.open(tmp_path / "run", config) as folder:
            folder.event(Event("step", {"step": 1, "loss": 0.5}))
            folder.event(Event("step", {"step": 2, "loss": 0.25}))
            folder.event(Event("progress", {"done": 1}))
    rows = read_rows(tmp_path / "run/events.jsonl")
    assert [(r["i"], r["step"]) for r in rows] == [(0, 1), (1, 2)]


def test_checkpoints_round_trip_and_replace(tmp_path: Path, config: RunConfig) -> None:
    with RunFolder.open(tmp_path / "run", config) as folder:
        assert folder.load_checkpoint("w") is None
        folder.save_checkpoint("w", {"x": torch.arange(6.0).reshape(2, 3).T}, {"step": 1})
        folder.save_checkpoint("w", {"x": torch.ones(2)}, {"step": 2, "text": "é"})
        found = folder.load_checkpoint("w")
    assert found is not None
    assert torch.equal(found[0]["x"], torch.ones(2))
    assert found[1] == {"step": 2, "text": "é"}


def test_another_config_may_not_use_the_folder(tmp_path: Path, config: RunConfig) -> None:
    with RunFolder.open(tmp_path / "run", config):
        pass
    with (
        pytest.raises(UsageError, match="another config"),
        RunFolder.open(tmp_path / "run", config.model_copy(update={"seed": 7})),
    ):
        pass


def _try_to_open(path: Path, config: RunConfig, queue: multiprocessing.Queue[str]) -> None:
    try:
        with RunFolder.open(path, config):
            queue.put("opened")
    except RunLocked as error:
        queue.put(str(error))


def test_a_second_process_says_so_and_stops(tmp_path: Path, config: RunConfig) -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[str] = context.Queue()
    with RunFolder.open(tmp_path / "run", config):
        process = context.Process(target=_try_to_open, args=(tmp_path / "run", config, queue))
        process.start()
        said = queue.get(timeout=60)
        process.join()
    assert "Another process is working on" in said


def test_a_final_summary_ends_the_work_folder_and_a_failed_one_does_not(tmp_path: Path, config: RunConfig) -> None:
    with RunFolder.open(tmp_path / "run", config) as folder:
        folder.remember("a", 1)
        folder.finish({"status": "failed", "reason": "x"})
        assert folder.summary is None
        assert folder.recall("a") == 1
        assert (tmp_path / "run/work").exists()
        folder.finish({"status": "done"})
        assert folder.summary == {"status": "done"}
        assert not (tmp_path / "run/work").exists()


def test_tuned_is_kept_whole_or_not_at_all(tmp_path: Path, config: RunConfig) -> None:
    def broken(folder: Path) -> None:
        (folder / "tuned.json").write_text("{}")
        raise RuntimeError("killed")

    with RunFolder.open(tmp_path / "run", config) as folder:
        folder.keep_tuned(lambda f: (f / "tuned.json").write_text('{"kind": "fixed"}'))
        with pytest.raises(RuntimeError):
            folder.keep_tuned(broken)
    assert json.loads((tmp_path / "run/tuned/tuned.json").read_text()) == {"kind": "fixed"}


def test_run_folders_are_found_one_level_down(tmp_path: Path, config: RunConfig) -> None:
    for name in ("b", "a"):
        with RunFolder.open(tmp_path / name, config):
            pass
    assert [p.name for p in run_folders([tmp_path])] == ["a", "b"]
    assert [p.name for p in run_folders([tmp_path / "b", tmp_path])] == ["b", "a"]
    with pytest.raises(UsageError, match="There is no folder"):
        run_folders([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no run folder"):
        run_folders([tmp_path / "empty"])


def test_missing_and_damaged_json_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"summary\.json is missing"):
        read_json(tmp_path / "summary.json")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        read_json(tmp_path / "summary.json")
