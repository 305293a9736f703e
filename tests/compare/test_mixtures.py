"""--allow-mixed: runs that are not comparable are compared by their common examples, and every format says so."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from reference.run_folders import write_run
from typer.testing import CliRunner

from cotune.cli import app
from cotune.compare.render import as_csv, as_json, as_latex, as_markdown, as_table
from cotune.compare.report import as_html
from cotune.compare.tables import compare
from cotune.errors import UsageError
from cotune.output import drawn

BASE = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.0}
TUNED = {"d": 1.0, "c": 1.0, "b": 1.0, "e": 0.0}  # three in common, in another order


@pytest.fixture
def out(tmp_path: Path) -> Path:
    cells = {cell: dict.fromkeys(TUNED, 0.0) for cell in ("seed/base", "tuned/base", "seed/tuned")}
    write_run(tmp_path, "zero-shot", BASE, name="one")
    write_run(tmp_path, "joint", TUNED, name="two", cells=cells, comparable={"decoding_digest": "c9"})
    write_run(tmp_path, "lora-only", status="failed", reason="no", name="three")
    return tmp_path


def test_the_common_examples_are_compared(out: Path) -> None:
    (group,) = compare([out], allow_mixed=True)
    rows = {row.strategy: row for row in group.rows}
    score, difference = rows["joint"].score, rows["joint"].difference
    assert score is not None and difference is not None
    assert (score.n, score.mean) == (3, 1.0)
    assert rows["zero-shot"].score is not None and rows["zero-shot"].score.mean == pytest.approx(1 / 3)
    assert difference.estimate.mean == pytest.approx(2 / 3)
    assert rows["joint"].cells == {"seed/base": 0.0, "tuned/base": 0.0, "seed/tuned": 0.0, "tuned/tuned": 1.0}
    assert rows["lora-only"].reason == "no"
    assert group.mixed[-1] == "Compared by the 3 of 4 examples whose ids all of these runs have."
    assert group.mixed[1] == "Mixed runs, decoding differ. decoding c0: one; decoding c9: two."
    assert group.mixed[0].startswith("Mixed runs, test examples differ. test examples ")


def test_every_format_is_marked(out: Path) -> None:
    groups = compare([out], allow_mixed=True)
    for text in (
        drawn(as_table(groups), terminal=False),
        as_markdown(groups),
        as_latex(groups),
        as_html(groups),
    ):
        assert "MIXED RUNS" in text
        assert "Mixed runs, decoding differ." in text
    assert "these are mixed runs, which are not comparable" in as_html(groups)
    assert "--allow-mixed" in as_html(groups)
    (group,) = json.loads(as_json(groups))["groups"]
    assert group["mixed"] == list(groups[0].mixed)
    done = [row for row in group["rows"] if row["status"] == "done"]
    assert all("decoding differ" in row["mixed"] for row in group["rows"])
    assert [row["correct"] for row in done] == [None, None]  # counts of examples that are not all compared
    assert all("decoding differ" in row["mixed"] for row in csv.DictReader(io.StringIO(as_csv(groups))))


def test_a_mean_over_tasks_says_which_are_mixed(out: Path) -> None:
    write_run(out, "zero-shot", BASE, task="micro-math", name="four")
    write_run(out, "joint", BASE, task="micro-math", name="five")
    groups = compare([out], allow_mixed=True)
    assert "Mixed runs, see the tables of: micro-gsm8k." in as_markdown(groups).replace("\\", "")
    assert [over["mixed"] for over in json.loads(as_json(groups))["overall"]] == [["micro-gsm8k"]] * 2
    assert "mixed runs of micro-gsm8k" in as_html(groups)


def test_the_flag_changes_nothing_for_runs_that_are_comparable(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", BASE)
    write_run(tmp_path, "joint", BASE)
    assert as_json(compare([tmp_path], allow_mixed=True)) == as_json(compare([tmp_path]))
    assert "mixed" not in as_markdown(compare([tmp_path], allow_mixed=True)).lower()


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", BASE)
    write_run(tmp_path, "joint", {"x": 1.0})
    with pytest.raises(UsageError, match="no test example in common"):
        compare([tmp_path], allow_mixed=True)


def test_the_refusal_names_the_flag_and_the_flag_works(out: Path) -> None:
    refused = CliRunner().invoke(app, ["compare", str(out)])
    assert refused.exit_code == 2
    assert "--allow-mixed compares them all the same and marks the table" in refused.stderr
    allowed = CliRunner().invoke(app, ["compare", str(out), "--allow-mixed"])
    assert allowed.exit_code == 0
    assert "MIXED RUNS" in allowed.stdout
