"""The command line from outside: exit codes, one-sentence errors, clean streams. Models: test_cli_run.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from reference.run_folders import write_rows, write_run
from typer.testing import CliRunner, Result

from cotune.cli import app
from cotune.strategies import STRATEGIES

COMMANDS = "run compare show watch list doctor data grade regrade export predict serve study"
ONES, ZEROS = dict.fromkeys("abc", 1.0), dict.fromkeys("abc", 0.0)


def cotune(*args: str | Path, **kwargs: str) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], **kwargs)


def process(*args: str | Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cotune", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload]


def error(result: Result, code: int = 2) -> str:
    """The one sentence of a refused command; nothing on stdout, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("Error: ")
    return result.stderr


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['cotune', '--help']\n"
        "from cotune.cli import app\n"
        "try: app()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'pydantic', 'numpy', 'scipy', 'peft', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS.split():
        assert re.search(rf"^  {command}\b", done.stdout, re.M)


@pytest.mark.parametrize("args", [[], *[[c, "--help"] for c in COMMANDS.split()], ["data", "check", "--help"], ["-h"]])
def test_help_of_every_command(args: list[str]) -> None:
    result = cotune(*args)
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert result.stderr == ""


def test_version() -> None:
    assert re.fullmatch(r"cotune \d+\.\d+\.\d+\n", cotune("--version").stdout)


@pytest.mark.parametrize("args", [["frobnicate"], ["run", "--frob"], ["list"], ["list", "cats"], ["compare"], ["data"],
                                  ["compare", "x", "--format", "pdf"], ["run", "--seed", "x"],
                                  ["run", "--limit-test", "0"],
                                  ["study", "x", "--jobs", "0"], ["grade", "gsm8k"]])  # fmt: skip
def test_wrong_usage_is_exit_code_2_on_stderr(args: list[str]) -> None:
    result = cotune(*args)
    assert result.exit_code == 2
    if args != ["data"]:  # which shows its help
        assert result.stdout == ""
        assert "Error" in result.stderr
    assert "Traceback" not in result.stderr


RUN = ("run", "--model", "tiny", "--task", "micro-gsm8k", "--strategy")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["run"], "'strategy' is not set. Give --strategy or set it in the config file."),
        ([*RUN, "jiont"], "There is no strategy 'jiont'. Did you mean 'joint'?"),
        ([*RUN, "joint", "--task", "micro-gms8k"], "There is no task 'micro-gms8k'. Did you mean 'micro-gsm8k'"),
        ([*RUN, "joint", "--engine", "transformer"], "There is no engine 'transformer'. Did you mean 'transformers'?"),
        ([*RUN, "joint", "--set", "joint.rnk=3"], "There is no setting 'joint.rnk'. Did you mean 'joint.rank'"),
        ([*RUN, "joint", "--set", "joint.rank"], "is not of the form key=value"),
        ([*RUN, "joint", "--budget", "2M"], "--budget '2M' is not valid. Give tokens=2M"),
        ([*RUN, "joint", "--budget", "token=2M"], "--budget 'token=2M' is not valid"),
        ([*RUN, "joint", "--budget", "tokens=1M", "--budget", "seconds=2x"], "--budget 'seconds=2x' is not valid"),
        ([*RUN, "joint", "--budget", "tokens=nan"], "--budget 'tokens=nan' is not valid"),
        ([*RUN, "joint", "--budget", "tokens=-1"], "budget.tokens = -1 is not valid"),
        ([*RUN, "joint", "--set", "joint.rank=0"], "joint.rank = 0 is not valid"),
        (
            [*RUN, "lora-only", "--set", "weights.method=dpo", "--set", "weights.beta=0"],
            "weights is not valid: with beta = 0",
        ),
        ([*RUN, "prompt-only", "--set", "prompt.method=opra"], "There is no prompt method 'opra'. Did you mean 'opro'"),
        ([*RUN, "joint", "--config", "no.toml"], "There is no config file 'no.toml'"),
        ([*RUN, "joint", "--name", "../x"], "--name '../x' is not one folder name"),
        (["compare", "nowhere"], "There is no folder 'nowhere'"),
        (["show", "nowhere"], "There is no folder 'nowhere'"),
        (["study", "nowhere.toml"], "There is no experiment (.toml) at 'nowhere.toml'"),
        (["data", "check", "gsm8"], "There is no task 'gsm8'. Did you mean 'gsm8k'"),
        (["grade", "gsm8", "--input", "x"], "There is no task 'gsm8'. Did you mean 'gsm8k'"),
    ],
)
def test_errors_are_one_sentence_with_the_fix(args: list[str], sentence: str) -> None:
    assert sentence in error(cotune(*args))


