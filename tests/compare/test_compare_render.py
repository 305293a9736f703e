"""The five formats: the same numbers, everything foreign made harmless, the same bytes every time."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from reference.run_folders import write_run

from cotune.compare.escape import clean, latex, markdown, short
from cotune.compare.render import as_csv, as_json, as_latex, as_markdown, as_table
from cotune.compare.tables import Group, compare
from cotune.output import drawn

EVIL = "[red]x[/red] a|b & 50% $h_1^2$ {~} \\ \x1b[31m\r\n\u202e<script>"


@pytest.fixture
def groups(tmp_path: Path) -> list[Group]:
    write_run(tmp_path, "zero-shot", {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0})
    ones = dict.fromkeys("abcd", 1.0)
    cells = {cell: {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0} for cell in ("seed/base", "tuned/base", "seed/tuned")}
    write_run(tmp_path, "joint", ones, cells=cells, tuning={"tokens": 12_345_678, "flops": 2.5e15, "seconds": 61.0})
    write_run(tmp_path, "lora-only", status="failed", reason=EVIL, name="evil-run")
    return compare([tmp_path])


def rendered(groups: list[Group], format: str) -> str:
    if format == "table":
        return drawn(as_table(groups), terminal=False)
    return {"markdown": as_markdown, "latex": as_latex, "csv": as_csv, "json": as_json}[format](groups)


FORMATS = ("table", "markdown", "latex", "csv", "json")


@pytest.mark.parametrize("format", FORMATS)
def test_no_control_character_survives(groups: list[Group], format: str) -> None:
    text = rendered(groups, format)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    if format in ("table", "csv"):
        assert "[red]x[/red] a|b & 50% $h_1^2$ {~} \\ \\x1b[31m\\r\\n\\u202e<script>" in text


@pytest.mark.parametrize("format", FORMATS)
def test_same_bytes_again(groups: list[Group], format: str) -> None:
    assert rendered(groups, format) == rendered(groups, format)


def test_table_shows_numbers_rounded_and_missing_ones_empty(groups: list[Group]) -> None:
    lines = rendered(groups, "table").splitlines()
    scores, tests, costs, crossed = (re.split(r"\s{2,}", line) for line in lines if line.startswith("joint"))
    assert scores == ["joint", "0", "4", "100.0 [51.0, 100.0]", "+75.0 [-3.4, 94.6]", "done"]
    assert tests == ["joint", "McNemar mid-p", "0.125", "0.250", "0.125", "g +0.50", "83.0"]
    assert costs == ["joint", "12.3M", "2.5e+15", "61", "60", "3e+07", "2.0"]
    assert crossed == ["joint", "25.0", "25.0", "25.0", "100.0", "+75.0 [-200.0, 94.6]"]
    assert max(map(len, lines[:6])) <= 80  # scores fit a terminal
    failed = next(line for line in lines if line.startswith("lora-only"))
    assert failed.split() == ["lora-only", "0", "failed"]


def test_serving_is_a_table_of_its_own_once_runs_report_it(groups: list[Group], tmp_path: Path) -> None:
    assert "serving" not in rendered(groups, "table")
    answers = {"read_tokens": 90.5, "written_tokens": 1200.0, "flops": 3.14e8, "seconds": 0.0123}
    serving = {"prompts": None, "adapters": None, "answers": answers, "flops": 3.14e8, "seconds": 0.0123}
    write_run(tmp_path / "new", "zero-shot", {"a": 0.0, "b": 1.0}, serving=serving)
    lines = rendered(compare([tmp_path / "new"]), "table").splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("· serving"))
    shown = re.split(r"\s{2,}", lines[start + 3])
    assert shown == ["zero-shot", "0.012", "3.1e+08", "90", "1.2k"]
    assert max(map(len, lines[start : start + 4])) <= 80


def test_several_seeds_show_their_range_and_several_tasks_their_mean(tmp_path: Path) -> None:
    for task in ("gsm8k", "math"):
        write_run(tmp_path, "zero-shot", {"a": 0.0, "b": 1.0}, task=task)
        for seed, a in enumerate((0.0, 1.0)):
            write_run(tmp_path, "joint", {"a": a, "b": 1.0}, task=task, seed=seed)
    lines = rendered(compare([tmp_path]), "table").splitlines()
    joint = [re.split(r"\s{2,}", line) for line in lines if line.startswith("joint")]
    assert joint[0] == ["joint", "0,1", "2", "75.0 [1.0, 99.9]", "50.0 to 100.0", "+25.0 [-100.0, 100.0]", "done"]
    (base, ours) = json.loads(rendered(compare([tmp_path]), "json"))["overall"]
    assert (base["relative_gain"], ours["relative_gain"], ours["tasks"]) == (None, 0.5, ["gsm8k", "math"])


def test_no_data_is_a_dash_and_not_a_zero(tmp_path: Path) -> None:
    write_run(tmp_path, "lora-only", status="no-data", reason="no accepted rollouts")
    lines = rendered(compare([tmp_path]), "table").splitlines()
    assert next(line for line in lines if line.startswith("lora-only")).split() == ["lora-only", "0", "-", "no-data"]
    assert "  no-data: lora-only, " in "\n".join(lines)


def test_csv_reads_back_exactly(groups: list[Group]) -> None:
    rows = {row["strategy"]: row for row in csv.DictReader(io.StringIO(as_csv(groups)))}
    assert float(rows["joint"]["score"]) == 1.0
    assert float(rows["joint"]["difference"]) == 0.75
    assert float(rows["joint"]["tuning_tokens"]) == 12_345_678
    assert rows["lora-only"]["score"] == ""
    assert rows["lora-only"]["status"] == "failed"


def test_json_has_null_for_missing_numbers(groups: list[Group]) -> None:
    group = json.loads(as_json(groups))["groups"][0]
    rows = {row["strategy"]: row for row in group["rows"]}
    assert rows["lora-only"]["score"] is None
    assert rows["lora-only"]["reason"] == EVIL  # JSON has its own escapes
    assert rows["joint"]["cell_tuned_tuned"] == 1.0
    assert rows["joint"]["interaction"] == 0.75


def test_markdown_rows_have_as_many_cells_as_the_header(groups: list[Group]) -> None:
    tables = [line for line in as_markdown(groups).splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    assert widths == [7] * 5 + [8] * 3 + [8] * 4 + [7] * 3
    assert "<script>" not in as_markdown(groups)


def test_latex_braces_and_columns_balance(groups: list[Group]) -> None:
    text = as_latex(groups)
    bare = re.sub(r"\\[{}\\&%$#_]", "", text)
    assert bare.count("{") == bare.count("}")
    for block in re.findall(r"\\midrule\n(.*?)\\bottomrule", text, re.S):
        counts = {len(re.findall(r"(?<!\\)&", line)) for line in block.splitlines()}
        assert len(counts) == 1


def test_table_wears_colour_on_a_terminal_only(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in drawn(as_table(groups), terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", drawn(as_table(groups), terminal=True))
    assert "\x1b[" not in drawn(as_table(groups), terminal=False)


def test_clean_keeps_what_people_write() -> None:
    assert clean("naïve 数学 x ≤ y") == "naïve 数学 x ≤ y"
    assert clean("a\nb\tc", newlines=True) == "a\nb\\tc"
    assert clean("\ud800\x9b") == "\\ud800\\x9b"
    assert short("abcdef", 4) == "abc…"
    assert short("a\nb", 10) == "a\\nb"


def test_escapes_of_single_characters() -> None:
    assert latex("a_b & 5%") == r"a\_b \& 5\%"
    assert latex("[x]") == "{}[x]"  # else \\ before it would read it as its argument
    assert markdown("a|b_c<d>`") == r"a\|b\_c&lt;d&gt;\`"
