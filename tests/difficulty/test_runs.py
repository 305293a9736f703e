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
from cotune.difficulty.allocation import BY_ENTROPY, BY_RATING, ONE_CHOICE, ORACLE, OWN_N, by_difficulty
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
    own = by_difficulty(expected, None, [1, 2, 4, 8], 8, 4, np.random.default_rng(3), range(1, 9))  # the run's seed
    for name, curve in own.curves.items():
        assert [p.scores.tolist() for p in found.found.curves[name].points] == [p.scores.tolist() for p in curve.points]


def test_the_numbers_by_hand_and_the_same_again(run: Path) -> None:
    value = told(run)
    kept = [row["samples"] for row in sampled()]
    right = np.array([[vote == 0 for vote in k["votes"]] for k in kept], dtype=float)
    curves = {curve["policy"]: curve for curve in value["curves"]}
    choices = [ORACLE, BY_ENTROPY, BY_RATING]
    everyone = [MAJORITY, BEST, WEIGHTED, ONE_CHOICE, ONE_CHOICE + OWN_N]
    assert list(curves) == [*everyone, *choices, *(name + OWN_N for name in choices)]
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
        cost = {ORACLE: 8, BY_ENTROPY: 4, BY_RATING: 4}[match["policy"].removesuffix(OWN_N)]
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
    same = [curve["policy"] for curve in value["curves"] if not curve["policy"].endswith(OWN_N)]
    assert same == [MAJORITY, ONE_CHOICE, ORACLE, BY_ENTROPY]
    assert {(g["gain"], g["significant"]) for g in value["gains"] if g["policy"] in same} == {(0.0, False)}
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


# ---- a run of parallel samples beside one of chains ----


