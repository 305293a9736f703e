"""A trained rewriter: it learns a policy that no single prompt can be, is charged, saved, and resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import reply_of, serving
from toy import Sums, Wrapped, bench, instruction_of, of_kind, question_of, right_answer
from typer.testing import CliRunner

from cotune.bench import MemoryStore
from cotune.cli import app
from cotune.config import RunConfig, resolve
from cotune.engines.base import Request, Sampling
from cotune.engines.fake import FakeEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.engines.vllm_engine import VllmEngine
from cotune.errors import CotuneError, UsageError
from cotune.experiment import dataset
from cotune.metatuned import Branches, MetaTuned
from cotune.models.base import BaseModel, load, weights_digest
from cotune.rewrite import REWRITE_INSTRUCTION, rewrite_messages
from cotune.strategies import load_tuned
from cotune.strategies.base import Fixed, Problem, Workload, one_adapter
from cotune.strategies.inference_aware import InferenceAware
from cotune.strategies.prompt_only import PromptOnly
from cotune.strategies.sequential import Sequential
from cotune.tasks import task as make_task
from cotune.values import Completion, Event, Example, Prompt

START = Fixed(Prompt("Add."))
KINDS = {"What": "W", "Please": "P"}
IMPROVES = "answered twice"
TEACHING = 30  # and as many that score, of 60 train examples


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load(str(random_model_dir), device="cpu", dtype="float32")


def example(i: int) -> Example:
    a, b = 3 + i, 2 * i + 1
    asked = (f"What is {a} + {b} ?", f"Please add {a} + {b}")[i % 2]
    return Example(f"toy-{i}", asked, str(a + b), rationale=f"{a} + {b} = {a + b}")


def kind(question: str) -> str:
    return KINDS[question.split()[0]]


def problem(base: BaseModel) -> Problem:
    rows = [example(i) for i in range(80)]
    return Problem(Sums(), tuple(rows[:60]), tuple(rows[60:]), base, base, Sampling(16))


def answer(rendered: str, adapter: str | None, sample: int) -> str:
    """Right under the letter of the question's kind; under the start prompt every other time; else wrong."""
    if IMPROVES in rendered:
        asked = rendered.split("Question:\n")[1]
        return f"<instruction>{kind(asked)}</instruction>"
    said = instruction_of(rendered)
    fine = said == kind(question_of(rendered)) or (said == "Add." and sample % 2 == 1)
    return right_answer(rendered) if fine else "I do not know"


class Split(Wrapped):
    """Rewriting by the real model under its adapter, everything else by `says`. Counts batches; stops before one.

    `answered` has (instruction, adapter's digest, samples) of each question that `says` was asked.
    """

    def __init__(self, base: BaseModel, says: Any = answer, stop_at: int | None = None) -> None:
        super().__init__(TransformersEngine(base, batch_size=16, threads=1), name="split")
        self.fake = FakeEngine(says, batch_size=16)
        self.stop_at = stop_at
        self.batches = 0
        self.answered: list[tuple[str, str | None, int]] = []

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        return (self.inner if REWRITE_INSTRUCTION in requests[0].prompt else self.fake).plan(requests, sampling)

    def token_count(self, prompt: str) -> int:
        return (self.inner if REWRITE_INSTRUCTION in prompt else self.fake).token_count(prompt)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        if self.batches == self.stop_at:
            raise KeyboardInterrupt
        self.batches += 1
        if REWRITE_INSTRUCTION in requests[0].prompt:
            return super().generate(requests, sampling)
        self.answered += [
            (instruction_of(r.prompt), r.adapter.digest if r.adapter else None, sampling.n)
            for r in requests
            if IMPROVES not in r.prompt
        ]
        return self.fake.generate(requests, sampling)


def config(strategy: str = "prompt-only", **changes: Any) -> RunConfig:
    prompt = {"method": "bpo", "rounds": 1, "search_examples": 30, "choice_examples": 20, "finalists": 2}
    bpo = {
        "samples": 2,
        "max_prompt_tokens": 4,
        "epochs": 8,
        "learning_rate": 0.02,
        "batch_size": 5,
        "micro_batch_size": 5,
        "checkpoint_every": 6,
    }
    given = {"strategy": strategy, "model": "x", "task": "micro-gsm8k", "joint": {"generator_rank": 4}}
    return resolve({**given, "prompt": prompt, "bpo": bpo}, changes)


def strategy(**changes: Any) -> PromptOnly:
    return PromptOnly.from_config(config(**changes))


