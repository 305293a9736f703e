"""Runs at another one's budget: which there are, how far they are scaled, and that they end at it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from reference.run_folders import write_rows, write_run
from typer.testing import CliRunner, Result

from cotune import matching, planning, study
from cotune.cli import app
from cotune.config import RunConfig, resolve
from cotune.errors import UsageError
from cotune.matching import matched, pairs, scaled
from cotune.study import Experiment, experiments

ALL = 'model = "tiny"\ntask = "micro-gsm8k"\nstrategy = ["zero-shot", "prompt-only", "lora-only", "joint"]\n'
BOTH = {"prompt.rounds": 3, "weights.epochs": 10}
PULLS = {"prompt.rounds": 3, "inference.completions": 500}
SCORES = {"a": 1.0, "b": 0.0}


def config(strategy: str, **settings: Any) -> RunConfig:
    return resolve({"strategy": strategy, "model": "tiny", "task": "micro-gsm8k"}, settings)


def made_up(c: RunConfig) -> int:
    """10 tokens before anything, 100 a round, 30 an epoch, 2 a pull's completion, of whom each has what it has."""
    rounds = 100 * c.prompt.rounds if c.strategy in ("prompt-only", "sequential", "inference-aware") else 0
    rounds += 2 * c.inference.completions if c.strategy == "inference-aware" else 0
    epochs = 30 * c.weights.epochs if c.strategy in ("lora-only", "sequential") else 0
    return 10 + rounds + epochs + (50 * c.joint.epochs if c.strategy == "joint" else 0)


@pytest.mark.parametrize(
    ("strategy", "own", "spent", "budget", "then"),
    [
        # 310 planned, 155 spent: half of what is planned, so 10 + 100 r may be 2 x 500: 9 rounds
        ("prompt-only", {"prompt.rounds": 3}, 155, 500, {"prompt.rounds": 9}),
        ("prompt-only", {"prompt.rounds": 3}, 155, 455, {"prompt.rounds": 9}),  # 910 / 2 to the token
        ("prompt-only", {"prompt.rounds": 3}, 155, 454, {"prompt.rounds": 8}),
        ("lora-only", {"weights.epochs": 10}, 310, 160, {"weights.epochs": 5}),  # scaled down as well
        ("lora-only", {"weights.epochs": 10}, 310, 39, {"weights.epochs": 1}),  # does not fit: the limit will end it
        ("joint", {"joint.epochs": 2}, 110, 1_000_000, {"joint.epochs": 19_999}),
        # at 16 of 10 epochs 4.8 rounds: 10 + 500 + 480; at 17 5.1: 10 + 500 + 510; at 18 5.4: 10 + 500 + 540
        ("sequential", BOTH, 610, 1049, {"prompt.rounds": 5, "weights.epochs": 17}),
        ("sequential", BOTH, 610, 1050, {"prompt.rounds": 5, "weights.epochs": 18}),
        # 10 + 300 + 2 x 500 planned, all spent; a factor of 2 to the completion: 10 + 600 + 2 x 1000
        ("inference-aware", PULLS, 1310, 2610, {"prompt.rounds": 6, "inference.completions": 1000}),
        ("sequential", BOTH | {"prompt.rounds": 0}, 310, 610, {"prompt.rounds": 0, "weights.epochs": 20}),
    ],
)  # fmt: skip
def test_repetitions_are_the_largest_whole_numbers_that_are_expected_to_fit(
    strategy: str, own: dict[str, int], spent: int, budget: int, then: dict[str, int]
) -> None:
    def settings(values: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in values.items():
            section, name = key.split(".")
            out[section] = {**out.get(section, {}), name: value}
        return out

    again = scaled(config(strategy, **settings(own)), spent, budget, "joint", made_up)
    limits = {"budget.tokens": budget, "budget.matched": "joint"}
    assert again == config(strategy, **settings(own | then | limits))  # and nothing else is changed


def test_what_does_not_repeat_cannot_be_scaled() -> None:
    for given, spent in ((config("zero-shot"), 5), (config("lora-only", weights={"epochs": 0}), 5)):
        with pytest.raises(UsageError, match="decides what it spends"):
            scaled(given, spent, 100, "joint", made_up)
    with pytest.raises(UsageError, match="decides what it spends"):
        scaled(config("lora-only"), 0, 100, "joint", made_up)


def planned(folder: Path, match: str | None = "joint", **files: str) -> list[Experiment]:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return experiments(folder, {"match_budget": match} if match else {})


def test_all_that_tune_are_matched_but_the_reference(tmp_path: Path) -> None:
    assert pairs(planned(tmp_path, None, all=ALL)) == []
    found = pairs(planned(tmp_path, all=ALL + "seed = [0, 1]\n"))
    both = [(p.own.config, p.reference.config) for p in found]
    told = [(own.strategy, own.seed, other.strategy, other.seed) for own, other in both if own and other]
    assert told == [(s, n, "joint", n) for s in ("prompt-only", "lora-only") for n in (0, 1)]


def test_an_experiment_file_is_a_reference_before_a_strategy_is(tmp_path: Path) -> None:
    one = 'model = "tiny"\ntask = "micro-gsm8k"\nstrategy = "joint"\n'
    files = {"joint": one, "other": one + '[joint]\nvariant = "alternating"\n'}
    for name, other in (("joint", "other.toml"), ("other", "joint.toml")):
        (found,) = pairs(planned(tmp_path, name, **files))
        assert (found.own.source, found.reference.source) == (other, f"{name}.toml")


def test_a_study_can_say_it_in_its_files(tmp_path: Path) -> None:
    assert len(pairs(planned(tmp_path, None, all='match_budget = "joint"\n' + ALL))) == 2
    (wrong,) = planned(tmp_path, None, all="match_budget = 3\n" + ALL)
    assert "match_budget = 3 is not valid" in wrong.reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALL.replace(', "joint"', ""), "and this study has none"),
        (ALL + '[grid]\n"joint.epochs" = [1, 2]\n', "and this study has 2"),
        (ALL + "[budget]\ntokens = 9\n", r"has a budget of its own \(tokens\)"),
    ],
)
def test_what_cannot_be_matched_is_an_error_before_anything_runs(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        pairs(planned(tmp_path, all=text))


def spent(tokens: int) -> dict[str, float]:
    return {"tokens": tokens, "flops": 1.0, "seconds": 1.0}


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "tuning_tokens", lambda _: made_up)


