"""The card: its ten lines are run as they stand, and no text of a model can be Markdown of ours."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from cotune.bundle import read_bundle
from cotune.card import card, ten_lines
from cotune.export import export
from cotune.predict import predict
from cotune.record import read_json, read_rows
from cotune.tasks import task as make_task

QUESTIONS = ["Tom has 3 pens and buys $4 more. How many?", "What is 12 + 30?"]


@pytest.fixture(scope="module")
def joint_bundle(tmp_path_factory: pytest.TempPathFactory, joint_run: Path) -> Path:
    out = tmp_path_factory.mktemp("home") / "joint"
    export(joint_run, out)
    return out


def _lines(bundle: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)\n```", (bundle / "README.md").read_text(), re.S)
    return str(code)


def _run(code: str, question: str) -> str:
    assert code.count('"..."') == 1
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace('"..."', repr(question)), {})
    return printed.getvalue().removesuffix("\n")


@pytest.mark.parametrize("kind", ["lora", "joint"])
def test_the_ten_lines_answer_as_predict_does(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle: Path = request.getfixturevalue(f"{kind}_bundle")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{question}"}}\n' for question in QUESTIONS))
    predict(bundle, str(rows), str(tmp_path / "out.jsonl"), static=kind == "joint")
    answers = [row["completion"] for row in read_rows(tmp_path / "out.jsonl")]
    assert len(set(answers)) == 2
    code = _lines(bundle)
    imports, _, rest = code.partition("\n\n")
    assert all(line.startswith("import ") for line in imports.splitlines()) and len(rest.splitlines()) == 10
    monkeypatch.chdir(bundle)
    assert [_run(code, question) for question in QUESTIONS] == answers
    without = "\n".join(line for line in code.splitlines() if "peft.PeftModel" not in line)
    assert [_run(without, question) for question in QUESTIONS] != answers  # else the adapter shows nothing


def test_the_card_says_what_the_run_recorded(joint_bundle: Path, joint_run: Path) -> None:
    text, summary = (joint_bundle / "README.md").read_text(), read_json(joint_run / "summary.json")
    assert f"| this run | {100 * summary['score']:.1f}" in text
    for cell in ("seed prompt, base weights (zero-shot)", "tuned prompt, base weights", "seed prompt, tuned weights"):
        assert f"| {cell} | " in text
    for used in read_json(joint_run / "data.json")["used"].values():
        assert used["digest"] in text
    assert "| 1 | " in text and "| one for each question | " in text  # what the static approximation loses
    assert f"{summary['cost']['tuning']['tokens']:,} tokens" in text
    assert "not known to cotune; look at the model's own page" in text
    assert "rows of micro-gsm8k: made by cotune itself" in text
    assert (joint_bundle / "generator" / "metatuner.safetensors").read_bytes() == (
        joint_run / "tuned" / "metatuner.safetensors"
    ).read_bytes()


def test_text_of_a_model_stays_text(lora_bundle: Path, lora_run: Path) -> None:
    evil = "```\n# Owned <script>\n````\n\x1b[2J"
    bundle = read_bundle(lora_bundle)
    bundle = bundle.model_copy(
        update={"prompt": {"instruction": evil, "demonstrations": []}, "run": "a*b<i>", "task": "x|y"}
    )
    text = card(lora_run, bundle, make_task("micro-gsm8k"), {"per_example": None, "joint": False}, adapter=True)
    assert "`````\n```\n# Owned <script>\n````\n\\x1b[2J\n`````" in text
    assert r"# a\*b&lt;i&gt;" in text and "x\\|y" in text
    assert "\x1b" not in text


def test_a_hub_model_and_a_sampling_plan(lora_bundle: Path, lora_run: Path) -> None:
    bundle = read_bundle(lora_bundle)
    model = bundle.model.model_copy(update={"source": "Qwen/Qwen2.5-7B-Instruct", "revision": "abc"})
    plan = bundle.plan.model_copy(update={"temperature": 0.7, "top_p": 0.9})
    hub = bundle.model_copy(update={"model": model, "plan": plan})
    assert model.reference == "Qwen/Qwen2.5-7B-Instruct@abc"
    code = ten_lines(hub, adapter=False)
    assert 'base = "Qwen/Qwen2.5-7B-Instruct"' in code and "peft" not in code
    assert 'AutoTokenizer.from_pretrained(base, revision="abc")' in code
    assert "do_sample=True, temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=12" in code
    text = card(lora_run, hub, make_task("micro-gsm8k"), {"per_example": None, "joint": False}, adapter=False)
    assert "cotune's list of models says: Apache-2.0" in text