def stages(kinds: str, **weights: Any) -> Sequential:
    weights = {"epochs": 2, "rank": 2, "batch_size": 20, "micro_batch_size": 20, "learning_rate": 0.01} | weights
    return Sequential.from_config(config("sequential", sequential={"stages": kinds}, weights=weights))


def test_the_rewriter_learns_what_no_single_prompt_can(base: BaseModel, tmp_path: Path) -> None:
    """The known optimum is the letter of each question's kind: 100%, where the best prompt for all gets half."""
    given, events, before = problem(base), list[Event](), weights_digest(base.model)
    at = bench(base, Split(base), events=events)
    tuned = strategy().tune(START, given, at)
    assert isinstance(tuned, MetaTuned)
    [improved] = of_kind(events, "improved")
    assert improved == improved | {"examples": TEACHING, "mixed": TEACHING, "kept": TEACHING, "rejected": {}}
    scores = {f["origin"]: (f["score"], f["val_score"]) for f in of_kind(events, "finalist")}
    assert scores == {"bpo": (1.0, 1.0), "start": (0.0, 0.0)}
    assert weights_digest(base.model) == before and not any(p.requires_grad for p in base.model.parameters())

    conditionings = tuned.condition(given.val, at)
    assert [c.prompt.instruction for c in conditionings] == [kind(e.question) for e in given.val]
    assert all(c.adapter is None for c in conditionings)
    tuned.save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    opened = load_tuned(tmp_path, base)
    assert isinstance(opened, MetaTuned) and set(tuned.sizes()) == {"encoder", "prompt_decoder"}
    # the task of a saved one is the real one of that name; its questions read alike
    assert [c.prompt for c in opened.condition(given.val, at)] == [c.prompt for c in conditionings]


def test_weights_learn_under_the_prompt_written_for_each_question(base: BaseModel, tmp_path: Path) -> None:
    given = problem(base)
    at, alone = bench(base, engine := Split(base)), bench(base, Split(base))
    tuned = stages("p,w").tune(START, given, at)
    stages("p").tune(START, given, alone)
    assert isinstance(tuned, MetaTuned) and tuned.adapter
    asked = [base.encode(base.render(given.task.messages(Prompt(kind(e.question)), e))) for e in given.train]
    learned = sum(len(q) + len(base.encode_answer(e.rationale)) for q, e in zip(asked, given.train, strict=True))
    assert at.ledger.tuning.trained_tokens - alone.ledger.tuning.trained_tokens == 2 * learned  # epochs

    conditionings = tuned.condition(given.val, at)
    assert [c.prompt.instruction for c in conditionings] == [kind(e.question) for e in given.val]
    assert {c.adapter for c in conditionings} == {tuned.adapter}
    assert {(letter, tuned.adapter.digest, 1) for letter in "WP"} <= set(engine.answered)
    tuned.save(tmp_path)
    opened = load_tuned(tmp_path, base)
    assert isinstance(opened, MetaTuned) and opened.adapter and opened.adapter.digest == tuned.adapter.digest
    assert [c.prompt for c in opened.condition(given.val, at)] == [c.prompt for c in conditionings]


@pytest.mark.parametrize("method", ["rft", "dpo", "kto", "grpo", "ppo"])
def test_own_completions_are_sampled_under_the_prompt_of_each_question(base: BaseModel, method: str) -> None:
    def says(rendered: str, adapter: str | None, sample: int) -> str:
        tuned = IMPROVES not in rendered and instruction_of(rendered) in KINDS.values()
        return "I do not know" if tuned and sample % 2 else answer(rendered, adapter, sample)

    class Read(Split):
        """Completions have tokens that the model knows: grpo and ppo learn the sampled ones."""

        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
            made = super().generate(requests, sampling)
            return [[replace(c, token_ids=tuple(base.encode(c.text))) for c in row] for row in made]

    engine = Read(base, says)
    chosen = stages("p,w", method=method, epochs=1, samples=4)
    tuned = chosen.tune(START, problem(base), bench(base, engine))
    assert isinstance(tuned, MetaTuned) and tuned.adapter
    assert sorted(i for i, _, samples in engine.answered if samples == 4) == 30 * ["P"] + 30 * ["W"]


