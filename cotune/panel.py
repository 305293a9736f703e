"""Standings drawn with rich: one run as a panel, several as a table. Fits 80 x 24; ASCII where a terminal has no more.

Decides how things look and nothing else. Whatever comes from rows, models or configs is cleaned here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cotune.compare.escape import clean
from cotune.sparkline import ASCII_BARS, BARS, sparkline
from cotune.standing import Series, Standing

PROMPT_LINES = 2
_NAME = 8  # columns of a row's name
_EDGES = 4  # columns of the panel's sides


@dataclass(frozen=True)
class View:
    """One run at `now` (seconds since the epoch). `state` is running, interrupted or what its summary says.

    `final` is the score in [0, 1] of a run that is done.
    """

    title: str
    state: str
    standing: Standing
    now: float
    final: float | None = None


def title_of(config: Mapping[str, Any], name: str = "") -> str:
    """What a run is, in one line; `name` is that of its folder."""
    known = [str(config[key]) for key in ("strategy", "task", "model") if config.get(key) is not None]
    if "seed" in config:
        known.append(f"seed {config['seed']}")
    return " · ".join(filter(None, [name, *known])) or "cotune"


def duration(seconds: float) -> str:
    """`1:02` or `1:01:02`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class RunPanel:
    """A panel that asks for the present view whenever it is drawn."""

    def __init__(self, view: Callable[[], View]) -> None:
        self._view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view, ascii = self._view(), options.ascii_only
        width = min(options.max_width, 120)
        inner = width - _EDGES - _NAME
        lines = [_line(name, text) for name, text in _rows(view, inner, ascii, console)]
        elapsed = "" if view.standing.began is None else duration(max(0.0, view.now - view.standing.began))
        yield Panel(
            Text("\n", overflow=_overflow(ascii), no_wrap=True).join(lines),
            title=_text(view.title, ascii, width - _EDGES - 4, "bold"),
            title_align="left",
            subtitle=_text(" · ".join(filter(None, [view.state, elapsed])), ascii, width - _EDGES - 4),
            subtitle_align="right",
            width=width,
        )


class RunsTable:
    """Several runs, a line each."""

    def __init__(self, views: Callable[[], Sequence[View]]) -> None:
        self._views = views

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ascii = options.ascii_only
        table = Table(box=None, padding=(0, 2, 0, 0), width=options.max_width)
        table.add_column("run", ratio=1, no_wrap=True, overflow=_overflow(ascii))
        for name, width in (("now", 22), ("score", 13), ("eta", 7)):
            table.add_column(name, width=width, no_wrap=True, overflow=_overflow(ascii))
        views = self._views()
        room = max(1, options.max_height - 3)
        for view in views[:room]:
            standing, running = view.standing, view.state == "running"
            work = " ".join(filter(None, [standing.label or standing.stage or "starting", _count(standing)]))
            score = f"{standing.score.mean:.1%} of {standing.score.n}" if standing.score and running else ""
            table.add_row(
                _text(view.title, ascii),
                _text(work if running else view.state, ascii),
                score if view.final is None else f"{view.final:.1%}",
                _eta(view) if running else "",
            )
        yield table
        if len(views) > room:
            yield Text(f"and {len(views) - room} more")


def _overflow(ascii: bool) -> Literal["crop", "ellipsis"]:
    return "crop" if ascii else "ellipsis"  # rich's ellipsis is one character, and not ASCII


def _line(name: str, text: Text) -> Text:
    return Text.assemble((f"{name:<{_NAME}}", "dim"), text)


