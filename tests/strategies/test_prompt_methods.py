"""Every prompt method on a bandit of prompts whose success rates are known: the best arm is found, and what it cost."""

from __future__ import annotations

import re
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from toy import Sums, answering, bench, example, fake, instruction_of, of_kind, problem, question_of

from cotune import errors
from cotune.bench import MemoryStore
from cotune.config import resolve
from cotune.diagnosis import warnings
from cotune.engines.fake import FakeEngine
from cotune.errors import UsageError
from cotune.models.base import BaseModel, load
from cotune.strategies.base import Fixed, Workload
from cotune.strategies.prompt_methods import METHODS
from cotune.strategies.prompt_methods.formats import RENDERERS
from cotune.strategies.prompt_methods.told import feedback
from cotune.strategies.prompt_only import PromptOnly
from cotune.strategies.sequential import Sequential
from cotune.values import Event, Grade, Outcome, Prompt

PACKAGES = {"mipro": "optuna", "gepa": "gepa"}
START = Fixed(Prompt("Add the numbers."))
ARMS = {f"Arm number {i}.": p for i, p in enumerate([0.1, 0.3, 0.2, 0.5, 0.9, 0.4, 0.1, 0.6, 0.3, 0.2, 0.5, 0.4])}
BEST_ARM = max(ARMS, key=lambda arm: ARMS[arm])
DRIVING = 48  # search examples
SMALL: dict[str, Any] = {
    "rounds": 4,
    "candidates": 6,
    "search_examples": DRIVING,
    "choice_examples": 20,
    "minibatch": 8,
    "finalists": 2,
}
LEARNED: dict[str, Any] = {"tokens": 2, "samples": 4, "hidden": 8, "steps": 6, "try_every": 3, "checkpoint_every": 2}


def method(name: str) -> Any:
    package = PACKAGES.get(name)
    missing = package is not None and find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install it"))


EVERY = [method(name) for name in sorted(METHODS)]
SEARCHING = [method(name) for name in sorted(METHODS) if name != "bpo"]  # which has own tests of resuming and stages
PROPOSING = [method(name) for name in sorted(METHODS) if name not in ("rlprompt", "bpo")]  # which have own tests


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir), device="cpu", dtype="float32")


def strategy(name: str, **changes: Any) -> PromptOnly:
    prompt = SMALL | {"method": name} | changes
    given = {"strategy": "prompt-only", "model": "x", "task": "micro-gsm8k", "prompt": prompt, "rlprompt": LEARNED}
    return PromptOnly.from_config(resolve(given))


def asks_for_a_prompt(rendered: str) -> bool:
    frames = ("Write a new instruction", "write a new instruction for the assistant", "put before every question of a")
    return any(frame in rendered for frame in frames)


def bandit(rates: Any) -> FakeEngine:
    """As a proposer it names an arm at random, in the frame it was asked for; as the model it is right at `rates`."""
    says = answering(rates)

    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        if not asks_for_a_prompt(rendered):
            return says(rendered, adapter, sample)
        arm = list(ARMS)[zlib.crc32(f"{rendered}{sample}".encode()) % len(ARMS)]
        if "PART: CHANGE" in rendered:
            return f"Some thoughts.\ntask: say {arm}"
        return f"<instruction>{arm}</instruction>" if "<instruction>" in rendered else f"```\n{arm}\n```"

    return FakeEngine(answer, batch_size=8)


def rollouts(engine: FakeEngine, given: Any) -> int:
    """Answers to train examples, for scores and for demonstrations."""
    train = {e.question for e in given.train}
    return sum(question_of(r.prompt) in train for r in engine.calls if not asks_for_a_prompt(r.prompt))


@pytest.mark.parametrize("name", [method("opro"), method("gepa")])
def test_the_best_instruction_of_a_bandit_is_found(base: BaseModel, name: str, record_property: Any) -> None:
    engine, given = bandit(lambda rendered, _: ARMS.get(instruction_of(rendered), 0.15)), problem(base, 96, 20)
    tuned = strategy(name).tune(START, given, bench(base, engine))
    assert tuned == Fixed(Prompt(BEST_ARM))
    exhaustive = (len(ARMS) + 1) * DRIVING
    record_property("rollouts / exhaustive", rollouts(engine, given) / exhaustive)
    assert rollouts(engine, given) < exhaustive


def shows(rendered: str, question: str) -> bool:
    return question in rendered and question_of(rendered) != question


def test_the_best_demonstrations_of_a_bandit_are_found(base: BaseModel, record_property: Any) -> None:
    """Of ten teaching examples one is worth showing; 175 sets of at most three can be made of them."""
    given = problem(base, 40, 20)
    at = bench(base, bandit(lambda *_: 0.0))
    *_, magic = strategy("bootstrap")._split(given, at)[1]

    def rates(rendered: str, _: str | None) -> float:
        return 0.8 if shows(rendered, magic.question) else 0.4

    engine = bandit(lambda rendered, _: 1.0 if question_of(rendered) == magic.question else rates(rendered, _))
    tuned = strategy("bootstrap").tune(START, given, bench(base, engine))
    assert isinstance(tuned, Fixed)
    assert magic.question in [d.question for d in tuned.prompt.demonstrations]
    record_property("rollouts / exhaustive", rollouts(engine, given) / (175 * 30))
    assert rollouts(engine, given) < 175 * 30