def test_the_rewriter_learns_beside_the_adapter_of_the_stage_before(base: BaseModel) -> None:
    given, events = problem(base), list[Event]()
    at = bench(base, engine := Split(base), events=events)
    tuned = stages("w,p").tune(START, given, at)
    assert isinstance(tuned, MetaTuned) and tuned.adapter
    written = [adapter for instruction, adapter, _ in engine.answered if instruction in KINDS.values()]
    assert written and set(written) == {tuned.adapter.digest}
    sampled = [adapter for instruction, adapter, _ in engine.answered if instruction == "Add."]
    assert {None, tuned.adapter.digest} <= set(sampled)  # before and after w
    scores = {f["origin"]: f["val_score"] for f in of_kind(events, "finalist")}
    assert scores == {"bpo": 1.0, "start": 0.0}


def test_a_later_stage_of_prompts_begins_with_the_original_prompt_again(base: BaseModel) -> None:
    at = bench(base, Split(base), events=(events := []))
    tuned = stages("p,w,p").tune(START, problem(base), at)
    assert isinstance(tuned, MetaTuned) and tuned.adapter and tuned.seed == START.prompt
    assert [r["val_score"] for r in of_kind(events, "stage-result")] == [1.0, 1.0, 1.0]
    assert [c["origin"] for c in of_kind(events, "chosen") if "origin" in c] == ["bpo", "bpo"]


def test_stages_are_within_the_plan_and_keep_a_budget(base: BaseModel) -> None:
    given, chosen = problem(base), stages("p,w,p")
    whole = bench(base, Split(base))
    chosen.tune(START, given, whole)
    rewriting = [base.encode(base.render(rewrite_messages("Add.", e.question))) for e in given.train]
    reference = max(len(base.encode_answer(e.rationale)) for e in given.train)
    works = chosen.plan(Workload(60, 20, max(map(len, rewriting)), reference, 16))
    assert whole.ledger.tuning.calls <= sum(w.calls for w in works)
    assert whole.ledger.tuning.trained_tokens <= sum(w.trained_tokens for w in works)
    for share in (0.0, 0.5, 0.9):
        at = bench(base, Split(base), tokens=int(share * whole.ledger.tuning.tokens), events=(events := []))
        kept = chosen.tune(START, given, at)
        assert at.ledger.tuning.tokens <= share * whole.ledger.tuning.tokens
        assert of_kind(events, "budget")
        assert share or kept == START


def test_what_makes_adapters_for_every_example_is_no_start_for_one(base: BaseModel) -> None:
    made = MetaTuned.create(
        Sums(),
        START.prompt,
        Branches(),
        base,
        base.digest,
        {"share": 0.5, "sharing": True, "generator_training": "lora", "generator_rank": 2, "rank": 2, "scaling": 1.0}
        | {"width": 4, "pooling": "last", "layer_embedding": True, "seed": 0},
        {},
    )
    with pytest.raises(CotuneError, match=r"lora-only goes on from at most one adapter"):
        one_adapter(made, "lora-only")


def test_a_rewriter_can_be_an_arm_of_inference_aware(base: BaseModel, tmp_path: Path) -> None:
    events: list[Event] = []
    at = bench(base, Split(base), events=events)
    chosen = InferenceAware.from_config(
        config("inference-aware", inference={"samples": 2, "prompts": 2, "completions": 80})
    )
    tuned = chosen.tune(START, problem(base), at)
    assert isinstance(tuned, MetaTuned)
    assert tuned.plan.aggregation == "majority"
    assert [a["chosen"] for a in of_kind(events, "arm")] == [True, False]
    tuned.save(tmp_path)
    opened = load_tuned(tmp_path, base)
    assert isinstance(opened, MetaTuned)
    assert opened.plan == tuned.plan


def test_everything_is_charged_and_within_the_plan(base: BaseModel) -> None:
    given, chosen = problem(base), strategy()
    at = bench(base, Split(base))
    chosen.tune(START, given, at)
    encoded = [
        len(base.encode(base.render(rewrite_messages("Add.", e.question)) + kind(e.question) + "<|im_end|>"))
        for e in chosen._split(given, at)[1]
    ]
    assert at.ledger.tuning.trained_tokens == 8 * sum(encoded)
    works = chosen.plan(Workload(60, 20, max(encoded), 8, 16))
    assert at.ledger.tuning.calls <= sum(w.calls for w in works)
    assert at.ledger.tuning.trained_tokens <= sum(w.trained_tokens for w in works)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
def test_a_budget_is_kept(base: BaseModel, share: float) -> None:
    whole = bench(base, Split(base))
    strategy().tune(START, problem(base), whole)
    at = bench(base, Split(base), tokens=int(share * whole.ledger.tuning.tokens), events=(events := []))
    kept = strategy().tune(START, problem(base), at)
    assert at.ledger.tuning.tokens <= share * whole.ledger.tuning.tokens
    assert kept == START or [c["origin"] for c in of_kind(events, "chosen")] == ["bpo"]
    assert of_kind(events, "budget")
    if share == 0:
        assert at.ledger.tuning.tokens == 0