def _rows(view: View, width: int, ascii: bool, console: Console) -> list[tuple[str, Text]]:
    """A row is there from when it has something to say, and then stays: the panel grows a little and never jumps."""
    now = view.standing
    rows = [("stage", _text(now.stage or "starting", ascii, width)), ("work", _work(view, width, ascii))]
    if now.score:
        low, high = now.score.interval
        text = f"{100 * now.score.mean:.1f}% ({100 * low:.1f} to {100 * high:.1f}) on {now.score.n:,}"
        text += f" of {now.score.of:,} so far" if now.score.n < now.score.of else ""
        rows.append(("score", _text(f"{text}, {now.score.what}", ascii, width)))
    if now.best:
        rows.append(("best", Text(f"{100 * now.best.score:.1f}% on train with the prompt")))
        rows += [("", line) for line in _prompt(now.best.text, width, ascii, console)]
    for name, series, form in (
        ("loss", now.losses, "{:.4g}"),
        ("reward", now.rewards, "{:.1%}"),
        ("val", now.val_scores, "{:.1%}"),
    ):
        if series.values:
            rows.append((name, _series(series, form, width, ascii)))
    rows += [("budget", _budget(now, unit, limit, width, ascii)) for unit, limit in now.limits.items()]
    if not now.limits and "tokens" in now.spent:
        rows.append(("budget", Text(f"{now.spent['tokens']:,.0f} tokens, no limit")))
    if now.warnings:
        more = f"({now.warned} notes) " if now.warned > 1 else ""
        rows.append(("note", _text(more + now.warnings[-1], ascii, width, "yellow")))
    return rows


def _work(view: View, width: int, ascii: bool) -> Text:
    """`search 34/160 [bar] 0:39 left`, in columns that do not move."""
    now = view.standing
    if now.done is None or now.of is None:
        return Text("-")
    label = _text(now.label, ascii, 12)
    label.pad_right(max(0, 12 - label.cell_len))
    digits = max(9, 2 * len(f"{now.of}") + 1)
    left = _eta(view)
    ending = f"  {left} left" if left else "  done" if now.done == now.of else ""
    bar = _bar(now.done / now.of if now.of else 1.0, width - 12 - digits - 2 - 14, ascii)
    return Text.assemble(label, f" {_count(now):>{digits}} ", bar, ending)


def _count(now: Standing) -> str:
    return "" if now.done is None else f"{now.done}/{now.of}"


def _eta(view: View) -> str:
    left = view.standing.eta(view.now)
    unknown = left is None or view.standing.done == view.standing.of
    return "" if unknown or left is None else duration(left)


def _bar(share: float, width: int, ascii: bool) -> Text:
    width = max(4, width)
    full = round(min(1.0, max(0.0, share)) * width)
    on, off = ("#", "-") if ascii else ("━", "─")
    return Text.assemble((on * full, "green"), (off * (width - full), "dim"))


def _series(series: Series, form: str, width: int, ascii: bool) -> Text:
    values = series.values
    ends = f" {form.format(values[-1])}"
    if len(values) > 1:
        ends = f" {form.format(values[0])} -> {form.format(values[-1])}, {series.count:,}"
    room = max(8, width - len(ends) - 1)
    return Text.assemble((sparkline(values, min(room, 48), ASCII_BARS if ascii else BARS), "cyan"), ends)


def _budget(now: Standing, unit: str, limit: float, width: int, ascii: bool) -> Text:
    used = now.spent.get(unit)
    form = "{:.3g}" if unit == "flops" else "{:,.0f}"
    known = "?" if used is None else form.format(used)
    share = (used or 0.0) / limit if limit else 1.0
    text = f" {share:.0%}, {known} of {form.format(limit)} {unit}"
    return Text.assemble(_bar(share, min(24, width - len(text) - 1), ascii), text)


def _prompt(prompt: str, width: int, ascii: bool, console: Console) -> list[Text]:
    """`PROMPT_LINES` lines of it, so that a longer prompt moves nothing."""
    words = _text(" ".join(prompt.split()), ascii)  # line breaks say little here, and would be shown as escapes
    lines = list(words.wrap(console, max(1, width), overflow="fold", no_wrap=False))
    if len(lines) > PROMPT_LINES:
        lines = lines[:PROMPT_LINES]
        more = "..." if ascii else "…"
        lines[-1].rstrip()
        lines[-1].truncate(max(1, width - len(more)), overflow="crop")
        lines[-1].append(more)
    return lines + [Text()] * (PROMPT_LINES - len(lines))


def _text(text: str, ascii: bool, width: int | None = None, style: str = "") -> Text:
    """Foreign text, harmless and on one line; cut to `width` columns when given."""
    line = clean(text)
    if ascii:
        line = line.replace("·", "-").encode("ascii", "backslashreplace").decode("ascii")
    done = Text(line, style=style, overflow=_overflow(ascii), no_wrap=True)
    if width is not None and done.cell_len > width:
        more = "..." if ascii else "…"
        done.truncate(max(1, width - len(more)), overflow="crop")
        done.append(more)
    return done
