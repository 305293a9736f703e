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
    "openai": "cotune.engines.openai_engine:OpenAIEngine",
}


def engine(base: BaseModel, config: RunConfig) -> Engine:
    """The engine that `config` names, for one model; "auto" is vllm where it is installed and there is a GPU.

    With the openai engine a second model that is loaded here (a proposer) gets what "auto" stands for.
    Raises UsageError for an unknown name, and for what the engine cannot serve.
    """
    from cotune.models.black_box import BlackBox

    local = config.engine == "openai" and not isinstance(base, BlackBox)
    chosen = resolve("engines", ENGINES, automatic() if local or config.engine == "auto" else config.engine)
    return chosen.from_config(base, config)  # type: ignore[no-any-return]


def automatic() -> str:
    """What "auto" stands for on this machine."""
    import torch

    return "vllm" if torch.cuda.is_available() and find_spec("vllm") else "transformers"
