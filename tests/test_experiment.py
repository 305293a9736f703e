"""One run end to end on the random model: its folder, prediction on new rows, regrading, failing, refusing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune import experiment, finished, planning
from cotune.config import RunConfig, resolve
from cotune.errors import DataError, UsageError
from cotune.predict import predict
from cotune.record import read_rows
from cotune.tasks import data as data_of_tasks
from cotune.tasks import task as make_task
from cotune.tasks.micro import MicroCosmosQA

FILES = {"config.json", "environment.json", "data.json", "events.jsonl", "predictions.jsonl", "summary.json", "tuned"}


@pytest.fixture(scope="module")
def config(random_model_dir: Path) -> RunConfig:
    small = {"limit_train": 8, "limit_val": 4, "limit_test": 10, "decoding": {"max_new_tokens": 6}}
    weights = {"rank": 2, "alpha": 4.0, "epochs": 1, "learning_rate": 1e-2}
    names = {"strategy": "sequential", "model": str(random_model_dir), "task": "micro-cosmosqa"}
    prompt = {"proposer": "edits", "rounds": 1, "candidates": 2, "demonstrations": 0, "search_examples": 4}
    return resolve(small, names, {"weights": weights, "prompt": prompt, "sequential": {"stages": "w,p"}})


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experiment.run(config, tmp_path_factory.mktemp("out"), "run").folder


def summary(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return read


def test_the_folder_is_complete_and_its_numbers_agree(run: Path, config: RunConfig) -> None:
    assert FILES | {"crossed.jsonl"} == {p.name for p in run.iterdir()} - {".lock"}
    rows, said = read_rows(run / "predictions.jsonl"), summary(run)
    assert len(rows) == said["n"] == sum(said["outcomes"].values()) == 10
    assert said["outcomes"] == {o: Counter(r["outcome"] for r in rows)[o] for o in said["outcomes"]}
    assert said["score"] == pytest.approx(sum(r["score"] for r in rows) / 10)
    assert said["cells"]["tuned/tuned"] == said["score"]
    assert said["hardware"] == ["cpu", torch.backends.cpu.get_cpu_capability()]
    crossed = read_rows(run / "crossed.jsonl")
    assert Counter(r["cell"] for r in crossed) == {"seed/base": 10, "tuned/base": 10, "seed/tuned": 10}
    for cell in ("seed/base", "tuned/base", "seed/tuned"):
        assert said["cells"][cell] == pytest.approx(sum(r["score"] for r in crossed if r["cell"] == cell) / 10)
    # four cells of ten examples, prompts as recorded, are what measuring cost on test (plus the stages' reports)
    assert said["cost"]["measuring"]["calls"] >= 40
    measured = sum(r["prompt_tokens"] + r["generated_tokens"] for r in [*rows, *crossed])
    assert said["cost"]["measuring"]["tokens"] >= measured
    data = json.loads((run / "data.json").read_text())
    used = data["used"]
    assert [r["id"] for r in rows] == used["test"]["ids"]
    assert not set(used["test"]["ids"]) & (set(used["train"]["ids"]) | set(used["val"]["ids"]))
    assert json.loads((run / "config.json").read_text()) == config.model_dump(mode="json")


def test_a_finished_run_is_returned_as_it_is(run: Path, config: RunConfig) -> None:
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert experiment.run(config, run.parent, "run").summary == summary(run)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_predict_repeats_the_measurement_and_answers_unlabelled_rows(run: Path, tmp_path: Path) -> None:
    task = MicroCosmosQA()
    rows = [r | {"id": f"new-{i}"} for i, r in enumerate(task.generate_rows("test", 3, 0))]
    unlabelled = {k: v for k, v in rows[1].items() if k not in ("label", "rationale")}
    broken = {**rows[2], "question": ""}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [rows[0], unlabelled, broken]))
    report, _ = predict(run, str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl"))
    assert (report["rows"], report["unusable"], report["graded"]) == (3, 1, 1)
    first, second, third = read_rows(tmp_path / "out.jsonl")
    assert "outcome" in first
    assert "outcome" not in second
    assert "empty" in third["error"]

    # Rows of the run's own test split get the completions that the run recorded.
    recorded = {r["id"]: r["completion"] for r in read_rows(run / "predictions.jsonl")}
    official = task.generate_rows("test", 500, 0)
    known = [r for r in official if str(r["id"]) in recorded]
    assert known
    (tmp_path / "again.jsonl").write_text("".join(json.dumps(r) + "\n" for r in known))
    predict(run, str(tmp_path / "again.jsonl"), str(tmp_path / "again-out.jsonl"))
    for row in read_rows(tmp_path / "again-out.jsonl"):
        assert row["completion"] == recorded[row["id"]]


def test_regrade_changes_nothing_until_the_grader_changes(
    run: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "predictions.jsonl").read_bytes()
    assert finished.regrade(run)["changed"] == 0
    assert (run / "predictions.jsonl").read_bytes() == before

    rows = read_rows(run / "predictions.jsonl")
    wrong = next(r for r in rows if r["outcome"] != "correct")
    edited = [r | {"completion": f"Answer: {r['reference']}"} if r is wrong else r for r in rows]
    (run / "predictions.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in edited))
    was = summary(run)["score"]
    report = finished.regrade(run)
    assert report["changed"] == 1
    assert summary(run)["score"] == pytest.approx(was + 0.1)
    assert summary(run)["cells"]["tuned/tuned"] == pytest.approx(was + 0.1)
    assert read_rows(run / "regrades.jsonl")[0]["changed"][0]["id"] == wrong["id"]


def test_plan_is_an_upper_bound(config: RunConfig, run: Path) -> None:
    planned = planning.plan(config)
    assert planned["examples"] == {"train": 8, "val": 4, "test": 10}
    spent = json.loads((run / "summary.json").read_text())["cost"]["tuning"]
    assert 0 < spent["tokens"] <= 1.5 * planned["tuning_at_most"]["tokens"]  # tuned prompts may be longer than the seed
    assert planned["measuring_at_most"]["calls"] == 40


def test_what_cannot_start_leaves_no_run_behind(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-such-model"):
        experiment.run(config.model_copy(update={"model": "no-such-model"}), tmp_path, "a")
    with pytest.raises(DataError, match="no data folder"):
        experiment.run(config.model_copy(update={"data": str(tmp_path / "nowhere")}), tmp_path, "b")
    assert list(tmp_path.iterdir()) == []


def test_no_accepted_completions_is_an_outcome(config: RunConfig, tmp_path: Path) -> None:
    own = config.weights.model_copy(update={"method": "rft"})
    update = {"task": "micro-gsm8k", "strategy": "lora-only", "weights": own}
    result = experiment.run(config.model_copy(update=update), tmp_path, "w")
    assert result.summary["status"] == "no-data"
    assert "nothing to train on" in result.summary["reason"]
    assert not (tmp_path / "w/tuned").exists()


def test_a_failure_in_the_middle_is_recorded_and_repaired_by_the_same_command(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"strategy": "zero-shot"})
    grade = MicroCosmosQA.grade

    def broken(*_: Any) -> Any:
        raise RuntimeError("no space on the moon")

    monkeypatch.setattr(MicroCosmosQA, "grade", broken)
    with pytest.raises(RuntimeError):
        experiment.run(config, tmp_path, "f")
    failed = summary(tmp_path / "f")
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no space on the moon")
    monkeypatch.setattr(MicroCosmosQA, "grade", grade)
    assert experiment.run(config, tmp_path, "f").summary["status"] == "done"
    assert make_task("micro-cosmosqa").grade  # the real one is back


def test_val_is_measured_without_reading_test(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    generated = data_of_tasks._generated  # parsed once in a process

    def noted(kind: Any, split: str, count: int) -> Any:
        read.append(split)
        return generated(kind, split, count)

    choosing = config.model_copy(update={"measured": "val"})
    data = experiment.dataset(choosing, make_task(choosing.task))
    monkeypatch.setattr(data_of_tasks, "_generated", noted)
    folder = experiment.run(choosing, tmp_path).folder
    assert [r["id"] for r in read_rows(folder / "predictions.jsonl")] == [e.id for e in data.val]
    used = json.loads((folder / "data.json").read_text())["used"]
    assert used.keys() == {"train", "val"}
    assert summary(folder)["cells"] is None
    assert not (folder / "crossed.jsonl").exists()
    assert read.count("test") == 1  # for the overlap alone; a measured test split is read once more
    with pytest.raises(UsageError, match="not of the task"):
        resolve(choosing.model_dump(), {"train_tasks": ["micro-math"]})


def test_a_generator_smaller_than_the_model_is_said_before_anything_runs() -> None:
    names = {"strategy": "joint", "task": "micro-gsm8k"}
    (note,) = planning.plan(resolve(names, {"model": "tiny-4m", "generator": "tiny"}))["notes"]
    assert "swap --generator and --model" in note
    assert planning.plan(resolve(names, {"model": "tiny", "generator": "tiny-4m"}))["notes"] == []


def test_no_val_to_measure_is_said_before_anything_is_tuned(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "micro-cosmosqa").mkdir()
    for split, count in (("train", 2), ("test", 2)):  # too few to carve val from
        rows = MicroCosmosQA().generate_rows(split, count)
        (tmp_path / "micro-cosmosqa" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    choosing = config.model_copy(update={"measured": "val", "data": str(tmp_path)})
    with pytest.raises(UsageError, match="no val examples"):
        experiment.dataset(choosing, make_task(choosing.task))


def test_a_study_asks_the_hub_for_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(name: str) -> None:
        asked.append(name)
        raise UsageError("The hub cannot be reached.")

    monkeypatch.setattr(planning, "outline", unreachable)
    for seed in (0, 1):
        with pytest.raises(UsageError, match="cannot be reached"):
            planning.plan(resolve({"strategy": "zero-shot", "model": "org/far", "task": "micro-gsm8k", "seed": seed}))
    assert asked == ["org/far"]


@pytest.mark.parametrize("strategy", ["prompt-only", "lora-only", "joint"])
def test_a_run_says_that_its_budget_stopped_it(config: RunConfig, strategy: str, tmp_path: Path) -> None:
    joint = {"epochs": 1, "rollouts": 2, "max_prompt_tokens": 4, "rank": 2, "generator_rank": 2, "share": 0.5}
    free = resolve(config.model_dump(), {"strategy": strategy, "joint": joint})
    spent = experiment.run(free, tmp_path, "free").summary
    assert not [note for note in spent["notes"] if "budget" in note]
    limit = spent["cost"]["tuning"]["tokens"] - 1
    short = free.model_copy(update={"budget": free.budget.model_copy(update={"tokens": limit})})
    stopped = experiment.run(short, tmp_path, "short").summary
    assert f"The budget of {limit:,} tuning tokens is used up." in stopped["notes"]
    assert stopped["cost"]["tuning"]["tokens"] <= limit
