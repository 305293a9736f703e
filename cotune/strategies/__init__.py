"""The tables of strategies and of what they leave behind, imported on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.errors import UsageError

if TYPE_CHECKING:
    from cotune.models.base import BaseModel
    from cotune.values import Tuned

STRATEGIES = {
    "zero-shot": "cotune.strategies.zero_shot:ZeroShot",
    "prompt-only": "cotune.strategies.prompt_only:PromptOnly",
    "lora-only": "cotune.strategies.lora_only:LoraOnly",
    "sequential": "cotune.strategies.sequential:Sequential",
    "joint": "cotune.strategies.joint:Joint",
    "plan-only": "cotune.strategies.plan_only:PlanOnly",
    "inference-aware": "cotune.strategies.inference_aware:InferenceAware",
}


def load_tuned(folder: Path, generator: BaseModel) -> Tuned:
    """What `Tuned.save` wrote. `generator` is MetaTuner's G, unused by a fixed prompt and adapter."""
    try:
        content = json.loads((folder / "tuned.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{folder} holds no tuned prompt or adapter ({error}). Give the folder of a finished run."
        ) from None
    if content["kind"] == "fixed":
        from cotune.strategies.base import Fixed

        return Fixed.load(folder, content)
    from cotune.strategies.joint import MetaTuned

    return MetaTuned.load(folder, content, generator)
