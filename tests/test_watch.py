"""`cotune watch` on run folders written by hand, and attached to a real run in another process."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from reference.run_folders import write_rows, write_run
from rich.console import Console
from typer.testing import CliRunner, Result

from cotune.cli import app
from cotune.progress_file import ProgressFile, read
from cotune.record import being_worked_on
from cotune.values import Event
from cotune.watch import GRACE_S, Followed, Watch

EVENTS: list[dict[str, Any]] = [
    {"i": 0, "time": 100.0, "kind": "start", "strategy": "prompt-only", "tuning_tokens": 0},
    {"i": 1, "time": 101.0, "kind": "candidate", "stage": "tune", "text": "\x1b[2JThink.", "score": 0.5,
     "tuning_tokens": 70},
]  # fmt: skip


def progress(done: int, of: int = 40) -> Event:
    return Event("progress", {"stage": "tune", "label": "search", "done": done, "of": of, "score": 0.5})


def watch(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["watch", *map(str, args)])


def started(*args: str | Path, **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cotune", "watch", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.fixture
def going_on(tmp_path: Path) -> Path:
    """An unfinished run with some events and a progress file; whether it runs is up to the lock."""
    folder = write_run(tmp_path, "prompt-only", status=None, name="one", settings={"budget": {"tokens": 1000}})
    write_rows(folder / "events.jsonl", EVENTS)
    now = 200.0
    file = ProgressFile(folder, clock=lambda: now)
    file(progress(10))
    now = 202.0
    file(progress(20))
    return folder


def test_the_progress_file_is_written_once_a_second(tmp_path: Path) -> None:
    now = 1000.0
    file = ProgressFile(tmp_path, clock=lambda: now)
    assert read(tmp_path) == (None, None)
    seen = []
    for done in range(40):
        now = 1000.0 + done / 10
        file(progress(done))
        seen.append((read(tmp_path)[1] or {})["done"])
    assert sorted(set(seen)) == [0, 10, 20, 30]
    began, row = read(tmp_path)
    assert (began, row and row["rate"], row and row["time"]) == (1000.0, pytest.approx(10.0), 1003.0)
    now = 5.0  # a clock that is set back does not end it
    file(progress(40))
    assert (read(tmp_path)[1] or {})["done"] == 40
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["progress.json"]


def test_what_a_killed_process_left_is_not_shown_as_progress(tmp_path: Path) -> None:
    ProgressFile(tmp_path)(progress(10))
    assert read(tmp_path)[1]
    ProgressFile(tmp_path)(Event("start"))
    assert read(tmp_path)[1] is None


def test_a_place_that_cannot_be_written_is_not_the_runs_problem(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file where the folder should be")
    file = ProgressFile(tmp_path)
    file(progress(1))
    assert read(tmp_path) == (None, None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work").symlink_to("/dev/full")  # neither is a device
    ProgressFile(tmp_path / "full")(progress(1))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"began": "x", "progress": 1}', '{"began": null}', "\x00"])
def test_a_damaged_progress_file_is_no_progress(text: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "progress.json").write_text(text)
    assert read(tmp_path) == (None, None)


def test_looking_at_the_lock_changes_nothing(tmp_path: Path) -> None:
    assert not being_worked_on(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with FileLock(tmp_path / ".lock"):
        before = (tmp_path / ".lock").stat().st_mtime_ns
        assert being_worked_on(tmp_path)
        assert (tmp_path / ".lock").stat().st_mtime_ns == before
    assert not being_worked_on(tmp_path)
    with FileLock(tmp_path / ".lock", timeout=0):  # nothing is held behind
        pass


def test_once_as_json(going_on: Path) -> None:
    with FileLock(going_on / ".lock"):
        result = watch(going_on, "--once", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    (run,) = json.loads(result.stdout)["runs"]
    assert {"run": "one", "status": "running", "strategy": "prompt-only", "result": None, "reason": None,
            "stage": "tune", "label": "search", "done": 20, "of": 40, "losses": [], "rewards": [0.5],
            }.items() <= run.items()  # fmt: skip
    assert run["score"]["n"] == 20
    assert run["budget"] == {"tokens": {"used": 70.0, "limit": 1000.0}}
    assert run["best_prompt"]["text"] == "\x1b[2JThink."  # JSON escapes it
    assert run["elapsed_seconds"] > 1e6  # since the process began, at 200 s of 1970


def test_once_in_words(going_on: Path) -> None:
    with FileLock(going_on / ".lock"):
        result = watch(going_on, "--once")
    assert result.stdout == "one: running  tune  search  20/40  score 50.0% (29.9 to 70.1) on 20  0:04 left\n"
    assert result.exit_code == 0


def test_each_other_state_is_one_sentence(going_on: Path, tmp_path: Path) -> None:
    result = watch(going_on)
    assert (result.stdout, result.exit_code) == ("one: interrupted; the same command continues it.\n", 1)
    failed = write_run(tmp_path / "f", "joint", status="failed", reason="loss is \x1b[31mNaN", name="bad")
    result = watch(failed)
    assert (result.stdout, result.exit_code) == ("bad: failed, loss is \\x1b[31mNaN\n", 1)
    done = write_run(tmp_path / "d", "joint", {"a": 1.0, "b": 0.0}, name="good")
    result = watch(done)
    assert result.stdout == "good: done, accuracy 50.0% (95% interval 9.5 to 90.5, n = 2): 1 correct, 1 wrong\n"
    assert result.exit_code == 0
    (run,) = json.loads(watch(done, "--once", "--json").stdout)["runs"]
    assert (run["status"], run["result"]) == ("done", {"headline": "accuracy", "score": 0.5, "n": 2})
    assert '"n": 2\n' in watch(done, "--once", "--json").stdout  # a whole number
    nothing = watch(tmp_path / "none")
    assert (nothing.exit_code, nothing.stdout) == (2, "")
    assert "There is no folder" in nothing.stderr
    (tmp_path / "empty").mkdir()
    assert "holds no run folder" in watch(tmp_path / "empty").stderr
    assert "Give --once with it." in watch(done, "--json").stderr


def test_a_failed_run_that_is_tried_again_is_running(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "joint", status="failed", reason="x", name="again")
    with FileLock(folder / ".lock"):
        assert watch(folder, "--once").stdout == "again: running  starting\n"


def test_a_folder_shows_the_unfinished_newest_first(going_on: Path) -> None:
    out = going_on.parent
    write_run(out, "joint", {"a": 1.0}, name="done")
    newer = write_run(out, "lora-only", status=None, name="two")
    write_rows(newer / "events.jsonl", [{"kind": "start", "time": 300.0}])
    write_run(out, "sequential", status=None, name="three")
    with FileLock(going_on / ".lock"), FileLock(newer / ".lock"):
        runs = json.loads(watch(out, "--once", "--json").stdout)["runs"]
    assert [(run["run"], run["status"]) for run in runs] == [
        ("two", "running"),
        ("one", "running"),
        ("three", "interrupted"),
    ]
    only_done = watch(write_run(out / "x", "joint", {"a": 1.0}, name="done").parent)
    assert only_done.exit_code == 0
    assert only_done.stdout == f"No run in {out / 'x'} is going on or waits to be continued: 1 done.\n"


def test_events_are_read_once_and_torn_ones_when_they_are_whole(going_on: Path) -> None:
    run = Followed(going_on)
    assert [row["kind"] for row in run.look()] == ["start", "candidate", "progress"]
    assert run.look() == []
    line = json.dumps({"kind": "step", "time": 300.0, "stage": "tune", "loss": 1.0}).encode()
    with (going_on / "events.jsonl").open("ab") as file:
        file.write(b"damaged\n[]\n" + line[:20])
        file.flush()
        assert run.look() == []
        file.write(line[20:] + b"\n")
    assert [row["loss"] for row in run.look()] == [1.0]
    assert run.standing.losses.values == (1.0,)
    write_rows(going_on / "events.jsonl", EVENTS[:1])  # another run in the same place
    assert [row["kind"] for row in run.look()] == ["start"]
    assert run.standing.losses.values == ()


def test_plain_lines_until_the_run_ends(going_on: Path) -> None:
    with FileLock(going_on / ".lock"):
        watching = started(going_on, "--interval", "0.1")
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith("one: running  tune  search  20/40")
        with (going_on / "events.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "round", "time": 400.0, "stage": "tune", "best": 0.5}) + "\n")
        assert watching.stdout.readline() == "tune  round  best 0.5\n"
        (going_on / "summary.json").write_text('{"status": "no-data", "reason": "No accepted rollouts."}')
        rest, errors = watching.communicate(timeout=60)
    assert (rest, errors) == ("one: no-data, No accepted rollouts.\n", "")
    assert watching.returncode == 0


def test_watching_ends_when_the_folder_is_removed_or_nobody_reads(going_on: Path, tmp_path: Path) -> None:
    with FileLock(going_on / ".lock"):
        watching = started(going_on, "--interval", "0.1")
        assert watching.stdout is not None
        watching.stdout.readline()
        assert watching.stderr is not None
        watching.stdout.close()
        watching.stderr.close()
        event = {"kind": "round", "time": 400.0, "stage": "tune"}
        write_rows(going_on / "events.jsonl", [*EVENTS, event, event])
        assert watching.wait(timeout=60) == 0
        watching = started(going_on, "--interval", "0.1")
        assert watching.stdout is not None
        watching.stdout.readline()
        shutil.rmtree(going_on)  # as a run does that could not begin
        rest, errors = watching.communicate(timeout=60)
    assert (rest, errors, watching.returncode) == ("one: its folder was removed.\n", "", 1)


def test_runs_of_a_study_come_and_go(tmp_path: Path) -> None:
    one = write_run(tmp_path, "joint", status=None, name="one")
    now = 1000.0
    with FileLock(one / ".lock"):
        watching = Watch(tmp_path, clock=lambda: now)
        assert [run.name for run in watching.running] == ["one"]
    (one / "summary.json").write_text('{"status": "done", "score": 0.5, "n": 2}')
    watching.look()
    assert (watching.running, watching.over) == ([], False)  # the next one may be about to begin
    two = write_run(tmp_path, "lora-only", status=None, name="two")
    with FileLock(two / ".lock"):
        watching.look()
        assert [(run.name, run.state) for run in watching.runs] == [("two", "running"), ("one", "done")]
        console = Console(width=80, record=True, file=StringIO())
        console.print(watching.picture())
        assert [line.split() for line in console.export_text().splitlines()[1:]] == [
            ["two", "starting"], ["one", "done", "50.0%"]]  # fmt: skip
    watching.look()
    now += GRACE_S
    assert watching.over
    assert watching.endings() == [
        "two: interrupted; the same command continues it.",
        "one: done, but its summary.json is damaged.",
    ]
    assert watching.code == 1


def test_ctrl_c_leaves_the_run_alone(going_on: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in going_on.rglob("*")}
    with FileLock(going_on / ".lock"):
        before |= {p: p.stat().st_mtime_ns for p in going_on.rglob("*")}
        watching = started(going_on, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None)
        assert watching.stdout is not None
        watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=60)
        assert being_worked_on(going_on)
    assert (watching.returncode, errors) == (130, "Interrupted. Nothing was changed.\n")
    assert {p: p.stat().st_mtime_ns for p in going_on.rglob("*")} == before


def test_watching_a_real_run(tmp_path: Path, random_model_dir: Path) -> None:
    """A run in one process, watched from two others: plain, and on a terminal."""
    run = subprocess.Popen(
        [sys.executable, "-m", "cotune", "run", "--strategy", "zero-shot", "--model", str(random_model_dir),
         "--task", "micro-gsm8k", "--limit-train", "4", "--limit-val", "4", "--limit-test", "300",
         "--set", "decoding.max_new_tokens=48", "--set", "runner.batch_size=2", "--quiet",
         "--out", str(tmp_path), "--name", "real"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = tmp_path / "real"
    while run.poll() is None and not read(folder)[1]:
        time.sleep(0.05)
    assert run.poll() is None, "the run ended before it could be watched"
    ours, theirs = pty.openpty()
    seen = subprocess.Popen(
        [sys.executable, "-m", "cotune", "watch", str(folder)],
        stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
    )  # fmt: skip
    os.close(theirs)
    lines, errors = started(folder, "--interval", "0.2").communicate(timeout=120)
    drawn = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux reports the closed other end this way
            break
        if not part:
            break
        drawn += part
    os.close(ours)
    result = run.communicate()[0]
    assert (run.returncode, seen.wait()) == (0, 0)
    assert errors == ""
    assert "real: running" in lines
    summary = json.loads((folder / "summary.json").read_text())
    ending = next(line.strip() for line in result.splitlines() if line.startswith("  accuracy"))
    assert lines.splitlines()[-1] == f"real: done, {ending}"
    assert not (folder / "work").exists()
    text = drawn.decode()
    assert "real · zero-shot · micro-gsm8k" in text
    assert "/300" in text
    assert f"real: done, accuracy {100 * summary['score']:.1f}%" in text
