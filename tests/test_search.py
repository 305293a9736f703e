"""The prompt-search loop on a fake engine whose accuracy is a known function of the instruction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from toy import Sums, bench, example, fake, instruction_of, of_kind, question_of

from cotune.bench import Bench
from cotune.engines.base import Sampling
from cotune.engines.fake import FakeEngine
from cotune.errors import BudgetExhausted
from cotune.models.base import BaseModel, load
from cotune.search import Board, PromptSearch, Proposal, Racing, Scored, hopeless, size
from cotune.values import Demonstration, Event, Prompt

EXAMPLES = [example(i) for i in range(32)]
START = Prompt("start 0.5")
SAMPLING = Sampling(16)


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir), device="cpu", dtype="float32")


def share(rendered: str, adapter: str | None) -> float:
    return float(instruction_of(rendered).rsplit(" ", 1)[1])


class Listed:
    """Proposes given texts and notes what it was shown."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.shown: list[Scored] = []
        self.best: Prompt | None = None

    def propose(self, round: int, history: Sequence[Scored], best: Prompt, bench: Bench) -> list[Proposal]:
        self.shown, self.best = list(history), best
        return [Proposal(Prompt(t), "listed") for t in self.texts]


def searching(
    base: BaseModel,
    engine: FakeEngine,
    events: list[Event],
    tokens: int | None = None,
    racing: Racing = True,
    examples: int = 32,
) -> PromptSearch:
    at = bench(base, engine, tokens=tokens, events=events)
    board = Board(Sums(), EXAMPLES[:examples], None, SAMPLING, at)
    reject = {"never 1.0": "banned"}
    return PromptSearch(
        START, board, lambda p: reject.get(p.prompt.instruction), at, minibatch=8, racing=racing, finalists=1
    )


def run(search: PromptSearch, *rounds: Listed) -> PromptSearch:
    search.begin()
    for proposer in rounds:
        search.round(proposer)
    return search


def test_hopeless_by_hand() -> None:
    zeros, ones = [0.0] * 16, [1.0] * 16
    assert hopeless(zeros, ones)
    assert not hopeless(ones, zeros)
    assert not hopeless(zeros, zeros)
    assert not hopeless([0.0], [1.0])  # one example decides nothing
    # One loss in 16: mean -1/16, standard error 1/16, upper bound (1.645 - 1) / 16 > 0.
    assert not hopeless([0.0] + [1.0] * 15, ones)
    # Four losses in 16: mean -0.25, deviation sqrt(0.2), upper bound -0.25 + 1.645 * 0.1118 = -0.066.
    assert hopeless([0.0] * 4 + [1.0] * 12, ones)
    # Only the common prefix is paired.
    assert hopeless(zeros, [1.0] * 99)


def test_bad_candidates_cost_one_minibatch_and_nothing_runs_twice(base: BaseModel) -> None:
    engine, events = fake(share), list[Event]()
    rounds = Listed("bad 0.0", "good 0.9", "middling 0.45"), Listed("best 1.0", "good 0.9")
    search = run(searching(base, engine, events), *rounds)
    runs = Counter(instruction_of(r.prompt) for r in engine.calls)
    assert runs["bad 0.0"] == 8
    assert runs["start 0.5"] == runs["good 0.9"] == runs["best 1.0"] == 32
    assert max(Counter((instruction_of(r.prompt), question_of(r.prompt)) for r in engine.calls).values()) == 1
    assert [s.prompt.instruction for s in search.ranking()][:2] == ["best 1.0", "good 0.9"]
    assert search.ranking()[0].score == 1.0


def test_without_racing_everything_runs_in_full(base: BaseModel) -> None:
    engine = fake(share)
    search = run(searching(base, engine, [], racing=False), Listed("bad 0.0", "good 0.9"))
    assert set(Counter(instruction_of(r.prompt) for r in engine.calls).values()) == {32}
    assert [s.prompt.instruction for s in search.ranking()] == ["good 0.9", "start 0.5", "bad 0.0"]


def test_an_adaptive_race_finds_the_best_for_a_third_of_the_rollouts(base: BaseModel) -> None:
    """Eight values apart by two examples of 32, the best among the last."""
    engine, events = fake(share), list[Event]()
    texts = [
        f"{name} {value}" for name, value in zip("abcdefgh", (0.3, 0.7, 0.1, 0.6, 0.9, 0.2, 0.4, 0.8), strict=True)
    ]
    first, second = Listed(*texts[:4]), Listed(*texts[4:])
    search = run(searching(base, engine, events, racing="adaptive"), first, second)
    assert search.best == Prompt("e 0.9")
    ran = Counter(instruction_of(r.prompt) for r in engine.calls)
    assert ran.total() <= 32 * 9 / 3
    assert len(ran) == 9 and min(ran.values()) == 2  # nobody is passed over; what lost its first look is left alone
    told = {c["text"]: c for c in of_kind(events, "candidate")}
    assert {text: c["n"] for text, c in told.items()} == ran
    assert not told["e 0.9"]["dropped"] and told["c 0.1"]["dropped"]
    exact = run(searching(base, fake(share), [], racing=False), first, second)
    values = {s.prompt: s.score for s in exact.ranking()}
    # What is right on the easier questions, as here, is told exactly where a prompt's border was found.
    assert [s.prompt for s in search.ranking()][:2] == [s.prompt for s in exact.ranking()][:2]
    assert all(s.score == values[s.prompt] for s in search.ranking() if s.n == 32)


