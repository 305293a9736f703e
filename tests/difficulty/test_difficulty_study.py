"""The study: populations are what they say, and the table says what the runs found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cotune.compare.stats import Estimate
from cotune.difficulty import study


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("SIZES", (1, 4)),
        ("SHOWN", (1, 4)),
        ("ESTIMATED", 4),
        ("FEW", 2),
        ("CHAINS", 2),
        ("TIERED", 4),
    ):
        monkeypatch.setattr(study, name, value)


@pytest.mark.parametrize("name", study.POPULATIONS)
def test_a_population_has_the_chances_it_says(name: str) -> None:
    population = study.POPULATIONS[name]
    tier, samples, chains = population.draw(300, np.random.default_rng(0))
    for t in range(study.TIERS):
        mine = tier == t
        answers, right = samples.predictions[mine], samples.scores[mine] == 1
        assert right.mean() == pytest.approx(population.right[t], abs=0.03)
        assert (answers[~right] == "1").mean() == pytest.approx(population.leading[t], abs=0.05)
        assert samples.ratings is not None
        logit = np.log(samples.ratings[mine] / (1 - samples.ratings[mine]))
        assert logit[right].mean() - logit[~right].mean() == pytest.approx(population.insight[t], abs=0.1)
        before, after = chains.scores[mine, :, :-1] == 1, chains.scores[mine, :, 1:] == 1
        assert after[~before].mean() == pytest.approx(population.mended[t], abs=0.02)
        assert (~after[before]).mean() == pytest.approx(population.spoiled[t], abs=0.03)
        kept = ~before & ~after
        assert (chains.predictions[mine, :, 1:][kept] == chains.predictions[mine, :, :-1][kept]).all()
    assert (samples.chains, chains.chains, chains.length) == (96, 16, 16)


def test_the_command_writes_the_same_bytes_again(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table.md"
    texts = []
    for seed in ("0", "0", "1"):
        monkeypatch.setattr(
            "sys.argv", ["study", "--runs", "2", "--questions", "10", "--seed", seed, "--out", str(out)]
        )
        study.main()
        texts.append(out.read_text(encoding="utf-8"))
    assert texts[0] == texts[1] != texts[2]
    assert [line for line in texts[0].splitlines() if line.startswith("## ")] == [f"## {n}" for n in study.POPULATIONS]


def test_cells_of_the_table(small: None) -> None:
    """Gains of 1, 2 and 3 points: mean 2; the intervals of two of the three runs hold it."""
    run = study.run_once(study.POPULATIONS["All alike"], 10, np.random.default_rng(0))
    key = (study.ORACLE, 4)
    ends = ((0.0, 0.015), (0.01, 0.03), (0.01, 0.05))
    estimates = [Estimate((i + 1) / 100, low, high, 0.01, 10) for i, (low, high) in enumerate(ends)]
    found = (study.ORACLE, study.ONE_CHOICE, 4)
    runs = [
        replace(
            run,
            accuracy=dict(run.accuracy) | {(study.MAJORITY, 4): 0.625},
            gains=dict(run.gains) | {key: estimate},
            matched=dict(run.matched) | {(*found, False): n, (*found, True): charged},
        )
        for estimate, n, charged in zip(estimates, (4, None, 1), (12, None, 9), strict=True)
    ]
    table = study.markdown({"All alike": runs}, 10)
    row = next(line for line in table.splitlines() if line.startswith("| oracle | ") and "+2.0 [" in line)
    assert row.endswith("| 67% |")
    assert "| 62.5 |" in next(line for line in table.splitlines() if line.startswith("| majority | "))
    assert next(line for line in table.splitlines() if line.startswith("| oracle | ") and " / " in line).endswith(
        "| 4 / 12 |"
    )


def test_the_table_of_tiers_is_the_mean_over_runs(small: None) -> None:
    run = study.run_once(study.POPULATIONS["All alike"], 10, np.random.default_rng(0))
    assert list(run.by_tier)[:4] == ["majority", "best-of-N", "weighted best-of-N", "majority, 2 in a row"]
    runs = [replace(run, by_tier={"majority": np.full(5, share)}) for share in (0.25, 0.5)]
    assert "| majority | 37.5 | 37.5 | 37.5 | 37.5 | 37.5 |" in study.markdown({"All alike": runs}, 10)


def test_gains_without_spread_have_no_interval() -> None:
    nothing = Estimate(0.0, None, None, 0.0, 10)
    assert study._gained([nothing, nothing]) == "+0.0 | 100%"


def test_arguments_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (["--runs", "1"], ["--questions", "1"], ["--seed", "-1"], ["--populations", "none"]):
        monkeypatch.setattr("sys.argv", ["study", "--out", str(tmp_path / "table.md"), *bad])
        with pytest.raises(SystemExit, match="2"):
            study.main()