@pytest.mark.parametrize("name", [method("mipro"), method("opro+bootstrap")])
def test_the_best_pair_of_a_bandit_is_found(base: BaseModel, name: str, record_property: Any) -> None:
    """Arms times demonstrations: two of three points from the instruction, one from showing anything at all."""

    def rates(rendered: str, _: str | None) -> float:
        return 0.6 * ARMS.get(instruction_of(rendered), 0.15) + 0.3 * (rendered.count("<|im_start|>user") > 1)

    engine, given = bandit(rates), problem(base, 96, 20)
    tuned = strategy(name, candidates=12, demonstrations=1, demonstration_sets=3).tune(
        START, given, bench(base, engine)
    )
    assert isinstance(tuned, Fixed)
    assert (tuned.prompt.instruction, len(tuned.prompt.demonstrations)) == (BEST_ARM, 1)
    exhaustive = (len(ARMS) + 1) * 5 * DRIVING
    record_property("rollouts / exhaustive", rollouts(engine, given) / exhaustive)
    assert rollouts(engine, given) < exhaustive


def test_the_best_content_and_the_best_format_of_a_bandit_are_found(base: BaseModel, record_property: Any) -> None:
    """Arms times formats: two of three points from what the instruction says, one from its look."""

    def rates(rendered: str, _: str | None) -> float:
        said = [p for arm, p in ARMS.items() if arm in instruction_of(rendered)]
        return 0.6 * max(said, default=0.15) + 0.3 * instruction_of(rendered).startswith("<task>")

    engine, given = bandit(rates), problem(base, 96, 20)
    small = strategy("cfpo", rounds=6, candidates=10, demonstrations=0)
    tuned = small.tune(START, given, bench(base, engine, events=(events := [])))
    assert isinstance(tuned, Fixed)
    assert tuned.prompt == Prompt(f"<task>\n{BEST_ARM}\n</task>")
    assert {c["origin"].split(":")[0] for c in of_kind(events, "candidate") if c["round"] in (2, 4)} == {"format"}
    exhaustive = (len(ARMS) + 1) * len(RENDERERS) * DRIVING  # one sentence looks alike in every style
    record_property("rollouts / exhaustive", rollouts(engine, given) / exhaustive)
    assert rollouts(engine, given) < exhaustive


@pytest.mark.parametrize("name", PROPOSING)
def test_edits_improve_every_method_and_a_budget_keeps_what_ran_in_full(base: BaseModel, name: str) -> None:
    def likes(rendered: str, _: str | None) -> float:
        return 0.3 + 0.3 * ("step" in instruction_of(rendered)) + 0.3 * (rendered.count("<|im_start|>user") > 1)

    small = strategy(name, proposer="edits", rounds=2, search_examples=12)
    whole = bench(base, fake(likes), events=(events := []))
    tuned = small.tune(START, problem(base), whole)
    assert isinstance(tuned, Fixed) and tuned != START
    assert len(of_kind(events, "chosen")) == 1
    works = small.plan(Workload(40, 20, 20, 8, 16))
    assert whole.ledger.tuning.calls <= sum(work.calls for work in works)
    for share in (0.2, 0.6, 0.9):
        limit = int(share * whole.ledger.tuning.tokens)
        at = bench(base, fake(likes), tokens=limit, events=(events := []))
        kept = small.tune(START, problem(base), at)
        assert at.ledger.tuning.tokens <= limit
        assert isinstance(kept, Fixed)
        full = [c["text"] for c in of_kind(events, "candidate") if c["n"] == 12]
        assert kept == START or kept.prompt.instruction in full
        assert of_kind(events, "budget")


