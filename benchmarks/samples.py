"""What a token costs when a prompt has N samples, against N = 1 (floor: at most 1.1x), and what sharing a prompt saves.

    python benchmarks/samples.py --size 105m --samples 8 [--engine vllm] [--json]

32 questions of micro-gsm8k, each continued by N samples in one batch, for the same number of tokens (nothing ends
early), against one sample of each; and against the same rows as requests of their own, where every prompt is read N
times. The variants take turns in every round; figures are medians of processor seconds, which other work on the machine
disturbs less, on a GPU of the clock. `tiny` and `tiny-4m` are the packaged models; `105m` has random weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from engines import SIZES, model
from lora_throughput import median_seconds
from random_models import SHAPES, random_model

from cotune.engines.base import Engine, Request, Sampling
from cotune.models.base import BaseModel
from cotune.tasks import task as make_task
from cotune.tasks.data import load as load_data
from cotune.values import Prompt


def engine(name: str, base: BaseModel, rows: int) -> Engine:
    if name == "vllm":
        from cotune.engines.vllm_engine import VllmEngine

        return VllmEngine(base, sequences=rows, max_rank=None)
    from cotune.engines.transformers_engine import TransformersEngine

    return TransformersEngine(base, batch_size=rows, max_batch_tokens=2**30)


def variants(made: Engine, base: BaseModel, prompts: int, samples: int, new: int) -> dict[str, Callable[[], int]]:
    """Name -> function that generates one batch and returns the number of new tokens."""
    task = make_task("micro-gsm8k")
    examples = load_data(task, None, seed=0, limit_test=prompts, val_max=10).test()
    prompt = Prompt(task.seed_instruction)
    requests = [Request(base.render(task.messages(prompt, example))) for example in examples]
    one = Sampling(new, temperature=0.7)

    def through(asked: list[Request], sampling: Sampling) -> int:
        return sum(len(c.token_ids) for row in made.generate(asked, sampling) for c in row)

    return {
        "N = 1": lambda: through(requests, one),
        f"N = {samples}": lambda: through(requests, replace(one, n=samples)),
        f"{samples} requests each": lambda: through(requests * samples, one),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--size", choices=[*SIZES, *SHAPES], default="tiny")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--device", default="cpu", help="another than cpu: random weights in bfloat16, transformers only"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.device == "cpu" else time.perf_counter  # tokens are lists: the GPU has ended
    with tempfile.TemporaryDirectory() as folder:
        if given.device == "cpu":
            base = model(given.size, Path(folder))
        else:
            base = random_model(given.size, given.device, torch.bfloat16)  # it has no end of turn
        made = engine(given.engine, base, given.prompts * given.samples)
        torch.set_num_threads(given.threads)  # the engine has its own idea for small models
        runs = variants(made, base, given.prompts, given.samples, given.new_tokens)
        tokens = {name: run() for name, run in runs.items()}  # warm-up
        seconds = median_seconds(runs, given.rounds, clock)
    per_token = {name: seconds[name] / tokens[name] for name in runs}
    first, *others = per_token
    ratios = {name: per_token[name] / per_token[first] for name in others}
    if given.json:
        print(json.dumps(vars(given) | {"seconds_per_token": per_token, "ratios": ratios}))
        return
    print(f"{given.engine}, {given.size}, {given.prompts} prompts, {given.new_tokens} new tokens")
    for name, each in per_token.items():
        print(f"  {name:24}{1e6 * each:10.1f} µs a token" + (f"{ratios[name]:8.2f}x" if name in ratios else ""))


if __name__ == "__main__":
    main()