def test_unknown_keys_of_a_config_file_are_errors(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('strategy = "joint"\nmodel = "tiny"\ntask = "micro-math"\n[weights]\nepoch = 2\n')
    assert "There is no setting 'weights.epoch'. Did you mean 'weights.epochs'" in error(
        cotune("run", "--config", file)
    )
    file.write_text("strategy = ")
    assert "cannot be read as TOML" in error(cotune("run", "--config", file))


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    for args in (["--debug", "show", "nowhere"], ["show", "nowhere", "--debug"]):
        result = cotune(*args)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert "UsageError" in result.stderr
        assert "Error: There is no folder" in result.stderr.splitlines()[-1]


def test_an_unexpected_error_is_a_sentence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cotune.compare import tables

    def explode(*_: object) -> None:
        raise KeyError("boom")

    monkeypatch.setattr(tables, "compare", explode)
    assert "KeyError: 'boom'. This looks like a bug; --debug shows where." in error(cotune("compare", tmp_path), 1)


@pytest.mark.parametrize("kind", ["strategies", "tasks", "models", "engines"])
def test_list_as_text_and_json(kind: str) -> None:
    rows = json.loads(cotune("list", kind, "--json").stdout)[kind]
    text = cotune("list", kind).stdout
    for row in rows:
        assert row["about"], row
        assert re.search(rf"^{re.escape(row['name'])}\s", text, re.M)


def test_list_does_not_import_torch() -> None:
    code = "import sys; from cotune.catalog import listing; listing('strategies'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert [row["name"] for row in json.loads(cotune("list", "strategies", "--json").stdout)["strategies"]] == list(
        STRATEGIES
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    out = tmp_path / "runs"
    write_run(out, "zero-shot", ZEROS)
    write_run(out, "joint", ONES)
    write_run(out, "lora-only", status="failed", reason="loss is \x1b[31mNaN", name="failed-run")
    write_run(out, "sequential", status=None, name="open-run")
    return out


def test_compare_formats_agree(runs: Path) -> None:
    for format in ("table", "markdown", "csv", "latex", "json"):
        result = cotune("compare", runs, "--format", format)
        assert result.exit_code == 0
        for word in ("zero-shot", "joint", "failed", "unfinished"):
            assert word in result.stdout
        assert "\x1b" not in result.stdout
    assert cotune("compare", runs, "--json").stdout == cotune("compare", runs, "--format", "json").stdout


def test_compare_writes_a_file_whole_and_the_same_again(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    assert cotune("compare", runs, "--format", "markdown", "--out", out).stdout == ""
    first = out.read_bytes()
    cotune("compare", runs, "--format", "markdown", "--out", out)
    assert out.read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "table.md"]
    assert "cannot be written" in error(cotune("compare", runs, "--out", tmp_path / "no" / "x.md"))
    link = tmp_path / "link.md"
    link.symlink_to(out)
    cotune("compare", runs, "--format", "csv", "--out", link)
    assert link.is_symlink()
    assert out.read_text().startswith("task,model,")


def test_compare_never_replaces_a_device(runs: Path) -> None:
    done = process("compare", runs, "--format", "csv", "--out", "/dev/stdout")
    assert done.stdout.startswith("task,model,")
    assert Path("/dev/stdout").is_symlink()


def test_compare_refuses_unlike_runs(runs: Path) -> None:
    write_run(runs, "prompt-only", ONES, name="other", comparable={"grader_version": "2"})
    assert "because their grader version differ" in error(cotune("compare", runs))


def test_compare_does_not_import_torch(runs: Path) -> None:
    code = (
        "import sys; from cotune.compare import tables, render; from pathlib import Path\n"
        f"render.as_csv(tables.compare([Path({str(runs)!r})])); print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_show_a_done_run(runs: Path) -> None:
    folder = next(p for p in runs.iterdir() if "joint" in p.name)
    events = [{"i": i, "time": 0.0, "kind": "step", "stage": "tune", "step": i, "loss": 4.0 - i} for i in range(4)]
    dropped = {"kind": "candidate", "score": 0.9, "dropped": True}
    kept = [{"kind": "candidate", "score": s, "dropped": False} for s in (0.1, 0.2)]
    write_rows(folder / "events.jsonl", [*events, dropped, *kept])
    (folder / "tuned").mkdir()
    prompt = {"instruction": "Think\nin \x1b[31msteps.", "demonstrations": [{"question": "1+1?", "answer": "2"}]}
    (folder / "tuned" / "tuned.json").write_text(json.dumps({"kind": "fixed", "prompt": prompt, "adapter": True}))
    text = cotune("show", folder).stdout
    assert "done\n  accuracy 100.0% (95% interval 43.9 to 100.0, n = 3): 3 correct" in text
    assert re.search(r"tune step loss +█▆▃▁  4 -> 1, 4 values", text)
    assert re.search(r"candidate score +▁█  0.1 -> 0.2, 2 values", text)
    assert "  Think\n  in \\x1b[31msteps.\n  demonstration: 1+1?\n    -> 2\n" in text
    assert "tuned prompt (with an adapter)" in text
    assert text.count("    reference ") == 3
    told = json.loads(cotune("show", folder, "--json").stdout)
    assert told["changed"] == {"strategy": "joint", "model": "tiny", "task": "micro-gsm8k"}
    assert told["curves"][0] == {"stage": "tune", "kind": "step", "key": "loss", "values": [4.0, 3.0, 2.0, 1.0]}


def test_show_works_for_failed_unfinished_and_torn_runs(runs: Path) -> None:
    failed = cotune("show", runs / "failed-run")
    assert failed.exit_code == 0
    assert "failed (loss is \\x1b[31mNaN)" in failed.stdout
    (runs / "open-run" / "events.jsonl").write_text('{"kind": "start"}\n{"kind": "st')
    (runs / "open-run" / "predictions.jsonl").write_text('{"id": \n{"id": 1}\n')
    unfinished = cotune("show", runs / "open-run")
    assert unfinished.exit_code == 0
    assert "open-run: unfinished" in unfinished.stdout
    assert "problem: " in unfinished.stdout
    assert "line 1 is damaged" in unfinished.stdout
    assert "Give one of them" in error(cotune("show", runs))


def test_show_lists_changed_settings(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "joint", ONES, settings={"joint": {"rank": 3}, "limit_test": 7})
    text = cotune("show", folder).stdout
    assert "  joint.rank = 3\n" in text
    assert "  limit_test = 7\n" in text
    assert "joint.width" not in text


def test_a_reader_that_goes_away_is_no_error(runs: Path) -> None:
    for args in (["compare", runs, "--format", "csv"], ["list", "models"], ["--help"]):
        command = " ".join([sys.executable, "-m cotune", *map(str, args), "| true"])
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert done.stderr == ""


def test_streams_without_a_terminal_carry_no_control_codes(runs: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color"}
    for args in (["--help"], ["compare", runs], ["show", runs / "failed-run"], ["frob"]):
        done = process(*args, env=environment)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stdout + done.stderr)


def test_output_survives_a_terminal_that_knows_only_ascii(runs: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert process("compare", runs, env=environment).returncode == 0
    done = process("compare", runs, "--json", env=environment)
    assert json.loads(done.stdout)["groups"][0]["task"] == "micro-gsm8k"


def test_doctor_reports_every_problem_with_a_fix(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "gsm8k").mkdir(parents=True)
    (data / "gsm8k" / "test.jsonl").write_text("{}\n")
    result = cotune("doctor", "--data", data, "--out", tmp_path / "results", "--json")
    report = json.loads(result.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    for name in ("python", "torch", "transformers", "peft", "vllm", "device", "dtype", "threads", "memory", "hub"):
        assert name in checks
    assert checks["data gsm8k"]["status"] == "ok"
    assert checks["data gsm8k"]["found"] == "test.jsonl"
    assert checks["data math"]["status"] == "warn"
    assert all(check["fix"] for check in report["checks"] if check["status"] != "ok")
    assert result.exit_code == (0 if report["ok"] else 1)
    missing = json.loads(cotune("doctor", "--data", tmp_path / "none", "--json").stdout)
    assert not missing["ok"]
    assert not (tmp_path / "results").exists()  # looking changes nothing
