"""The study of the bandits: ceilings, rows that are kept, a table that says where PSST does not win."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cotune.bandits import study
from cotune.bandits.environments import MajorityVote


def small(random: np.random.Generator) -> MajorityVote:
    right = random.random((3, 10))
    return MajorityVote([0, 1], [1.0, 0.0], np.stack([right, 1 - right], -1), 0.01, [(1, 0), (1, 1)], 4, range(8))


@pytest.fixture
def small_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "ENVIRONMENTS", {"Small": small})


def test_ceilings_of_a_flip() -> None:
    """One context: prompt 0 is best with one completion, prompt 1 with two."""
    values = np.array([[[0.6, 0.65], [0.5, 0.9]]])
    assert [value for _, value in study.ceilings(values)] == [0.9, 0.65, 0.6, 1.0]


def test_rows_are_kept_and_the_table_is_the_same(small_study: None, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    rows = study.run_all(["Small"], 2, [30], 0, file)
    size = file.stat().st_size
    again = study.run_all(["Small"], 2, [30], 0, file)
    assert again == rows == study.run_all(["Small"], 2, [30], 0, None)
    assert file.stat().st_size == size
    assert study.run_all(["Small"], 2, [30, 40], 0, file).items() >= rows.items()
    assert study.markdown(rows, ["Small"], 2, [30]) == study.markdown(again, ["Small"], 2, [30])


def test_rows_of_another_seed_are_left_alone(small_study: None, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    assert study.run_all(["Small"], 2, [30], 0, file) != study.run_all(["Small"], 2, [30], 1, file)


def test_arguments_that_cannot_be(small_study: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (["--runs", "0"], ["--budgets", "0"], ["--seed", "-1"]):
        monkeypatch.setattr("sys.argv", ["study", "--out", str(tmp_path / "table.md"), *bad])
        with pytest.raises(SystemExit, match="2"):
            study.main()


def test_the_table_says_who_is_better_than_psst(small_study: None) -> None:
    others = [learner.name for learner in study.LEARNERS[1:]]
    rows: study.Rows = {}
    for run in range(20):
        for row in (*study.CEILINGS, study.FLIPS):
            rows["Small", run, 0, row] = (0.5 + run / 100, 0)
        for i, row in enumerate((study.REFERENCE, *others)):
            shift = {1: 0.1, 2: -0.1}.get(i, 0.0)
            rows["Small", run, 60, row] = (0.5 + run / 100 + shift * (1 + run / 50), 60)
    table = study.markdown(rows, ["Small"], 20, [60])
    assert f"Better than PSST: {others[0]}. Not told apart from it: {'; '.join(others[2:])}." in table
    assert f"| {study.REFERENCE} | 0.5950 [" in table
    # Wilcoxon's smallest p of 20 runs is 2 / 2^20; two of the ten differences have it, so Holm multiplies by 10 and 10.
    assert table.count("| 1.9e-05 | 60 |") == 2 and table.count("| 1 | 60 |") == 8


def test_the_command_writes_the_table(small_study: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table.md"
    monkeypatch.setattr("sys.argv", ["study", "--runs", "2", "--budgets", "30", "--out", str(out)])
    study.main()
    assert out.read_text(encoding="utf-8").startswith("# Bandits on synthetic environments\n\n2 runs, each a fresh")