@pytest.mark.usefixtures("plan")
def test_only_done_runs_are_matched_and_a_reference_that_is_not_is_told(tmp_path: Path) -> None:
    found, out = pairs(planned(tmp_path, all=ALL)), tmp_path / "out"
    assert matched(found, out) == []  # nothing has run
    write_run(out, "prompt-only", SCORES, tuning=spent(310))
    write_run(out, "lora-only", status="failed", reason="it broke")
    (told,) = matched(found, out)
    assert (told.config, told.source) == (None, "all.toml")
    assert "_prompt-only_tiny_s0_" in told.reason and told.reason.endswith(" is not finished.")
    write_run(out, "joint", status="failed", reason="it broke")
    (told,) = matched(found, out)
    assert "_joint_tiny_s0_" in told.reason and told.reason.endswith(" is failed.")


@pytest.mark.usefixtures("plan")
def test_a_matched_run_is_a_function_of_what_was_spent_and_of_its_contestant(tmp_path: Path) -> None:
    found, out = pairs(planned(tmp_path, all=ALL)), tmp_path / "out"
    write_run(out, "prompt-only", SCORES, tuning=spent(310))
    write_run(out, "lora-only", SCORES, tuning=spent(310))
    write_run(out, "joint", SCORES, tuning=spent(620))
    first, again = ([e.config for e in matched(found, out)] for _ in range(2))
    assert first == again
    assert first == [
        config("prompt-only", prompt={"rounds": 6}, budget={"tokens": 620, "matched": "joint"}),
        config("lora-only", weights={"epochs": 20}, budget={"tokens": 620, "matched": "joint"}),
    ]


