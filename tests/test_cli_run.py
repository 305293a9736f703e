"""The commands that start a model, end to end on a random one: run, study, predict, regrade, data check, grade."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner, Result

from cotune.cli import app

SMALL = ["--limit-train", "4", "--limit-val", "4", "--limit-test", "4", "--set", "decoding.max_new_tokens=4"]


def cotune(*args: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], input=input)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def done(out: Path, random_model_dir: Path) -> Path:
    """A finished zero-shot run."""
    result = cotune("run", "--strategy", "zero-shot", "--model", random_model_dir, "--task", "micro-gsm8k",
                    "--out", out, "--name", "one", *SMALL)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "zero-shot on micro-gsm8k" in result.stdout
    assert "n = 4" in result.stdout
    assert "test" in result.stderr  # progress
    return out / "one"


def test_the_same_command_again_only_reports(done: Path, out: Path, random_model_dir: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in done.iterdir() if p.name not in ("config.json", ".lock")}
    result = cotune("run", "--strategy", "zero-shot", "--model", random_model_dir, "--task", "micro-gsm8k",
                    "--out", out, "--name", "one", *SMALL, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["folder"] == str(done)
    assert (summary["status"], summary["n"], sum(summary["outcomes"].values())) == ("done", 4, 4)
    assert {p.name: p.stat().st_mtime_ns for p in done.iterdir() if p.name not in ("config.json", ".lock")} == before


def test_another_config_under_the_same_name_is_refused(done: Path, out: Path, random_model_dir: Path) -> None:
    result = cotune("run", "--strategy", "zero-shot", "--model", random_model_dir, "--task", "micro-gsm8k",
                    "--out", out, "--name", "one", *SMALL, "--seed", "5")  # fmt: skip
    assert result.exit_code == 2
    assert "holds a run with another config" in result.stderr


def test_a_run_that_another_process_works_on_is_left_alone(out: Path, random_model_dir: Path) -> None:
    (out / "busy").mkdir()
    with FileLock(out / "busy" / ".lock"):
        second = cotune("run", "--strategy", "zero-shot", "--model", random_model_dir, "--task", "micro-gsm8k",
                        "--out", out, "--name", "busy", *SMALL)  # fmt: skip
    assert second.exit_code == 1
    assert second.stdout == ""
    assert "Another process is working on" in second.stderr
    assert [p.name for p in (out / "busy").iterdir()] == [".lock"]


def test_plan_runs_nothing(out: Path, random_model_dir: Path) -> None:
    args = ["run", "--strategy", "zero-shot", "--model", random_model_dir, "--task", "micro-gsm8k",
            "--out", out, "--name", "planned", *SMALL, "--plan"]  # fmt: skip
    text = cotune(*args)
    assert text.exit_code == 0, text.output
    assert "limit_test: 4" in text.stdout
    planned = json.loads(cotune(*args, "--json").stdout)
    assert planned["folder"] == str(out / "planned")
    assert planned["config"]["limit_test"] == 4
    assert not (out / "planned").exists()


def test_a_model_that_is_not_there_fails_the_run_with_a_sentence(out: Path) -> None:
    result = cotune("run", "--strategy", "zero-shot", "--model", "tinny", "--task", "micro-gsm8k", "--out", out,
                    "--name", "lost", *SMALL, "--quiet")  # fmt: skip
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: There is no model 'tinny'")
    assert result.stderr.count("\n") == 1


def test_compare_and_show_read_the_run(done: Path) -> None:
    (group,) = json.loads(cotune("compare", done, "--json").stdout)["groups"]
    (row,) = group["rows"]
    assert (row["status"], row["n"], row["score_low"] <= row["score"] <= row["score_high"]) == ("done", 4, True)
    shown = cotune("show", done)
    assert shown.exit_code == 0
    assert "one: done" in shown.stdout
    assert "first 4 test rows" in shown.stdout


def test_seeds_of_one_strategy_are_comparable(done: Path, out: Path, random_model_dir: Path) -> None:
    second = cotune("run", "--strategy", "zero-shot", "--model", random_model_dir, "--task", "micro-gsm8k",
                    "--out", out, "--name", "two", *SMALL, "--seed", "1")  # fmt: skip
    assert second.exit_code == 0, second.output
    (group,) = json.loads(cotune("compare", done, out / "two", "--json").stdout)["groups"]
    assert [(row["seeds"], row["n"]) for row in group["rows"]] == [([0, 1], 4)]


def test_regrade_finds_nothing_to_change_in_a_fresh_run(done: Path) -> None:
    before = {name: (done / name).read_bytes() for name in ("predictions.jsonl", "summary.json")}
    result = cotune("regrade", done, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["run"], report["rows"], report["changed"]) == ("one", 4, 0)
    assert {name: (done / name).read_bytes() for name in before} == before
    assert "changed: 0" in cotune("regrade", done).stdout


def test_predict_answers_new_rows(done: Path, tmp_path: Path) -> None:
    rows = [{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, {"question": "What is 1 + 1?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = cotune("predict", done, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 2
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["completion"] == second["completion"]
    assert "outcome" in first
    assert "outcome" not in second  # nothing to grade it with
    wrong = cotune("predict", done, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "no" / "out.jsonl")
    assert wrong.exit_code == 2
    assert "cannot be written" in wrong.stderr


def test_a_study_is_planned_before_it_is_run(tmp_path: Path, random_model_dir: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(
        f'model = "{random_model_dir}"\ntask = "micro-gsm8k"\nstrategy = ["zero-shot", "lora-only"]\nlimit_train = 4\n'
        "limit_val = 4\nlimit_test = 4\n[decoding]\nmax_new_tokens = 4\n"
    )
    planned = cotune("study", file, "--plan", "--out", tmp_path / "out", "--json")
    assert planned.exit_code == 0, planned.output
    report = json.loads(planned.stdout)
    zero, lora = report["runs"]
    assert (zero["status"], zero["tuning_tokens"], lora["strategy"]) == ("planned", 0, "lora-only")
    assert lora["tuning_flops"] > 0 and lora["measuring_tokens"] == zero["measuring_tokens"] > 0
    assert report["total"]["measuring_tokens"] == 2 * zero["measuring_tokens"]
    assert not (tmp_path / "out").exists()
    limited = json.loads(cotune("study", file, "--plan", "--budget", "tokens=5", "--json").stdout)["runs"]
    assert [row["tuning_tokens"] for row in limited] == [0, 5]
    (tmp_path / "y.toml").write_text("nonsense = 1\n")
    wrong = cotune("study", tmp_path / "y.toml", "--plan")
    assert wrong.exit_code == 2 and "failed" in wrong.stdout and "at most, all together" in wrong.stdout


def test_study_runs_what_is_not_finished(tmp_path: Path, random_model_dir: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text(
        f'model = "{random_model_dir}"\ntask = ["micro-gsm8k", "micro-cosmosqa"]\nstrategy = "zero-shot"\n'
        "limit_train = 4\nlimit_val = 4\nlimit_test = 2\n[decoding]\nmax_new_tokens = 2\n"
    )
    command = [sys.executable, "-m", "cotune", "study", str(file), "--out", str(tmp_path / "out"), "--json"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    rows = json.loads(first.stdout)["runs"]
    assert [(row["task"], row["status"], row["skipped"], row["n"]) for row in rows] == [
        ("micro-gsm8k", "done", False, 2),
        ("micro-cosmosqa", "done", False, 2),
    ]
    assert len(first.stderr.splitlines()) == 2
    (tmp_path / "y.toml").write_text('model = "tiny"\ntask = "micro-gsm8k"\nstrategy = "zero-shoot"\n')
    again = cotune("study", tmp_path, "--out", tmp_path / "out", "--json")
    assert again.exit_code == 1
    report = json.loads(again.stdout)
    assert [(row["status"], row["skipped"]) for row in report["runs"]] == [
        ("done", True),
        ("done", True),
        ("failed", False),
    ]
    assert report["failed"] == 1
    assert "There is no strategy 'zero-shoot'" in report["runs"][2]["reason"]
    part = tmp_path / "part.toml"
    part.write_text(file.read_text().replace('["micro-gsm8k", "micro-cosmosqa"]', '["micro-gsm8k", "micro-math"]'))
    compared = cotune("compare", tmp_path / "out", "--study", part, "--json")
    assert [row["run_names"] for row in json.loads(compared.stdout)["groups"][0]["rows"]] == [[rows[0]["run"]]]
    assert f"1 of the 2 runs of {part} are not there" in compared.stderr
    part.write_text(part.read_text().replace("limit_test = 2", "limit_test = 3"))
    compared = cotune("compare", tmp_path / "out", "--study", part)
    assert (compared.exit_code, compared.stdout) == (2, "")
    assert f"None of the 2 runs of {part} is there" in compared.stderr
    laid_on = tmp_path / "laid-on.toml"
    laid_on.write_text("limit_test = 2\n")
    compared = cotune("compare", tmp_path / "out", "--study", part, "--config", laid_on, "--json")
    assert [row["run_names"] for row in json.loads(compared.stdout)["groups"][0]["rows"]] == [[rows[0]["run"]]]
    assert f"cotune study {part} --config {laid_on} --out DIR" in compared.stderr
    compared = cotune("compare", tmp_path / "out", "--config", laid_on)
    assert compared.exit_code == 2 and "Add --study" in compared.stderr


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it


@pytest.mark.parametrize("command", ["run", "study"])
def test_ctrl_c_exits_130_and_says_how_to_go_on(command: str, tmp_path: Path, random_model_dir: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text(
        f'model = "{random_model_dir}"\ntask = "micro-gsm8k"\nstrategy = "zero-shot"\nlimit_test = 5000\n'
        "[decoding]\nmax_new_tokens = 200\n[runner]\nbatch_size = 2\n"
    )
    args = ["run", "--config", str(config)] if command == "run" else ["study", str(config)]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "cotune", *args, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=_hear_ctrl_c,
    )  # fmt: skip
    while process.poll() is None and not list(out.glob("*/work/journal.jsonl")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == (
        "Interrupted. Give the same command again and it continues from its last checkpoint."
    )
    assert "Traceback" not in stderr


def test_ctrl_c_is_not_lost_in_a_finalizer() -> None:
    """Python drops what is raised in a `__del__`, also a KeyboardInterrupt that happened to come just then."""
    script = """
