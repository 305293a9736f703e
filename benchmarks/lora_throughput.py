"""Tokens per second of a batch in which every row has its own adapter, against the alternatives.

    python benchmarks/lora_throughput.py --size tiny --rounds 5 [--device cuda] [--json]

Random Qwen2 models, greedy, fixed lengths (nothing ends early), LoRA of rank 8 on all linear layers. The variants
take turns in every round, because a shared machine drifts; the figures are medians and ratios of medians. The loop over
examples is measured on a few of them and extrapolated. Ours decode with TransformersEngine, the others with
Hugging Face's `generate`; both give the same tokens, which is checked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import torch
from random_models import SHAPES, random_model
from torch import Tensor

from cotune.engines.base import Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine
from cotune.models.base import BaseModel
from cotune.models.lora import LoraFactors, target_linears

SIZES = ("tiny", "105m")  # of a bare call
RANK, SCALING = 8, 2.0


def random_adapter(base: BaseModel, seed: int) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(
        {
            name: (
                torch.randn(RANK, linear.in_features, generator=generator) / linear.in_features**0.5,
                torch.randn(linear.out_features, RANK, generator=generator) * 0.02,
            )
            for name, linear in target_linears(base.model, "all-linear").items()
        },
        SCALING,
    )


def with_peft(model: torch.nn.Module, adapters: list[LoraFactors]) -> peft.PeftModel:
    """The model with all adapters registered as "0", "1", ..."""
    with tempfile.TemporaryDirectory() as folder:
        for i, adapter in enumerate(adapters):
            adapter.save(Path(folder) / str(i))
        wrapped = peft.PeftModel.from_pretrained(model, Path(folder) / "0", adapter_name="0")
        for i in range(1, len(adapters)):
            wrapped.load_adapter(Path(folder) / str(i), adapter_name=str(i))
    wrapped.train(False)
    return wrapped


def variants(
    size: str, rows: int, prompt_tokens: int, new_tokens: int, loop_rows: int, device: str
) -> dict[str, Callable[[], Tensor]]:
    """Name -> function that generates and returns the new tokens [rows generated, new_tokens]."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    base, plain, other = (random_model(size, device, dtype) for _ in range(3))
    for stock in (plain, other):
        stock.model.set_attn_implementation("sdpa")  # as transformers and PEFT have it
    adapters = [random_adapter(base, i) for i in range(rows)]
    engine = TransformersEngine(base, batch_size=rows)
    prompts = [f"{i:03d} " + "x" * (prompt_tokens - 4) for i in range(rows)]
    ids = torch.tensor([base.encode(prompt) for prompt in prompts], device=device)
    sampling = Sampling(new_tokens)
    wrapped = with_peft(other.model, adapters)

    def ours(chosen: list[LoraFactors | None]) -> Tensor:
        requests = [Request(prompt, adapter) for prompt, adapter in zip(prompts, chosen, strict=True)]
        return torch.tensor([completions[0].token_ids for completions in engine.generate(requests, sampling)])

    def generate(model: torch.nn.Module, prompt_ids: Tensor = ids, **more: object) -> Tensor:
        with torch.inference_mode():
            out = model.generate(
                input_ids=prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                **more,
            )
        return out[:, prompt_ids.shape[1] :].cpu()  # which also waits for a GPU

    def one_shared_in_peft() -> Tensor:
        wrapped.set_adapter("0")
        return generate(wrapped)

    def loop() -> Tensor:
        rows_done = []
        for i in range(loop_rows):
            wrapped.set_adapter(str(i))
            rows_done.append(generate(wrapped, ids[i : i + 1]))
        return torch.cat(rows_done)

    return {
        "generated adapter per row": lambda: ours(list(adapters)),
        "one shared adapter": lambda: ours([adapters[0]] * rows),
        "no adapter": lambda: ours([None] * rows),
        "generate(), no adapter": lambda: generate(plain.model),
        "PEFT, one shared adapter": one_shared_in_peft,
        "PEFT, mixed batch": lambda: generate(wrapped, adapter_names=[str(i) for i in range(rows)]),
        "PEFT, loop over examples": loop,
    }


def median_seconds(
    runs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Of each variant, which take turns in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def measure(
    size: str, rows: int, prompt_tokens: int, new_tokens: int, rounds: int, loop_rows: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Name -> tokens per second (median) and how many times faster a generated adapter per row is."""
    runs = variants(size, rows, prompt_tokens, new_tokens, loop_rows, device)
    tokens = {name: run() for name, run in runs.items()}  # warm-up
    mine = tokens["generated adapter per row"]
    for name in ("PEFT, mixed batch", "PEFT, loop over examples"):
        same = (mine[: len(tokens[name])] == tokens[name]).all(dim=1)
        print(f"{size}: {int(same.sum())} of {len(same)} rows have the tokens of {name}", file=sys.stderr)
    speed = {name: tokens[name].numel() / taken for name, taken in median_seconds(runs, rounds).items()}
    own = speed["generated adapter per row"]
    return {name: {"tokens_per_second": s, "generated_is_times": own / s} for name, s in speed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop-rows", type=int, default=4, help="examples of the loop, whose speed is extrapolated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="float32 on a CPU, else bfloat16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in SIZES if options.size == "all" else [options.size]:
        result = measure(
            size,
            options.rows,
            options.prompt_tokens,
            options.new_tokens,
            options.rounds,
            options.loop_rows,
            options.device,
        )
        if options.json:
            about = {"size": size, "rows": options.rows, "device": options.device, "threads": options.threads}
            print(json.dumps(about | {"variants": result}))
            continue
        tokens = f"{options.prompt_tokens} + {options.new_tokens} tokens"
        print(f"{size}, batch of {options.rows}, {tokens}, {options.device}, {options.threads} thread(s)")
        for name, row in result.items():
            print(f"  {name:28}{row['tokens_per_second']:10,.0f} tok/s   {row['generated_is_times']:6.2f}x")
        print("  (x: how many times as fast a generated adapter per row is)")


if __name__ == "__main__":
    main()
