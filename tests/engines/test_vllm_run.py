"""A whole run through vLLM: G and M in one engine, adapters generated per query, the same bytes again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cotune.config import resolve
from cotune.experiment import run
from cotune.record import read_rows

SMALL = {
    "model": "tiny",
    "task": "micro-gsm8k",
    "engine": "vllm",
    "limit_train": 16,
    "limit_val": 8,
    "limit_test": 16,
    "vllm": {"cache_gib": 0.25, "sequences": 16, "adapters": 8},
    "weights": {"epochs": 2},
    "prompt": {"rounds": 1, "search_examples": 8, "minibatch": 4, "finalists": 1},
    "joint": {"epochs": 1, "rollout_examples": 8, "rollouts": 2},
}
# After less, what was trained is worse on val than its start, or as good at best, and the start is handed over.
LONGER = {"limit_train": 64, "limit_val": 16, "joint": {"epochs": 2}}


@pytest.mark.parametrize("strategy", ["zero-shot", "prompt-only", "lora-only", "joint"])
def test_a_run_comes_again_byte_for_byte(strategy: str, tmp_path: Path) -> None:
    adapted = strategy in ("lora-only", "joint")
    config = resolve(SMALL, LONGER if adapted else {}, {"strategy": strategy})
    first, second = (run(config, tmp_path / name) for name in ("first", "second"))
    assert first.summary["engine"] == "vllm"
    names = ["predictions.jsonl", *(["crossed.jsonl"] if strategy == "joint" else [])]
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    adapters = {row["adapter"] for row in read_rows(first.folder / "predictions.jsonl")}
    assert (adapters != {None}) == adapted


CHAINS = {"aggregation": "weighted-best-of", "samples": 4, "chain": 2, "scorer": "verifier"}
BINS = {"samples": 4, "completions": 64, "aggregation": "weighted-best-of"}


@pytest.mark.parametrize(
    "levers",
    [
        {"strategy": "zero-shot", "plan": CHAINS, "verifier": {"examples": 8}},
        {"strategy": "plan-only", "inference": BINS, "difficulty": {"bins": 2, "probe": 2}},
        {"strategy": "sequential", "sequential": {"stages": "w,i"}, "inference": BINS},
    ],
    ids=["chains and a verifier", "a plan for each difficulty", "weights, then the plan"],
)
def test_several_samples_come_again_byte_for_byte(levers: dict[str, Any], tmp_path: Path) -> None:
    config = resolve(SMALL, levers)
    first, second = (run(config, tmp_path / name) for name in ("first", "second"))
    rows = (first.folder / "predictions.jsonl").read_bytes()
    assert rows == (second.folder / "predictions.jsonl").read_bytes()
    assert (first.folder / "tuned/tuned.json").read_bytes() == (second.folder / "tuned/tuned.json").read_bytes()
    answered = read_rows(first.folder / "predictions.jsonl")
    assert all(len(row["samples"]["completions"]) == row["plan"]["samples"] for row in answered if row["samples"])
    assert any(row["samples"] for row in answered)
