"""`cotune export`: what is written, that PEFT loads it, and what a joint run loses by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner, Result

from cotune.bench import Bench, MemoryStore
from cotune.cli import app
from cotune.config import resolve
from cotune.experiment import base_model, dataset, engine_factory
from cotune.export import group
from cotune.ledger import Ledger
from cotune.metatuned import MetaTuned
from cotune.models.base import load
from cotune.models.lora import LoraFactors, PendingLora
from cotune.record import read_json
from cotune.strategies import load_tuned
from cotune.strategies.base import Fixed
from cotune.tasks import task as make_task

JOINT = {
    "rank": 2, "width": 8, "generator_rank": 2, "rollouts": 2, "rollout_examples": 4, "warmup_epochs": 1, "epochs": 1,
    "learning_rate": 0.02, "max_prompt_tokens": 6,
}  # fmt: skip


def cotune(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory: pytest.TempPathFactory, random_model_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("results")
    settings = [part for key, value in JOINT.items() for part in ("--set", f"joint.{key}={value}")]
    result = cotune("run", "--strategy", "joint", "--model", random_model_dir, "--task", "micro-gsm8k", "--out", out,
                    "--name", "joint", "--limit-train", "8", "--limit-val", "4", "--limit-test", "2",
                    "--set", "decoding.max_new_tokens=4", *settings)  # fmt: skip
    assert result.exit_code == 0, result.output
    return out / "joint"


def test_a_joint_run_becomes_one_prompt_and_one_adapter(
    joint_run: Path, random_model_dir: Path, tmp_path: Path
) -> None:
    result = cotune("export", joint_run, "--out", tmp_path / "one", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["groups"], report["adapter"]) == (1, True)
    measured = report["measured"]
    assert (measured["split"], measured["n"]) == ("val", 4)
    assert measured["difference"] == pytest.approx(measured["exported"] - measured["per_example"])
    base = load(str(random_model_dir))
    tuned = load_tuned(tmp_path / "one", base)
    assert isinstance(tuned, Fixed) and tuned.adapter is not None and not tuned.adapter.is_zero
    config = json.loads((tmp_path / "one" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(random_model_dir)
    PeftModel.from_pretrained(base.model, tmp_path / "one" / "adapter")

    again = cotune("export", joint_run, "--out", tmp_path / "one")
    assert again.exit_code == 2 and "is there already" in again.stderr
    assert cotune("export", joint_run, "--out", tmp_path / "two").exit_code == 0
    for file in ("tuned.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_groups_have_a_prompt_and_an_adapter_each(joint_run: Path, random_model_dir: Path, tmp_path: Path) -> None:
    result = cotune("export", joint_run, "--out", tmp_path / "many", "--groups", "3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "many" / "groups.json").read_text())
    count = json.loads(result.stdout)["groups"]
    assert 1 < count <= 3 and sum(found["sizes"]) == 8 and len(found["centres"]) == count
    assert all(sum(x * x for x in centre) == pytest.approx(1, abs=1e-5) for centre in found["centres"])
    base = load(str(random_model_dir))
    members = [load_tuned(tmp_path / "many" / f"group-{i}", base) for i in range(count)]
    assert len({m.adapter.digest for m in members if isinstance(m, Fixed) and m.adapter}) == count
    too_many = cotune("export", joint_run, "--out", tmp_path / "more", "--groups", "9")
    assert too_many.exit_code == 2 and "There are 8 train examples" in too_many.stderr


def test_every_example_a_group_of_its_own_loses_nothing(joint_run: Path, tmp_path: Path) -> None:
    config = resolve(read_json(joint_run / "config.json"))
    model = base_model(config, config.model)
    tuned = load_tuned(joint_run / "tuned", model)
    assert isinstance(tuned, MetaTuned)
    build = engine_factory(config)
    bench = Bench(model, build(model), build, Ledger(), MemoryStore(), 0)
    examples = dataset(config, make_task(config.task)).train
    own, grouped = tuned.condition(examples, bench), group(tuned, examples, len(examples), bench)
    assert grouped.sizes == [1] * len(examples)
    few = grouped.condition(examples, bench)
    assert [c.prompt for c in few] == [c.prompt for c in own]
    for mine, theirs in zip(own, few, strict=True):
        assert isinstance(mine.adapter, PendingLora) and isinstance(theirs.adapter, LoraFactors)
        for name, (_, lora_b) in mine.adapter.make().factors.items():
            torch.testing.assert_close(theirs.adapter.factors[name][1], lora_b, atol=1e-6, rtol=1e-4)


def test_a_fixed_prompt_is_written_as_it_is(random_model_dir: Path, tmp_path: Path) -> None:
    small = ["--limit-train", "4", "--limit-val", "4", "--limit-test", "2", "--set", "decoding.max_new_tokens=2"]
    run = ["run", "--strategy", "zero-shot", "--model", random_model_dir, "--task", "micro-gsm8k", *small]
    assert cotune(*run, "--out", tmp_path, "--name", "zero").exit_code == 0
    result = cotune("export", tmp_path / "zero", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "out": str(tmp_path / "out"), "groups": 1, "adapter": False, "measured": None,
    }  # fmt: skip
    assert (tmp_path / "out" / "tuned.json").read_bytes() == (tmp_path / "zero" / "tuned" / "tuned.json").read_bytes()
    refused = cotune("export", tmp_path / "zero", "--out", tmp_path / "more", "--groups", "2")
    assert refused.exit_code == 2 and "one prompt for all examples already" in refused.stderr
    missing = cotune("export", tmp_path / "nothing", "--out", tmp_path / "x")
    assert missing.exit_code == 2 and "There is no run folder" in missing.stderr
