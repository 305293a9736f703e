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
    assert scores == ["joint", "0", "4", "100.0 [51.0, 100.0]", "+75.0 [-10.7, 95.4]", "done"]
    assert tests == ["joint", "McNemar mid-p", "0.125", "0.250", "0.125", "g +0.50", "99.8"]
    assert costs == ["joint", "12.3M", "2.5e+15", "61", "60", "3e+07", "2.0"]
    assert crossed == ["joint", "25.0", "25.0", "25.0", "100.0", "+75.0 [-200.0, 125.0]"]
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


def test_latex_has_the_best_score_bold_and_stars_raised(tmp_path: Path) -> None:
    names = [f"e{i}" for i in range(40)]
    write_run(tmp_path, "zero-shot", dict.fromkeys(names, 0.0))
    write_run(tmp_path, "joint", dict.fromkeys(names, 1.0))
    text = as_latex(compare([tmp_path]))
    rows = [line for line in text.splitlines() if line.startswith(("zero-shot &", "joint &"))]
    assert rows[0].startswith("zero-shot & 0 & 40 & 0.0 [0.0, 8.8] &")
    assert rows[1].startswith(r"joint & 0 & 40 & \textbf{100.0} [91.2, 100.0] & +100.0 [")
    assert "]$^{*}$ & done" in rows[1]
    assert "Bold: the highest score" in text
    assert r"\textbf" not in as_latex(compare([next(tmp_path.glob("*joint*"))]))


def test_escapes_of_single_characters() -> None:
    assert latex("a_b & 5%") == r"a\_b \& 5\%"
    assert latex("[x]") == "{}[x]"  # else \\ before it would read it as its argument
    assert markdown("a|b_c<d>`") == r"a\|b\_c&lt;d&gt;\`"


TESTED = [
    "", "_low", "_high", "_bootstrap_low", "_bootstrap_high", "_excludes_zero", "_test", "_p", "_p_exact", "_p_holm",
    "_significant", "_detectable", "_effect", "_effect_name", "_sentence",
]  # fmt: skip
ROW = [
    "task", "model", "engine", "strategy", "status", "runs", "seeds", "n", "metric",
    "score", "score_low", "score_high", "score_bootstrap_low", "score_bootstrap_high",
    "score_least_run", "score_most_run", "standard_error",
    "seed_sd", "example_se", "engine_sd", "baseline", *(f"difference{end}" for end in TESTED),
    "cell_seed_base", "cell_tuned_base", "cell_seed_tuned", "cell_tuned_tuned",
    "cell_seed_base_seed", "cell_tuned_base_seed", "cell_seed_tuned_seed", "cell_tuned_tuned_seed",
    "cell_seed_base_tuned", "cell_tuned_base_tuned", "cell_seed_tuned_tuned", "cell_tuned_tuned_tuned",
    *(f"interaction{end}" for end in TESTED),
    "tuning_tokens", "tuning_flops", "tuning_seconds", "measuring_tokens", "measuring_flops", "measuring_seconds",
    "budget_used", "peak_memory_bytes", "serving_prompts_flops", "serving_prompts_seconds", "serving_adapters_flops",
    "serving_adapters_seconds", "serving_answers_flops", "serving_answers_seconds", "serving_flops", "serving_seconds",
    "correct", "wrong", "truncated", "errored", "check_truncated", "check_unread", "check_near_duplicates",
    "check_prompts_copying_val", "check_prompts_copying_test",
    "check_dead_adapters", "check_times_measured", "check_grades_differ", "mixed",
    "run_names", "reason",
]  # fmt: skip
EFFECT = ["strategy", "levers", *(f"effect{end}" for end in TESTED)]
OVERALL = [
    "model", "engine", "baseline", "strategy", "tasks", "mixed", "score", "score_low", "score_high",
    *(f"difference{end}" for end in TESTED), "relative_gain", "relative_gain_low", "relative_gain_high",
]  # fmt: skip


@pytest.fixture
def studies(tmp_path: Path) -> list[Group]:
    """Two tasks, three seeds of joint with a 2x2, one of lora-only."""
    names = [f"e{i}" for i in range(40)]
    for task in ("gsm8k", "math"):
        base = {name: float(i < 8) for i, name in enumerate(names)}
        write_run(tmp_path, "zero-shot", base, task=task)
        write_run(tmp_path, "lora-only", {**base, "e8": 1.0}, task=task)
        for seed in range(3):
            tuned = {name: float((i * 7 + seed) % 10 < 7 or i < 8 + 2 * seed) for i, name in enumerate(names)}
            cells = dict.fromkeys(("seed/base", "tuned/base", "seed/tuned"), base)
            write_run(tmp_path, "joint", tuned, task=task, seed=seed, cells=cells)
    return compare([tmp_path])


