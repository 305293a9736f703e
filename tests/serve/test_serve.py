"""`cotune serve` in a process of its own: our own client asks, Ctrl-C ends it, nothing of what was said is logged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from cotune.cli import app
from cotune.engines.base import Request, Sampling
from cotune.engines.openai_engine import OpenAIEngine
from cotune.models.black_box import BlackBox
from cotune.openai_client import ChatClient
from cotune.predict import predict

QUESTIONS = ["What is 1 + 1?", "What is 20 + 3?", "Ann has 2 pens. How many pens has Ann?"]


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it


def test_the_openai_engine_gets_what_predict_gives(lora_bundle: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cotune", "serve", str(lora_bundle), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_ctrl_c,
    )  # fmt: skip
    try:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
        expected = [json.loads(line)["completion"] for line in predict(lora_bundle, str(rows), "-")[1].splitlines()]
        assert process.stderr is not None
        ready = process.stderr.readline()
        assert ready.startswith("Serving lora-only at http://127.0.0.1:"), ready + process.stderr.read()
        model = BlackBox("lora-only", ChatClient(ready.split()[3], timeout=60))
        requests = [Request(model.render([{"role": "user", "content": q}])) for q in QUESTIONS]
        answers = OpenAIEngine(model).generate(requests, Sampling(12))
        assert [row[0].text for row in answers] == expected
        assert all(row[0].prompt_tokens > 0 for row in answers)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (130, "")
    lines = stderr.splitlines()
    assert lines[-1] == "Interrupted. Nothing was changed."
    assert sum('"POST /v1/chat/completions HTTP/1.1" 200' in line for line in lines) == 3 == len(lines) - 1
    assert not any(text in stderr for text in (*QUESTIONS, *expected))


def test_what_cannot_be_served_is_said_before(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"Error: {str(tmp_path)!r} is neither a finished run folder nor a bundle. Give ")
    assert refused.stderr.count("\n") == 1
