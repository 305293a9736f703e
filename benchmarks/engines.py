"""The vllm engine against vLLM called directly, against the Transformers engine, and with an adapter per request.

    python benchmarks/engines.py --size tiny --rounds 5 [--json]

`tiny` and `tiny-4m` are the packaged models; `105m` has random weights. Greedy; the prompts are questions of
micro-gsm8k, each continued for the same number of tokens (nothing ends early). The variants take turns in every round;
figures are medians and ratios of medians of processor seconds (both engines run in this process, so what else the
machine does hardly counts). Starting is timed once, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lora_throughput import median_seconds, random_adapter
from random_models import random_model

from cotune.bench import Bench, MemoryStore
from cotune.engines.base import Engine, Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine
from cotune.engines.vllm_engine import VllmEngine
from cotune.evaluate import evaluate
from cotune.ledger import Ledger
from cotune.models.base import BaseModel, load
from cotune.tasks import task as make_task
from cotune.tasks.data import load as load_data
from cotune.values import Conditioning, Prompt

SIZES = ("tiny", "tiny-4m", "105m")
_START = """
import time; began = time.perf_counter()
from cotune.models.base import load
from cotune.engines.base import Request, Sampling
base = load("tiny")
loaded = time.perf_counter()
from cotune.engines.{module} import {name}
{name}(base).generate([Request("x")], Sampling(1))
print(loaded - began, time.perf_counter() - loaded)
"""


def model(size: str, folder: Path) -> BaseModel:
    """None of its tokens ends a turn, so that every completion has the same length."""
    if size != "105m":
        base = load(size)
    else:
        made = random_model(size)
        made.model.save_pretrained(folder)
        base = replace(made, folder=folder)
    base.__dict__["end_of_turn_ids"] = ()
    return base


def variants(base: BaseModel, rows: int, new_tokens: int) -> dict[str, Callable[[], int]]:
    """Name -> function that generates and returns the number of new tokens."""
    task = make_task("micro-gsm8k")
    examples = load_data(task, None, seed=0, limit_test=rows, val_max=10).test()
    prompt = Prompt(task.seed_instruction)
    rendered = [base.render(task.messages(prompt, example)) for example in examples]
    sampling = Sampling(new_tokens)
    ours = VllmEngine(base, sequences=rows, adapters=rows, max_rank=8)
    plain = VllmEngine(base, sequences=rows, max_rank=None)
    reference = TransformersEngine(base, batch_size=rows)
    adapters = [random_adapter(base, i) for i in range(rows)]
    requests = [Request(text) for text in rendered]
    distinct = [Request(text, adapter) for text, adapter in zip(rendered, adapters, strict=True)]
    shared = [Request(text, adapters[0]) for text in rendered]

    def through(engine: Engine, asked: Sequence[Request]) -> int:
        return sum(len(row[0].token_ids) for row in engine.generate(asked, sampling))

    def evaluated() -> int:
        bench = Bench(base, plain, lambda model: plain, Ledger(), MemoryStore(), 0)
        done = evaluate(task, examples, [Conditioning(prompt)] * rows, sampling, bench)
        return sum(len(c.token_ids) for c in done.completions)

    def directly() -> int:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        inputs = [TokensPrompt(prompt_token_ids=base.encode(text)) for text in rendered]
        parameters = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        return sum(
            len(o.outputs[0].token_ids) for o in plain._running()._llm.generate(inputs, parameters, use_tqdm=False)
        )

    return {
        "evaluate() through vllm": evaluated,
        "vllm.LLM.generate": directly,
        "transformers": lambda: through(reference, requests),
        "vllm, serves adapters, none asked": lambda: through(ours, requests),
        "vllm, an adapter per request": lambda: through(ours, distinct),
        "vllm, one shared adapter": lambda: through(ours, shared),
        "transformers, an adapter per request": lambda: through(reference, distinct),
        "transformers, one shared adapter": lambda: through(reference, shared),
    }


RATIOS = (
    ("evaluate() through vllm", "vllm.LLM.generate"),
    ("evaluate() through vllm", "transformers"),
    ("vllm, an adapter per request", "vllm, one shared adapter"),
    ("vllm, an adapter per request", "transformers, an adapter per request"),
    ("vllm, one shared adapter", "transformers, one shared adapter"),
    ("vllm, serves adapters, none asked", "evaluate() through vllm"),
)


def measure(size: str, rows: int, new_tokens: int, rounds: int) -> dict[str, float]:
    """Name -> tokens per second (median)."""
    with tempfile.TemporaryDirectory() as folder:
        runs = variants(model(size, Path(folder)), rows, new_tokens)
        tokens = {name: run() for name, run in runs.items()}  # warm-up, and vLLM starts
        return {name: tokens[name] / taken for name, taken in median_seconds(runs, rounds, time.process_time).items()}


def starting() -> dict[str, float]:
    """Seconds to a first token with the tiny model, after that model is loaded."""
    found = {}
    for name in ("TransformersEngine", "VllmEngine"):
        module = "transformers_engine" if name.startswith("T") else "vllm_engine"
        code = _START.format(module=module, name=name)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found[name] = float(done.stdout.split()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in SIZES if options.size == "all" else [options.size]:
        speed = measure(size, options.rows, options.new_tokens, options.rounds)
        ratios = {f"{a} / {b}": speed[a] / speed[b] for a, b in RATIOS}
        if options.json:
            print(json.dumps({"size": size, "tokens_per_second": speed, "ratios": ratios}))
            continue
        print(f"{size}, {options.rows} requests, {options.new_tokens} new tokens, {options.threads} thread(s)")
        for name, tokens in speed.items():
            print(f"  {name:40}{tokens:10,.0f} tok/s")
        for name, ratio in ratios.items():
            print(f"  {name:80}{ratio:6.2f}x")
    start = starting()
    print(json.dumps({"starting": start}) if options.json else f"seconds from a loaded model to a first token: {start}")


if __name__ == "__main__":
    main()
