"""kill -9 in the middle of a run, the same command again: the same bytes as a run that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cotune.cli import app

SMALL = """
model = "tiny"
task = "micro-gsm8k"
limit_train = 24
limit_val = 8
limit_test = 12
decoding.max_new_tokens = 24
sequential.stages = "p,w"

[prompt]
rounds = 1
candidates = 4
method = "opro+bootstrap"
demonstration_sets = 1
demonstrations = 1
search_examples = 12
choice_examples = 8
minibatch = 4
finalists = 2

[rlprompt]
tokens = 2
samples = 4
hidden = 16
steps = 6
try_every = 3
checkpoint_every = 2

[weights]
rank = 2
alpha = 4.0
epochs = 2
samples = 2
updates = 2
checkpoint_every = 2

[verifier]
examples = 8
samples = 4
epochs = 3
batch_size = 8

[joint]
rank = 2
width = 16
generator_rank = 2
rollouts = 2
rollout_examples = 8
sync_every = 3
epochs = 1
max_prompt_tokens = 24
checkpoint_every = 2
"""
RESULTS = ("predictions.jsonl", "crossed.jsonl", "data.json", "tuned/tuned.json", "tuned/verifier.safetensors")
VERIFIED = ("plan.aggregation=weighted-best-of", "plan.samples=2", "plan.scorer=verifier")


def arguments(strategy: str, config: Path, out: Path) -> list[str]:
    """Of cotune. `strategy` may name the method of its lever: lora-only/ppo; or the scorer of its plan, a verifier."""
    name, _, method = strategy.partition("/")
    flags = ["--strategy", name, "--config", str(config), "--out", str(out), "--name", "run", "--quiet"]
    section = "prompt" if name == "prompt-only" else "weights"
    settings = VERIFIED if method == "verifier" else [f"{section}.method={method}"] if method else []
    flags += [part for setting in settings for part in ("--set", setting)]
    return ["run", *flags]


def run_here(strategy: str, config: Path, out: Path) -> None:
    """In this process, which has imported everything already."""
    result = CliRunner().invoke(app, arguments(strategy, config, out))
    assert result.exit_code == 0, result.output


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


PACKAGES = {"prompt-only/mipro": "optuna", "prompt-only/gepa": "gepa"}
PROMPTS = ["prompt-only", "prompt-only/cfpo", "prompt-only/rlprompt", *PACKAGES]


@pytest.mark.parametrize(
    "strategy", ["zero-shot", "zero-shot/verifier", *PROMPTS, "lora-only", "lora-only/ppo", "sequential", "joint"]
)
def test_a_killed_run_continues_to_the_same_bytes(strategy: str, tmp_path: Path) -> None:
    if strategy in PACKAGES:
        pytest.importorskip(PACKAGES[strategy])
    config = tmp_path / "small.toml"
    config.write_text(SMALL)
    run_here(strategy, config, tmp_path / "whole")
    whole = tmp_path / "whole/run"
    events = lines(whole / "events.jsonl")

    # Kill when a random number of its events are on disk, wherever it is then.
    killed = tmp_path / "killed/run"
    target = random.Random(f"kill/{strategy}").randrange(1, max(2, events))
    command = [sys.executable, "-m", "cotune", *arguments(strategy, config, tmp_path / "killed")]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while lines(killed / "events.jsonl") < target and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (killed / "summary.json").exists()

    run_here(strategy, config, tmp_path / "killed")
    for name in RESULTS:
        assert (killed / name).exists() == (whole / name).exists(), name
        if (whole / name).exists():
            assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, killed)]
    assert summaries[0]["status"] == "done"
    for account in ("tuning", "measuring"):
        counts = [{k: v for k, v in s["cost"][account].items() if k != "seconds"} for s in summaries]
        assert counts[0] == counts[1]

    # A finished run is reported, not run again.
    before = (killed / "summary.json").read_bytes()
    run_here(strategy, config, tmp_path / "killed")
    assert (killed / "summary.json").read_bytes() == before
