"""`cotune export`: what is written, that PEFT loads it, and what a joint run loses by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from cotune import export as exports
from cotune.bench import Bench, MemoryStore
from cotune.cli import app
from cotune.config import RunConfig, resolve
from cotune.experiment import base_model, dataset, engine_factory
from cotune.export import group
from cotune.ledger import Ledger
from cotune.metatuned import MetaTuned
from cotune.models.base import load
from cotune.models.lora import LoraFactors, PendingLora, attached
from cotune.record import read_json, read_rows
from cotune.strategies import load_tuned
from cotune.strategies.base import Fixed
from cotune.tasks import task as make_task
from cotune.tasks.base import Task
from cotune.tasks.data import Dataset
from cotune.values import Example


def cotune(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def opened(run: Path) -> tuple[RunConfig, MetaTuned, Bench]:
    config = resolve(read_json(run / "config.json"))
    model = base_model(config, config.model)
    tuned = load_tuned(run / "tuned", model)
    assert isinstance(tuned, MetaTuned)
    build = engine_factory(config)
    bench = Bench(model, build(model), build, Ledger(), MemoryStore(), 0)
    return config, tuned, bench


def test_a_joint_run_becomes_one_prompt_and_one_adapter(
    joint_run: Path, random_model_dir: Path, tmp_path: Path
) -> None:
    result = cotune("export", joint_run, "--out", tmp_path / "one", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["split"], report["n"], report["metric"]) == ("val", 4, "accuracy")
    each, (row,) = report["per_example"], report["rows"]
    assert (row["groups"], row["adapters"]) == (1, 1)
    assert row["difference"] == pytest.approx(row["score"] - each["score"])
    assert row["score_low"] <= row["score"] <= row["score_high"]
    assert row["serving"]["prompts"] is None and row["serving"]["adapters"] is None
    assert each["serving"]["prompts"]["flops"] > 0 and each["serving"]["adapters"]["flops"] > 0
    assert (each["groups"], each["adapters"], each["adapter_bytes"]) == (None, 4, 4 * row["adapter_bytes"])
    base = load(str(random_model_dir))
    tuned = load_tuned(tmp_path / "one", base)
    assert isinstance(tuned, Fixed) and tuned.adapter is not None and not tuned.adapter.is_zero
    config = json.loads((tmp_path / "one" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(random_model_dir)
    tensors = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    assert row["adapter_bytes"] == sum(t.nbytes for t in tensors.values())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = base.model(ids).logits
        with attached(base.model, tuned.adapter.factors, tuned.adapter.scaling):
            ours = base.model(ids).logits
        theirs = PeftModel.from_pretrained(base.model, tmp_path / "one" / "adapter")(ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 1e-2  # else agreeing shows nothing

    again = cotune("export", joint_run, "--out", tmp_path / "one")
    assert again.exit_code == 2 and "is there already" in again.stderr
    assert cotune("export", joint_run, "--out", tmp_path / "two").exit_code == 0
    for file in ("tuned.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_groups_have_a_prompt_and_an_adapter_each(joint_run: Path, random_model_dir: Path, tmp_path: Path) -> None:
    result = cotune("export", joint_run, "--out", tmp_path / "many", "--groups", "3", "--json")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "many" / "groups-3"
    found = json.loads((folder / "groups.json").read_text())
    one, row = json.loads(result.stdout)["rows"]
    assert one["groups"] == 1 and (tmp_path / "many" / "adapter").is_dir()
    count = row["adapters"]
    assert row["groups"] == 3 and row["serving"]["prompts"] is None and row["serving"]["adapters"]["flops"] > 0
    assert 1 < count <= 3 and sum(found["sizes"]) == 8 and len(found["centres"]) == count
    assert all(sum(x * x for x in centre) == pytest.approx(1, abs=1e-5) for centre in found["centres"])
    base = load(str(random_model_dir))
    members = [load_tuned(folder / f"group-{i}", base) for i in range(count)]
    assert len({m.adapter.digest for m in members if isinstance(m, Fixed) and m.adapter}) == count
    too_many = cotune("export", joint_run, "--out", tmp_path / "more", "--groups", "9")
    assert too_many.exit_code == 2 and "There are 8 train examples" in too_many.stderr


def test_several_numbers_of_groups_are_one_curve(joint_run: Path, tmp_path: Path) -> None:
    alone = json.loads(cotune("export", joint_run, "--out", tmp_path / "alone", "--groups", "2", "--json").stdout)
    result = cotune("export", joint_run, "--out", tmp_path / "all", "--groups", "8,2", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["groups"] for row in report["rows"]] == [1, 2, 8]
    sizes = [row["adapter_bytes"] for row in report["rows"]]
    assert sizes == sorted(set(sizes)) and sizes[1] == 2 * sizes[0]

    def facts(row: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if k != "serving"}  # which has seconds

    assert facts(report["rows"][1]) == facts(alone["rows"][1])
    assert facts(report["per_example"]) == facts(alone["per_example"])
    two = tmp_path / "alone" / "groups-2"
    files = {p.relative_to(two) for p in two.rglob("*") if p.is_file()}
    assert len(files) == 7  # prompt, PEFT's two files, for each of two; groups.json
    for file in files:
        assert (two / file).read_bytes() == (tmp_path / "all" / "groups-2" / file).read_bytes()

    table = cotune("export", joint_run, "--out", tmp_path / "text", "--groups", "1,2").stdout
    rows = [line.split() for line in table.splitlines() if line.startswith(("one per example", "1 ", "2 "))]
    assert len(rows) == 3 and "measured on val, n = 4" in table
    for wrong in ("0", "1,x", ""):
        refused = cotune("export", joint_run, "--out", tmp_path / "no", "--groups", wrong)
        assert refused.exit_code == 2 and "is not a number of groups" in refused.stderr


def test_the_test_split_stays_untouched(joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched() -> tuple[Example, ...]:
        raise AssertionError("the test split was loaded")

    def without_test(config: RunConfig, task: Task) -> Dataset:
        return replace(dataset(config, task), test=touched)

    monkeypatch.setattr(exports, "dataset", without_test)
    assert cotune("export", joint_run, "--out", tmp_path / "out", "--groups", "1,2").exit_code == 0


def test_fewer_different_queries_than_groups(joint_run: Path) -> None:
    config, tuned, bench = opened(joint_run)
    first, second = dataset(config, make_task(config.task)).train[:2]
    examples = [first, first, second, first]
    assert sorted(group(tuned, examples, tuned.latents(examples), 4, bench).sizes) == [1, 3]


def test_the_run_says_what_serving_costs(joint_run: Path, random_model_dir: Path) -> None:
    summary = read_json(joint_run / "summary.json")
    serving, rows = summary["serving"], read_rows(joint_run / "predictions.jsonl")
    answers = serving["answers"]
    assert serving["examples"] == len(rows) == 2
    assert answers["read_tokens"] == sum(row["prompt_tokens"] for row in rows) / 2
    assert answers["written_tokens"] == sum(row["generated_tokens"] for row in rows) / 2
    model = load(str(random_model_dir))
    tokens = answers["read_tokens"] + answers["written_tokens"]
    assert answers["flops"] == pytest.approx(2 * model.parameters_count * tokens)
    prompts, adapters = serving["prompts"], serving["adapters"]
    assert prompts["read_tokens"] == adapters["read_tokens"] > 0  # G reads the same query for both
    assert serving["flops"] == pytest.approx(sum(serving[p]["flops"] for p in ("prompts", "adapters", "answers")))
    assert all(serving[part]["seconds"] > 0 for part in ("prompts", "adapters", "answers"))
    parts = serving["parameters"]
    assert set(parts) == {"encoder", "prompt_decoder", "parameter_decoder"}
    assert all(0 < size["trained"] <= size["total"] for size in parts.values())
    shown = cotune("show", joint_run).stdout
    for words in ("writing its prompt: ", "making its adapter: ", "answering: ", "parameter decoder: "):
        assert words in shown
    measured = summary["cost"]["measuring"]
    assert measured["flops"] > 2 * serving["flops"]  # the other cells of the 2x2 are not in it


def test_every_example_a_group_of_its_own_loses_nothing(joint_run: Path, tmp_path: Path) -> None:
    config, tuned, bench = opened(joint_run)
    examples = dataset(config, make_task(config.task)).train
    own, grouped = (
        tuned.condition(examples, bench),
        group(tuned, examples, tuned.latents(examples), len(examples), bench),
    )
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
    report = json.loads(result.stdout)
    assert (report["split"], report["n"], report["per_example"]) == (None, None, None)
    (row,) = report["rows"]
    assert (row["groups"], row["adapters"], row["score"], row["serving"]) == (1, 0, None, None)
    serving = read_json(tmp_path / "zero" / "summary.json")["serving"]
    assert serving["prompts"] is serving["adapters"] is serving["parameters"] is None
    assert serving["flops"] == serving["answers"]["flops"] > 0
    assert (tmp_path / "out" / "tuned.json").read_bytes() == (tmp_path / "zero" / "tuned" / "tuned.json").read_bytes()
    refused = cotune("export", tmp_path / "zero", "--out", tmp_path / "more", "--groups", "2")
    assert refused.exit_code == 2 and "one prompt for all examples already" in refused.stderr
    missing = cotune("export", tmp_path / "nothing", "--out", tmp_path / "x")
    assert missing.exit_code == 2 and "is neither a finished run folder nor a bundle" in missing.stderr
    again = cotune("export", tmp_path / "out", "--out", tmp_path / "x")
    assert again.exit_code == 2 and "is a bundle already" in again.stderr
