"""A plan by difficulty: carried out without drawing twice, chosen on a model whose chances are known, taken home."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_plan_runs import QUESTIONS, answered
from test_pulls import Chancy
from toy import Sums, bench, example, of_kind, problem
from typer.testing import CliRunner

from cotune import by_difficulty
from cotune.bench import MemoryStore
from cotune.by_difficulty import offered_plans
from cotune.cli import app
from cotune.config import DifficultyConfig, InferenceConfig, RunConfig, VerifierConfig, resolve
from cotune.diagnosis import warnings
from cotune.difficulty.choosing import Choice
from cotune.engines.base import Request, Sampling
from cotune.engines.fake import FakeEngine
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.experiment import prediction_rows, scores
from cotune.export import export
from cotune.finished import regrade
from cotune.models.base import BaseModel
from cotune.opened import open_any
from cotune.plans import check_bins, loaded_plan, recorded, saved_plan
from cotune.pulls import learner
from cotune.record import read_json, read_rows
from cotune.strategies import plan_only
from cotune.strategies.base import Fixed
from cotune.strategies.plan_only import PlanOnly
from cotune.tasks import task as make_task
from cotune.values import (
    AnyPlan,
    Completion,
    Conditioning,
    Evaluation,
    Event,
    InferencePlan,
    PlanByDifficulty,
    Prompt,
    Samples,
    Told,
)
from tests.conftest import finished_run
from tests.serve.test_app import question, visit

PROMPT = Prompt("Add the numbers.")
EXAMPLES = [example(i) for i in range(4)]
SAMPLING = Sampling(16)


def majority(n: int) -> InferencePlan:
    return InferencePlan("majority", n, None, 1.0)


BINNED = PlanByDifficulty(2, None, (-0.1,), (majority(2), majority(5)))


def unsure(rendered: str, adapter: str | None, sample: int) -> str:
    """Of questions with an even first number it is sure; of the others every sample says something else."""
    first = int(rendered.rsplit("What is ", 1)[1].split()[0])
    return "7" if first % 2 == 0 else " ".join(["so"] * sample + [str(sample)])


def run(base: BaseModel, engine: FakeEngine, plan: AnyPlan, **given: Any) -> tuple[Evaluation, Any]:
    at = bench(base, engine)
    conditionings = [Conditioning(PROMPT, plan=plan)] * len(EXAMPLES)
    return evaluate(Sums(), given.get("examples", EXAMPLES), conditionings, SAMPLING, at), at.ledger.tuning


# ---- carried out ----


def test_each_question_has_the_samples_of_its_bins_plan_and_none_is_drawn_twice(random_base: BaseModel) -> None:
    engine = FakeEngine(unsure)
    done, spent = run(random_base, engine, BINNED)
    of_bin = [run(random_base, FakeEngine(unsure), plan)[0] for plan in BINNED.plans]
    bins = [1, 0, 1, 0]  # first numbers 3, 4, 5, 6
    for i, b in enumerate(bins):
        ours, alone = done.samples[i], of_bin[b].samples[i]
        assert ours is not None and ours.told is not None and alone is not None
        assert (ours.told.bin, ours.plan) == (b, BINNED.plans[b])
        assert ours.completions == alone.completions
        assert replace(ours, told=None) == alone
        assert done.grades[i] == of_bin[b].grades[i]
    tokens = [sum(c.generated_tokens for c in s.completions) for s in done.samples if s]
    assert spent.generated_tokens == sum(tokens) == 2 * 2 + 2 * (1 + 2 + 3 + 4 + 5)
    assert spent.calls == 2 * 2 + 2 * 5
    prompts = [engine.token_count(text) for text in done.rendered]
    assert spent.prompt_tokens == sum(prompts) + prompts[0] + prompts[2]  # those that go on are read a second time
    assert [(r.first, len({c.prompt for c in engine.calls})) for r in engine.calls] == [(0, 4)] * 4 + [(2, 4)] * 2


def test_the_same_probe_with_no_more_samples_is_one_generation(random_base: BaseModel) -> None:
    engine = FakeEngine(unsure)
    run(random_base, engine, replace(BINNED, plans=(majority(2), majority(2))))
    assert len(engine.calls) == len(EXAMPLES)


def test_rows_and_summary_say_bins_shares_samples_and_scores(random_base: BaseModel) -> None:
    rows = prediction_rows(run(random_base, FakeEngine(unsure), BINNED)[0])
    assert [row["difficulty"]["bin"] for row in rows] == [1, 0, 1, 0]
    assert [row["plan"] for row in rows] == [recorded(BINNED.plans[b]) for b in (1, 0, 1, 0)]
    found = scores(rows, [])["plan"]
    assert (found["curve"], found["samples"]) == ([], 3.5)
    assert [(b["bin"], b["share"], b["samples"]) for b in found["bins"]] == [(0, 0.5, 2), (1, 0.5, 5)]
    assert [b["score"] for b in found["bins"]] == [sum(rows[i]["score"] for i in p) / 2 for p in ((1, 3), (0, 2))]
    same_bin = [row for row in rows if row["difficulty"]["bin"] == 0]
    assert scores(same_bin, [])["plan"]["curve"] == []  # one sample would not have told the bin


class Full(FakeEngine):
    """No prompt leaves room for an answer."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        self.calls += requests
        return [[Completion("", (), 9, True)] * sampling.n for _ in requests]


