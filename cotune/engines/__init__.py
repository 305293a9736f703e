"""Engines by name, imported on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cotune.plugins import resolve

if TYPE_CHECKING:
    from cotune.engines.base import Engine
    from cotune.models.base import BaseModel

ENGINES: dict[str, str] = {"transformers": "cotune.engines.transformers_engine:TransformersEngine"}


def engine(name: str, base: BaseModel, **settings: Any) -> Engine:
    """The engine called `name` for one model; "auto" picks for the machine (today always transformers).

    Raises UsageError for an unknown name.
    """
    chosen = resolve("engines", ENGINES, "transformers" if name == "auto" else name)
    return chosen(base, **settings)  # type: ignore[no-any-return]
