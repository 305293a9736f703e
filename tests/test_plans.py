"""Inference plans through `evaluate`: votes, ties, scorers that fail, costs, one draw read for every smaller number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
from toy import Sums, bench, example

from cotune import plans, scorers
from cotune.aggregation import majority_accuracy
from cotune.config import PlanConfig, resolve
from cotune.engines.base import Request, Sampling
from cotune.engines.fake import FakeEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.experiment import prediction_rows, scores
from cotune.models.base import BaseModel
from cotune.plans import block_scores, check, choose, curve, regraded, sampling_of
from cotune.scorers import LogProbability
from cotune.strategies import load_tuned
from cotune.strategies.base import Fixed
from cotune.tasks import task as make_task
from cotune.values import GREEDY, Completion, Conditioning, Evaluation, Example, InferencePlan, Outcome, Prompt

PROMPT = Prompt("Add the numbers.")
EXAMPLES = [example(0), example(1), example(2)]  # 4, 7, 10
SAMPLING = Sampling(16)


def majority(n: int) -> InferencePlan:
    return InferencePlan("majority", n, None, 1.0)


def said(*texts: str) -> FakeEngine:
    """Sample s of any question is `texts[s]`; every other question alike."""
    return FakeEngine(lambda rendered, adapter, sample: texts[sample])


class Unsure(FakeEngine):
    """Its tokens have the log-probabilities that `of` gives for a text; none at all for an empty one."""

    def __init__(self, of: Callable[[str], float], *texts: str) -> None:
        super().__init__(lambda rendered, adapter, sample: texts[sample])
        self.of = of

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        assert sampling.logprobs
        rows = super().generate(requests, sampling)
        return [
            [
                Completion(c.text, c.token_ids, c.prompt_tokens, c.truncated, (self.of(c.text),) * len(c.token_ids))
                for c in row
            ]
            for row in rows
        ]


def run(base: BaseModel, engine: FakeEngine, *of: InferencePlan) -> Evaluation:
    conditionings = [Conditioning(PROMPT, plan=plan) for plan in of]
    return evaluate(Sums(), EXAMPLES[: len(of)], conditionings, SAMPLING, bench(base, engine))


def test_the_majority_is_the_answer_and_all_samples_are_paid_for(random_base: BaseModel) -> None:
    engine = said("so 5", "so 4", "it is 4", "9")
    at = bench(random_base, engine)
    done = evaluate(Sums(), EXAMPLES[:1], [Conditioning(PROMPT, plan=majority(4))], SAMPLING, at)
    (grade,), (samples,) = done.grades, done.samples
    assert (grade.prediction, grade.outcome, grade.score, grade.note) == ("4", Outcome.CORRECT, 1.0, "")
    assert done.completions[0].text == "so 4"
    assert samples is not None
    assert (samples.votes, samples.agreement) == (("5", "4", "4", "9"), 0.5)
    assert (at.ledger.tuning.calls, at.ledger.tuning.generated_tokens) == (4, 2 + 2 + 3 + 1)
    assert at.ledger.tuning.prompt_tokens == engine.token_count(done.rendered[0])  # read once for all four
    (row,) = prediction_rows(done)
    assert row["generated_tokens"] == 8


@pytest.mark.parametrize(
    ("texts", "score", "outcome"),
    [
        (("4", "5"), 0.5, Outcome.CORRECT),
        (("5", "4"), 0.5, Outcome.WRONG),  # the answer that was drawn first is given
        (("5", "4", "6"), 1 / 3, Outcome.WRONG),
        (("5", "none", "none", "5"), 0.0, Outcome.WRONG),
        (("none", "none", "4"), 0.0, Outcome.WRONG),  # no answer is an answer, and wins (aggregation.py)
    ],
)
def test_tied_answers_share_the_credit(
    random_base: BaseModel, texts: tuple[str, ...], score: float, outcome: Outcome
) -> None:
    done = run(random_base, said(*texts), majority(len(texts)))
    (grade,) = done.grades
    assert (grade.score, grade.outcome) == (pytest.approx(score), outcome)
    assert ("tied" in grade.note) == (score > 0 or texts[0] == "5")


def test_the_first_drawn_of_the_tied_is_each_of_them_equally_often() -> None:
    """Over all orders that draws can come in, so it is IAPO's uniform choice."""
    given = [plans.decided(Sums(), EXAMPLES[0], majority(4), drawn(order), ()) for order in product("45", repeat=4)]
    tied = [s.votes[s.chosen] for s in given if len(s.shares) == 2]
    assert (tied.count("4"), tied.count("5")) == (3, 3)


