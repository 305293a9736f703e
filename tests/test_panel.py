"""How a run is drawn: it fits, it does not move, and nothing from data reaches the terminal."""

from __future__ import annotations

from io import BytesIO, TextIOWrapper
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from cotune.panel import RunPanel, RunsTable, View, duration, title_of
from cotune.sparkline import ASCII_BARS, BARS, sparkline
from cotune.standing import Standing, folded, standing

CONFIG = {"strategy": "joint", "task": "micro-gsm8k", "model": "tiny", "seed": 0, "budget": {"tokens": 1000}}
EVIL = "\x1b[2J[red]\u202e\x07 " + "много 漢字 " * 40


def drawn(picture: RenderableType, width: int = 80, encoding: str = "utf-8") -> list[str]:
    stream = TextIOWrapper(BytesIO(), encoding=encoding)
    Console(file=stream, width=width, height=24, highlight=False, emoji=False).print(picture)
    stream.seek(0)
    return stream.read().splitlines()


def full(text: str = "Think.\nThen answer.", done: int = 30) -> Standing:
    rows: list[dict[str, Any]] = [
        {"kind": "step", "time": 0.0, "stage": text, "loss": 2.0},
        {"kind": "step", "time": 1.0, "stage": text, "loss": 1.0},
        {"kind": "candidate", "time": 2.0, "stage": text, "text": text, "score": 0.5},
        {"kind": "finalist", "time": 3.0, "stage": text, "val_score": 0.25},
        {"kind": "warning", "time": 4.0, "stage": text, "message": text},
        {"kind": "progress", "time": 5.0, "stage": text, "label": text, "done": 10, "of": 40, "score": 0.5},
        {"kind": "progress", "time": 7.0, "stage": text, "label": text, "done": done, "of": 40, "score": 0.5,
         "tuning_tokens": 250},
    ]  # fmt: skip
    now = standing(CONFIG)
    for row in rows:
        now = folded(now, row)
    return now


def panel(now: Standing, title: str = "t", state: str = "running") -> RunPanel:
    return RunPanel(lambda: View(title, state, now, 7.0))


def test_everything_worth_knowing_is_there() -> None:
    text = "\n".join(drawn(panel(full(), title_of(CONFIG))))
    for part in (
        "joint · micro-gsm8k · tiny · seed 0",
        "30/40",
        "0:01 left",
        "score   50.0% (33.2 to 66.8) on 30 of 40 so far",
        "best    50.0% on train with the prompt",
        "Think. Then answer.",
        "loss    █▁ 2 -> 1, 2",
        "reward  ▁ 50.0%",
        "val     ▁ 25.0%",
        "25%, 250 of 1,000 tokens",
        "note    Think.\\nThen answer.",
        "running · 0:07",
    ):
        assert part in text, text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_it_fits_and_shows_no_control_characters(width: int, encoding: str) -> None:
    for now in (full(), full(EVIL), Standing(), full("")):
        lines = drawn(panel(now, EVIL, EVIL), width, encoding)
        assert len(lines) <= 16
        assert all(cell_len(line) <= width for line in lines)
        assert all(line.isprintable() for line in lines)
        if encoding == "ascii":
            assert all(line.isascii() for line in lines)


def test_a_longer_prompt_or_another_count_moves_nothing() -> None:
    short, long = drawn(panel(full("Go."))), drawn(panel(full("Go on and on. " * 30)))
    assert len(short) == len(long)
    assert "…" in "".join(long)
    first, later = drawn(panel(full(done=11))), drawn(panel(full(done=40)))
    assert [line.index("/40") for line in (first[2], later[2])] == [first[2].index("/40")] * 2
    assert "done" in later[2]


def test_runs_are_a_line_each() -> None:
    views = [View(EVIL, "running", full(), 7.0), View("b", "interrupted", Standing(), 7.0)]
    lines = drawn(RunsTable(lambda: views))
    assert len(lines) == 3
    assert "50.0% of 30" in lines[1]
    assert "0:01" in lines[1]
    assert "interrupted" in lines[2]
    assert all(line.isprintable() for line in lines)
    many = drawn(RunsTable(lambda: [View(f"run {i}", "running", full(), 7.0) for i in range(50)]))
    assert len(many) <= 24
    assert many[-1].strip() == "and 29 more"


def test_durations_and_sparklines() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]
    assert sparkline([0, 1, 2], bars=ASCII_BARS) == "_=#"
    assert sparkline([1, 1], bars=BARS) == "▁▁"
    assert len(sparkline(list(range(500)), 20)) == 20
