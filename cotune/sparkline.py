"""A series of numbers as one line of bars. Knows nothing of what the numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"  # for a terminal that cannot show the others
_WIDTH = 60


def sparkline(values: Sequence[float], width: int = _WIDTH, bars: str = BARS) -> str:
    """At most `width` bars from lowest to highest; longer curves are averaged in equal pieces, flat ones are low."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(values), max(values) - min(values)
    return "".join(bars[int((v - low) / span * (len(bars) - 1) + 0.5) if span else 0] for v in values)