@pytest.mark.parametrize("name", SEARCHING)
def test_interrupted_and_resumed_is_the_same(base: BaseModel, name: str) -> None:
    class Stopping(FakeEngine):
        left = 10**9

        def generate(self, requests: Any, sampling: Any) -> Any:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().generate(requests, sampling)

    def rates(rendered: str, _: str | None) -> float:
        return ARMS.get(instruction_of(rendered), 0.15)

    def run(store: MemoryStore, left: int) -> tuple[Any, Any, list[Event]]:
        engine = bandit(rates)
        stopping = Stopping(engine.answer, batch_size=8)
        stopping.left = left
        at = bench(base, stopping, store=store, events=(events := []))
        tuned = strategy(name, rounds=2).tune(START, problem(base, 30, 10), at)
        return tuned, at.ledger.tuning, [e for e in events if e.kind != "progress"]

    whole = run(MemoryStore(), 10**9)
    store = MemoryStore()
    for left in (1, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            run(store, left)
    resumed = run(store, 10**9)
    assert resumed[0] == whole[0]
    assert (resumed[1].tokens, resumed[1].calls) == (whole[1].tokens, whole[1].calls)
    assert resumed[2] == whole[2]


SAYS: dict[str, Any] = {
    "nothing": ("", "empty"),
    "a refusal": ("I'm sorry, but I can't help with that.", "refusal"),
    "the same again": ("```\nAdd the numbers.\n```", "duplicate"),
    "junk": ("```\n<|im_end|>\n```", "tags"),
}


@pytest.mark.parametrize("said", sorted(SAYS))
@pytest.mark.parametrize("name", [method(n) for n in ("opro", "opro+bootstrap", "cfpo", "mipro", "gepa")])
def test_a_useless_proposer_is_counted_and_told_and_the_search_goes_on(base: BaseModel, name: str, said: str) -> None:
    text, reason = SAYS[said]
    says = answering(lambda *_: 0.5)

    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        if not asks_for_a_prompt(rendered):
            return says(rendered, adapter, sample)
        return (
            text.replace("```\n", "<instruction>").replace("\n```", "</instruction>") if "<instr" in rendered else text
        )

    engine, events = FakeEngine(answer, batch_size=8), list[Event]()
    demonstrations = 0 if name != "opro+bootstrap" else 1
    few = 4 if name == "cfpo" else 2  # half of them are rounds of formats, which ask nobody
    chosen = strategy(name, rounds=few, demonstrations=demonstrations).tune(
        START, problem(base), bench(base, engine, events=events)
    )
    rounds = of_kind(events, "round")
    assert sum(r["rejected"].get(reason, 0) for r in rounds) >= 6
    [told] = [warnings([{"kind": e.kind, **e.data} for e in events])]
    if demonstrations or name == "cfpo":
        assert told == [] and isinstance(chosen, Fixed)
    else:
        assert chosen == START
        assert re.fullmatch(rf".* no new prompt .* all \d+ proposals were rejected \(.*{reason}.*\), so .*", told[0])


def test_mipro_without_racing_runs_every_pair_in_full(base: BaseModel) -> None:
    pytest.importorskip("optuna")
    events: list[Event] = []
    small = strategy("mipro", proposer="edits", racing=False, rounds=1)
    small.tune(START, problem(base), bench(base, fake(lambda *_: 0.5), events=events))
    assert {c["n"] for c in of_kind(events, "candidate")} == {30}


def test_gepa_writes_nothing(base: BaseModel, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    pytest.importorskip("gepa")
    monkeypatch.chdir(tmp_path)
    strategy("gepa", proposer="edits", rounds=1).tune(START, problem(base), bench(base, fake(lambda *_: 0.5)))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_gepa_ends_with_the_error_of_its_proposer(base: BaseModel) -> None:
    """The package would go on after it: a budget, or a refusing server, would go unnoticed."""
    pytest.importorskip("gepa")
    tight = problem(base)

    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        if asks_for_a_prompt(rendered):
            raise errors.CotuneError("The server is gone.")
        return "no idea"

    with pytest.raises(errors.CotuneError, match="server is gone"):
        strategy("gepa").tune(START, tight, bench(base, FakeEngine(answer)))


def test_feedback_says_what_was_read_and_what_is_right() -> None:
    asked = example(0)
    assert feedback(asked, Grade(Outcome.CORRECT, "4", 1.0)) == "Correct."
    wrong = feedback(asked, Grade(Outcome.WRONG, "5", 0.0))
    assert wrong == "Wrong (score 0.00). The answer read from it is '5'; the correct answer is '4'."
    assert "No answer can be read" in feedback(asked, Grade(Outcome.WRONG, None, 0.0))
    assert "cut off" in feedback(asked, Grade(Outcome.TRUNCATED, None, 0.0))


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_missing_package_is_named_with_its_extra(name: str, package: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("cotune.strategies.prompt_methods.base.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=rf"needs the package {package}: pip install 'cotune\[{name}\]'"):
        strategy(name)
    with pytest.raises(UsageError, match=r"no prompt method 'mipr'\. Did you mean 'mipro'"):
        strategy("mipr")


@pytest.mark.parametrize("name", EVERY)
def test_one_training_example_is_enough(base: BaseModel, name: str) -> None:
    tuned = strategy(name, rounds=1).tune(START, problem(base, 1, 1), bench(base, bandit(lambda *_: 0.5)))
    assert isinstance(tuned, Fixed)
    assert Sums.seed_instruction == START.prompt.instruction


@pytest.mark.parametrize("name", SEARCHING)
def test_every_method_is_a_stage_before_and_after_weights(base: BaseModel, name: str) -> None:
    prompt = SMALL | {"method": name, "rounds": 1}
    given = {"strategy": "sequential", "model": "x", "task": "micro-gsm8k", "prompt": prompt, "rlprompt": LEARNED}
    chosen = Sequential.from_config(resolve(given | {"weights": {"epochs": 1, "rank": 2}}))
    events: list[Event] = []
    tuned = chosen.tune(START, problem(base, 60, 20), bench(base, bandit(lambda *_: 0.5), events=events))
    assert isinstance(tuned, Fixed) and tuned.adapter
    assert [e.data["strategy"] for e in events if e.kind == "stage-result"] == [
        "prompt-only",
        "lora-only",
        "prompt-only",
    ]
    assert {"0-p", "2-p"} == {e.data["stage"] for e in events if e.kind == "finalist"}
