"""What one answer costs once tuning is over: writing its prompt, making its adapter, answering.

Means over the examples answered. Seconds are those of the work in batches on this machine, not the latency of a single
request. Knows nothing of how the work was done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cotune.ledger import Part, Spent


def per_example(parts: Mapping[Part, Spent], examples: int) -> dict[str, Any]:
    """The `serving` object of summary.json, without `parameters`: each part per example, and their sum.

    Examples with equal queries share what was generated for one of them. A part that did no work (generation, for a
    fixed prompt) is None.
    """

    def mean(part: Part, read: str, written: str | None = None) -> dict[str, float] | None:
        spent = parts.get(part)
        if spent is None:
            return None
        columns = {"read_tokens": read, "written_tokens": written, "flops": "flops", "seconds": "seconds"}
        return {name: getattr(spent, field) / examples for name, field in columns.items() if field}

    found = {
        "prompts": mean("prompts", "prompt_tokens", "generated_tokens"),
        "adapters": mean("adapters", "encoded_tokens"),
        "answers": mean("answers", "prompt_tokens", "generated_tokens"),
    }
    worked = [part for part in found.values() if part]
    return {
        "examples": examples,
        **found,
        "flops": sum(part["flops"] for part in worked),
        "seconds": sum(part["seconds"] for part in worked),
    }
