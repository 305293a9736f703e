"""The plots of a comparison as SVG: paired differences, quality against cost, learning curves, 2x2.

Every plot is drawn for a width in pixels, so that letters keep their size on a narrow screen. Colours are classes of
plots.css. Knows numbers and labels; nothing of run folders or of the page around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise

from cotune.compare.curves import Curve, Points
from cotune.compare.escape import clean, short
from cotune.compare.markup import Html, tag
from cotune.compare.render import count, estimate
from cotune.compare.runs import CELLS
from cotune.compare.stats import Estimate, Finding

WIDE, NARROW = 540, 340  # pixels
_LETTER = 8.2  # width of a bold letter in pixels, generously
_KNOWN = ("zero-shot", "prompt-only", "lora-only", "sequential", "joint")


@dataclass(frozen=True)
class Series:
    """What is drawn of one row: its label, and the strategy that gives it colour and marker."""

    label: str
    strategy: str

    @property
    def css(self) -> str:
        return self.strategy if self.strategy in _KNOWN else "other"


@dataclass(frozen=True)
class Plot:
    """`draw(width)` makes the SVG; `title` and `about` describe it to who cannot see it."""

    name: str
    title: str
    about: str
    draw: Callable[[float], Html]

    def svg(self, width: int) -> Html:
        """For a page that has plots.css."""
        return self.draw(width)

    def alone(self) -> str:
        """A file of its own, with its colours."""
        drawn = self.draw(WIDE)
        head, rest = drawn.split(">", 1)
        # Nothing but our own style sheet goes in between; it holds no "]]>".
        return f'{head} xmlns="http://www.w3.org/2000/svg"><style><![CDATA[\n{style()}]]></style>{rest}\n'


def style() -> str:
    return files("cotune.compare").joinpath("plots.css").read_text(encoding="utf-8")


def forest(name: str, baseline: str, items: Sequence[tuple[Series, Finding]]) -> Plot:
    """Every difference to the baseline with its interval, in points, and the line at 0."""
    ends = [x for _, t in items for x in (t.estimate.low, t.estimate.high, t.estimate.mean) if x is not None]
    title = f"Differences to {baseline}, in points"
    told = "; ".join(f"{s.label} {_difference(t)}" for s, t in items)

    def draw(width: float) -> Html:
        low, high = _padded(min([0.0, *ends]), max([0.0, *ends]))
        left, right, top, step = 8.0, width - 8, 8.0, 46.0
        bottom = top + step * len(items) + 4

        def x(value: float) -> float:
            return left + (value - low) / (high - low) * (right - left)

        parts = [_line(x(t), top, x(t), bottom, "grid") for t in _ticks(low, high, width / 60)]
        parts += [_line(x(0), top, x(0), bottom, "zero")]
        parts += [
            _text(x(t), bottom + 17, f"{100 * t:+z.0f}" if round(t, 9) else "0", "soft middle")
            for t in _ticks(low, high, width / 60)
        ]
        axis = f"points more than {baseline} (95% interval)"
        parts.append(_text(width / 2, bottom + 38, _fit(axis, width), "soft middle"))
        for i, (series, tested) in enumerate(items):
            y, e, number = top + step * i, tested.estimate, _difference(tested)
            room = width - 24 - len(number) * _LETTER
            line = y + 31
            row = [_text(left, y + 17, _fit(series.label, room), "own name"), _text(right, y + 17, number, "end value")]
            if e.low is not None and e.high is not None:
                row.append(_line(x(e.low), line, x(e.high), line, "bar"))
            parts.append(tag("g", row, _marker(series, x(e.mean), line), class_=series.css))
        return _svg(width, bottom + 46, title, told, parts)

    return Plot(f"{name}-differences", title, told, draw)


def frontier(name: str, metric: str, items: Sequence[tuple[Series, float, Estimate]]) -> Plot:
    """Score against tuning tokens, with the line through the rows that none beats at the same cost or less."""
    front = pareto([(cost, e.mean) for _, cost, e in items])
    names = ", ".join(items[i][0].label for i in front)
    title = f"{metric} against tuning cost"
    said = (f"{s.label} {estimate(e, '.1f')}% for {count(c)} tokens" for s, c, e in items)
    told = f"{'; '.join(said)}. Pareto front: {names}."
    # Many or long labels would cover the points: numbers then, and what they stand for below.
    numbered = len(items) > 6 or max(len(s.label) for s, _, _ in items) > 20

    def draw(width: float) -> Html:
        left, right, top, bottom = 44.0, width - 14, 14.0, 264.0
        low, high = _padded(
            min(e.mean if e.low is None else e.low for _, _, e in items),
            max(e.mean if e.high is None else e.high for _, _, e in items),
        )
        high += (high - low) * 0.12  # room for labels over the points
        spent = [math.log10(cost) for _, cost, _ in items if cost > 0]
        free = any(cost <= 0 for _, cost, _ in items)
        first = left + (46 if free else 0)
        small, large = (min(spent) - 0.12, max(spent) + 0.12) if spent else (0.0, 1.0)

        def x(cost: float) -> float:
            return left + 20 if cost <= 0 else first + (math.log10(cost) - small) / (large - small) * (right - first)

        def y(value: float) -> float:
            return bottom - (value - low) / (high - low) * (bottom - top)

        parts: list[Html] = []
        for t in _ticks(low, high, 6):
            parts += [_line(left, y(t), right, y(t), "grid"), _text(left - 6, y(t) + 4, f"{100 * t:.0f}", "soft end")]
        if free:
            parts += [_text(left + 20, bottom + 18, "0", "soft middle")]
            parts += [_line(first - 3, bottom - 4, first - 9, bottom + 4, "axis")]
        for cost in _decades(small, large) if spent else ():
            parts += [_line(x(cost), bottom, x(cost), bottom + 4, "axis")]
            parts += [_text(x(cost), bottom + 18, count(cost), "soft middle")]
        parts.append(_line(left, bottom, right, bottom, "axis"))
        path = " ".join(f"{x(items[i][1]):.1f},{y(items[i][2].mean):.1f}" for i in front)
        parts.append(tag("polyline", class_="front", points=path))
        taken = [(x(c) - 7, y(e.mean) - 7, x(c) + 7, y(e.mean) + 7) for _, c, e in items]
        taken += [
            (x(c) - 1, y(e.high), x(c) + 1, y(e.low)) for _, c, e in items if e.low is not None and e.high is not None
        ]
        key: list[Html] = []
        for i, (series, cost, e) in enumerate(items):
            px, py = x(cost), y(e.mean)
            name = str(i + 1) if numbered else series.label
            if numbered:
                line = _fit(f"{name}  {series.label}", right - left)
                key.append(_text(left, bottom + 64 + 19 * i, line, f"own name {series.css}"))
            bar = [] if e.low is None or e.high is None else [_line(px, y(e.low), px, y(e.high), "bar")]
            lx, ly, side = _place(px, py, name, taken, (left, top, right, bottom))
            label = _text(lx, ly, _fit(name, right - left - 20), f"own name {side}".strip())
            far = [_line(px, py, lx + (-4 if side else 4), ly - 4, "leader")] if abs(ly - 4 - py) > 20 else []
            parts.append(tag("g", far, bar, _marker(series, px, py), label, class_=series.css))
        parts.append(_text(left, bottom + 40, "tuning tokens, mean per run (log scale; 0 apart)", "soft"))
        parts.append(_text(left - 36, top - 2, f"{metric} %", "soft"))
        return _svg(width, bottom + 48 + 19 * len(key), title, told, [*parts, *key], 10)

    return Plot(f"{name}-cost", title, told, draw)


def curves(name: str, rows: Sequence[tuple[Series, Sequence[Curve]]]) -> Plot:
    """A panel for each row, all with the same axes: for each seed its val scores, the best so far, and the search."""
    points = [p for _, some in rows for curve in some for p in (*curve.validated, *curve.searched)]
    title = "Score while tuning"
    told = "; ".join(f"{series.label}: {_told(some)}" for series, some in rows)

    def draw(width: float) -> Html:
        across = 2 if width >= WIDE else 1
        panel, tall = (width - 44 - 16 * (across - 1)) / across, 112.0
        low, high = _padded(min(y for _, y in points), max(y for _, y in points))
        most = max(x for x, _ in points) or 1.0
        parts: list[Html] = []
        for i, (series, some) in enumerate(rows):
            left, top = 40 + (i % across) * (panel + 16), 44 + (i // across) * (tall + 54)
            bottom = top + tall

            def x(value: float, left: float = left) -> float:
                return left + value / most * panel

            def y(value: float, bottom: float = bottom) -> float:
                return bottom - (value - low) / (high - low) * tall

            parts.append(_text(left, top - 9, _fit(series.label, panel), f"own name {series.css}"))
            for t in _ticks(low, high, 5):
                parts.append(_line(left, y(t), left + panel, y(t), "grid"))
                if i % across == 0:
                    parts.append(_text(left - 6, y(t) + 4, f"{100 * t:.0f}", "soft end"))
            parts.append(_line(left, bottom, left + panel, bottom, "axis"))
            steps = [t for t in _ticks(0, most, panel / 80) if t <= most * 0.97]
            parts += [_text(x(t), bottom + 17, count(t), "soft middle") for t in steps]

            def line(
                points: Points, css: str, x: Callable[[float], float] = x, y: Callable[[float], float] = y
            ) -> Html:
                return tag("polyline", class_=css, points=" ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points))

            for curve in some:
                if curve.searched:
                    parts.append(line(curve.searched, f"curve search {series.css}"))
                if curve.best:
                    parts.append(line(_steps(curve.best), f"curve {series.css}"))
                last = len(curve.validated) - 1
                for n, (px, py) in enumerate(curve.validated):
                    radius = 3.5 if n == last else 2.5
                    parts.append(tag("circle", class_=f"point {series.css}", cx=x(px), cy=y(py), r=radius))
        rows_down = -(-len(rows) // across)
        height = 44 + rows_down * (tall + 54)
        parts.append(_text(40, height - 8, "tuning tokens of one run", "soft"))
        return _svg(width, height, title, told, [*parts, _text(4, 12, "score %", "soft")])

    return Plot(f"{name}-curves", title, told, draw)


def two_by_two(name: str, rows: Sequence[tuple[Series, Mapping[str, float], Finding | None]]) -> Plot:
    """Seed and tuned prompt with base and tuned weights: four scores for each row, and their interaction."""
    title = "2x2 of prompt and weights, in percent"
    told = "; ".join(
        f"{s.label}: " + ", ".join(f"{cell} {100 * cells[cell]:.1f}" for cell in CELLS) for s, cells, _ in rows
    )
    least, most = _padded(*(f([v for _, cells, _ in rows for v in cells.values()]) for f in (min, max)))

    def draw(width: float) -> Html:
        across = 2 if len(rows) > 1 else 1
        gap = 24.0 if width >= WIDE else 12.0
        panel, tall = (width - gap * (across - 1)) / across, 214.0
        parts: list[Html] = []
        for i, (series, cells, tested) in enumerate(rows):
            left, top = (i % across) * (panel + gap), (i // across) * tall
            side = min(78.0, (panel - 54) / 2)
            inner = [_text(left, top + 16, _fit(series.label, panel), "own name")]
            for col, weights in enumerate(("base", "tuned")):
                middle = left + 54 + side * (col + 0.5)
                inner.append(_text(middle, top + 38, f"{weights} weights" if side > 95 else weights, "soft middle"))
                for line, prompt in enumerate(("seed", "tuned")):
                    value = cells[f"{prompt}/{weights}"]
                    cx, cy = left + 54 + side * col, top + 46 + 58 * line
                    shade = 0.08 + 0.34 * (value - least) / (most - least)
                    inner.append(
                        tag("rect", class_="cell", x=cx, y=cy, width=side - 3, height=55, fill_opacity=shade, rx=3)
                    )
                    inner.append(_text(middle - 1.5, cy + 33, f"{100 * value:.1f}", "big middle value"))
            for line, prompt in enumerate(("seed", "tuned")):
                inner.append(_text(left, top + 70 + 58 * line, prompt, "soft"))
                inner.append(_text(left, top + 85 + 58 * line, "prompt", "soft"))
            inner.append(_text(left, top + 182, "interaction, points" if tested else "", "soft"))
            inner.append(_text(left, top + 199, _difference(tested) if tested else "", "value"))
            parts.append(tag("g", inner, class_=series.css))
        return _svg(width, tall * -(-len(rows) // across), title, told, parts)

    return Plot(f"{name}-2x2", title, told, draw)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, score) that no other beats at the same cost or less, from cheap to dear."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


# ---- pieces ----


def _svg(width: float, height: float, title: str, told: str, parts: Sequence[Html], above: float = 0) -> Html:
    return tag(
        "svg",
        tag("title", short(title, 200)),
        tag("desc", short(told, 2000)),
        list(parts),
        viewBox=f"0 {-above:g} {width:g} {height + above:g}",
        width=width,
        height=height + above,
        role="img",
        aria_label=short(f"{title}. {told}", 2000),
    )


def _text(x: float, y: float, text: str, css: str) -> Html:
    return tag("text", text, x=round(x, 1), y=round(y, 1), class_=css)


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Html:
    return tag("line", class_=css, x1=round(x1, 1), y1=round(y1, 1), x2=round(x2, 1), y2=round(y2, 1))


def _marker(series: Series, x: float, y: float) -> Html:
    """A shape of its own for each strategy, for who cannot tell the colours."""
    if series.css == "zero-shot":
        return tag("circle", class_="open", cx=x, cy=y, r=5)
    if series.css == "prompt-only":
        return tag("circle", class_="point", cx=x, cy=y, r=6)
    if series.css == "lora-only":
        return tag("rect", class_="point", x=x - 5.5, y=y - 5.5, width=11, height=11)
    if series.css == "sequential":
        return tag("path", class_="point", d=f"M{x:.1f} {y - 7:.1f}l7 12h-14z")
    if series.css == "joint":
        return tag("path", class_="point", d=f"M{x:.1f} {y - 7.5:.1f}l7.5 7.5l-7.5 7.5l-7.5 -7.5z")
    return tag("rect", class_="open", x=x - 4.5, y=y - 4.5, width=9, height=9)


Box = tuple[float, float, float, float]


def _place(x: float, y: float, label: str, taken: list[Box], inside: Box) -> tuple[float, float, str]:
    """Where a label meets nothing that is drawn, as near as can be; its box is then taken."""
    wide = min(len(label) * _LETTER, inside[2] - inside[0] - 20)
    spots: list[tuple[Box, tuple[float, float, str]]] = []
    for down in (0, -16, 16, -30, 30, -46, 46, -62, 62, -80, 80):
        for ahead in (True, False):
            start = x + 11 if ahead else x - 11 - wide
            box = (start, y + down - 8, start + wide, y + down + 8)
            spots.append((box, (x + 11, y + down + 4, "") if ahead else (x - 11, y + down + 4, "end")))
    fit = [s for s in spots if s[0][0] >= inside[0] and s[0][2] <= inside[2] and inside[1] <= s[0][1] < inside[3] - 12]
    fit = fit or spots
    box, spot = next((s for s in fit if not any(_overlap(s[0], other) for other in taken)), fit[0])
    taken.append(box)
    return spot


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _fit(text: str, room: float) -> str:
    return short(text, max(4, int(room / _LETTER)))


def _difference(tested: Finding) -> str:
    return estimate(tested.estimate, "+z.1f") + ("*" if tested.significant else "")


def _told(some: Sequence[Curve]) -> str:
    lines = [points for curve in some for points in (curve.searched, curve.best) if points]
    return ", ".join(f"{100 * points[0][1]:.0f} to {100 * points[-1][1]:.0f}" for points in lines)


def _steps(points: Points) -> Points:
    """With a corner before each change: a score holds until the next one is known."""
    corners = [((x, before), (x, y)) for (_, before), (x, y) in pairwise(points)]
    return (points[0], *(point for corner in corners for point in corner))


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = (high - low) * 0.06 or 0.05
    return low - pad, high + pad


def _ticks(low: float, high: float, most: float) -> list[float]:
    """Round numbers from `low` to `high`, about `most` of them."""
    rough = (high - low) / max(2.0, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _decades(small: float, large: float) -> list[float]:
    """Tick values between two powers of ten: decades alone when there are many, else 1, 2, 5."""
    steps = (1,) if large - small > 3 else (1, 2, 3, 5) if large - small > 0.6 else (1, 1.5, 2, 3, 4, 5, 7)
    every = [m * 10.0**p for p in range(math.floor(small), math.ceil(large) + 1) for m in steps]
    return [v for v in every if small <= math.log10(v) <= large]


def file_name(text: str) -> str:
    """Letters, digits, dots and dashes, for the name of a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", clean(text)).strip("-.") or "plot"
