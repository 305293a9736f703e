"""The real libraries: what they wrote is read back and compared with events.jsonl and the summary."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cotune.trackers import Trackers, results
from cotune.trackers.base import numbers

CONFIG = {"strategy": "lora-only", "seed": 3, "weights": {"rank": 4}, "seed_instruction": "Solve <it>. " + "x" * 7000}
SUMMARY = {
    "status": "done",
    "seed": 3,
    "score": 0.75,
    "n": 4,
    "cells": {"seed/base": 0.25},
    "checks": {"val in train": 1},
}
SECRET = "hunter2-of-the-environment"


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {"i": i, "time": 1000.5 + i, "kind": "step", "stage": "tune", "loss": 1 / (1 + i), "tuning_tokens": 9 * i}
        for i in range(first, last)
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_DIR", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SOME_API_KEY", SECRET)


def tracked(out: Path, name: str) -> list[str]:
    """A run whose process is killed after three rows, and goes on in another; the warnings of both."""
    run, said = out / "the-run", list[str]()
    run.mkdir(parents=True)

    def work(some: list[dict[str, Any]]) -> Trackers:
        trackers = Trackers([name], run, CONFIG, said.append)
        for row in some:
            with (run / "events.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            trackers.row(row)
        return trackers

    work(rows(0, 3))
    work(rows(3, 5)).end(SUMMARY)
    for file in out.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    return said


def expected() -> dict[str, list[tuple[int, float]]]:
    """Every curve as [(tuning tokens, value)]."""
    curves = defaultdict(list)
    for row in rows(0, 5):
        for name, value in numbers(row).items():
            curves[name].append((row["tuning_tokens"], value))
    assert len(curves["tune/step/loss"]) == 5
    return dict(curves) | {name: [(36, value)] for name, value in results(SUMMARY).items()}


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="pip install 'cotune[tensorboard]'")
    assert tracked(tmp_path, "tensorboard") == []
    files = sorted((tmp_path / "tensorboard" / "the-run").iterdir())
    assert len(files) == 2
    *_, last = (_curves(file) for file in files)
    texts = last.pop("text")
    assert last == {name: [(x, pytest.approx(y)) for x, y in some] for name, some in expected().items()}
    assert any("seed_instruction = Solve <it>. xxx" in text for text in texts)
    assert "done" in texts


def _curves(file: Path) -> dict[str, Any]:
    """As readers see it: the mark that a writer began at a step takes away what came before at that step or later."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    curves: dict[str, Any] = {"text": []}
    data = file.read_bytes()
    while data:  # TFRecord: length, its checksum, the record, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        if event.session_log.status == SessionLog.START:
            assert event.step == 0
            curves = {"text": []}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                curves.setdefault(value.tag, []).append((event.step, value.simple_value))
            else:
                curves["text"].append(value.tensor.string_val[0].decode())
    return curves


def test_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="pip install 'cotune[mlflow]'")
    assert tracked(tmp_path, "mlflow") == []
    assert [p.name for p in (tmp_path / "mlruns").glob("[!.]*")] == ["mlflow.db"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "cotune")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "the-run" / "trackers.json").read_text())["mlflow"]
    assert (run.info.run_name, run.info.status) == ("the-run", "FINISHED")
    assert {name: value for name, value in run.data.tags.items() if name != "mlflow.runName"} == {
        "cotune.status": "done"
    }
    assert run.data.params["weights.rank"] == "4"
    assert run.data.params["seed_instruction"] == CONFIG["seed_instruction"][:6000]  # type: ignore[index]
    found = {
        name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }
    assert found == expected()
    (first, *_) = client.get_metric_history(run.info.run_id, "tune/step/loss")
    assert first.timestamp == 1000500


def test_mlflow_without_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="pip install 'cotune[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said = tracked(tmp_path, "mlflow")
    assert [line.split(",")[0] for line in said] == ["Tracker mlflow is off"] * 2  # one for each process
    assert not (tmp_path / "mlruns").exists()


def test_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install 'cotune[wandb]'")
    assert tracked(tmp_path, "wandb") == []
    name = json.loads((tmp_path / "the-run" / "trackers.json").read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    records = list(_records(files[-1]))
    (begun,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (begun.run_id, begun.display_name, begun.project) == (name, "the-run", "cotune")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["weights.rank"] == 4
    assert config["seed_instruction"] == CONFIG["seed_instruction"]
    assert begun.host == ""
    curves = defaultdict(list)
    for record in records:
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for key in items.keys() - {"tuning_tokens"}:
            if not key.startswith("_"):
                curves[key].append((items["tuning_tokens"], items[key]))
    final = {name: [(36, value)] for name, value in results(SUMMARY).items()}
    assert dict(curves) | final == expected()
    summary: dict[str, Any] = {}
    for record in records:
        summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
    assert summary.items() >= (results(SUMMARY) | {"status": "done"}).items()


def _records(file: Path) -> Iterator[Any]:
    """wandb's file: LevelDB's log, blocks of 32 KiB, each piece with checksum, length and place in its record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, block, whole = file.read_bytes(), 7, 32768, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, place = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if place in (1, 4):  # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""