import os, signal, time
from cotune.cli import app

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

@app.command()
def work():
    Slow()
    time.sleep(100)

app(["work"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, preexec_fn=_hear_ctrl_c
    )
    assert (done.returncode, done.stderr) == (130, "Interrupted. Nothing was changed.\n")


def test_grade_reads_stdin_and_writes_json_lines() -> None:
    rows = [{"reference": "18", "completion": "so #### 18"}, {"reference": "18", "completion": "so #### 19"}]
    result = cotune("grade", "gsm8k", "--input", "-", input="".join(json.dumps(r) + "\n" for r in rows))
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(t["outcome"], t["prediction"]) for t in told] == [("correct", "18"), ("wrong", "19")]


def test_grade_of_what_is_not_there() -> None:
    result = cotune("grade", "gsm8k", "--input", "nowhere.jsonl")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nowhere.jsonl cannot be read" in result.stderr


def test_data_check_reports_every_split(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    row = {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n")
    for args in (["gsm8k"], []):
        result = cotune("data", "check", *args, "--data", tmp_path, "--json")
        assert result.exit_code == 0, result.output
        (report,) = [json.loads(line) for line in result.stdout.splitlines()]
        assert report["task"] == "gsm8k"
        test = report["splits"]["test"]
        assert (test["rows"], test["references_correct"]) == (1, 1)
    assert "references_correct: 1" in cotune("data", "check", "gsm8k", "--data", tmp_path).stdout
