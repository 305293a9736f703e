"""A run under an inference plan, from the command line to what is taken home: the plan goes wherever the answers go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cotune.cells import LEVERS, named
from cotune.cli import app
from cotune.config import RunConfig
from cotune.export import export
from cotune.finished import regrade
from cotune.opened import open_any
from cotune.planning import plan
from cotune.predict import predict
from cotune.record import read_json, read_rows
from tests.conftest import finished_run
from tests.serve.test_app import question, visit

PLAN = {"aggregation": "majority", "samples": 4, "scorer": None, "temperature": 1.3, "top_p": 1.0}
QUESTIONS = ["What is 1 + 1?", "What is 20 + 3?"]


@pytest.fixture(scope="module")
def voting(tmp_path_factory: pytest.TempPathFactory, random_model_dir: Path) -> Path:
    return finished_run(
        tmp_path_factory.mktemp("voting"), random_model_dir, "lora-only", 8,
        weights__rank=2, weights__epochs=1, weights__learning_rate=0.05, weights__batch_size=4,
        plan__aggregation="majority", plan__samples=4, plan__temperature=1.3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, voting: Path) -> Path:
    out = tmp_path_factory.mktemp("home") / "bundle"
    export(voting, out)
    return out


def answered(folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    return [json.loads(line) for line in predict(folder, str(rows), "-")[1].splitlines()]


def test_the_run_records_plan_samples_curve_and_their_cost(voting: Path) -> None:
    summary, rows = read_json(voting / "summary.json"), read_rows(voting / "predictions.jsonl")
    assert summary["plan"]["plans"] == [PLAN]
    assert [p["samples"] for p in summary["plan"]["curve"]] == [1, 2, 4]
    assert summary["plan"]["curve"][-1]["score"] == summary["score"]
    assert [row["plan"] for row in rows] == [PLAN] * 2
    generated = sum(sum(row["samples"]["generated_tokens"]) for row in rows)
    assert sum(row["generated_tokens"] for row in rows) == generated
    assert summary["serving"]["answers"]["written_tokens"] == generated / 2
    shown = CliRunner().invoke(app, ["show", str(voting)])
    assert "  plan: majority of 4 (temperature 1.3, top_p 1)\n    by number of samples" in shown.output


def test_a_new_grading_changes_nothing_where_the_grader_is_the_same(voting: Path) -> None:
    before = (voting / "predictions.jsonl").read_bytes(), read_json(voting / "summary.json")
    assert regrade(voting)["changed"] == 0
    assert (voting / "predictions.jsonl").read_bytes() == before[0]
    assert read_json(voting / "summary.json") == before[1]


def test_run_bundle_and_server_answer_alike(voting: Path, bundle: Path, tmp_path: Path) -> None:
    expected = answered(voting, tmp_path)
    assert answered(bundle, tmp_path) == expected
    assert {row["samples"] for row in expected} == {4}
    opened = open_any(bundle)

    async def ask(client: Any) -> list[Any]:
        asks: list[dict[str, Any]] = [{}, {"n": 2}, {"seed": 1}, {"temperature": 0.0}]
        bodies = [question(opened, QUESTIONS[0], **more) for more in asks]
        return [(await client.post("/v1/chat/completions", json=body)).json() for body in bodies]

    one, several, other, greedy = visit(opened, ask)
    assert [c["message"]["content"] for c in one["choices"]] == [expected[0]["completion"]]
    assert one["cotune"]["plan"] == PLAN
    assert one["cotune"]["agreement"] == expected[0]["agreement"]
    assert one["usage"]["completion_tokens"] > several["usage"]["completion_tokens"]
    # Who says how to sample gets single completions; a seed alone draws other samples under the same plan.
    assert len(several["choices"]) == 2
    assert "plan" not in several["cotune"] and "plan" not in greedy["cotune"]
    assert other["cotune"]["plan"] == PLAN
    assert other["choices"] != one["choices"]


def test_the_bundle_says_how_its_answers_are_made(bundle: Path) -> None:
    content = read_json(bundle / "bundle.json")
    assert content["plan"]["aggregate"] == PLAN
    assert content["plan"]["temperature"] == 0.0  # of a single completion
    assert "They answer with majority of 4 completions, drawn at temperature 1.3" in (bundle / "README.md").read_text()


def test_joint_tuning_hands_the_plan_on(tmp_path: Path, random_model_dir: Path) -> None:
    run = finished_run(
        tmp_path, random_model_dir, "joint", 4,
        joint__rank=2, joint__width=8, joint__generator_rank=2, joint__rollouts=2, joint__rollout_examples=4,
        joint__warmup_epochs=1, joint__epochs=1, joint__learning_rate=0.02, joint__max_prompt_tokens=6,
        plan__aggregation="best-of", plan__samples=2,
    )  # fmt: skip
    assert {json.dumps(row["plan"]) for row in read_rows(run / "crossed.jsonl")} == {
        json.dumps(row["plan"]) for row in read_rows(run / "predictions.jsonl")
    }
    assert {row["samples"] for row in answered(run, tmp_path)} == {2}


def test_a_plan_is_chosen_for_what_joint_tuning_generates(tmp_path: Path, random_model_dir: Path) -> None:
    run = finished_run(
        tmp_path, random_model_dir, "sequential", 4, sequential__stages="j,i",
        joint__rank=2, joint__width=8, joint__generator_rank=2, joint__rollouts=2, joint__rollout_examples=4,
        joint__warmup_epochs=1, joint__epochs=1, joint__learning_rate=0.02, joint__max_prompt_tokens=6,
        inference__samples=2, inference__completions=12, inference__aggregation="best-of",
    )  # fmt: skip
    tuned, rows = read_json(run / "tuned/tuned.json"), read_rows(run / "predictions.jsonl")
    assert (tuned["kind"], tuned["plan"]["aggregation"]) == ("metatuner", "best-of")
    assert all(row["plan"] == tuned["plan"] and row["adapter"] for row in rows)
    assert [row["stage"] for row in read_rows(run / "events.jsonl") if row["kind"] == "policy"] == ["tune/1-i"]
    the_cells_are_measured(run, LEVERS, tuned["plan"])
    export(run, tmp_path / "bundle")
    assert answered(tmp_path / "bundle", tmp_path) == answered(run, tmp_path)
    assert read_json(tmp_path / "bundle/bundle.json")["plan"]["aggregate"] == tuned["plan"]
    assert "| tuned prompt, base weights, seed plan |" in (tmp_path / "bundle/README.md").read_text()


def the_cells_are_measured(run: Path, levers: tuple[str, ...], chosen: dict[str, Any]) -> None:
    """Every cell has every example once, under the levers that its name says; a greedy answer is no sample."""
    rows, cells = read_rows(run / "predictions.jsonl"), read_json(run / "summary.json")["cells"]
    crossed = read_rows(run / "crossed.jsonl")
    *others, last = named(levers)
    assert list(cells) == [*others, last]
    assert cells[last] == read_json(run / "summary.json")["score"]
    assert [(row["cell"], row["id"]) for row in crossed] == [(cell, row["id"]) for cell in others for row in rows]
    for i, row in enumerate(crossed):
        tuned, ours = named(levers)[row["cell"]], rows[i % len(rows)]
        assert row.get("plan") == (chosen if "plan" in tuned else None)
        assert row["adapter"] == (ours["adapter"] if "weights" in tuned else None)
        assert row["instruction"] == (ours if "prompt" in tuned else crossed[0])["instruction"]
    before = (run / "crossed.jsonl").read_bytes(), read_json(run / "summary.json")
    assert regrade(run)["rows"] == len(rows) * 2 ** len(levers)
    assert ((run / "crossed.jsonl").read_bytes(), read_json(run / "summary.json")) == before
    shown = CliRunner().invoke(app, ["show", str(run)]).output
    size = "x".join("2" * len(levers))
    assert f"  {size} (prompt/weights/plan) seed/base/seed {100 * cells['seed/base/seed']:.1f}%" in shown


def test_weights_then_plan_are_four_cells_and_planned_as_such(tmp_path: Path, random_model_dir: Path) -> None:
    run = finished_run(
        tmp_path, random_model_dir, "sequential", 4, sequential__stages="w,i",
        weights__rank=2, weights__epochs=1, weights__learning_rate=0.05, weights__batch_size=4,
        inference__samples=2, inference__completions=12, noise_examples=0,
    )  # fmt: skip
    the_cells_are_measured(run, ("weights", "plan"), read_json(run / "tuned/tuned.json")["plan"])
    config = RunConfig(**read_json(run / "config.json"))
    assert plan(config)["measuring_at_most"]["calls"] == 2 * (2 * 1 + 2 * 2)  # two questions, greedy or two samples
    other = config.model_copy(update={"sequential": config.sequential.model_copy(update={"stages": "p,w,i"})})
    assert plan(other)["measuring_at_most"]["calls"] == 2 * (4 * 1 + 4 * 2)
    compared = json.loads(CliRunner().invoke(app, ["compare", str(run), "--json"]).output)["groups"][0]
    assert [effect["levers"] for effect in compared["effects"]] == [["weights"], ["plan"], ["weights", "plan"]]
    cells = read_json(run / "summary.json")["cells"]
    means = [
        (cells["seed/tuned/seed"] + cells["seed/tuned/tuned"] - cells["seed/base/seed"] - cells["seed/base/tuned"]) / 2,
        (cells["seed/base/tuned"] + cells["seed/tuned/tuned"] - cells["seed/base/seed"] - cells["seed/tuned/seed"]) / 2,
    ]
    assert [effect["effect"] for effect in compared["effects"][:2]] == pytest.approx(means)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["plan.samples=8"], "greedy is one completion"),
        (["plan.aggregation=best-of", "plan.samples=2", "plan.scorer=logprob"], "There is no scorer 'logprob'"),
        (["plan.aggregation=majority", "plan.samples=2", "plan.temperature=0"], "are all the same"),
    ],
)
def test_a_plan_that_cannot_be_is_one_sentence_and_leaves_no_run(
    settings: list[str], why: str, tmp_path: Path, random_model_dir: Path
) -> None:
    named = ["--strategy", "zero-shot", "--model", str(random_model_dir), "--task", "micro-gsm8k"]
    sets = [part for text in settings for part in ("--set", text)]
    refused = CliRunner().invoke(app, ["run", *named, *sets, "--out", str(tmp_path / "runs")])
    assert refused.exit_code == 2
    assert why in refused.stderr
    assert not list((tmp_path / "runs").glob("*/config.json"))
