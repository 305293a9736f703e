"""Chains of revisions through `evaluate`: who sees what, what it costs, what one draw of chains serves, bad input."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from chat_server import reply_of, serving
from toy import Sums, bench, example, of_kind
from typer.testing import CliRunner

from cotune.aggregation import majority_accuracy, weighted_best_of_n
from cotune.bench import MemoryStore
from cotune.cli import app
from cotune.compare.labels import variant_labels
from cotune.compare.runs import read_run
from cotune.config import resolve
from cotune.engines.base import Request, Sampling, stream_seed
from cotune.engines.cache import completion_keys
from cotune.engines.fake import FakeEngine
from cotune.engines.openai_engine import OpenAIEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import BudgetExhausted, UsageError
from cotune.evaluate import evaluate
from cotune.experiment import prediction_rows
from cotune.experiment import run as run_config
from cotune.export import export
from cotune.finished import regrade
from cotune.models.base import BaseModel
from cotune.models.black_box import BlackBox
from cotune.openai_client import ChatClient
from cotune.opened import open_any
from cotune.planning import plan as planned
from cotune.plans import check, choose, curve, recorded, regraded, served, tokens_read
from cotune.predict import predict
from cotune.record import read_json, read_rows
from cotune.revision import REVISE_INSTRUCTION, revision_messages
from cotune.values import Conditioning, Evaluation, Event, Example, InferencePlan, Prompt, digest
from tests.conftest import finished_run
from tests.serve.test_app import question, visit

PROMPT = Prompt("Add the numbers.")
EXAMPLES = [example(0), example(1), example(2)]  # 4, 7, 10


def majority(n: int, chain: int) -> InferencePlan:
    return InferencePlan("majority", n, None, 1.0, 1.0, chain)


def attempts_in(rendered: str) -> list[str]:
    turns = rendered.split("<|im_start|>assistant\n")[1:-1]  # the last one is to be written
    return [turn.split("<|im_end|>")[0] for turn in turns]


def run(base: BaseModel, engine: Any, plan: InferencePlan, examples: int = 1, limit: int = 16) -> Evaluation:
    chosen = EXAMPLES[:examples]
    return evaluate(Sums(), chosen, [Conditioning(PROMPT, plan=plan)] * examples, Sampling(limit), bench(base, engine))


def texts(done: Evaluation, i: int = 0) -> list[str]:
    samples = done.samples[i]
    assert samples is not None
    return [c.text for c in samples.completions]


# ---- what each attempt sees ----


def test_each_attempt_sees_the_latest_four_before_it_in_its_own_chain(random_base: BaseModel) -> None:
    engine = FakeEngine(lambda rendered, adapter, number: f"{len(attempts_in(rendered))}{'ab'[number]}")
    done = run(random_base, engine, majority(12, 6))
    assert texts(done) == ["0a", "1a", "2a", "3a", "4a", "4a", "0b", "1b", "2b", "3b", "4b", "4b"]
    last = [request.prompt for request in engine.calls[-2:]]
    assert [attempts_in(prompt) for prompt in last] == [["1a", "2a", "3a", "4a"], ["1b", "2b", "3b", "4b"]]
    assert last[0].count(REVISE_INSTRUCTION) == 4
    assert [request.first for request in engine.calls] == [0] + [0, 1] * 5  # the question once, for both chains


def test_attempts_at_one_place_are_generated_together(random_base: BaseModel) -> None:
    sizes: list[tuple[int, int]] = []

    class Counting(FakeEngine):
        def generate(self, requests: Any, sampling: Sampling) -> Any:
            sizes.append((len(requests), sampling.n))
            return super().generate(requests, sampling)

    run(random_base, Counting(lambda *_: "4"), majority(6, 3), examples=3)
    assert sizes == [(3, 2), (6, 1), (6, 1)]


def test_progress_counts_every_place_and_ends_with_the_score(random_base: BaseModel) -> None:
    events: list[Event] = []
    at = bench(random_base, FakeEngine(mending), events=events)
    evaluate(Sums(), EXAMPLES[:1], [Conditioning(PROMPT, plan=majority(10, 5))], Sampling(16), at, label="test")
    told = [(t["label"], t["done"], t["of"], t.get("score")) for t in of_kind(events, "progress")]
    assert told == [
        ("test, attempt 1 of 5", 1, 1, None),
        *((f"test, attempt {place} of 5", 2, 2, None) for place in (2, 3, 4, 5)),
        ("test", 1, 1, 1.0),
    ]


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_it_is_a_loop_of_single_requests_written_out(engine: str, random_base: BaseModel) -> None:
    """One request at a time through the same engine: neither batch nor number of chains nor their length matters."""

    def made() -> Any:
        if engine == "transformers":
            return TransformersEngine(random_base, batch_size=5, threads=1)
        return FakeEngine(lambda rendered, adapter, number: digest([rendered, number])[:3], batch_size=2)

    plan = majority(6, 3)
    at = bench(random_base, made(), seed=4)
    done = evaluate(Sums(), EXAMPLES[:2], [Conditioning(PROMPT, plan=plan)] * 2, Sampling(6, seed=4), at)
    alone = made()
    for i in range(2):
        chat = Sums().messages(PROMPT, EXAMPLES[i])
        expected = []
        for chain in range(2):
            said: list[str] = []
            for place in range(3):
                prompt = random_base.render(revision_messages(chat, said))
                seed = int(digest([4, "attempt", place]), 16) >> 1
                ((completion,),) = alone.generate([Request(prompt, None, chain)], Sampling(6, 1.0, seed=seed))
                said.append(completion.text)
            expected += said
        assert texts(done, i) == expected
        assert len(set(expected)) > 3


def test_a_smaller_plan_sees_the_beginnings_of_a_larger_one(random_base: BaseModel) -> None:
    engine = TransformersEngine(random_base, threads=1)
    large, small = (texts(run(random_base, engine, plan, limit=6)) for plan in (majority(6, 3), majority(2, 2)))
    assert small == large[:2]
    first = texts(run(random_base, engine, majority(2, 1), limit=6))
    assert first != [large[0], large[3]]  # parallel samples are other draws


def test_chains_that_have_said_the_same_go_on_apart_and_so_does_one_that_repeats_itself(random_base: BaseModel) -> None:
    """After five equal attempts the prompt of the sixth is that of the fifth; after any, that of the other chain."""
    seen = []

    class Watched(FakeEngine):
        def generate(self, requests: Any, sampling: Sampling) -> Any:
            seen.extend(
                (r.prompt, stream_seed(sampling, r.prompt, r.first + s)) for r in requests for s in range(sampling.n)
            )
            return super().generate(requests, sampling)

    run(random_base, Watched(lambda *_: "4"), majority(14, 7))
    assert len({prompt for prompt, _ in seen}) == 5  # with no, one, ... four attempts
    assert len({stream for _, stream in seen}) == 14


def test_the_number_of_a_sample_is_part_of_journal_and_cache(random_base: BaseModel) -> None:
    engine = FakeEngine(lambda rendered, adapter, number: str(number))
    at, sampling = bench(random_base, engine), Sampling(4, 1.0)
    found = [at.generate([Request("q", None, first)], sampling)[0][0].text for first in (0, 1, 0)]
    assert found == ["0", "1", "0"]
    keys = [completion_keys(engine, ["w"], [[1]], [Request("q", None, first)], sampling) for first in (0, 1)]
    assert keys[0] != keys[1]


# ---- what chains are good for ----


def mending(rendered: str, adapter: str | None, number: int) -> str:
    """Wrong, wrong again, and right from the third attempt on."""
    return "4" if len(attempts_in(rendered)) >= 2 else "5"


def spoiling(rendered: str, adapter: str | None, number: int) -> str:
    """Right twice, then wrong, each time otherwise."""
    seen = len(attempts_in(rendered))
    return "4" if seen < 2 else str(20 + seen)


def test_a_model_that_mends_its_answers_is_better_in_a_row_at_equal_generations(random_base: BaseModel) -> None:
    in_a_row, parallel = (run(random_base, FakeEngine(mending), majority(6, chain)).score for chain in (6, 1))
    assert (in_a_row, parallel) == (1.0, 0.0)


def test_right_answers_that_are_turned_wrong_are_still_chosen_from_the_whole_chain(random_base: BaseModel) -> None:
    done = run(random_base, FakeEngine(spoiling), majority(4, 4))
    assert texts(done) == ["4", "4", "22", "23"]
    assert (done.score, done.completions[0].text) == (1.0, "4")  # the last attempt would be wrong


def test_weighted_best_of_is_within_the_chains_then_across() -> None:
    plan = InferencePlan("weighted-best-of", 6, "log-probability", 1.0, 1.0, 3)
    votes, scores = ("a", "b", "b", "c", "b", "b"), (0.75, 0.25, 0.25, 0.5, 0.25, 0.125)
    assert choose(plan, votes, scores) == {"a": 1.0}  # a 0.75 > b 0.5 in the first chain, c 0.5 > b 0.375 in the second
    assert weighted_best_of_n(votes, scores) == {"b": 1.0}  # 0.875 over all
    best = InferencePlan("best-of", 6, "log-probability", 1.0, 1.0, 3)
    assert choose(best, votes, scores) == {"a": 1.0}


@pytest.mark.parametrize("aggregation", ["best-of", "weighted-best-of"])
def test_shares_of_the_votes_as_scores_are_the_majority_of_chains_too(aggregation: Any) -> None:
    for votes in product(("a", "b", None), repeat=4):
        plan = InferencePlan(aggregation, 4, "self-consistency", 1.0, 1.0, 2)
        assert choose(plan, votes, ()) == choose(majority(4, 2), votes, ())


# ---- costs ----


def test_every_attempt_pays_for_what_it_reads_and_says(random_base: BaseModel) -> None:
    engine = FakeEngine(lambda rendered, adapter, number: "it is 4"[3 * number :])  # three words, two words
    at = bench(random_base, engine)
    done = evaluate(Sums(), EXAMPLES[:1], [Conditioning(PROMPT, plan=majority(6, 3))], Sampling(16), at)
    chat = Sums().messages(PROMPT, EXAMPLES[0])
    read = engine.token_count(random_base.render(chat))  # once for both chains
    for said in ("it is 4", "is 4"):
        for seen in ([said], [said, said]):
            read += engine.token_count(random_base.render(revision_messages(chat, seen)))
    spent = at.ledger.tuning
    assert (spent.calls, spent.generated_tokens, spent.prompt_tokens) == (6, 3 * 3 + 3 * 2, read)
    (row,) = prediction_rows(done)
    assert row["prompt_tokens"] == engine.token_count(done.rendered[0])
    assert row["generated_tokens"] == 15
    assert tokens_read(3, row["samples"]["prompt_tokens"]) == read
    last = curve([row])[-1]
    assert (last["samples"], last["chain"], last["generated_tokens"], last["read_tokens"]) == (6, 3, 15, read)


def test_a_budget_that_ends_between_attempts_gives_no_evaluation(random_base: BaseModel) -> None:
    engine = FakeEngine(lambda *_: "4")
    at = bench(
        random_base, engine, tokens=engine.token_count(random_base.render(Sums().messages(PROMPT, EXAMPLES[0]))) + 60
    )
    with pytest.raises(BudgetExhausted):
        evaluate(Sums(), EXAMPLES[:1], [Conditioning(PROMPT, plan=majority(4, 2))], Sampling(16), at)
    assert [request.first for request in engine.calls] == [0]  # the first attempts were paid for, no revision was


def test_killed_at_any_batch_the_rest_alone_is_asked_for_and_says_the_same(random_base: BaseModel) -> None:
    asked: list[int] = []

    class Dying(FakeEngine):
        lives = 99

        def generate(self, requests: Any, sampling: Sampling) -> Any:
            if not self.lives:
                raise KeyboardInterrupt
            self.lives -= 1
            asked.append(len(requests))
            return super().generate(requests, sampling)

    def answer(rendered: str, adapter: str | None, number: int) -> str:
        return digest([rendered, number])[:4]

    def go(engine: FakeEngine, store: MemoryStore) -> list[dict[str, Any]]:
        conditionings = [Conditioning(PROMPT, plan=majority(6, 3))] * 3
        at = bench(random_base, engine, store=store)
        return prediction_rows(evaluate(Sums(), EXAMPLES, conditionings, Sampling(16), at))

    whole = go(Dying(answer, batch_size=2), MemoryStore())
    batches = len(asked)
    assert batches == 2 + 3 + 3
    for lives in range(batches):
        store, killed = MemoryStore(), Dying(answer, batch_size=2)
        killed.lives = lives
        with pytest.raises(KeyboardInterrupt):
            go(killed, store)
        asked.clear()
        assert go(Dying(answer, batch_size=2), store) == whole
        assert len(asked) == batches - lives


def test_revisions_are_made_under_the_adapter_of_their_question(random_base: BaseModel) -> None:
    @dataclass(frozen=True)
    class Named:
        digest: str

    engine = FakeEngine(lambda rendered, adapter, number: f"{adapter} {len(attempts_in(rendered))}")
    conditionings = [Conditioning(PROMPT, Named(name), majority(3, 3)) for name in ("a", "b")]
    done = evaluate(Sums(), EXAMPLES[:2], conditionings, Sampling(16), bench(random_base, engine))
    assert [texts(done, i) for i in range(2)] == [["a 0", "a 1", "a 2"], ["b 0", "b 1", "b 2"]]


# ---- a context that is too short ----


def test_what_does_not_fit_is_left_out_whole_the_oldest_first(
    random_base: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(lambda rendered, adapter, number: f"attempt {len(attempts_in(rendered))} says 4 4 4 4")
    chat = Sums().messages(PROMPT, EXAMPLES[0])
    two = engine.token_count(random_base.render(revision_messages(chat, ["attempt 2 says 4 4 4 4"] * 2)))
    engine.context_length = two + 16
    done = run(random_base, engine, majority(5, 5))
    seen = [attempts_in(request.prompt) for request in engine.calls]
    assert [len(own) for own in seen] == [0, 1, 2, 2, 2]
    assert seen[3] == texts(done)[1:3] and seen[4] == texts(done)[2:4]  # the latest, uncut
    assert done.score == 1.0
    assert "1 of 1 revisions see fewer earlier attempts than 3, 0 of these none" in caplog.text


def test_where_not_even_one_fits_the_question_is_answered_anew(
    random_base: BaseModel, caplog: pytest.LogCaptureFixture
) -> None:
    streams = []

    class Watched(FakeEngine):
        def generate(self, requests: Any, sampling: Sampling) -> Any:
            streams.append(stream_seed(sampling, requests[0].prompt, requests[0].first))
            return super().generate(requests, sampling)

    engine = Watched(lambda *_: "4")
    engine.context_length = engine.token_count(random_base.render(Sums().messages(PROMPT, EXAMPLES[0]))) + 16
    done = run(random_base, engine, majority(3, 3))
    assert len({request.prompt for request in engine.calls}) == 1
    assert len(set(streams)) == 3  # an independent sample each time
    assert done.score == 1.0
    assert "1 of 1 revisions see fewer earlier attempts than 2, 1 of these none" in caplog.text


def test_a_question_that_does_not_fit_itself_is_truncated_in_every_attempt(random_base: BaseModel) -> None:
    engine = FakeEngine(lambda *_: "4", context_length=17)
    done = run(random_base, engine, majority(4, 2))
    assert done.samples[0] is not None
    assert [(c.text, c.truncated) for c in done.samples[0].completions] == [("", True)] * 4
    assert (done.grades[0].outcome.value, done.score) == ("truncated", 0.0)


def test_the_real_engine_takes_every_prompt_that_is_made_to_fit(random_base: BaseModel) -> None:
    """512 tokens, one a byte: most revisions of 48 new tokens have no room for four attempts."""
    done = run(random_base, TransformersEngine(random_base, threads=1), majority(6, 6), limit=48)
    assert done.samples[0] is not None
    read = [c.prompt_tokens for c in done.samples[0].completions]
    assert max(read) <= 512 - 48
    assert all(c.token_ids for c in done.samples[0].completions)
    assert read[1] > read[0]


# ---- one draw of chains, read for fewer and shorter ones ----


def test_which_plans_a_draw_serves() -> None:
    assert {n: served(majority(8, 4), n) for n in (1, 2, 4, 8)} == {1: [1], 2: [1, 2], 4: [2, 4], 8: [4]}
    assert {n: served(majority(8, 1), n) for n in (1, 2, 4, 8)} == {1: [1], 2: [1], 4: [1], 8: [1]}
    assert served(majority(21, 7), 16) == []  # three chains of up to seven: no way to have sixteen


@pytest.mark.parametrize("aggregation", ["majority", "weighted-best-of"])
def test_beginnings_of_chains_are_unbiased_for_every_plan_they_serve(aggregation: Any, random_base: BaseModel) -> None:
    """Over all draws of 2 chains of 2, exactly: an attempt repeats the one before with 3/4, else it is drawn anew."""
    scorer = None if aggregation == "majority" else "log-probability"
    plan = InferencePlan(aggregation, 4, scorer, 1.0, 1.0, 2)
    fresh, worth = {"4": 0.4, "5": 0.6}, {"4": 1.0, "5": 0.0}
    rating = {"4": 0.5, "5": 0.25}

    def chance(chain: tuple[str, ...]) -> float:
        first, *rest = chain
        made, before = fresh[first], first
        for said in rest:
            made *= 0.75 * (said == before) + 0.25 * fresh[said]
            before = said
        return made

    def exact(wide: int, length: int) -> float:
        chains = list(product(product(fresh, repeat=length), repeat=wide))
        total = 0.0
        for own in chains:
            votes = [vote for chain in own for vote in chain]
            scores = [rating[vote] for vote in votes] if scorer else []
            shares = choose(InferencePlan(aggregation, len(votes), scorer, 1.0, 1.0, length), votes, scores)
            total += math.prod(map(chance, own)) * sum(share * worth[str(vote)] for vote, share in shares.items())
        return total

    found: dict[tuple[int, int], float] = {}
    for own in product(product(fresh, repeat=2), repeat=2):
        votes = [list(fresh).index(vote) for chain in own for vote in chain]
        samples = {"answers": list(fresh), "worth": list(worth.values()), "votes": votes, "generated_tokens": [1] * 4}
        samples |= {"prompt_tokens": [5, 8, 5, 9]}
        samples |= {"scores": [rating[vote] for chain in own for vote in chain]} if scorer else {}
        for point in curve([{"plan": recorded(plan), "samples": samples}]):
            key = point["samples"], point["chain"]
            found[key] = found.get(key, 0.0) + math.prod(map(chance, own)) * point["score"]
            wide = point["samples"] // point["chain"]
            assert point["generated_tokens"] == point["samples"]
            assert point["read_tokens"] == 5 + (wide * 8.5 if point["chain"] == 2 else 0)
    assert found.keys() == {(1, 1), (2, 1), (2, 2), (4, 2)}
    for (n, length), mean in found.items():
        assert mean == pytest.approx(exact(n // length, length), abs=1e-12)
    if aggregation == "majority":
        assert found[2, 1] == pytest.approx(majority_accuracy([0.4, 0.6], 2)[1])
    assert found[2, 1] != pytest.approx(found[2, 2], abs=1e-3) or aggregation == "majority"


def test_a_new_grading_chooses_again_and_costs_stay(random_base: BaseModel) -> None:
    (row,) = json.loads(json.dumps(prediction_rows(run(random_base, FakeEngine(spoiling), majority(8, 4)))))
    grade, follows = regraded(Sums(), EXAMPLES[0], row)
    assert (grade.score, grade.prediction) == (row["score"], row["prediction"])
    assert {key: row[key] for key in follows} == follows


# ---- plans as values ----


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (majority(6, 4), "6 samples cannot be chains of 4 attempts each"),
        (majority(2, 4), "2 samples cannot be chains of 4 attempts each"),
        (majority(0, 2), "0 answers nothing"),
        (majority(2, 0), "chains of 0 attempts"),
        (InferencePlan("majority", 4, None, 0.0, 1.0, 2), "At temperature 0 2 chains are all the same"),
        (InferencePlan("greedy", 1, chain=2), "greedy is one completion"),
    ],
)
def test_chains_that_cannot_be_are_refused(plan: InferencePlan, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check(plan)


def test_one_chain_may_be_greedy(random_base: BaseModel) -> None:
    done = run(random_base, FakeEngine(mending), InferencePlan("majority", 5, None, 0.0, 1.0, 5))
    assert texts(done) == ["5", "5", "4", "4", "4"]


def test_the_config_names_chains_and_runs_without_keep_their_digests() -> None:
    named = {"strategy": "zero-shot", "model": "m", "task": "gsm8k"}
    voting = {"aggregation": "majority", "samples": 8}
    assert resolve(named, {"plan": voting}).digest == resolve(named, {"plan": voting | {"chain": 1}}).digest
    # The digest of this config before there were chains.
    assert resolve(named, {"plan": voting}).digest == "861e4f61c041d346"
    assert "chain" not in resolve(named, {"plan": voting}).model_dump(mode="json")["plan"]
    chained = resolve(named, {"plan": voting | {"chain": 4}})
    assert chained.plan.value == InferencePlan("majority", 8, None, 0.7, 1.0, 4)
    assert resolve(chained.model_dump(mode="json")) == chained
    for wrong, why in ((3, "chain must divide samples"), (16, "chain must divide samples"), (0, "chain = 0")):
        with pytest.raises(UsageError, match=why):
            resolve(named, {"plan": voting | {"chain": wrong}})
    with pytest.raises(UsageError, match="cannot be chains of 2"):
        resolve(named, {"plan": {"chain": 2}})


# ---- a run of chains, from the command line to what is taken home ----

PLAN = {"aggregation": "majority", "samples": 4, "scorer": None, "temperature": 1.3, "top_p": 1.0, "chain": 2}
SETTINGS = {"plan__aggregation": "majority", "plan__samples": 4, "plan__temperature": 1.3}


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory, random_model_dir: Path) -> Path:
    return finished_run(tmp_path_factory.mktemp("chained"), random_model_dir, "zero-shot", 8, plan__chain=2, **SETTINGS)


def test_the_run_keeps_its_chains_and_says_what_they_cost(
    chained: Path, tmp_path: Path, random_model_dir: Path
) -> None:
    summary, rows = read_json(chained / "summary.json"), read_rows(chained / "predictions.jsonl")
    assert summary["plan"]["plans"] == [PLAN]
    assert [(p["samples"], p["chain"]) for p in summary["plan"]["curve"]] == [(1, 1), (2, 1), (2, 2), (4, 2)]
    assert summary["plan"]["curve"][-1]["score"] == summary["score"]
    read = sum(tokens_read(2, row["samples"]["prompt_tokens"]) for row in rows)
    assert summary["cost"]["measuring"]["prompt_tokens"] == read
    assert summary["serving"]["answers"]["read_tokens"] == read / 2 == summary["plan"]["curve"][-1]["read_tokens"]
    shown = CliRunner().invoke(app, ["show", str(chained)]).output
    assert "  plan: majority of 4 in chains of 2 (temperature 1.3, top_p 1)\n    by number of samples" in shown
    assert " 2 (2 in a row): " in shown
    before = (chained / "predictions.jsonl").read_bytes(), read_json(chained / "summary.json")
    assert regrade(chained)["changed"] == 0
    assert ((chained / "predictions.jsonl").read_bytes(), read_json(chained / "summary.json")) == before
    config = resolve(read_json(chained / "config.json"))
    most = planned(config)["measuring_at_most"]
    assert most["calls"] == 8
    assert summary["cost"]["measuring"]["tokens"] <= most["tokens"]
    parallel = finished_run(tmp_path, random_model_dir, "zero-shot", 8, **SETTINGS)
    labels = variant_labels([read_run(chained), read_run(parallel)])
    assert sorted(labels.values()) == ["zero-shot", "zero-shot (chain=2)"]


def test_difficulty_takes_a_run_of_samples_and_one_of_chains(
    chained: Path, tmp_path: Path, random_model_dir: Path
) -> None:
    parallel = finished_run(tmp_path, random_model_dir, "zero-shot", 8, **SETTINGS | {"plan__samples": 8})
    told = CliRunner().invoke(app, ["difficulty", str(parallel), str(chained), "--json"])
    assert told.exit_code == 0, told.output
    value = json.loads(told.output)
    assert (value["questions"], value["judged"], value["chains"]["length"]) == (2, 4, 2)
    (point,) = [p for p in value["plans"] if (p["n"], p["length"]) == (4, 2)]
    last = read_json(chained / "summary.json")["plan"]["curve"][-1]
    assert [point[name] for name in ("score", "generated", "read")] == pytest.approx(
        [last[name] for name in ("score", "generated_tokens", "read_tokens")]
    )
    # The samples that told the difficulty are other draws than the chains' first attempts.
    for ours, theirs in zip(
        read_rows(parallel / "predictions.jsonl"), read_rows(chained / "predictions.jsonl"), strict=True
    ):
        assert not {*ours["samples"]["completions"]} & {*theirs["samples"]["completions"][::2]}


def test_run_bundle_and_server_answer_alike(chained: Path, tmp_path: Path) -> None:
    asked = "What is 20 + 3?"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": asked}) + "\n")
    export(chained, tmp_path / "bundle")
    (expected,), (bundled,) = (
        [json.loads(line) for line in predict(folder, str(tmp_path / "rows.jsonl"), "-")[1].splitlines()]
        for folder in (chained, tmp_path / "bundle")
    )
    assert expected == bundled
    assert expected["samples"] == 4
    assert read_json(tmp_path / "bundle/bundle.json")["plan"]["aggregate"] == PLAN
    card = (tmp_path / "bundle/README.md").read_text()
    assert "majority of 4 completions in chains of 2, each in sight of the latest 4 before it" in card
    opened = open_any(tmp_path / "bundle")

    async def ask(client: Any) -> Any:
        return (await client.post("/v1/chat/completions", json=question(opened, asked))).json()

    served_answer = visit(opened, ask)
    assert served_answer["choices"][0]["message"]["content"] == expected["completion"]
    assert served_answer["cotune"]["plan"] == PLAN
    own = opened.base.render(opened.task.messages(Prompt(expected["instruction"]), Example("x", asked, "")))
    assert served_answer["usage"]["prompt_tokens"] > 3 * len(opened.base.encode(own))  # once, and by two revisions


def test_a_run_killed_between_attempts_goes_on_to_the_same_bytes(
    chained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, generate, calls = resolve(read_json(chained / "config.json")), TransformersEngine.generate, []

    def dying(self: TransformersEngine, requests: Any, sampling: Sampling) -> Any:
        calls.append(len(requests))
        if len(calls) == 2:  # the revisions, whose first attempts are in the journal
            raise KeyboardInterrupt
        return generate(self, requests, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run_config(config, tmp_path)
    done = run_config(config, tmp_path)
    assert calls == [2, 4, 4]
    assert (done.folder / "predictions.jsonl").read_bytes() == (chained / "predictions.jsonl").read_bytes()


def test_a_model_behind_a_server_revises_in_its_own_chat() -> None:
    def answer(body: Any) -> Any:
        said = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
        return reply_of(f"#### {len(said)}")

    with serving() as server:
        server.answer = answer
        base = BlackBox("some-model", ChatClient(server.url, first_wait=0.001, concurrency=1))
        at = bench(base, OpenAIEngine(base))
        done = evaluate(Sums(), EXAMPLES[:1], [Conditioning(PROMPT, plan=majority(4, 2))], Sampling(16), at)
        assert texts(done) == ["#### 0", "#### 1"] * 2
        bodies = [body for _, body, _ in server.seen if "messages" in body]
        assert [len(body["messages"]) for body in bodies] == [2, 2, 4, 4]
        assert bodies[2]["messages"][2:] == [
            {"role": "assistant", "content": "#### 0"},
            {"role": "user", "content": REVISE_INSTRUCTION},
        ]
        assert len({body["seed"] for body in bodies}) == 4
        assert (at.ledger.tuning.calls, at.ledger.tuning.prompt_tokens) == (4, 400)