def test_the_fields_of_json_and_csv_are_pinned_and_documented(studies: list[Group]) -> None:
    value = json.loads(as_json(studies))
    assert list(value) == ["groups", "overall"]
    assert list(value["groups"][0]) == [
        "task", "model", "engine", "metric", "baseline", "notes", "mixed", "rows", "curves", "effects", "break_even",
    ]  # fmt: skip
    assert all(list(row) == ROW for group in value["groups"] for row in group["rows"])
    assert all(list(row) == OVERALL for row in value["overall"])
    assert as_csv(studies).splitlines()[0].split(",") == ROW
    documented = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
    section = documented.partition("\n## compare\n")[2].partition("\n## ")[0]
    for name in (*ROW, *OVERALL, *TESTED[1:]):
        assert f"`{name}`" in section or name.startswith(("difference_", "interaction_")), name
    for name in EFFECT[:3]:
        assert f'"{name}"' in section, name


def test_the_fields_of_an_effect_of_levers_are_pinned(tmp_path: Path) -> None:
    grid = {cell: dict.fromkeys("abc", 0.0) for cell in ("seed/base/seed", "tuned/base/seed", "seed/base/tuned")}
    write_run(tmp_path, "inference-aware", {"a": 1.0, "b": 0.0, "c": 1.0}, cells=grid)
    (group,) = json.loads(as_json(compare([tmp_path])))["groups"]
    assert [list(effect) for effect in group["effects"]] == [EFFECT] * 3
    (row,) = group["rows"]
    assert row["cell_tuned_base_tuned"] == 0.666666666667
    assert row["cell_tuned_tuned_tuned"] is row["cell_tuned_tuned"] is row["interaction"] is None


def test_types_of_a_full_row(studies: list[Group]) -> None:
    row = {r["strategy"]: r for r in json.loads(as_json(studies))["groups"][0]["rows"]}["joint"]
    assert row["seeds"] == [0, 1, 2]
    for name in ("difference", "interaction"):
        assert isinstance(row[f"{name}_significant"], bool)
        assert isinstance(row[f"{name}_sentence"], str)
        for end in ("", "_low", "_high", "_p", "_p_holm", "_detectable", "_effect"):
            assert isinstance(row[name + end], float)
        assert (row[f"{name}_test"], row[f"{name}_p_exact"], row[f"{name}_effect_name"]) == ("t", None, "d_z")
    assert isinstance(row["seed_sd"], float)
    assert row["engine_sd"] is None


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_says_it_in_words(studies: list[Group], format: str) -> None:
    text = rendered(studies, format)
    if format == "latex":
        text = text.replace(r"\%", "%")
    assert "joint is better than zero-shot by 5" in text
    assert "lora-only against zero-shot: no difference shown (+2.5 points, 95% " in text
    assert "this design could have seen" in text
    assert "One seed: other seeds are not covered." in text
    assert "joint: prompt and weights together gain" in text
    if format != "csv":  # which has rows of tasks only
        assert "Mean of 2 tasks: joint is better than zero-shot by" in text
        assert "joint against zero-shot: relative gain +" in text


def test_the_legend_says_which_p_decides_and_what_intervals_cover(studies: list[Group]) -> None:
    text = " ".join(rendered(studies, "table").split())
    assert "each for its number alone" in text
    assert "*: p below 0.05 after Holm's correction" in text
    assert "with three or more seeds, other seeds" in text


def test_json_and_csv_carry_twelve_digits(tmp_path: Path) -> None:
    """What comes after them in a quantile or a logarithm is not the same on every machine."""
    write_run(tmp_path, "zero-shot", {"a": 1.0, "b": 0.0, "c": 0.0})
    (row,) = json.loads(as_json(compare([tmp_path])))["groups"][0]["rows"]
    assert row["score"] == 0.333333333333
    (line,) = csv.DictReader(io.StringIO(as_csv(compare([tmp_path]))))
    assert line["score_high"] == str(row["score_high"]) == f"{row['score_high']:.12g}"