def test_where_no_answer_fits_nothing_more_is_asked(random_base: BaseModel) -> None:
    engine = Full(unsure)
    done, _ = run(random_base, engine, BINNED)
    assert len(engine.calls) == 4
    assert [len(s.completions) for s in done.samples if s] == [5] * 4


def test_no_reference_reaches_the_probe(random_base: BaseModel) -> None:
    task = make_task("micro-gsm8k")
    told: list[list[tuple[Told | None, InferencePlan]]] = []
    for reference in ("7", "11", "0"):
        examples = [replace(e, reference=reference) for e in EXAMPLES]
        conditionings = [Conditioning(PROMPT, plan=BINNED)] * 4
        done = evaluate(task, examples, conditionings, SAMPLING, bench(random_base, FakeEngine(unsure)))
        told.append([(s.told, s.plan) for s in done.samples if s])
    assert told[0] == told[1] == told[2]
    assert {t.bin for t, _ in told[0] if t} == {0, 1}


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (replace(BINNED, edges=(-0.1, -0.1)), "falling edges"),
        (replace(BINNED, edges=()), "0 edges and 2 plans"),
        (replace(BINNED, edges=(float("nan"),)), "falling edges"),
        (replace(BINNED, probe=3), "cannot be part of the plan majority of 2"),
        (replace(BINNED, plans=(majority(2), InferencePlan("majority", 5, None, 0.5))), "temperature and top_p"),
        (replace(BINNED, scorer="self-consistency"), "rates no sample apart"),
        (replace(BINNED, scorer="best"), "There is no scorer 'best'"),
        (replace(BINNED, probe=0), "at least 1"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(plan: PlanByDifficulty, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check_bins(plan)
    with pytest.raises(UsageError, match=why):
        loaded_plan(json.loads(json.dumps(saved_plan(plan))))


def test_what_is_saved_is_loaded() -> None:
    edges = (-0.1, -1 / 3)
    plan = PlanByDifficulty(2, "log-probability", edges, (majority(2), majority(5), majority(3)))
    assert loaded_plan(json.loads(json.dumps(saved_plan(plan)))) == plan
    with pytest.raises(UsageError, match="damaged"):
        loaded_plan({"plan": {**saved_plan(plan)["plan"], "more": 1}})


# ---- chosen ----

GIVEN = InferenceConfig(samples=12, completions=12 * 80, cost_weight=2.0)  # 0.01 for a completion of five tokens
DIFFICULTY = DifficultyConfig(bins=2, probe=2)


def by_question(easy: float, hard: float) -> Chancy:
    """Questions with an even first number have the one chance, the others the other."""
    return Chancy(lambda instruction, text: easy if int(text.split()[2]) % 2 == 0 else hard)


def tune(base: BaseModel, engine: FakeEngine, events: list[Event] | None = None, **at: Any) -> Fixed:
    made = PlanOnly(GIVEN, learner(GIVEN, 1), VerifierConfig(), at.pop("difficulty", DIFFICULTY))
    found = made.tune(Fixed(PROMPT), problem(base), bench(base, engine, events=events, **at))
    assert isinstance(found, Fixed)
    return found


def test_hard_questions_get_more_samples_and_both_together_do_more_than_one_number(random_base: BaseModel) -> None:
    events: list[Event] = []
    found = tune(random_base, by_question(1.0, 0.7), events).plan
    assert isinstance(found, PlanByDifficulty)
    assert found.plans[0].samples == 2 < found.plans[1].samples
    (policy,) = of_kind(events, "policy")
    assert policy["by_difficulty"] and policy["gain"] > policy["error"]
    assert policy["completions"] == 12 * 80
    # On other questions: the score, and what the best plan of as many samples or more scores.
    train, others = problem(random_base), [example(i) for i in range(100, 500)]
    adaptive = _score(random_base, found, train.task, others)
    uniform = _score(random_base, majority_of(found, adaptive[1]), train.task, others)
    assert uniform[1] >= adaptive[1]
    assert adaptive[0] > uniform[0]


def majority_of(plan: PlanByDifficulty, mean: float) -> InferencePlan:
    return replace(plan.plans[0], samples=-int(-mean // 1))


def _score(base: BaseModel, plan: AnyPlan, task: Any, examples: list[Any]) -> tuple[float, float]:
    conditionings = [Conditioning(PROMPT, plan=plan)] * len(examples)
    done = evaluate(task, examples, conditionings, SAMPLING, bench(base, by_question(1.0, 0.7)))
    return done.score, sum(len(s.completions) for s in done.samples if s) / len(examples)


def test_where_all_are_alike_one_plan_answers_all_and_the_run_says_so(random_base: BaseModel) -> None:
    events: list[Event] = []
    found = tune(random_base, by_question(1.0, 1.0), events).plan
    assert found == InferencePlan("majority", 1, None, 0.7)
    (policy,) = of_kind(events, "policy")
    assert not policy["by_difficulty"]
    (note,) = warnings([{"kind": e.kind, **e.data} for e in events])
    assert "one plan of 1 sample answers all" in note


def test_the_rest_of_a_killed_run_gives_the_same(random_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_difficulty, "_AT_ONCE", 8)
    whole: list[Event] = []
    expected = tune(random_base, by_question(1.0, 0.7), whole)

    class Killed(Chancy):
        left = 4

        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().generate(requests, sampling)

    store, again = MemoryStore(), list[Event]()
    with pytest.raises(KeyboardInterrupt):
        tune(random_base, Killed(by_question(1.0, 0.7).of), store=store)
    engine = by_question(1.0, 0.7)
    assert tune(random_base, engine, again, store=store) == expected
    strip = lambda events: [(e.kind, e.data) for e in events if e.kind != "progress"]  # noqa: E731
    assert strip(again) == strip(whole)
    assert len(engine.calls) == 80 - 4 * 8


def test_an_exhausted_budget_chooses_by_what_was_drawn(random_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_difficulty, "_AT_ONCE", 8)
    assert tune(random_base, by_question(1.0, 0.7), tokens=0) == Fixed(PROMPT)
    events: list[Event] = []
    found = tune(random_base, by_question(1.0, 0.7), events, tokens=4000)
    (policy,) = of_kind(events, "policy")
    assert 0 < policy["completions"] < 12 * 80
    assert len(of_kind(events, "budget")) == 1
    assert found.plan != Fixed(PROMPT).plan


def test_what_is_offered_is_rated_only_where_samples_are() -> None:
    kinds = [(p.aggregation, p.samples) for p in offered_plans(InferenceConfig(samples=2))]
    assert kinds == [("majority", 1), ("majority", 2)]
    rated = offered_plans(InferenceConfig(samples=2, aggregation="best-of"))
    assert [(p.aggregation, p.samples, p.scorer) for p in rated] == [
        ("majority", 1, None),
        ("majority", 2, None),
        ("best-of", 2, "log-probability"),
        ("weighted-best-of", 2, "log-probability"),
    ]


def test_one_draw_is_read_from_every_probe_on() -> None:
    """Votes 4, 4, 5, 6 of which 4 is right, tokens 1 to 4, price 0.1 a token: by hand for N = 1, 2, 3, 4."""
    votes = ("4", "4", "5", "6")
    completions = tuple(Completion(vote, (1,) * (i + 1), 1, False) for i, vote in enumerate(votes))
    samples = Samples(completions, votes, (), {"4": 1.0}, 0, majority(4))
    given = InferenceConfig(samples=4, cost_weight=100.0)
    found = by_difficulty._columns((samples, {"4": 1.0, "5": 0.0, "6": 0.0}), offered_plans(given), given, DIFFICULTY)
    assert [ease for _, ease in found] == pytest.approx([0.0, -math.log(2)])
    first, second = (utility for utility, _ in found)
    assert first == pytest.approx([1 - 0.1, 1 - 0.3, 1 - 0.6, 1 - 1.0])
    assert second == pytest.approx([0 - 0.3, 0 - 0.7, 1 / 3 - 0.8, 1 - 1.0])  # 5, 6, 4, 4


def test_difficulty_by_rating_needs_no_votes(random_base: BaseModel) -> None:
    """All ratings are alike (the fake's log-probabilities are 0), so there is one bin."""
    given = GIVEN.model_copy(update={"aggregation": "best-of"})
    at = bench(random_base, FakeEngine(unsure))
    difficulty = DifficultyConfig(bins=2, probe=2, told_by="rating")
    found = PlanOnly(given, learner(given, 1), VerifierConfig(), difficulty).tune(
        Fixed(PROMPT), problem(random_base), at
    )
    assert isinstance(found, Fixed) and isinstance(found.plan, InferencePlan)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"strategy": "inference-aware"}, "one plan for all"),
        ({"inference": {"learner": "ucb"}}, "leave inference.learner out"),
        ({"difficulty": {"probe": 17}}, "more than inference.samples = 16"),
        ({"difficulty": {"probe": 1}}, "one answer has no entropy"),
        ({"difficulty": {"told_by": "rating"}}, "rated one by one"),
        ({"difficulty": {"bins": 0}}, "difficulty.bins = 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], why: str) -> None:
    given = {"strategy": "plan-only", "model": "m", "task": "gsm8k", "difficulty": {"bins": 5}}
    with pytest.raises(UsageError, match=why):
        resolve(given, settings)


def test_runs_without_it_keep_their_digests() -> None:
    config = resolve({"strategy": "plan-only", "model": "m", "task": "gsm8k"})
    assert "difficulty" not in config.model_dump(mode="json")
    other = resolve({"strategy": "plan-only", "model": "m", "task": "gsm8k", "difficulty": {"bins": 2}})
    assert config.digest != other.digest
    assert RunConfig(**other.model_dump(mode="json")) == other


# ---- from the command line to what is taken home ----

SMALL: dict[str, Any] = {"inference__samples": 4, "inference__completions": 32, "difficulty__bins": 2}


@pytest.fixture(scope="module")
def binned(tmp_path_factory: pytest.TempPathFactory, random_model_dir: Path) -> Path:
    """A run whose two test questions are in two bins: the edge lies between their ratings, which a run before shows."""
    out = tmp_path_factory.mktemp("binned")
    before = finished_run(
        out, random_model_dir, "zero-shot", 8,
        plan__aggregation="best-of", plan__samples=2, plan__temperature=1.3,
    )  # fmt: skip
    ratings = [sum(row["samples"]["scores"]) / 2 for row in read_rows(before / "predictions.jsonl")]
    plans = InferencePlan("majority", 2, None, 1.3), InferencePlan("best-of", 4, "log-probability", 1.3)
    plan = PlanByDifficulty(2, "log-probability", (sum(ratings) / 2,), plans)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_only, "plan_by_difficulty", lambda pulls, difficulty, bench: plan)
        return finished_run(out, random_model_dir, "plan-only", 8, **SMALL, difficulty__probe=2)


def test_the_run_records_bins_and_a_new_grading_keeps_them(binned: Path) -> None:
    summary, rows = read_json(binned / "summary.json"), read_rows(binned / "predictions.jsonl")
    assert sorted(row["difficulty"]["bin"] for row in rows) == [0, 1]
    assert [len(row["samples"]["votes"]) for row in rows] == [row["plan"]["samples"] for row in rows]
    assert summary["plan"]["samples"] == 3.0
    assert summary["serving"]["answers"]["written_tokens"] == sum(row["generated_tokens"] for row in rows) / 2
    assert "  plan by difficulty: 3.0 samples per example" in CliRunner().invoke(app, ["show", str(binned)]).output
    before = (binned / "predictions.jsonl").read_bytes(), summary
    assert regrade(binned)["changed"] == 0
    assert ((binned / "predictions.jsonl").read_bytes(), read_json(binned / "summary.json")) == before


def test_run_bundle_and_server_answer_alike(binned: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export(binned, bundle)
    expected = answered(binned, tmp_path)
    assert answered(bundle, tmp_path) == expected
    assert [row["samples"] for row in expected] == [[2, 4][row["bin"]] for row in expected]
    content = read_json(bundle / "bundle.json")["plan"]
    assert "aggregate" not in content
    assert content["by_difficulty"] == read_json(binned / "tuned/tuned.json")["plan"]
    assert "put it into a bin by their mean log-probability" in (bundle / "README.md").read_text()
    opened = open_any(bundle)

    async def ask(client: Any) -> list[Any]:
        bodies = [question(opened, text, **more) for text in QUESTIONS for more in ({}, {"temperature": 0.0})]
        return [(await client.post("/v1/chat/completions", json=body)).json() for body in bodies]

    replies = visit(opened, ask)
    for row, reply in zip(expected, replies[::2], strict=True):
        assert reply["choices"][0]["message"]["content"] == row["completion"]
        assert (reply["cotune"]["bin"], reply["cotune"]["plan"]["samples"]) == (row["bin"], row["samples"])
    assert all("bin" not in reply["cotune"] for reply in replies[1::2])


def test_the_stage_i_chooses_by_difficulty_too(
    tmp_path: Path, random_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that knows nothing bins gain nothing; here they are bought all the same, to see what follows."""
    monkeypatch.setattr(Choice, "parts", property(lambda self: True))
    run = finished_run(
        tmp_path, random_model_dir, "sequential", 4, sequential__stages="w,i", **SMALL,
        weights__rank=2, weights__epochs=1, weights__learning_rate=0.05, weights__batch_size=4, noise_examples=0,
    )  # fmt: skip
    plan = read_json(run / "tuned/tuned.json")["plan"]
    assert (plan["probe"], len(plan["plans"])) == (4, len(plan["edges"]) + 1)
    rows, crossed = read_rows(run / "predictions.jsonl"), read_rows(run / "crossed.jsonl")
    assert all("difficulty" in row for row in rows)
    assert ["difficulty" in row for row in crossed] == [row["cell"].endswith("tuned") for row in crossed]
    (policy,) = (e for e in read_rows(run / "events.jsonl") if e["kind"] == "policy")
    assert policy["by_difficulty"] and policy["completions"] == 32
