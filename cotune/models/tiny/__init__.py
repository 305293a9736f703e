"""The offline models shipped with cotune: real Qwen2 checkpoints, small enough for one core (docs/tiny-model.md)."""

from __future__ import annotations

from pathlib import Path

TINY_MODELS: dict[str, Path] = {name: Path(__file__).parent / name for name in ("tiny", "tiny-4m")}
