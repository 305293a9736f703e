"""What a listener writes where: plain lines in a pipe, a bar on a terminal, only warnings when quiet."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from cotune.progress import describe, listener, plain
from cotune.values import Event


def progress(done: int, of: int = 100) -> Event:
    return Event("progress", {"stage": "tune", "label": "val", "done": done, "of": of})


def test_plain_lines_are_rare_while_work_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    listen = plain("", clock=lambda: now)
    for done in range(1, 101):
        now += 0.3
        listen(progress(done))
    captured = capsys.readouterr()
    assert captured.out == ""
    shown = [line.split()[-1] for line in captured.err.splitlines()]
    assert shown == ["1/100", "35/100", "69/100", "100/100"]  # one in ten seconds, and the last


def test_what_matters_is_always_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with listener(prefix="run: ") as listen:
        for score in (0.25, 0.5):
            listen(Event("round", {"stage": "tune", "round": 1, "best": score, "tuning_tokens": 9}))
    assert capsys.readouterr().err == "run: tune  round  round 1  best 0.25\nrun: tune  round  round 1  best 0.5\n"


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with listener(quiet=True) as listen:
        listen(progress(100))
        listen(Event("warning", {"message": "halved the batch"}))
    assert capsys.readouterr().err == "warning  halved the batch\n"


def test_a_message_is_not_cut_off_before_its_fix() -> None:
    long = "Something is odd. " * 20 + "Swap them."
    assert describe(Event("warning", {"message": long})).endswith("Swap them.")
    assert len(describe(Event("prompt", {"text": long}))) == 160


def test_model_text_cannot_reach_the_terminal() -> None:
    line = describe(Event("candidate", {"text": "\x1b[2J[red]\nnew line" + "x" * 500}))
    assert line.startswith("candidate  \\x1b[2J[red]\\nnew line")
    assert len(line) == 160


def test_a_terminal_gets_a_bar_and_stdout_stays_clean() -> None:
    code = (
        "from cotune.progress import listener\nfrom cotune.values import Event\n"
        "with listener() as listen:\n"
        "    listen(Event('progress', {'stage': 's', 'label': '[b]', 'done': 1, 'of': 2}))\n"
        "    listen(Event('step', {'step': 1, 'loss': 0.5}))\n"
        "    listen(Event('round', {'best': 0.5}))\n"
        "print('result')"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True
    )
    os.close(theirs)
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
    assert done.stdout == b"result\n"
    assert b"\x1b[" in drawn
    assert b"round  best 0.5" in drawn
