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
_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")  # and after it


def write_peft(folder: Path, factors: Mapping[str, tuple[Tensor, ...]], scaling: float, base_model: str | None) -> None:
    """Module name -> (lora_a [R, I], lora_b [O, R]), of DoRA with magnitude [O] as the third, as PEFT would save them.

    Each file is replaced atomically, the config last: a folder with a config is complete. The config names every module
    in full, so that exactly these layers are adapted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{name}{ending}": tensor.detach().cpu().contiguous()
        for name, own in factors.items()
        for ending, tensor in zip(_ENDINGS, own, strict=False)  # the last one is DoRA's
    }
    first = next(iter(factors.values()))
    rank = first[0].shape[0]
    alpha = scaling * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "inference_mode": True,
        "target_modules": sorted(factors),
    } | ({"use_dora": True} if len(first) == 3 else {})
    partial = folder / f"{_WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / _WEIGHTS)
    partial = folder / f"{_CONFIG}.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / _CONFIG)


def read_peft(folder: Path, device: str | torch.device) -> tuple[dict[str, tuple[Tensor, ...]], float]:
    """(factors, scaling) of a plain LoRA or DoRA adapter.

    Raises UsageError for a folder without the two files, a damaged file, or a PEFT feature that is neither (ranks by
    layer, trained biases or whole modules).
    """
    try:
        config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        tensors = load_file(folder / _WEIGHTS, device=str(device))
    except FileNotFoundError as error:
        raise UsageError(f"{folder} is no PEFT adapter: it lacks {_WEIGHTS} or {_CONFIG}.") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"The adapter in {folder} is damaged ({error}); write it again.") from error
    extras = ("rank_pattern", "alpha_pattern", "modules_to_save")
    used = [key for key in extras if config.get(key)]
    if config.get("peft_type") != "LORA" or used or config.get("bias", "none") != "none":
        raise UsageError(
            f"The adapter in {folder} is not a plain LoRA ({', '.join(used) or config.get('peft_type')}); "
            "cotune reads and writes plain low-rank factors, and DoRA's magnitudes with them."
        )
    endings = _ENDINGS if config.get("use_dora") else _ENDINGS[:2]
    factors = {}
    for key in tensors:
        name, found, _ = key.removeprefix(_PREFIX).partition(_ENDINGS[0])
        keys = [f"{_PREFIX}{name}{ending}" for ending in endings]
        if found and all(key in tensors for key in keys):
            factors[name] = tuple(tensors[key] for key in keys)
    if len(endings) * len(factors) != len(tensors):
        raise UsageError(
            f"The adapter in {folder} holds tensors that are not the {len(endings)} of each linear layer that "
            f"{'DoRA' if config.get('use_dora') else 'LoRA'} has."
        )
    return factors, scaling
