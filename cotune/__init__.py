"""cotune: tune the prompt, the weights, both in turn, or both jointly; one honest comparison.

The names below are the public ones; everything else may change between minor versions. They are imported when first
used, so that `cotune --help` stays as quick as a bare command-line program.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cotune.config import RunConfig, resolve
    from cotune.errors import CotuneError, UsageError
    from cotune.values import (
        Completion,
        Conditioning,
        Demonstration,
        Evaluation,
        Example,
        Grade,
        Outcome,
        Prompt,
        Tuned,
    )

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "Conditioning",
    "CotuneError",
    "Demonstration",
    "Evaluation",
    "Example",
    "Grade",
    "Outcome",
    "Prompt",
    "RunConfig",
    "Tuned",
    "UsageError",
    "__version__",
    "resolve",
]

_HOMES = {"RunConfig": "config", "resolve": "config", "CotuneError": "errors", "UsageError": "errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cotune' has no attribute {name!r}")
    return getattr(import_module(f"cotune.{_HOMES.get(name, 'values')}"), name)