def test_an_adaptive_race_that_the_budget_ends_keeps_what_it_told_until_then(base: BaseModel) -> None:
    first, second = Listed("good 0.9", "bad 0.0"), Listed(*(f"new{i} 0.{i}" for i in range(8)))
    free = run(searching(base, fake(share), events := [], racing="adaptive"), first)
    spent = of_kind(events, "round")[-1]["tuning_tokens"]
    search = run(searching(base, fake(share), [], tokens=spent + 100, racing="adaptive"), first)
    with pytest.raises(BudgetExhausted):
        search.round(second)
    assert search.ranking() == free.ranking()
    assert search.best == Prompt("good 0.9")


def test_an_adaptive_race_looks_first_where_the_best_differ(base: BaseModel) -> None:
    engine = fake(share)
    search = searching(base, engine, [], racing="adaptive")
    run(search, Listed("good 0.9", "fair 0.6"), Listed("new 0.7"))
    asked = [question_of(r.prompt) for r in engine.calls if instruction_of(r.prompt) == "new 0.7"]

    def score(text: str, question: str) -> float:
        return search.board.scores(Prompt(text))[[e.question for e in EXAMPLES].index(question)]

    assert all(score("good 0.9", question) != score("fair 0.6", question) for question in asked[:2])


def test_an_adaptive_race_of_few_examples_or_prompts(base: BaseModel) -> None:
    few = run(searching(base, fake(share), [], examples=2, racing="adaptive"), Listed(), Listed("good 0.9", "bad 0.0"))
    assert {s.n for s in few.ranking()} == {2}
    alone = run(searching(base, fake(share), [], racing="adaptive"))
    assert [(s.prompt, s.n) for s in alone.ranking()] == [(START, 2)]


def test_minibatches_are_the_same_examples_for_all(base: BaseModel) -> None:
    engine = fake(share)
    run(searching(base, engine, []), Listed("bad 0.0", "worse 0.01"))
    asked = {
        text: [question_of(r.prompt) for r in engine.calls if instruction_of(r.prompt) == text]
        for text in ("start 0.5", "bad 0.0", "worse 0.01")
    }
    assert asked["bad 0.0"] == asked["worse 0.01"] == asked["start 0.5"][:8] == [e.question for e in EXAMPLES[:8]]


def test_proposers_see_everything_scored_ascending_and_the_best(base: BaseModel) -> None:
    second = Listed("end 0.7")
    run(searching(base, fake(share), []), Listed("bad 0.0", "good 0.9"), second)
    scores = [s.score for s in second.shown]
    assert scores == sorted(scores)
    assert {s.prompt.instruction: s.n for s in second.shown} == {"bad 0.0": 8, "start 0.5": 32, "good 0.9": 32}
    assert second.best == Prompt("good 0.9")


def test_rejected_proposals_are_counted_and_never_run(base: BaseModel) -> None:
    engine, events = fake(share), list[Event]()
    run(searching(base, engine, events), Listed("never 1.0", "good 0.9", "good 0.9", "start 0.5"))
    [round_] = of_kind(events, "round")
    assert round_["proposed"] == 4
    assert round_["rejected"] == {"banned": 1, "duplicate": 2}
    assert round_["rejected_share"] == 0.75
    assert "never 1.0" not in {instruction_of(r.prompt) for r in engine.calls}
    candidates = of_kind(events, "candidate")
    assert [(c["text"], c["round"], c["n"], c["dropped"]) for c in candidates] == [
        ("start 0.5", 0, 32, False),
        ("good 0.9", 1, 32, False),
    ]


def test_an_empty_round_is_a_round(base: BaseModel) -> None:
    events: list[Event] = []
    run(searching(base, fake(share), events), Listed())
    assert of_kind(events, "round")[0]["rejected_share"] == 0.0


def test_ties_go_to_the_shorter_prompt(base: BaseModel) -> None:
    search = searching(base, fake(share), [])
    run(search, Listed("a much longer one 0.9", "short 0.9"))
    assert search.ranking()[0].prompt.instruction == "short 0.9"
    assert size(Prompt("ab", (Demonstration("cde", "f"),))) == 6


def test_an_exhausted_budget_keeps_what_ran_in_full(base: BaseModel) -> None:
    free = searching(base, fake(share), events := [])
    run(free, Listed("good 0.9"), Listed("best 1.0"))
    spent = [r["tuning_tokens"] for r in of_kind(events, "round")]

    events = []
    search = searching(base, fake(share), events, tokens=sum(spent) // 2)
    with pytest.raises(BudgetExhausted):
        run(search, Listed("good 0.9"), Listed("best 1.0"))
    assert search.ranking()[0].prompt.instruction == "good 0.9"

    nothing = searching(base, fake(share), [], tokens=10)
    with pytest.raises(BudgetExhausted):
        run(nothing, Listed("good 0.9"))
    assert nothing.ranking() == nothing.history() == []
