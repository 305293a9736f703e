"""Who proposes, what is read from a reply, and what may not become a prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, reply_of, serving
from toy import Sums, bench, example, fake, instruction_of, of_kind, right_answer

from cotune.bench import Bench, MemoryStore
from cotune.engines.base import Sampling
from cotune.engines.fake import FakeEngine
from cotune.errors import BudgetExhausted, CotuneError, UsageError
from cotune.models.base import BaseModel, load
from cotune.openai_client import ChatClient
from cotune.proposers import Proposing
from cotune.proposers.bank import FAMILIES, GENERAL, phrases
from cotune.proposers.demonstrations import DemonstrationProposer
from cotune.proposers.edits import EditProposer, sentences
from cotune.proposers.filters import Filter
from cotune.proposers.instructions import InstructionProposer
from cotune.proposers.meta_prompt import MetaPrompt, read_reply
from cotune.proposers.model import ModelWriter
from cotune.proposers.openai import ServerWriter
from cotune.search import Proposal, Proposer, Scored
from cotune.tasks import TASKS
from cotune.values import Demonstration, Event, Example, Prompt

TRAIN = tuple(example(i) for i in range(12))
BEST = Prompt("Add the numbers. Say the sum.")
HISTORY = [
    Scored(Prompt("Guess."), "start", 0.125, 16),
    Scored(Prompt("Add."), "x", 0.5, 16),
    Scored(BEST, "x", 0.755, 16),
]


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir), device="cpu", dtype="float32")


# filters


CHOICE = "they wanted to see the old house once more"


def rejecting(**changes: Any) -> Filter:
    question = "Ann has seven red apples and Bob takes two of them."
    copied = Example("x", question, "5", rationale="7 - 2 = 5", choices=(CHOICE,))
    settings: dict[str, Any] = {
        "trusted": "The {user}'s own.",
        "max_characters": 100,
        "special_tokens": ["<|im_end|>"],
        "fits": lambda prompt: not prompt.demonstrations,
    }
    return Filter([copied], **(settings | changes))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Add the numbers carefully.", None),
        ("Put the result in \\boxed{answer}.", None),
        ("The {user}'s own.", None),
        (" \n", "empty"),
        ("Add\x1b[2J.", "unreadable"),
        ("Add \ufffd", "unreadable"),
        ("Add \ud83d", "unreadable"),
        ("Zähle\t\u4e00 \U0001f600:\n1", None),
        ("x" * 100, None),
        ("x" * 101, "too_long"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I cannot write instructions.", "refusal"),
        ("As an AI, I have no opinion.", "refusal"),
        ("If you can't add, say sorry, as an aim.", None),
        ("Be good.<|im_end|>", "tags"),
        ("Do <|custom|> things", "tags"),
        ("[INST] add [/INST]", "tags"),
        ("Answer [INSTRUCTION] now", "tags"),
        ("Answer {question} now", "tags"),
        ("<instruction>Add", "tags"),
        ("Say: ann has seven RED apples, and Bob takes a few", "copied"),
        ("Say: has seven red apples and Bob takes a few", None),  # seven words in a row
        (f"Prefer: {CHOICE}", "copied"),
        ("7 - 2 = 5", None),
    ],
)
def test_reasons(text: str, reason: str | None) -> None:
    assert rejecting().reject(Proposal(Prompt(text), "x")) == reason


def test_truncated_and_too_long_for_the_context() -> None:
    demo = (Demonstration("What is 1 + 1 ?", "2"),)
    assert rejecting().reject(Proposal(Prompt("Add."), "x", truncated=True)) == "truncated"
    assert rejecting().reject(Proposal(Prompt("Add.", demo), "x")) == "over_context"


def test_an_instruction_that_passed_is_not_read_again() -> None:
    once = rejecting()
    assert once.reject(Proposal(Prompt("Add."), "x")) is None
    assert once.reject(Proposal(Prompt("Add."), "x", truncated=True)) is None


# the meta-prompt


def asked(history: list[Scored] = HISTORY, most_history: int = 20, most_exemplars: int = 3, seed: int = 0) -> str:
    meta = MetaPrompt(Sums(), TRAIN, 20, 3)
    [turn] = meta.messages(history, random.Random(seed), most_history=most_history, most_exemplars=most_exemplars)
    assert turn["role"] == "user"
    return turn["content"]


def test_meta_prompt_has_opros_parts_in_order() -> None:
    text = asked()
    places = [
        text.index(part) for part in ("new instruction", "Guess.", "score: 12", "Add.", "score: 50", BEST.instruction)
    ]
    places += [text.index("score: 76"), text.index("Correct answer:"), text.index("differs from all of the above")]
    assert places == sorted(places)
    assert text.count("Correct answer:") == text.count("[INSTRUCTION]\nWhat is") == 3
    assert not any(e.rationale in text for e in TRAIN)


def test_meta_prompt_limits_and_draws() -> None:
    assert "Guess." not in asked(most_history=2)
    assert "Earlier instructions" not in asked(most_history=0)
    assert asked(most_exemplars=1).count("Correct answer:") == 1
    assert asked(seed=1) != asked(seed=2)


def test_meta_prompt_shows_an_instruction_once_with_its_best_score() -> None:
    demo = replace(BEST, demonstrations=(Demonstration("q", "a"),))
    text = asked([*HISTORY, Scored(demo, "x", 0.9, 16)])
    assert text.count(BEST.instruction) == 1
    assert text.index("score: 50") < text.index(BEST.instruction) < text.index("score: 90")


def test_replies() -> None:
    def read(text: str, truncated: bool = False) -> tuple[str, bool]:
        proposal = read_reply(text, truncated, "x", BEST)
        return proposal.prompt.instruction, proposal.truncated

    assert read("Sure: <instruction>\nAdd.\n</instruction> ok") == ("Add.", False)
    assert read("<instruction>Add.</instruction> and more", truncated=True) == ("Add.", False)
    assert read("<instruction>Add") == ("Add", True)
    assert read("  Add them.\n") == ("Add them.", False)
    assert read("Add th", truncated=True) == ("Add th", True)


# a model as the proposer


def test_model_proposer_samples_candidates_without_an_adapter(base: BaseModel) -> None:
    engine = FakeEngine(lambda prompt, adapter, sample: f"<instruction>Add {sample}.</instruction>")
    at = bench(base, engine)
    writer = ModelWriter("self", base, engine, 1.0, 256)
    proposals = InstructionProposer(writer, MetaPrompt(Sums(), TRAIN, 20, 3), 4).propose(1, HISTORY, BEST, at)
    assert [p.prompt.instruction for p in proposals] == ["Add 0.", "Add 1.", "Add 2.", "Add 3."]
    assert [r.adapter for r in engine.calls] == [None]
    assert "[INSTRUCTION]" in engine.calls[0].prompt
    assert at.ledger.tuning.calls == 4


def test_model_proposer_shortens_the_meta_prompt_to_the_context(base: BaseModel) -> None:
    class Characters(FakeEngine):
        def token_count(self, prompt: str) -> int:
            return len(prompt) // 4

    engine = Characters(lambda prompt, adapter, sample: "<instruction>Add.</instruction>")
    long = [Scored(Prompt(f"{i} " + "word " * 40), "x", i / 9, 16) for i in range(9)]
    writer = ModelWriter("self", base, engine, 1.0, 256)
    proposer = InstructionProposer(writer, MetaPrompt(Sums(), TRAIN, 20, 3), 1)
    proposer.propose(1, long, BEST, bench(base, engine))
    [request] = engine.calls
    assert len(request.prompt) // 4 <= 512 - 256
    assert "Correct answer:" not in request.prompt  # exemplars go first
    assert "\n8 word" in request.prompt and "\n0 word" not in request.prompt  # then the worst instructions


# offline edits


def proposed(round: int, seed: int = 0, history: list[Scored] = HISTORY, count: int = 8) -> list[Proposal]:
    nothing: Any = None
    return EditProposer(["micro-gsm8k"], count).propose(round, history, BEST, bench(nothing, nothing, seed=seed))


@pytest.mark.parametrize("round", [1, 2, 5])
def test_edits_are_new_distinct_and_seeded(round: int) -> None:
    texts = [p.prompt.instruction for p in proposed(round)]
    assert len(set(texts)) == 8
    assert not set(texts) & {s.prompt.instruction for s in HISTORY}
    assert texts == [p.prompt.instruction for p in proposed(round)]
    assert texts != [p.prompt.instruction for p in proposed(round, seed=1)]


def test_edits_are_made_of_bank_sentences_and_of_the_parents() -> None:
    known = {s for kind in phrases("gsm8k").kinds for s in kind}
    known |= {sentence for s in HISTORY for sentence in sentences(s.prompt.instruction)}
    found = [p for round in range(1, 9) for p in proposed(round)]
    assert all(s in known for p in found for s in sentences(p.prompt.instruction))
    assert {p.origin for p in found} >= {"edits:fresh", "edits:add", "edits:remove", "edits:swap", "edits:cross"}


def test_edits_start_from_nothing_and_end_when_nothing_is_new() -> None:
    assert len(proposed(1, history=[Scored(Prompt(""), "start", 0.0, 16)])) == 8
    few = EditProposer(["unknown"], 1)
    assert few._bank == GENERAL


def test_every_family_of_the_table_has_a_bank_within_the_limit() -> None:
    assert {name.removeprefix("micro-") for name in TASKS} == set(FAMILIES)
    for name in TASKS:
        for kind in phrases(name).kinds:
            assert len(kind) == len(set(kind))
            assert all(sentences(p) == [p] for p in kind)  # one sentence each, so that edits find them again


# demonstrations


def test_demonstrations_are_accepted_answers_and_gold_ones(base: BaseModel) -> None:
    solvable = {e.question for e in TRAIN[:5]}
    engine = FakeEngine(
        lambda prompt, adapter, sample: right_answer(prompt) if any(q in prompt for q in solvable) else "no idea"
    )
    events: list[Event] = []
    at = bench(base, engine, events=events)
    proposals = DemonstrationProposer(Sums(), TRAIN, None, Sampling(16), most=3, sets=6).propose(7, HISTORY, BEST, at)
    assert of_kind(events, "traces")[0]["accepted"] == 5
    labelled, *own = proposals
    assert [p.origin for p in own] == ["own-demonstrations"] * 6
    assert len(labelled.prompt.demonstrations) == 3
    assert {1, 3} <= {len(p.prompt.demonstrations) for p in own} <= {1, 2, 3}
    for proposal in own:
        shown = [d.question for d in proposal.prompt.demonstrations]
        assert set(shown) <= solvable and len(set(shown)) == len(shown)
        assert proposal.prompt.instruction == BEST.instruction


def test_without_accepted_answers_only_gold_ones_are_shown(base: BaseModel) -> None:
    at = bench(base, fake(lambda rendered, adapter: 0.0))
    proposals = DemonstrationProposer(Sums(), TRAIN, None, Sampling(16), most=3, sets=6).propose(1, HISTORY, BEST, at)
    assert [p.origin for p in proposals] == ["gold-demonstrations"]
    shown = replace(BEST, demonstrations=(Demonstration("q", "a"),))
    proposals = DemonstrationProposer(Sums(), TRAIN, None, Sampling(16), most=3, sets=6).propose(2, HISTORY, shown, at)
    assert proposals[1] == Proposal(BEST, "no-demonstrations")


# a server


def reply(text: str, reason: str = "stop") -> Any:
    return reply_of(f"<instruction>{text}</instruction>", reason)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving() as made:
        made.answer = lambda _: reply("Add.")
        yield made


def asking(server: ChatServer, at: Bench, count: int = 2) -> list[Proposal]:
    client = ChatClient(server.url, first_wait=0.001)
    proposer = InstructionProposer(
        ServerWriter(client, "some-model", 0.7, 256), MetaPrompt(Sums(), TRAIN, 20, 3), count
    )
    return proposer.propose(1, HISTORY, BEST, at)


def test_server_is_asked_once_per_candidate_and_not_again_on_resume(
    server: ChatServer, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server.replies = [(200, reply("One.")), (200, reply("Two.", "length"))]
    store, events = MemoryStore(), list[Event]()
    engine = fake(lambda rendered, adapter: 1.0)
    at = bench(base, engine, store=store, events=events)
    proposals = asking(server, at)
    assert [p.prompt.instruction for p in proposals] == ["One.", "Two."]
    assert [p.truncated for p in proposals] == [False, False]  # the tag was closed
    path, body, key = server.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret-key")
    assert (body["model"], body["temperature"]) == ("some-model", 0.7)
    assert (at.ledger.tuning.prompt_tokens, at.ledger.tuning.generated_tokens, at.ledger.tuning.flops) == (200, 14, 0.0)
    assert "secret-key" not in json.dumps([store._journal, [e.data for e in events]])

    again = bench(base, engine, store=store)
    assert asking(server, again) == proposals
    assert len(server.seen) == 2
    assert again.ledger.tuning == at.ledger.tuning


def test_server_errors_are_retried_then_told(
    server: ChatServer, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    at = bench(base, fake(lambda rendered, adapter: 1.0))
    server.replies = [(503, {}), (429, {})]
    assert [p.prompt.instruction for p in asking(server, at, count=1)] == ["Add."]
    assert [key for _, _, key in server.seen] == [None] * 3

    server.replies = [(500, {})] * 5
    with pytest.raises(CotuneError, match="status 500, 5 times"):
        asking(server, bench(base, fake(lambda rendered, adapter: 1.0)))
    server.seen.clear()
    server.replies = [(401, {"error": "no"})]
    with pytest.raises(CotuneError, match="OPENAI_API_KEY"):
        asking(server, bench(base, fake(lambda rendered, adapter: 1.0)))
    assert len(server.seen) == 1
    server.replies = [(400, {"error": {"message": "prompt is too long"}})]
    with pytest.raises(CotuneError, match=r"refuses the meta-prompt: prompt is too long. Lower prompt.history"):
        asking(server, bench(base, fake(lambda rendered, adapter: 1.0)))


def test_server_without_usage_is_counted_here_and_the_budget_holds(server: ChatServer, base: BaseModel) -> None:
    server.replies = [(200, {"choices": [{"message": {"content": "Add them up."}}]})]
    at = bench(base, fake(lambda rendered, adapter: 1.0))
    asking(server, at, count=1)
    assert at.ledger.tuning.generated_tokens == 3
    assert at.ledger.tuning.prompt_tokens == len(server.seen[0][1]["messages"][0]["content"].split())
    with pytest.raises(BudgetExhausted):
        asking(server, bench(base, fake(lambda rendered, adapter: 1.0), tokens=100))
    assert len(server.seen) == 1


# the table


def made(spec: str, base: BaseModel) -> Proposer:
    how = Proposing(spec, 2, history=20, exemplars=3, temperature=1.0, max_characters=500, server={})
    return how.proposer(Sums(), TRAIN, base, bench(base, fake(lambda rendered, adapter: 1.0)))


def test_specs(base: BaseModel) -> None:
    assert isinstance(made("edits", base), EditProposer)
    for spec, writer in (("self", ModelWriter), ("model:tiny", ModelWriter), ("openai:http://x:1/v1#m", ServerWriter)):
        proposer = made(spec, base)
        assert isinstance(proposer, InstructionProposer) and isinstance(proposer.writer, writer)
    for wrong in ("nobody", "openai:http://localhost:1/v1", "openai:#m", "openai:file:///x#m", "model:"):
        with pytest.raises(UsageError, match="no proposer"):
            made(wrong, base)


def test_toy_helpers() -> None:
    rendered = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\nWhat is 3 + 1 ?<|im_end|>\n"
    assert instruction_of(rendered) == "Add."
    assert right_answer(rendered) == "3 + 1 = 4"
