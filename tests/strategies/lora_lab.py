"""lora-only at the smallest size, for the tests of what it trains and how."""

from __future__ import annotations

from typing import Any

from cotune.config import resolve
from cotune.strategies.base import Fixed
from cotune.strategies.lora_only import LoraOnly
from cotune.values import Prompt

START = Fixed(Prompt("Add the numbers."))
SMALL: dict[str, Any] = {
    "rank": 4,
    "alpha": 8.0,
    "target_modules": "all-linear",
    "epochs": 3,
    "learning_rate": 1e-2,
    "batch_size": 4,
    "micro_batch_size": 4,
    "checkpoint_every": 2,
}


def strategy(**changes: Any) -> LoraOnly:
    sequential = {"drop_demonstrations": changes.pop("drop_demonstrations", True)}
    runner = {"gradient_checkpointing": changes.pop("gradient_checkpointing", False)}
    sections = {
        "weights": SMALL | changes,
        "sequential": sequential,
        "prompt": {"choice_examples": 4},
        "runner": runner,
    }
    return LoraOnly.from_config(resolve({"strategy": "lora-only", "model": "x", "task": "micro-gsm8k"}, sections))


def half(rendered: str, adapter: str | None) -> float:
    return 0.5