def drawn(texts: Sequence[str]) -> list[Completion]:
    return [Completion(text, (1,), 1, False) for text in texts]


def test_the_expected_credit_is_the_exact_accuracy_of_the_sheet() -> None:
    """Worked example of sheet 11: probabilities (0.4, 0.2, 0.2, 0.2), N = 3 -> 0.448; summed over all draws."""
    chance = {"4": 0.4, "5": 0.2, "6": 0.2, "7": 0.2}
    total = 0.0
    for texts in product(chance, repeat=3):
        samples = plans.decided(Sums(), EXAMPLES[0], majority(3), drawn(texts), ())
        total += math.prod(chance[t] for t in texts) * plans.judged(Sums(), EXAMPLES[0], samples)[0].score
    assert total == pytest.approx(0.448)
    assert total == pytest.approx(majority_accuracy(list(chance.values()), 3)[2])


def test_best_of_takes_the_likeliest_completion_and_weights_add_up(random_base: BaseModel) -> None:
    of = {"4": -0.1, "5": -0.5, "5 5": -0.5, "6": -3.0}  # exp: 0.905, 0.607, 0.607, 0.050
    texts = ("6", "5", "5 5", "4")
    best = run(random_base, Unsure(of.__getitem__, *texts), InferencePlan("best-of", 4, "log-probability", 1.0))
    weighted = InferencePlan("weighted-best-of", 4, "log-probability", 1.0)
    summed = run(random_base, Unsure(of.__getitem__, *texts), weighted)
    assert (best.grades[0].prediction, summed.grades[0].prediction) == ("4", "5")
    assert best.samples[0] is not None
    assert best.samples[0].scores == pytest.approx([math.exp(of[t]) for t in texts])


def test_self_consistency_as_a_scorer_is_the_majority() -> None:
    for votes in product(("a", "b", "c", None), repeat=4):
        for aggregation in ("best-of", "weighted-best-of"):
            plan = InferencePlan(aggregation, 4, "self-consistency", 1.0)  # type: ignore[arg-type]
            assert choose(plan, votes, ()) == choose(majority(4), votes, ())


def test_completions_that_a_scorer_cannot_score_win_nothing(random_base: BaseModel) -> None:
    plan = InferencePlan("best-of", 3, "log-probability", 1.0)
    some = run(random_base, Unsure(lambda _: -5.0, "", "", "4"), plan)
    assert (some.grades[0].prediction, some.grades[0].score) == ("4", 1.0)
    assert some.grades[0].note == "2 of 3 completions have no score and count 0"
    none = run(random_base, Unsure(lambda _: math.nan, "4", "5", "4"), plan)
    assert none.grades[0].score == 0.5  # two answers, tied at 0
    assert none.grades[0].note.endswith("3 of 3 completions have no score and count 0")


class Broken:
    logprobs: ClassVar[bool] = False

    def score(self, prompt: str, completions: Sequence[Completion]) -> Sequence[float | None]:
        if len(completions) > 2:
            raise RuntimeError("out of order")
        return [1.0]


def test_a_scorer_that_raises_costs_no_run_and_one_that_miscounts_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(scorers.SCORERS, "broken", f"{__name__}:Broken")
    plan = InferencePlan("best-of", 3, "broken", 1.0)
    assert plans.scored(plan, "", drawn(("4", "5", "6"))) == (None, None, None)
    assert "The scorer broken has failed: RuntimeError: out of order" in caplog.text
    with pytest.raises(UsageError, match="gave 1 scores to 2 completions"):
        plans.scored(plan, "", drawn(("4", "5")))


def test_no_answer_among_the_samples_is_a_wrong_answer_and_cut_ones_are_truncated(random_base: BaseModel) -> None:
    for texts, outcome in ((("what", "no"), Outcome.WRONG), ((" ".join("4" * 17), "no"), Outcome.TRUNCATED)):
        (grade,) = run(random_base, said(*texts), majority(2)).grades
        assert (grade.prediction, grade.outcome, grade.score) == (None, outcome, 0.0)


