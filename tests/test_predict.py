"""`cotune predict`: from a run and from a bundle, with files and pipes, interrupted and continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cotune.cli import app
from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import UsageError
from cotune.opened import Place
from cotune.predict import predict
from cotune.values import Event

ROWS = [
    {"question": "What is 1 + 1?"},
    {"question": ""},
    {"question": "What is 20 + 3?", "answer": "#### 23"},
    {"question": "Ann has 2 pens. How many pens has Ann?"},
]
ONE_BY_ONE = Place(settings={"runner": {"batch_size": 1}})


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def cotune(*args: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], input=input)


def test_a_run_and_its_bundle_answer_alike_by_file_and_by_pipe(
    lora_run: Path, lora_bundle: Path, rows: str, tmp_path: Path
) -> None:
    report, _ = predict(lora_run, rows, str(tmp_path / "run.jsonl"))
    assert (report["rows"], report["unusable"], report["graded"]) == (4, 1, 1)
    piped = cotune("predict", lora_bundle, "--input", "-", "--output", "-", "--quiet", input=Path(rows).read_text())
    assert piped.exit_code == 0, piped.output
    assert piped.stdout == (tmp_path / "run.jsonl").read_text()
    lines = [json.loads(line) for line in piped.stdout.splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3, 4]
    assert lines[1] == {"row": 2, "error": "the question is empty"}
    assert "outcome" not in lines[0] and "outcome" in lines[2]
    assert len({line["completion"] for line in lines if "completion" in line}) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "run.jsonl"}


def test_an_interrupted_one_goes_on(lora_run: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = predict(lora_run, rows, "-", place=ONE_BY_ONE)
    answered: list[int] = []
    real = TransformersEngine.generate

    def counted(self: TransformersEngine, requests: Any, sampling: Any) -> Any:
        answered.append(len(requests))
        return real(self, requests, sampling)

    def interrupt(event: Event) -> None:
        if event.data.get("done") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    out, kept = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    with pytest.raises(KeyboardInterrupt):
        predict(lora_run, rows, str(out), interrupt, ONE_BY_ONE)
    assert answered == [1, 1] and kept.exists() and not out.exists()
    with kept.open("a") as file:
        file.write('{"key": "to')  # torn by a kill
    predict(lora_run, rows, str(out), place=ONE_BY_ONE)
    assert answered == [1, 1, 1] and not kept.exists()
    assert out.read_text() == whole


def test_nothing_is_overwritten_and_nothing_is_guessed(lora_run: Path, rows: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("precious")
    for input, output, said in (
        (rows, tmp_path / "mine.jsonl", "is there already and is not overwritten"),
        (rows, tmp_path, "is there already and is not overwritten"),
        (rows, tmp_path / "no" / "out.jsonl", "cannot be written"),
        (tmp_path / "none.jsonl", tmp_path / "out.jsonl", "There is no file"),
    ):
        with pytest.raises(UsageError, match=said):
            predict(lora_run, str(input), str(output))
    assert (tmp_path / "mine.jsonl").read_text() == "precious"
    refused = cotune("predict", lora_run, "--input", rows, "--output", "-", "--json")
    assert refused.exit_code == 2 and "are JSON already" in refused.stderr
    wrong = cotune("predict", tmp_path, "--input", rows, "--output", tmp_path / "out.jsonl")
    assert wrong.exit_code == 2 and "is neither a finished run folder nor a bundle" in wrong.stderr
    empty = cotune("predict", lora_run, "--input", "-", "--output", "-", input="")
    assert empty.exit_code == 2 and "stdin holds no rows" in empty.stderr
