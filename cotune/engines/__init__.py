"""Engines by name, imported on demand."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from cotune.plugins import resolve

if TYPE_CHECKING:
    from cotune.config import RunConfig
    from cotune.engines.base import Engine
    from cotune.models.base import BaseModel

ENGINES: dict[str, str] = {
    "transformers": "cotune.engines.transformers_engine:TransformersEngine",
    "vllm": "cotune.engines.vllm_engine:VllmEngine",
}


def engine(base: BaseModel, config: RunConfig) -> Engine:
    """The engine that `config` names, for one model; "auto" is vllm where it is installed and there is a GPU.

    Raises UsageError for an unknown name, and for what the engine cannot serve.
    """
    chosen = resolve("engines", ENGINES, automatic() if config.engine == "auto" else config.engine)
    return chosen.from_config(base, config)  # type: ignore[no-any-return]


def automatic() -> str:
    """What "auto" stands for on this machine."""
    import torch

    return "vllm" if torch.cuda.is_available() and find_spec("vllm") else "transformers"
