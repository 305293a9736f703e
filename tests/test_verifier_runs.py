"""A run whose plan ranks by a verifier, from the command line to what is taken home."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cotune.cli import app
from cotune.config import RunConfig, resolve
from cotune.difficulty.choosing import Choice
from cotune.difficulty.runs import of_run
from cotune.errors import UsageError
from cotune.experiment import check_black_box, make_strategy
from cotune.export import export
from cotune.finished import regrade
from cotune.opened import open_any
from cotune.planning import plan, tuning_tokens
from cotune.record import read_json, read_rows
from tests.conftest import finished_run
from tests.serve.test_app import question, visit
from tests.test_plan_runs import QUESTIONS, answered, the_cells_are_measured

SMALL = {"verifier__examples": 8, "verifier__epochs": 3}
PLAN = {"plan__aggregation": "weighted-best-of", "plan__samples": 8, "plan__scorer": "verifier"}


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the tiny model: a random one is never right, and its verifier would have nothing to learn."""
    out = tmp_path_factory.mktemp("verified")
    return finished_run(out, Path("tiny"), "zero-shot", 24, **SMALL, **PLAN)


def test_the_run_trains_a_verifier_pays_for_it_and_ranks_by_it(verified: Path) -> None:
    summary, rows = read_json(verified / "summary.json"), read_rows(verified / "predictions.jsonl")
    events = read_rows(verified / "events.jsonl")
    (told,) = [e for e in events if e["kind"] == "verifier"]
    assert (told["stage"], told["examples"], told["completions"]) == ("verifier", 8, 64)
    assert not told["constant"]
    assert summary["cost"]["tuning"]["calls"] == 64  # nothing else is tuned
    scores = [score for row in rows for score in row["samples"]["scores"]]
    assert len(scores) == 16 and all(0 <= score <= 1 for score in scores)
    assert len(set(scores)) > 2
    asked = {row["plan"]["scorer"] for row in rows}
    assert asked == {"verifier"}
    # The engine reads each prompt once, the verifier reads it again before every different completion.
    read = 0
    for row in rows:
        kept = row["samples"]
        different = dict(zip(kept["completions"], kept["generated_tokens"], strict=True))
        read += row["prompt_tokens"] * (1 + len(different)) + sum(different.values())
    assert summary["serving"]["answers"]["read_tokens"] == read / len(rows)
    assert "weighted-best-of-8 by verifier" in CliRunner().invoke(app, ["show", str(verified)]).output


def test_what_is_measured_is_not_learned_from(verified: Path) -> None:
    used = read_json(verified / "data.json")["used"]
    assert used["train"]["n"] == 8
    assert not set(used["train"]["ids"]) & (set(used["val"]["ids"]) | set(used["test"]["ids"]))


def test_a_new_grading_uses_the_scores_that_were_kept(verified: Path) -> None:
    before = (verified / "predictions.jsonl").read_bytes()
    assert regrade(verified)["changed"] == 0
    assert (verified / "predictions.jsonl").read_bytes() == before


def test_run_bundle_and_server_answer_alike(verified: Path, tmp_path: Path) -> None:
    expected = answered(verified, tmp_path)
    bundle = tmp_path / "bundle"
    export(verified, bundle)
    assert (bundle / "verifier.safetensors").read_bytes() == (verified / "tuned/verifier.safetensors").read_bytes()
    assert answered(bundle, tmp_path) == expected
    opened = open_any(bundle)

    async def ask(client: Any) -> list[Any]:
        bodies = [question(opened, text) for text in QUESTIONS]
        return [(await client.post("/v1/chat/completions", json=body)).json() for body in bodies]

    replies = visit(opened, ask)
    assert [r["choices"][0]["message"]["content"] for r in replies] == [row["completion"] for row in expected]
    assert replies[0]["cotune"]["plan"]["scorer"] == "verifier"
    (bundle / "verifier.safetensors").unlink()
    with pytest.raises(UsageError, match=r"verifier\.safetensors is missing"):
        open_any(bundle)


def test_its_ratings_predict_difficulty(verified: Path) -> None:
    found = of_run(verified)
    kept = [row["samples"]["scores"] for row in read_rows(verified / "predictions.jsonl")]
    assert found.samples.ratings is not None
    assert found.samples.ratings[:, :, 0].tolist() == kept


def test_of_a_chain_every_attempt_is_judged_behind_the_question_alone(tmp_path: Path) -> None:
    run = finished_run(tmp_path, Path("tiny"), "zero-shot", 24, **SMALL, **PLAN, plan__chain=4)
    samples = [row["samples"] for row in read_rows(run / "predictions.jsonl")]
    for kept in samples:
        assert len(kept["scores"]) == 8 and all(0 <= score <= 1 for score in kept["scores"])
        # What a later attempt has seen does not count: the same words have the same score at every place.
        by_words = dict(zip(kept["completions"], kept["scores"], strict=True))
        assert kept["scores"] == [by_words[words] for words in kept["completions"]]
    assert any(len(set(kept["completions"])) < 8 for kept in samples)
    assert any(len(set(kept["scores"])) > 2 for kept in samples)
    assert regrade(run)["changed"] == 0
    expected = answered(run, tmp_path)
    export(run, tmp_path / "bundle")
    assert answered(tmp_path / "bundle", tmp_path) == expected


