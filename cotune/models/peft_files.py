"""PEFT's adapter folder: two files, safetensors and JSON. Knows names, tensors and a scaling, nothing of models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cotune.errors import UsageError

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # what PEFT puts before the module's own name


def write_peft(
    folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float, base_model: str | None
) -> None:
    """Module name -> (lora_a [R, I], lora_b [O, R]), as PEFT would save them.

    Each file is replaced atomically, the config last: a folder with a config is complete. The config names every module
    in full, so that exactly these layers are adapted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{name}.lora_{letter}.weight": tensor.detach().cpu().contiguous()
        for name, pair in factors.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    rank = next(iter(factors.values()))[0].shape[0]
    alpha = scaling * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "inference_mode": True,
        "target_modules": sorted(factors),
    }
    partial = folder / f"{_WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / _WEIGHTS)
    partial = folder / f"{_CONFIG}.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / _CONFIG)


def read_peft(folder: Path, device: str | torch.device) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """(factors, scaling) of a plain LoRA adapter.

    Raises UsageError for a folder without the two files, a damaged file, or a PEFT feature that is not a plain
    low-rank update (DoRA, ranks by layer, trained biases or whole modules).
    """
    try:
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        tensors = load_file(folder / _WEIGHTS, device=str(device))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is no PEFT adapter: it lacks {_WEIGHTS} or {_CONFIG}.") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"The adapter in {folder} is damaged ({error}); write it again.") from error
    extras = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
    used = [key for key in extras if config.get(key)]
    if config.get("peft_type") != "LORA" or used or config.get("bias", "none") != "none":
        raise UsageError(
            f"The adapter in {folder} is not a plain LoRA ({', '.join(used) or config.get('peft_type')}); "
            "cotune reads and writes plain low-rank factors only."
        )
    factors = {}
    for key in tensors:
        name, found, _ = key.removeprefix(_PREFIX).partition(".lora_A.weight")
        partner = f"{_PREFIX}{name}.lora_B.weight"
        if found and partner in tensors:
            factors[name] = (tensors[key], tensors[partner])
    if 2 * len(factors) != len(tensors):
        raise UsageError(f"The adapter in {folder} holds tensors that are not pairs of LoRA factors of linear layers.")
    return factors, scaling
