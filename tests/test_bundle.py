"""The bundle's format: the chat frame, and everything that is refused when one is read."""

from __future__ import annotations

import hashlib
import json
import shutil
import string
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cotune.bundle import SUMS, chat_frame, read_bundle, write_sums
from cotune.errors import UsageError
from cotune.models.base import BaseModel, load
from cotune.opened import Place, open_any
from cotune.tasks import task as make_task
from cotune.values import Demonstration, Example, Prompt

HOSTILE = Prompt("Pay $5 for ${question}.", (Demonstration("$x?", "${context}"),))


@pytest.mark.parametrize("name", ["micro-gsm8k", "micro-math", "micro-hotpotqa", "micro-cosmosqa"])
def test_the_frame_filled_in_is_what_the_task_makes(name: str, random_base: BaseModel) -> None:
    task = make_task(name)
    choices = tuple("$abcd"[: task.choices])
    example = Example("1", "What of $7 and ${context}?", "", "It was ${question}.", choices=choices)
    frame = chat_frame(random_base, task, HOSTILE)
    *before, last = frame.messages
    values = {"question": example.question, "context": example.context} | {
        f"choice{i}": choice for i, choice in enumerate(choices)
    }
    filled = string.Template(last["content"]).substitute({field: values[field] for field in frame.fields})
    assert [*before, {**last, "content": filled}] == task.messages(HOSTILE, example)
    assert frame.fields[-1 - task.choices] == "question"


def test_the_frame_of_a_model_without_a_system_role(random_model_dir: Path) -> None:
    base = load(str(random_model_dir))
    base.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
    )
    task, example = make_task("micro-gsm8k"), Example("1", "How many?", "")
    (message,) = chat_frame(base, task, Prompt("Pay $5.")).messages
    assert message["role"] == "user" and "$$5" in message["content"]
    filled = string.Template(message["content"]).substitute(question=example.question)
    assert filled == base.render(task.messages(Prompt("Pay $5."), example)) == "Pay $5.\n\nHow many?"


def test_the_sums_are_those_of_sha256sum(lora_bundle: Path) -> None:
    files = {p.relative_to(lora_bundle).as_posix() for p in lora_bundle.rglob("*") if p.is_file()} - {SUMS}
    listed = dict(reversed(line.split("  ", 1)) for line in (lora_bundle / SUMS).read_text().splitlines())
    assert set(listed) == files >= {"bundle.json", "tuned.json", "README.md", "adapter/adapter_config.json"}
    for name, digest in listed.items():
        assert hashlib.sha256((lora_bundle / name).read_bytes()).hexdigest() == digest
    if tool := shutil.which("sha256sum"):
        subprocess.run([tool, "--quiet", "-c", SUMS], cwd=lora_bundle, check=True)


def _edit(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "bundle.json").read_text()) | changes
    (folder / "bundle.json").write_text(json.dumps(content))
    (folder / SUMS).unlink()
    write_sums(folder)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda b: (b / "adapter/adapter_model.safetensors").unlink(), "adapter/adapter_model.safetensors is missing"),
        (lambda b: (b / "tuned.json").write_text("{}"), "tuned.json is another file now"),
        (lambda b: (b / "groups.json").write_text("{}"), "groups.json was added"),
        (lambda b: (b / "adapter/adapter_model.bin").write_bytes(b"x"), "pickled files can run code"),
        (lambda b: (b / SUMS).unlink(), "has no readable SHA256SUMS"),
        (lambda b: (b / SUMS).write_text(f"{'0' * 64}  ../x\n"), "is not a line of it"),
        (lambda b: _edit(b, format=2), "has the bundle format 2, and this cotune reads 1"),
        (lambda b: _edit(b, rank="many"), "is not what cotune writes (rank:"),
        (lambda b: _edit(b, more=1), "is not what cotune writes (more:"),
    ],
)
def test_what_is_no_whole_bundle_is_refused(
    harm: Callable[[Path], object], said: str, lora_bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(lora_bundle, tmp_path / "copy"))
    (copy / "README.md").write_text("A card may be edited.")
    assert read_bundle(copy).task == "micro-gsm8k"
    harm(copy)
    with pytest.raises(UsageError) as refused:
        read_bundle(copy)
    assert said in str(refused.value)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, random_model_dir: Path) -> tuple[Path, Path]:
    """The random model with one other weight, and with another chat template."""
    weights = Path(shutil.copytree(random_model_dir, tmp_path_factory.mktemp("m") / "weights"))
    tensors = load_file(weights / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    template = Path(shutil.copytree(random_model_dir, tmp_path_factory.mktemp("m") / "template"))
    (file,) = template.glob("chat_template.jinja")
    file.write_text(file.read_text() + " ")
    return weights, template


def test_another_base_model_is_refused(lora_bundle: Path, lora_run: Path, others: tuple[Path, Path]) -> None:
    other, template = map(str, others)
    for place in (lora_bundle, lora_run):
        with pytest.raises(UsageError, match=f"was tuned for .*random-model.*, but {other}.* has other weights"):
            open_any(place, Place(model=other))
    with pytest.raises(UsageError, match=r"no model 'gone'.* --model says where it is now"):
        open_any(lora_bundle, Place(model="gone"))
    half = Place(settings={"runner": {"dtype": "bfloat16"}})
    for place, said in ((lora_bundle, "other weights"), (lora_run, "its type with --set runner.dtype")):
        with pytest.raises(UsageError, match=said):
            open_any(place, half)
    with pytest.raises(UsageError, match="was tuned with the chat template"):
        open_any(lora_bundle, Place(model=template))


def test_a_copy_of_the_model_elsewhere_is_the_same(lora_bundle: Path, random_model_dir: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(random_model_dir, tmp_path / "moved"))
    opened = open_any(lora_bundle, Place(model=str(moved), settings={"runner": {"batch_size": 3}}))
    assert (opened.base.folder, opened.config.runner.batch_size, opened.name) == (moved, 3, "lora-only")
    assert opened.sampling == open_any(lora_bundle).sampling


def test_what_is_neither_a_run_nor_a_bundle(lora_run: Path, tmp_path: Path) -> None:
    for nothing in (tmp_path, tmp_path / "nowhere", Path("pyproject.toml")):
        with pytest.raises(UsageError, match="is neither a finished run folder nor a bundle"):
            open_any(nothing)
    with pytest.raises(UsageError, match="--static is for bundles"):
        open_any(lora_run, static=True)
    shutil.copy(lora_run / "config.json", tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "failed", "reason": "no space"}')
    with pytest.raises(UsageError, match=r"is not done \(failed: no space\)"):
        open_any(tmp_path)


def test_settings_of_what_was_tuned_stay() -> None:
    with pytest.raises(UsageError, match="--set decoding would change what was tuned"):
        Place(settings={"decoding": {"temperature": 1.0}})
    with pytest.raises(UsageError, match="auto, transformers or vllm"):
        Place(engine="openai")