def test_a_plan_for_each_difficulty_is_told_by_the_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choice, "parts", property(lambda self: True))  # bins are bought, whatever they gain
    run = finished_run(
        tmp_path, Path("tiny"), "plan-only", 24, **SMALL,
        inference__samples=4, inference__completions=32, inference__aggregation="weighted-best-of",
        inference__scorer="verifier", difficulty__bins=2, difficulty__probe=2, difficulty__told_by="rating",
    )  # fmt: skip
    plan = read_json(run / "tuned/tuned.json")["plan"]
    assert (plan["scorer"], len(plan["plans"])) == ("verifier", 2)
    for row in read_rows(run / "predictions.jsonl"):
        told = row["difficulty"]
        assert told["bin"] == sum(told["ease"] < edge for edge in plan["edges"])
        if row["samples"]["scores"] is not None:
            assert told["ease"] == pytest.approx(sum(row["samples"]["scores"][:2]) / 2)
    assert regrade(run)["changed"] == 0
    expected = answered(run, tmp_path)
    export(run, tmp_path / "bundle")
    assert answered(tmp_path / "bundle", tmp_path) == expected


def test_a_plan_chosen_after_the_weights_has_a_verifier_of_what_they_answer(
    tmp_path: Path, random_model_dir: Path
) -> None:
    run = finished_run(
        tmp_path, random_model_dir, "sequential", 4, sequential__stages="w,i",
        weights__rank=2, weights__epochs=1, weights__learning_rate=0.05, weights__batch_size=4,
        inference__samples=2, inference__completions=12, inference__aggregation="weighted-best-of",
        inference__scorer="verifier", **SMALL,
    )  # fmt: skip
    tuned = read_json(run / "tuned/tuned.json")
    assert tuned["plan"]["scorer"] == "verifier"
    assert (run / "tuned/verifier.safetensors").is_file()
    told = [e for e in read_rows(run / "events.jsonl") if e["kind"] == "verifier"]
    assert [e["stage"] for e in told] == ["tune/1-i/verifier"]
    assert any("rates every one alike" in note for note in read_json(run / "summary.json")["notes"])  # never right
    the_cells_are_measured(run, ("weights", "plan"), tuned["plan"])


def test_joint_tuning_hands_the_verifier_on(tmp_path: Path, random_model_dir: Path) -> None:
    run = finished_run(
        tmp_path, random_model_dir, "joint", 4,
        joint__rank=2, joint__width=8, joint__generator_rank=2, joint__rollouts=2, joint__rollout_examples=4,
        joint__warmup_epochs=1, joint__epochs=1, joint__learning_rate=0.02, joint__max_prompt_tokens=6,
        **SMALL, **(PLAN | {"plan__samples": 2}),
    )  # fmt: skip
    assert read_json(run / "tuned/tuned.json")["kind"] == "metatuner"
    assert all(len(row["samples"]["scores"]) == 2 for row in read_rows(run / "crossed.jsonl"))
    export(run, tmp_path / "bundle")
    expected = answered(run, tmp_path)
    assert answered(tmp_path / "bundle", tmp_path) == expected
    for made in ("", "generator/"):
        assert (tmp_path / f"bundle/{made}verifier.safetensors").is_file()


def config(**given: Any) -> RunConfig:
    layer = {"strategy": "zero-shot", "model": "tiny", "task": "micro-gsm8k", "limit_train": 8, "limit_test": 2}
    return resolve(layer, given)


RANKED = {"aggregation": "best-of", "samples": 4, "scorer": "verifier"}


def test_what_it_takes_is_planned() -> None:
    plain, ranked = (plan(config(plan=RANKED | {"scorer": name})) for name in ("log-probability", "verifier"))
    assert ranked["measuring_at_most"]["tokens"] == 2 * plain["measuring_at_most"]["tokens"]
    assert plain["tuning_at_most"]["tokens"] == 0
    means = ranked["mean_tokens"]
    each = means["question"] + means["completion_limit"]
    assert (ranked["tuning_at_most"]["calls"], ranked["tuning_at_most"]["tokens"]) == (8 * 8, 2 * 8 * 8 * each)
    assert tuning_tokens(config(plan=RANKED))(config(plan=RANKED)) == ranked["tuning_at_most"]["tokens"]
    inference = {"aggregation": "best-of", "samples": 2, "scorer": "verifier", "completions": 10}
    chosen = plan(config(strategy="plan-only", inference=inference))
    assert chosen["tuning_at_most"]["tokens"] == 2 * 8 * 8 * each + 2 * 10 * each


def test_a_run_without_a_verifier_is_named_as_before() -> None:
    assert "verifier" not in config().model_dump(mode="json")
    assert "verifier" in config(verifier={"samples": 3}).model_dump(mode="json")


@pytest.mark.parametrize(
    "given",
    [
        {"plan": RANKED},
        {"strategy": "plan-only", "inference": {"aggregation": "best-of", "scorer": "verifier"}},
    ],
)
def test_a_model_behind_a_server_has_no_states_to_read(given: dict[str, Any]) -> None:
    behind = config(engine="openai", openai={"base_url": "http://localhost:1/v1"}, **given)
    with pytest.raises(UsageError, match=r"reads the model's own states.* log-probability"):
        check_black_box(behind, make_strategy(behind))


def test_a_budget_that_does_not_pay_for_it_is_a_failed_run_with_the_fix(tmp_path: Path) -> None:
    sets = [part for k, v in (PLAN | SMALL).items() for part in ("--set", f"{k.replace('__', '.')}={v}")]
    named = ["--strategy", "zero-shot", "--model", "tiny", "--task", "micro-gsm8k", "--limit-train", "8"]
    limits = ["--limit-val", "2", "--limit-test", "2", "--budget", "tokens=100", "--out", str(tmp_path)]
    refused = CliRunner().invoke(app, ["run", *named, *limits, *sets, "--name", "run"])
    assert refused.exit_code == 1
    assert "before the verifier has learned. Raise --budget" in refused.stderr
    assert read_json(tmp_path / "run/summary.json")["status"] == "failed"
    assert not (tmp_path / "run/predictions.jsonl").exists()
