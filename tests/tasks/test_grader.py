from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cotune.tasks import grader, task
from cotune.tasks.grader import Grader, GraderFailed
from cotune.values import Example, Outcome


def test_a_hard_comparison_is_killed_and_the_next_one_works() -> None:
    judge = Grader(limit_s=1.0)
    assert judge.equal("x^2-1", "(x-1)(x+1)")
    first = judge._child
    with pytest.raises(GraderFailed, match="longer than 1 s"):
        judge.equal(r"\frac{1}{2}", "9^{9^{9^9}}")
    assert judge.equal(r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}")
    assert judge._child is not first
    judge.close()


@pytest.mark.parametrize("answer", ["1000000!", "10^{10^8}", "(" * 900 + "1" + ")" * 900])
def test_towers_and_nests_cost_one_errored_grade(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader, "_GRADER", judge := Grader(limit_s=0.5))
    grade = task("math").grade(Example("1", "q", r"\frac{1}{2}"), rf"\boxed{{{answer}}}")
    assert grade.outcome is Outcome.ERRORED
    assert grade.score == 0
    assert "longer than 0.5 s" in grade.note
    judge.close()


def test_a_dead_child_costs_one_comparison() -> None:
    judge = Grader()
    assert judge.equal("x", r"\frac{2x}{2}")
    assert judge._child is not None
    judge._child.kill()
    judge._child.wait()
    with pytest.raises(GraderFailed, match="died"):
        judge.equal("x", "y")
    assert not judge.equal("x", "y")
    judge.close()


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads Linux's /proc")
def test_memory_of_the_child_is_limited() -> None:
    judge = Grader()
    judge.equal("x", "y")
    assert judge._child is not None
    limits = Path(f"/proc/{judge._child.pid}/limits").read_text()
    assert re.search(rf"Max address space\s+{grader.MEMORY_BYTES}\b", limits)
    judge.close()


def test_too_long_an_answer_is_not_compared() -> None:
    grade = task("math").grade(Example("1", "q", "1"), r"\boxed{" + "1+" * 5000 + "1}")
    assert grade.outcome is Outcome.ERRORED
    assert "longer than 2000" in grade.note


def test_easy_comparisons_need_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader, "_GRADER", None)
    assert grader.compare("72", " 72.0 ")
    assert not grader.compare(r"\frac{1}{2}", "0.51")


def test_the_child_never_imports_torch() -> None:
    code = "import cotune.tasks.grader, cotune.tasks.equality as e, sys; e.warm_up(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