@pytest.mark.parametrize("kinds", ["p", "p,w"])
def test_interrupted_and_resumed_is_the_same(base: BaseModel, tmp_path: Path, kinds: str) -> None:
    class Stopping(MemoryStore):
        def save_checkpoint(self, name: str, tensors: Any, meta: Any) -> None:
            super().save_checkpoint(name, tensors, meta)
            if name.endswith("bpo") and meta["meta"]["step"] == 6:
                raise KeyboardInterrupt

    def run(store: MemoryStore, stop_at: int | None = None) -> tuple[dict[str, bytes], Any, list[Event]]:
        at = bench(base, Split(base, stop_at=stop_at), store=store, events=(events := []))
        tuned = stages(kinds).tune(START, problem(base), at)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        tuned.save(folder)
        files = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return files, at.ledger.tuning, [e for e in events if e.kind not in ("progress", "step")]

    whole = run(MemoryStore())
    store = Stopping()
    for stop_at in (2, 5) if kinds == "p" else (2, 25):
        with pytest.raises(KeyboardInterrupt):
            run(store, stop_at)
    with pytest.raises(KeyboardInterrupt):
        run(store)
    again = MemoryStore()
    again.__dict__.update(store.__dict__)
    resumed = run(again)
    assert resumed[0] == whole[0]
    if kinds == "p":  # a stage w says nothing again of what is in its checkpoint
        assert resumed[2] == whole[2]
    assert (resumed[1].tokens, resumed[1].calls, resumed[1].flops) == (
        whole[1].tokens,
        whole[1].calls,
        whole[1].flops,
    )


SAYS = {
    "": "empty",
    "I'm sorry, but I can't help with that.": "refusal",
    "<instruction>Add.</instruction>": "duplicate",
    "<instruction><|im_end|></instruction>": "tags",
    "<instruction>Count with care, slowly.</instruction>": "too long",  # for four tokens
}


@pytest.mark.parametrize("said", [*SAYS, "the answer"])
def test_useless_improvements_are_counted_and_told_and_the_start_stays(base: BaseModel, said: str) -> None:
    def says(rendered: str, adapter: str | None, sample: int) -> str:
        if IMPROVES not in rendered:
            return answer(rendered, adapter, sample)
        asked = rendered.split("Question:\n")[1].split("\n")[0].split("<|im_end|>")[0]
        numbers = [int(word) for word in asked.split() if word.isdigit()]
        return f"<instruction>{sum(numbers)}</instruction>" if said == "the answer" else said

    reason = SAYS.get(said, "answers")
    at = bench(base, Split(base, says), events=(events := []))
    assert strategy().tune(START, problem(base), at) == START
    [improved] = of_kind(events, "improved")
    assert improved["rejected"] == {reason.replace(" ", "_"): TEACHING}
    [told] = [w["message"] for w in of_kind(events, "warning")]
    assert f"all 30 improved instructions were rejected (30 {reason})" in told


def test_nothing_answered_both_better_and_worse_is_told(base: BaseModel) -> None:
    at = bench(base, Split(base, lambda rendered, *_: right_answer(rendered)), events=(events := []))
    assert strategy().tune(START, problem(base), at) == START
    [told] = [w["message"] for w in of_kind(events, "warning")]
    assert "no example was answered both better and worse" in told


def test_vllm_serves_the_rewriters_adapter(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.engines.vllm_engine.find_spec", lambda _: "as if it were installed")

    def largest(**prompt: Any) -> int | None:
        return VllmEngine.from_config(base, config(prompt=prompt)).max_rank

    assert largest() == 32  # of weights.rank, joint.rank and joint.generator_rank, whatever is served
    assert largest(method="opro") is None


def test_what_it_cannot_do_is_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match=r"'bpo' trains what writes its prompts, and x is a black box .* --generator"):
        strategy(engine="openai")
    with pytest.raises(UsageError, match=r"asks none\. Take another proposer \(self, model:NAME or openai:"):
        strategy(prompt={"proposer": "edits"})
    with pytest.raises(UsageError, match=r"a later stage p could go on from one .* Leave sequential.restart on"):
        Sequential.from_config(config("sequential", sequential={"stages": "p,w,p", "restart": False}))


