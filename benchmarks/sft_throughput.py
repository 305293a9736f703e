"""A step of lora-only's supervised training against TRL's SFTTrainer with PEFT: same model, rows, batches, optimizer.

    python benchmarks/sft_throughput.py --size tiny --rounds 5 [--device cuda] [--json]

Random Qwen2 models, LoRA of rank 8 on all linear layers, prompts and completions of many lengths, AdamW with clipping.
Float32 on a CPU, else a bfloat16 model under float32 factors (TRL's: `bf16=True`). The two take turns in every round,
because a shared machine drifts; times are processor seconds, on a GPU those of the clock, the ratio is one of
medians. TRL is timed from the beginning of its first step to the end of its last (without setting up); ours is the
whole call. The loss of the very first step must agree.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from datasets import Dataset
from random_models import SHAPES, random_model
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from cotune.bench import Bench, MemoryStore
from cotune.engines.fake import FakeEngine
from cotune.ledger import Ledger
from cotune.methods.base import Policy
from cotune.models.base import BaseModel
from cotune.models.lora import init_static
from cotune.supervision import TokenRow, completion_loss
from cotune.training import Settings, Trainer
from cotune.values import Event

RANK, ALPHA, RATE = 8, 16.0, 1e-4


def rows_of(number: int, prompt: int, completion: int) -> list[TokenRow]:
    """Random tokens; lengths from half to one and a half times the means."""
    rng = random.Random(0)

    def ids(mean: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, 256) for _ in range(rng.randint(mean // 2, 3 * mean // 2)))

    return [TokenRow(ids(prompt), ids(completion), str(i)) for i in range(number)]


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def model(size: str, device: str) -> BaseModel:
    return random_model(size, device, torch.float32 if device == "cpu" else torch.bfloat16)


def ours(size: str, rows: list[TokenRow], batch: int, device: str) -> Callable[[], tuple[float, float]]:
    """() -> seconds of one pass over the rows, and the loss of its first step."""
    base = model(size, device)
    factors = init_static(base.model, "all-linear", RANK, torch.Generator().manual_seed(0))
    policy = Policy(base, factors, ALPHA / RANK, None, False)
    named = {f"{n}.{part}": p for n, pair in factors.items() for part, p in zip("ab", pair, strict=True)}
    batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    losses: list[float] = []

    def listen(event: Event) -> None:
        if event.kind == "step":
            losses.append(event.data["loss"])

    engine = FakeEngine(lambda *_: "")
    bench = Bench(base, engine, lambda _: engine, Ledger(), MemoryStore(), 0, listen)

    def loss(items: Any) -> Any:
        with policy.training():
            return completion_loss(base, items), {}

    def run() -> tuple[float, float]:
        settings = Settings(RATE, batch, batch, 0.0, 1.0, 10**9)
        weight = lambda row: len(row.completion)  # noqa: E731
        trainer = Trainer("lora", named, loss, weight, policy.cost, lambda r: r.example, settings, len(batches), bench)
        losses.clear()
        began = now(device)
        trainer.run(batches)
        return now(device) - began, losses[0]

    return run


class InOrder(SFTTrainer):
    """The rows in the order in which they are given, so that batches are the same."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    began = ended = first = 0.0

    def __init__(self, device: str) -> None:
        self.device = device

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.began = now(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = now(self.device)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.global_step == 1 and "loss" in logs:
            self.first = float(logs["loss"])


def trls(size: str, rows: list[TokenRow], batch: int, device: str) -> Callable[[], tuple[float, float]]:
    """The same of TRL's SFTTrainer on a PEFT model."""
    base = model(size, device)
    base.tokenizer.pad_token = base.tokenizer.decode([0])
    data = Dataset.from_list(
        [
            {
                "input_ids": [*row.context, *row.completion],
                "labels": [-100] * len(row.context) + list(row.completion),
            }
            for row in rows
        ]
    )
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=10**6,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        gradient_checkpointing=False,
        max_length=None,
        completion_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock(device)
    trainer = InOrder(
        base.model,
        config,
        train_dataset=data,
        processing_class=base.tokenizer,
        peft_config=lora,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)

    def run() -> tuple[float, float]:
        trainer.train()
        return clock.ended - clock.began, clock.first

    return run


def measure(
    size: str, batch: int, steps: int, prompt: int, completion: int, rounds: int, device: str
) -> dict[str, Any]:
    rows = rows_of(batch * steps, prompt, completion)
    runs = {"cotune": ours(size, rows, batch, device), "trl": trls(size, rows, batch, device)}
    first = {name: run()[1] for name, run in runs.items()}  # warm-up
    if abs(first["cotune"] - first["trl"]) > (1e-3 if device == "cpu" else 0.02):
        raise SystemExit(f"the losses of the first step differ: {first}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run()[0])
    tokens = sum(map(len, rows))
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "size": size,
        "batch": batch,
        "steps": steps,
        "tokens": tokens,
        "first_loss": first,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / taken for name, taken in median.items()},
        "times_as_fast_as_trl": median["trl"] / median["cotune"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--completion-tokens", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(o.size, o.batch, o.steps, o.prompt_tokens, o.completion_tokens, o.rounds, o.device)
    if o.json:
        print(json.dumps(result))
        return
    print(f"{o.size}, batch of {o.batch}, {o.steps} steps, {result['tokens']:,} tokens, {o.device}, {o.rounds} rounds")
    for name, speed in result["tokens_per_second"].items():
        print(f"  {name:8}{speed:10,.0f} tok/s   loss of the first step {result['first_loss'][name]:.5f}")
    print(f"  lora-only is {result['times_as_fast_as_trl']:.2f}x as fast as TRL (floor 1.0x)")


if __name__ == "__main__":
    main()