def test_examples_may_have_different_plans_and_those_that_sample_alike_share_batches(random_base: BaseModel) -> None:
    engine = said("4", "7", "7", "7")
    done = run(random_base, engine, GREEDY, majority(4), InferencePlan("best-of", 4, "self-consistency", 1.0))
    assert [g.prediction for g in done.grades] == ["4", "7", "7"]
    assert [g.score for g in done.grades] == [1.0, 1.0, 0.0]
    assert [s is None for s in done.samples] == [True, False, False]
    assert len(engine.calls) == 3
    told = scores(prediction_rows(done), [])
    assert (told["plan"]["examples"], len(told["plan"]["plans"]), told["plan"]["curve"]) == (2, 2, [])


def test_a_plan_of_fewer_samples_sees_the_first_of_a_larger_one(random_base: BaseModel) -> None:
    at = bench(random_base, TransformersEngine(random_base, threads=1))
    conditionings = [Conditioning(PROMPT, plan=majority(n)) for n in (2, 5)]
    few, many = evaluate(Sums(), [EXAMPLES[0]] * 2, conditionings, Sampling(6), at).samples
    assert few is not None
    assert many is not None
    assert [c.text for c in few.completions] == [c.text for c in many.completions[:2]]
    assert len({c.text for c in many.completions}) > 1


# ---- one draw for every smaller number ----


def test_the_curve_reads_disjoint_blocks_of_one_draw(random_base: BaseModel) -> None:
    rows = prediction_rows(run(random_base, said("5", "4", "4", "4", "6"), majority(5)))
    found = curve(json.loads(json.dumps(rows)))
    assert [(p["samples"], p["score"], p["generated_tokens"]) for p in found] == [
        (1, 3 / 5, 1.0),
        (2, (0.5 + 1) / 2, 2.0),  # 5 4 | 4 4, and one left over
        (4, 1.0, 4.0),
        (5, 1.0, 5.0),
    ]
    assert curve([]) == curve([{"score": 1.0}]) == []


def test_blocks_of_one_draw_are_unbiased_for_every_size() -> None:
    chance = {"4": 0.5, "5": 0.3, "6": 0.2}
    worth: dict[str | None, float] = {"4": 1.0, "5": 0.0, "6": 0.0}
    exact = majority_accuracy(list(chance.values()), 4)
    for n in (1, 2, 3, 4):
        total = 0.0
        for votes in product(chance, repeat=4):
            found = block_scores(majority(4), votes, (), worth, n)
            assert len(found) == 4 // n
            total += math.prod(chance[v] for v in votes) * sum(found) / len(found)
        assert total == pytest.approx(exact[n - 1])


def test_a_new_grading_chooses_again_from_the_texts(random_base: BaseModel) -> None:
    of = {"4": -0.1, "5": -0.5, "5 5": -0.5, "6": -3.0}
    for plan in (majority(4), *(InferencePlan(a, 4, "log-probability", 1.0) for a in ("best-of", "weighted-best-of"))):  # type: ignore[arg-type]
        engine = said(*of) if plan.scorer is None else Unsure(of.__getitem__, *of)
        (row,) = json.loads(json.dumps(prediction_rows(run(random_base, engine, plan))))
        grade, follows = regraded(Sums(), EXAMPLES[0], row)
        assert (grade.score, grade.prediction, grade.note) == (row["score"], row["prediction"], row["note"])
        assert {key: row[key] for key in follows} == follows