@pytest.mark.usefixtures("plan")
def test_a_study_takes_the_matched_runs_of_its_contestants_alone(tmp_path: Path) -> None:
    out, budget = tmp_path / "out", {"budget": {"tokens": 620, "matched": "joint"}}
    mine = write_run(out, "prompt-only", SCORES, settings={**budget, "prompt": {"rounds": 7}})
    write_run(out, "prompt-only", SCORES, settings={**budget, "prompt": {"rounds": 7, "minibatch": 3}})
    write_run(out, "prompt-only", SCORES, settings={"budget": {"tokens": 620, "matched": "full"}})
    write_run(out, "prompt-only", SCORES)
    (out / "broken").mkdir()
    (out / "broken" / "config.json").write_text('{"budget": {"matched": "joint"}}')
    assert matching.of_study(planned(tmp_path, all=ALL), [out]) == [mine]
    assert matching.of_study(planned(tmp_path, None, all=ALL), [out]) == []


# ---- end to end, on a random model ----


def cotune(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def in_this_process(
    todo: Sequence[Experiment],
    out: Path,
    _jobs: int,
    tell: Callable[[Experiment, dict[str, Any]], None],
    work: study.Work,
) -> list[Experiment]:
    for experiment in todo:
        tell(experiment, work(experiment, out))
    return []


def test_a_matched_study_ends_at_its_budget_continues_and_is_compared(
    tmp_path: Path, random_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "_in_workers", in_this_process)  # a worker takes seconds to begin
    file, out = tmp_path / "x.toml", tmp_path / "out"
    for split in ("train", "test"):
        rows = [{"question": f"{split} {n} + 1 ?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(20)]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    file.write_text(
        f'model = "{random_model_dir}"\ntask = "gsm8k"\ndata = "{tmp_path}"\n'
        'strategy = ["prompt-only", "lora-only", "joint"]\n'
        "limit_train = 8\nlimit_val = 2\nlimit_test = 2\n[decoding]\nmax_new_tokens = 2\n"
        '[prompt]\nproposer = "edits"\nrounds = 1\ncandidates = 2\ndemonstration_sets = 0\nfinalists = 1\n'
        "[weights]\nepochs = 1\nrank = 2\nalpha = 4\n"
        "[joint]\nepochs = 6\nrank = 2\nwidth = 8\nshare = 0.5\ngenerator_rank = 2\nrollouts = 1\n"
        "max_prompt_tokens = 4\n"
    )
    command = ("study", file, "--match-budget", "joint", "--out", out, "--json")
    before = cotune(*command, "--plan")
    assert before.exit_code == 0, before.output
    report = json.loads(before.stdout)
    own, again = report["runs"][:3], report["runs"][3:]
    assert [(row["strategy"], row["matched"], row["run"]) for row in again] == [
        (strategy, "joint", None) for strategy in ("prompt-only", "lora-only")
    ]
    assert {row["tuning_tokens"] for row in again} == {own[2]["tuning_tokens"]}
    assert [row["tuning_flops"] for row in (*again, report["total"])] == [None] * 3
    assert [row["measuring_tokens"] for row in again] == [row["measuring_tokens"] for row in own[:2]]

    first = cotune(*command)
    assert first.exit_code == 0, first.output
    rows = json.loads(first.stdout)["runs"]
    assert [row["status"] for row in rows] == ["done"] * 5
    tokens = [json.loads((out / r["run"] / "summary.json").read_text())["cost"]["tuning"]["tokens"] for r in rows]
    budget = tokens[2]
    for row, used, own_use in zip(rows[3:], tokens[3:], tokens[:2], strict=True):
        kept = json.loads((out / row["run"] / "config.json").read_text())
        assert kept["budget"] == {"tokens": budget, "flops": None, "seconds": None, "matched": "joint"}
        assert own_use < used <= budget
        assert used > 0.8 * budget, row

    second = cotune(*command)
    assert [row["skipped"] for row in json.loads(second.stdout)["runs"]] == [True] * 5
    assert second.stderr.splitlines()[-1].startswith(f"[5/5] done    {rows[4]['run']} @ joint's budget: accuracy")

    file.write_text('match_budget = "joint"\n' + file.read_text())
    (group,) = json.loads(cotune("compare", out, "--study", file, "--json").stdout)["groups"]
    assert [row["strategy"] for row in group["rows"]] == [
        "prompt-only",
        "prompt-only @ joint's budget",
        "lora-only",
        "lora-only @ joint's budget",
        "joint",
    ]
    used = [row["budget_used"] for row in group["rows"]]
    assert [share is None for share in used] == [True, False, True, False, True]
    assert used[1] == pytest.approx(tokens[3] / budget)