def cotune(*args: str | Path | int) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize(
    ("strategy", "shown", "carded"),
    [
        ("prompt-only", "a prompt generated for each example\n", "a generator that writes a prompt for every question"),
        ("sequential", "for each example, one adapter for all\n", "(`generator/`) and one LoRA adapter for all"),
    ],
    ids=["bpo", "bpo, then weights"],
)
def test_a_run_is_taken_home_and_answers_there_as_in_its_folder(
    tmp_path: Path, strategy: str, shown: str, carded: str
) -> None:
    """Through the command line: the packaged model answers and rewrites, a server improves."""
    settings = {
        "sequential.stages": "p,w",
        "weights.epochs": 2,
        "prompt.method": "bpo",
        "prompt.rounds": 1,
        "prompt.search_examples": 20,
        "prompt.choice_examples": 12,
        "bpo.samples": 4,
        "bpo.batch_size": 4,
        "bpo.epochs": 6,
        "bpo.learning_rate": 0.01,
        "bpo.max_prompt_tokens": 32,
        "joint.generator_rank": 4,
        "decoding.max_new_tokens": 32,
    }

    with serving() as server:
        server.answer = lambda _: reply_of(
            "<instruction>Think step by step. Finish with #### and the number.</instruction>"
        )
        settings["prompt.proposer"] = f"openai:{server.url}#m"
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        limits = ("--limit-train", 40, "--limit-val", 12, "--limit-test", 4, "--out", tmp_path, "--name", "run")
        cotune("run", "--strategy", strategy, "--model", "tiny", "--task", "micro-gsm8k", *limits, *sets)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert next(e for e in events if e["kind"] == "improved")["kept"] > 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    tuned = json.loads((tmp_path / "run/tuned/tuned.json").read_text())
    assert tuned["kind"] == "metatuner" and summary["serving"]["prompts"]["written_tokens"] > 0
    assert shown in cotune("show", tmp_path / "run").stdout
    cotune("export", tmp_path / "run", "--out", tmp_path / "home")
    assert carded in (tmp_path / "home/README.md").read_text()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Tom has 3 eggs. He finds 4 more. How many has he?"}\n')
    for name in ("run", "home"):
        cotune("predict", tmp_path / name, "--input", rows, "--output", tmp_path / f"{name}.jsonl")
    assert (tmp_path / "run.jsonl").read_text() == (tmp_path / "home.jsonl").read_text()


def test_a_model_behind_a_server_is_asked_what_a_generator_here_writes(tmp_path: Path) -> None:
    """The paper's own case: the answering model is a black box, the rewriter is trained here."""
    task = make_task("micro-gsm8k")
    data = dataset(config(limit_train=40, limit_val=12), task)
    right = {task.question_text(e): e.reference for e in (*data.train, *data.val, *data.test())}

    def says(body: Any) -> Any:
        instruction, asked = (body["messages"][i]["content"] for i in (0, -1))
        if IMPROVES in asked:
            return reply_of("<instruction>Think step by step.</instruction>")
        if "step by step" in instruction or body.get("seed", 0) % 2:
            return reply_of(f"#### {right[asked]}")
        return reply_of("I do not know")

    args = ["--engine", "openai", "--model", "some-model", "--generator", "tiny", "--task", "micro-gsm8k"]
    settings = {
        "prompt.method": "bpo",
        "prompt.proposer": "self",
        "prompt.rounds": 1,
        "prompt.search_examples": 20,
        "prompt.choice_examples": 12,
        "bpo.batch_size": 4,
        "bpo.epochs": 6,
        "bpo.learning_rate": 0.01,
        "bpo.max_prompt_tokens": 32,
        "joint.generator_rank": 4,
        "noise_examples": 0,
    }
    with serving() as server:
        server.answer = says
        settings["openai.base_url"] = server.url
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        limits = ("--limit-train", 40, "--limit-val", 12, "--limit-test", 8, "--out", tmp_path, "--name", "run")
        cotune("run", "--strategy", "prompt-only", *args, *limits, *sets)
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert summary["score"] == 1.0
        assert summary["serving"]["prompts"]["written_tokens"] > 0
        cotune("export", tmp_path / "run", "--out", tmp_path / "home")
        rows = tmp_path / "rows.jsonl"
        example = data.test()[0]
        rows.write_text(json.dumps({"question": example.question}) + "\n")
        for name in ("run", "home"):
            cotune("predict", tmp_path / name, "--input", rows, "--output", tmp_path / f"{name}.jsonl")
            assert json.loads((tmp_path / f"{name}.jsonl").read_text())["prediction"] == example.reference
