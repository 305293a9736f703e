"""How long `cotune compare` takes on many runs, against what pandas needs to read the same rows (floor: at most 3x).

    python benchmarks/compare_speed.py --runs 1000 --rows 1319

Writes synthetic run folders (four tasks, five strategies, several variants, five seeds each; rows as long as real
ones), then times, in interleaved rounds of fresh processes: `compare` to JSON in full (read, check, group, all
statistics, write), and `pandas.read_json(..., lines=True)` over every predictions.jsonl. Prints medians and the ratio,
on the clock and in processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cotune.config import dump, resolve
from cotune.values import digest

TASKS = ("gsm8k", "math", "hotpotqa", "cosmosqa")
SEEDS = 5

PANDAS = """
import sys, time
import pandas as pd
from pathlib import Path
start = time.perf_counter()
total = sum(pd.read_json(p, lines=True)["score"].sum() for p in sorted(Path(sys.argv[1]).glob("*/predictions.jsonl")))
print(time.perf_counter() - start, time.process_time())
"""
COMPARE = """
import sys, time
from pathlib import Path
start = time.perf_counter()
from cotune.compare import render, tables
text = render.as_json(tables.compare([Path(sys.argv[1])]))
print(time.perf_counter() - start, time.process_time())
"""


def variants(runs: int) -> Iterator[tuple[str, str, dict[str, Any], int]]:
    """Task, strategy, settings and seed of each run: as many variants as `runs` need, five seeds each."""
    made = 0
    for rank in range(1, runs + 1):
        for task in TASKS:
            for strategy in ("zero-shot", "prompt-only", "lora-only", "sequential", "joint"):
                own = {"zero-shot": {}, "prompt-only": {"prompt": {"rounds": rank}}, "joint": {"joint": {"rank": rank}}}
                settings = own.get(strategy, {"weights": {"epochs": rank}})
                if strategy == "zero-shot" and rank > 1:
                    continue
                for seed in range(SEEDS):
                    yield task, strategy, settings, seed
                    made += 1
                    if made == runs:
                        return


def write(out: Path, runs: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    ids = [f"test-{i:05d}" for i in range(rows)]
    ease = rng.normal(size=rows)
    answer = "First take the number of boxes and multiply it by what is in each of them. " * 4
    for task, strategy, settings, seed in variants(runs):
        config = resolve({"strategy": strategy, "model": "tiny", "task": task, "seed": seed}, settings)
        folder = out / f"{config.run_name}"
        folder.mkdir()
        (folder / "config.json").write_text(dump(config), encoding="utf-8")
        right = (rng.normal(size=rows) < ease + rng.normal() / 10).tolist()
        lines = [
            json.dumps(
                {
                    "id": i,
                    "prompt": "0" * 16,
                    "instruction": "Solve the problem step by step.",
                    "completion": answer,
                    "prediction": "42",
                    "reference": "42",
                    "outcome": "correct" if hit else "wrong",
                    "score": float(hit),
                    "metrics": {"accuracy": float(hit)},
                    "prompt_tokens": 90,
                    "generated_tokens": 80,
                    "note": "",
                }
            )
            for i, hit in zip(ids, right, strict=True)
        ]
        (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        spent = {"calls": 1, "tokens": 1000, "flops": 1e9, "seconds": 1.0}
        summary = {
            "status": "done",
            "engine": "transformers",
            "headline": "accuracy",
            "n": rows,
            "score": sum(right) / rows,
            "outcomes": {"correct": sum(right), "wrong": rows - sum(right), "truncated": 0, "errored": 0},
            "cost": {"tuning": spent, "measuring": spent},
            "peak_memory_bytes": 1,
            "comparable": {"data_digest": task, "test_ids_digest": digest(ids), "grader_version": "1"},
        }
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def seconds(code: str, folder: Path) -> tuple[float, float]:
    """On the clock without the imports of pandas; of the processor, whole process."""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    clock, processor = map(float, done.stdout.split())
    return clock, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1319)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = time.perf_counter()
        write(folder, args.runs, args.rows)
        print(f"{args.runs} runs x {args.rows} rows written in {time.perf_counter() - start:.0f} s", flush=True)
        pandas, ours = [], []
        for _ in range(args.rounds):
            pandas.append(seconds(PANDAS, folder))
            ours.append(seconds(COMPARE, folder))
        for i, name in enumerate(("clock", "processor")):
            read, compared = (statistics.median(times[i] for times in both) for both in (pandas, ours))
            print(f"{name}: pandas reads {read:.1f} s, compare takes {compared:.1f} s: {compared / read:.2f}x")


if __name__ == "__main__":
    main()