# ---- plans as values ----


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (majority(0), "0 answers nothing; choose at least 1"),
        (InferencePlan("greedy", 2), "greedy is one completion"),
        (InferencePlan("majority", 2), "At temperature 0 2 samples are all the same"),
        (InferencePlan("majority", 2, "log-probability", 1.0), "reads no scorer"),
        (InferencePlan("best-of", 2, None, 1.0), "needs a scorer"),
        (InferencePlan("best-of", 2, "log-probabilty", 1.0), "Did you mean 'log-probability'"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(random_base: BaseModel, plan: InferencePlan, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check(plan)
    engine = said("4")
    with pytest.raises(UsageError, match=why):
        run(random_base, engine, plan)
    assert engine.calls == []


def test_what_a_plan_asks_the_engine_for() -> None:
    decoding = Sampling(9, temperature=0.2, top_p=0.9, seed=5)
    assert sampling_of(GREEDY, decoding) is decoding
    assert sampling_of(majority(8), decoding) == Sampling(9, 1.0, 1.0, 8, 5)
    ranked = InferencePlan("best-of", 2, "log-probability", 0.5, 0.8)
    assert sampling_of(ranked, decoding) == Sampling(9, 0.5, 0.8, 2, 5, logprobs=True)


def test_the_config_names_plans_and_greedy_runs_keep_their_digests() -> None:
    named = {"strategy": "zero-shot", "model": "m", "task": "gsm8k"}
    assert resolve(named).plan.value == GREEDY
    assert "plan" not in resolve(named).model_dump(mode="json")
    voting = resolve(named, {"plan": {"aggregation": "majority", "samples": 8}})
    assert voting.plan.value == InferencePlan("majority", 8, None, 0.7)
    assert resolve(voting.model_dump(mode="json")) == voting
    assert voting.digest != resolve(named).digest
    assert PlanConfig(aggregation="best-of", samples=2).value.scorer == "log-probability"
    with pytest.raises(UsageError, match="greedy is one completion"):
        resolve(named, {"plan": {"samples": 8}})
    with pytest.raises(UsageError, match=r"plan\.samples = 0"):
        resolve(named, {"plan": {"aggregation": "majority", "samples": 0}})


def test_what_is_tuned_keeps_its_plan_and_greedy_files_know_of_none(tmp_path: Path, random_base: BaseModel) -> None:
    Fixed(PROMPT).save(tmp_path / "greedy")
    assert "plan" not in json.loads((tmp_path / "greedy/tuned.json").read_text())
    voting = Fixed(PROMPT, plan=majority(8))
    voting.save(tmp_path / "voting")
    assert load_tuned(tmp_path / "voting", random_base) == voting
    assert [c.plan for c in voting.condition(EXAMPLES, None)] == [majority(8)] * 3
    content = json.loads((tmp_path / "voting/tuned.json").read_text())
    for wrong in ({"samples": 0}, {"nonsense": 1}):
        (tmp_path / "voting/tuned.json").write_text(json.dumps(content | {"plan": content["plan"] | wrong}))
        with pytest.raises(UsageError):
            load_tuned(tmp_path / "voting", random_base)


def test_a_log_probability_is_the_mean_over_tokens() -> None:
    found = LogProbability().score("", [Completion("a b", (1, 2), 1, False, (-1.0, -3.0)), Completion("", (), 1, True)])
    assert found == [pytest.approx(math.exp(-2.0)), None]


# ---- votes ----


@pytest.mark.parametrize(
    ("task", "completions", "votes"),
    [
        ("gsm8k", ("#### 18", "so 18.00 in all", "$1,800", "no idea"), ("18", "18", "1800", None)),
        ("math", (r"\boxed{ x + 1 }", r"\boxed{x+1}", "none"), ("x+1", "x+1", None)),
        ("hotpotqa", ("Answer: The Beatles", "beatles."), ("beatles", "beatles")),
        ("cosmosqa", ("(B)", "went home", "who knows"), ("B", "B", None)),
    ],
)
def test_answers_that_mean_the_same_vote_together_without_a_reference(
    task: str, completions: tuple[str, ...], votes: tuple[str | None, ...]
) -> None:
    question: Any = Example("x", "?", "", choices=("stayed", "went home", "slept", "ate"))
    assert tuple(make_task(task).vote(question, text) for text in completions) == votes
    assert make_task(task).vote(question, "it was just about to", truncated=True) is None


@pytest.mark.parametrize("task", ["gsm8k", "math", "hotpotqa", "cosmosqa"])
def test_the_choice_does_not_know_the_reference(task: str) -> None:
    completions = drawn(["#### 1", "the answer is 2", "(B)", r"\boxed{3}", "the answer is 2", "nothing"])
    plan = InferencePlan("best-of", 6, "self-consistency", 1.0)
    made = [
        plans.decided(
            make_task(task), Example("x", "?", reference, choices=("a", "b", "c", "d")), plan, completions, ()
        )
        for reference in ("1", "2", "B", "")
    ]
    assert all(samples == made[0] for samples in made)