def revised(length: int = 4, chains: int = 4) -> list[dict[str, Any]]:
    """Chains that are wrong first and right from the second attempt on, on hard questions alone; else the other way."""
    rows = []
    for q, row in enumerate(rows_of({f"q{q:02}": float(q >= QUESTIONS // 2) for q in range(QUESTIONS)})):
        chain = [1] + [0] * (length - 1) if q >= QUESTIONS // 2 else [0] + [1] * (length - 1)
        samples = {
            "answers": ["right", "wrong"],
            "worth": [1.0, 0.0],
            "votes": chain * chains,
            "scores": [0.5] * (length * chains),
            "completions": ["..."] * (length * chains),
            "truncated": [False] * (length * chains),
            "generated_tokens": [5] * (length * chains),
            "prompt_tokens": [10, 20, 30, 40][:length] * chains,
        }
        rows.append(row | {"plan": PLAN | {"samples": length * chains, "chain": length}, "samples": samples})
    return rows


def both(tmp_path: Path, chained: list[dict[str, Any]], **settings: Any) -> tuple[Path, Path]:
    first = write(tmp_path / "parallel", sampled())
    second = write_run(tmp_path / "chained", "zero-shot", {row["id"]: row["score"] for row in chained}, **settings)
    write_rows(second / "predictions.jsonl", chained)
    return first, second


def test_revisions_are_compared_with_as_many_parallel_samples(tmp_path: Path) -> None:
    runs = both(tmp_path, revised())
    value = json.loads(CliRunner().invoke(app, ["difficulty", *map(str, runs), "--json"]).output)
    assert value["chains"] == {"run": runs[1].name, "chains": 4, "length": 4}
    plans = {(p["n"], p["aggregation"], p["length"]): p for p in value["plans"]}
    in_a_row = {(n, length) for n, _, length in plans if length > 1}
    assert in_a_row == {(2, 2), (4, 2), (4, 4), (8, 2), (8, 4)}
    # Of two attempts, right and wrong, the vote is a tie; of four, three are right on the hard half.
    assert plans[2, MAJORITY, 2]["score"] == pytest.approx(0.5)
    assert (plans[4, MAJORITY, 4]["score"], plans[8, MAJORITY, 4]["score"]) == (0.5, 0.5)
    assert {p["generated"] for (n, _, length), p in plans.items() if (n, length) == (8, 4)} == {40.0}
    assert [plans[n, MAJORITY, length]["read"] for n, length in ((8, 1), (8, 2), (4, 4), (8, 4))] == [
        10,  # the question, once
        10 + 4 * 20,
        10 + 20 + 30 + 40,
        10 + 2 * (20 + 30 + 40),
    ]
    for key, plan in plans.items():
        over = plan["over_parallel"]
        assert (over is None) == (key[2] == 1)
        if over:
            assert over["gain"] == pytest.approx(plan["score"] - plans[key[0], key[1], 1]["score"])
            assert over["p_holm"] >= over["p"]
    by_bin = {(b["difficulty"], b["plan"]): b["scores"] for b in value["by_bin"]}
    of_bins = by_bin[ORACLE, f"{MAJORITY}, 4 in a row"]
    assert (of_bins[:2], of_bins[3:]) == ([0, 0], [1, 1])
    chosen = {(c["difficulty"], c["n"]): c["plans"] for c in value["choices"]}
    easiest, *_, hardest = chosen[ORACLE, 4]
    assert not any("in a row" in plan for plan in easiest)
    assert hardest == [f"{MAJORITY}, 4 in a row"]  # the first of equals, on both folds
    alone = told(runs[0])
    assert (alone["chains"], alone["plans"]) == (None, [])
    assert [c for c in alone["curves"] if c["policy"] == MAJORITY] == [
        c for c in value["curves"] if c["policy"] == MAJORITY
    ]


def test_the_text_shows_both_ways_and_the_plans_of_each_bin(tmp_path: Path) -> None:
    runs = both(tmp_path, revised())
    text = CliRunner().invoke(app, ["difficulty", *map(str, runs)]).output
    assert f"{runs[1].name} answered the same questions in 4 chains of 4 attempts" in text
    assert " · in a row and in parallel at equal generations\n" in text
    assert " · plans chosen\n" in text
    (line,) = re.findall(r"^8 +majority, 4 in a row +(.*)$", text, re.M)
    assert re.match(r"50\.0 \[.*?\] +40\.0 +190\.0 ", line)
    assert "Tokens read are not in them" in text


def test_few_chains_serve_small_plans_and_the_largest_of_these_is_shown(tmp_path: Path) -> None:
    value = json.loads(
        CliRunner().invoke(app, ["difficulty", *map(str, both(tmp_path, revised(4, 1))), "--json"]).output
    )
    assert {p["n"] for p in value["plans"] if p["length"] > 1} == {2, 4}
    assert {b["n"] for b in value["by_bin"]} == {4}


def hotter(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["plan"] = row["plan"] | {"temperature": 1.0}


def other_prompt(rows: list[dict[str, Any]]) -> None:
    rows[3]["prompt"] = "f" * 16


def no_prompt_tokens(rows: list[dict[str, Any]]) -> None:
    del rows[3]["samples"]["prompt_tokens"]


def torn_chain(rows: list[dict[str, Any]]) -> None:
    for name in ("votes", "scores", "generated_tokens", "prompt_tokens"):
        rows[3]["samples"][name].pop()


def unchained(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["plan"] = PLAN


@pytest.mark.parametrize(
    ("spoil", "error", "why"),
    [
        (hotter, UsageError, "because their plan.temperature differ"),
        (other_prompt, UsageError, "because their prompts differ"),
        (unchained, UsageError, "has no chains. Give one as the second run"),
        (no_prompt_tokens, DataError, "are damaged .KeyError"),
        (torn_chain, DataError, "equally many attempts"),
    ],
)
def test_chains_that_do_not_go_with_the_samples(
    spoil: Callable[[list[dict[str, Any]]], None], error: type[Exception], why: str, tmp_path: Path
) -> None:
    rows = revised()
    spoil(rows)
    with pytest.raises(error, match=why):
        of_run(*both(tmp_path, rows))


def test_chains_of_other_questions_models_or_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="because their test examples differ"):
        of_run(*both(tmp_path / "fewer", revised()[1:]))
    with pytest.raises(UsageError, match="because their model differ"):
        of_run(*both(tmp_path / "model", revised(), model="tiny-4m"))
    with pytest.raises(UsageError, match="because their data differ"):
        of_run(*both(tmp_path / "data", revised(), comparable={"data_digest": "other"}))
    first, second = both(tmp_path / "alone", revised())
    for folders in ((second,), (second, first)):
        with pytest.raises(UsageError, match="Give a run of parallel samples of the same questions before it"):
            of_run(*folders)
    (second / "events.jsonl").write_text(json.dumps({"kind": "start", "model_digest": "w1"}) + "\n")
    with pytest.raises(UsageError, match="because their weights of the model differ"):
        of_run(first, second)


def test_it_needs_no_torch(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cotune.difficulty.runs import of_run; "
        "from cotune.difficulty.telling import sheets; sheets(of_run(Path(sys.argv[1]))); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
