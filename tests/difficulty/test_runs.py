"""From a run folder to what choosing by difficulty shows: the samples as they were drawn, the command, bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.run_folders import rows_of, write_rows, write_run
from typer.testing import CliRunner

from cotune.cli import app
from cotune.difficulty.allocation import BY_ENTROPY, BY_RATING, ONE_CHOICE, ORACLE, by_difficulty
from cotune.difficulty.attempts import attempts
from cotune.difficulty.plans import BEST, MAJORITY, WEIGHTED
from cotune.difficulty.runs import of_run
from cotune.difficulty.telling import record
from cotune.errors import DataError, UsageError

PLAN = {"aggregation": "best-of", "samples": 16, "scorer": "log-probability", "temperature": 0.7, "top_p": 1.0}
QUESTIONS = 40


def sampled(n: int = 16, rated: bool = True) -> list[dict[str, Any]]:
    """Of the easy half 3 in 4 samples are right and ratings mislead; of the other half 1 in 4, and ratings tell.

    Votes: 0 is right, 1 the one wrong answer, 2 no answer at all.
    """
    random = np.random.default_rng(7)
    rows = []
    for q, row in enumerate(rows_of({f"q{q:02}": float(q < QUESTIONS // 2) for q in range(QUESTIONS)})):
        chance = 0.75 if q < QUESTIONS // 2 else 0.25
        votes = np.where(random.random(n) < chance, 0, np.where(random.random(n) < 0.9, 1, 2)).tolist()
        high = 0 if q >= QUESTIONS // 2 else 1
        scores = [None if vote == 2 else 0.8 if vote == high else 0.3 for vote in votes]
        samples = {
            "answers": ["right", "wrong", None],
            "worth": [1.0, 0.0, 0.0],
            "votes": votes,
            **({"scores": scores} if rated else {}),
            "completions": ["..."] * n,
            "truncated": [False] * n,
            "generated_tokens": [5 + q % 3] * n,
        }
        rows.append(row | {"plan": PLAN | {"samples": n}, "samples": samples})
    return rows


def write(out: Path, rows: list[dict[str, Any]], seed: int = 3) -> Path:
    folder = write_run(out, "zero-shot", {row["id"]: row["score"] for row in rows}, seed=seed)
    write_rows(folder / "predictions.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("runs"), sampled())


def told(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(CliRunner().invoke(app, ["difficulty", str(folder), "--json"]).output)
    return value


def test_the_samples_are_those_of_the_rows(run: Path) -> None:
    kept = [row["samples"] for row in sampled()]
    predictions = [[("right", "wrong", None)[vote] for vote in k["votes"]] for k in kept]
    right = [[float(vote == 0) for vote in k["votes"]] for k in kept]
    rated = [[0.0 if score is None else score for score in k["scores"]] for k in kept]
    expected = attempts(predictions, right, [k["generated_tokens"] for k in kept], rated)
    found = of_run(run)
    assert (found.estimated, found.few, found.judged) == (8, 4, 8)
    own = by_difficulty(expected, None, [1, 2, 4, 8], 8, 4, np.random.default_rng(3))  # the run's seed
    for name, curve in own.curves.items():
        assert [p.scores.tolist() for p in found.found.curves[name].points] == [p.scores.tolist() for p in curve.points]


def test_the_numbers_by_hand_and_the_same_again(run: Path) -> None:
    value = told(run)
    kept = [row["samples"] for row in sampled()]
    right = np.array([[vote == 0 for vote in k["votes"]] for k in kept], dtype=float)
    curves = {curve["policy"]: curve for curve in value["curves"]}
    assert list(curves) == [MAJORITY, BEST, WEIGHTED, ONE_CHOICE, ORACLE, BY_ENTROPY, BY_RATING]
    first = curves[MAJORITY]["points"][0]
    assert first["score"] == pytest.approx(right[:, 8:].mean())  # only the samples that told no difficulty judge
    assert first["tokens"] == pytest.approx(np.mean([5 + q % 3 for q in range(QUESTIONS)]))
    assert [curves[p]["estimation"] for p in (MAJORITY, ONE_CHOICE, ORACLE, BY_ENTROPY)] == [0, 0, 8, 4]
    # Votes win where questions are easy, ratings where they are hard: difficulty is worth knowing.
    at_eight = {(g["policy"], g["n"]): g for g in value["gains"]}[ORACLE, 8]
    assert at_eight["low"] > 0 and at_eight["significant"]
    by_bin = {(b["difficulty"], b["plan"]): b["scores"] for b in value["by_bin"]}
    assert by_bin[ORACLE, MAJORITY][0] > by_bin[ORACLE, BEST][0]
    assert by_bin[ORACLE, MAJORITY][4] < by_bin[ORACLE, BEST][4]
    assert all(sum(counts) == QUESTIONS for counts in value["bins"].values())
    assert value["agreements"].keys() == {BY_ENTROPY, BY_RATING}
    for match in value["to_match"]:
        cost = {ORACLE: 8, BY_ENTROPY: 4, BY_RATING: 4}[match["policy"]]
        for end, free in match["free"].items():
            assert match["charged"][end] == (None if free is None else free + cost)
    assert told(run) == value == json.loads(json.dumps(record(of_run(run))))


def test_the_text_says_what_was_parted_and_every_table(run: Path) -> None:
    text = CliRunner().invoke(app, ["difficulty", str(run)]).output
    assert "40 questions with 16 samples each: 8 tell pass@1 (oracle), the first 4 of these predict" in text
    for title in (
        "difficulty",
        "score by bin at N = 8, %",
        "score at equal generations, %",
        "generations to match N = 8",
    ):
        assert f" · {title}\n" in text
    (line,) = re.findall(r"^oracle +8 +(\+[0-9.]+ \[.*?\]\*?)", text, re.M)
    gain = {(g["policy"], g["n"]): g for g in told(run)["gains"]}[ORACLE, 8]
    assert line == f"+{100 * gain['gain']:.1f} [{100 * gain['low']:.1f}, {100 * gain['high']:.1f}]*"


def test_without_ratings_there_is_one_plan_and_the_text_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path, sampled(8, rated=False))
    value = told(folder)
    assert [curve["policy"] for curve in value["curves"]] == [MAJORITY, ONE_CHOICE, ORACLE, BY_ENTROPY]
    assert {(g["gain"], g["significant"]) for g in value["gains"]} == {(0.0, False)}
    assert (value["rated"], value["samples"], value["judged"]) == (False, 8, 4)
    assert "--set plan.aggregation=best-of" in CliRunner().invoke(app, ["difficulty", str(folder)]).output


def test_a_single_question_shows_nothing_and_is_no_error(tmp_path: Path) -> None:
    value = told(write(tmp_path, sampled()[:1]))
    assert value["questions"] == 1
    assert not any(g["significant"] for g in value["gains"])
    assert {a["correlation"] for a in value["agreements"].values()} == {None}
    assert value["bins"][ORACLE] == [0, 0, 1, 0, 0]  # the middle of its rank


def greedy(rows: list[dict[str, Any]]) -> None:
    del rows[3]["samples"], rows[3]["plan"]


def other_plan(rows: list[dict[str, Any]]) -> None:
    rows[3]["plan"] = rows[3]["plan"] | {"temperature": 1.0}


def other_place(rows: list[dict[str, Any]]) -> None:
    rows[3]["samples"]["votes"][0] = 9


def uneven(rows: list[dict[str, Any]]) -> None:
    for name in ("votes", "scores", "generated_tokens"):
        rows[3]["samples"][name].pop()


def text_for_tokens(rows: list[dict[str, Any]]) -> None:
    rows[3]["samples"]["generated_tokens"][0] = "<b>"


@pytest.mark.parametrize(
    ("spoil", "error", "why"),
    [
        (greedy, UsageError, "single completions, so there is nothing to spread. Run it again with more.*samples=16"),
        (other_plan, UsageError, "under several inference plans"),
        (other_place, DataError, "are damaged .IndexError.*Run it again"),
        (uneven, DataError, "equally many attempts"),
        (text_for_tokens, DataError, "one score, its generated tokens"),
    ],
)
def test_rows_that_do_not_serve(
    spoil: Callable[[list[dict[str, Any]]], None], error: type[Exception], why: str, tmp_path: Path
) -> None:
    rows = sampled()
    spoil(rows)
    with pytest.raises(error, match=why):
        of_run(write(tmp_path, rows))


def test_runs_that_do_not_serve_are_one_sentence_with_the_fix(tmp_path: Path) -> None:
    few = CliRunner().invoke(app, ["difficulty", str(write(tmp_path / "few", sampled(4)))])
    assert few.exit_code == 2
    assert "drew 4 samples a question; difficulty needs 8 or more. Run it again" in few.stderr
    for folder, why in (
        (write_run(tmp_path, "joint", status="failed", reason="no memory"), "no finished run (failed: no memory)"),
        (write_run(tmp_path, "sequential", status=None), "no finished run (unfinished: "),
        (tmp_path / "none", "no finished run"),
    ):
        refused = CliRunner().invoke(app, ["difficulty", str(folder)])
        assert (refused.exit_code, why in refused.stderr, refused.stdout) == (2, True, "")


def test_it_needs_no_torch(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cotune.difficulty.runs import of_run; "
        "from cotune.difficulty.telling import sheets; sheets(of_run(Path(sys.argv[1]))); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
