"""The joint strategy on random models: schedule, rollouts, resume, what it hands over. Real training, tiny sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.bench import Bench, MemoryStore
from cotune.config import JointConfig
from cotune.engines.base import Engine, Request, Sampling
from cotune.engines.fake import FakeEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.ledger import Ledger
from cotune.metatuned import MetaTuned, usable
from cotune.models.base import BaseModel, load, weights_digest
from cotune.models.lora import LoraFactors
from cotune.models.metatuner.losses import JointItem
from cotune.rollouts import Candidate, best_prompt, rollouts
from cotune.strategies import joint as joint_module
from cotune.strategies import load_tuned
from cotune.strategies.base import Fixed, NoData, Problem
from cotune.strategies.joint import Joint
from cotune.tasks.micro import MicroGsm8k
from cotune.values import Completion, Event, Example, Grade, Outcome, Prompt, Tuned

SETTINGS = JointConfig(
    share=0.5,
    rank=2,
    lora_alpha=4.0,
    target_modules=("q_proj", "v_proj"),
    width=8,
    generator_rank=2,
    rollouts=3,
    rollout_examples=5,
    sync_every=2,
    warmup_epochs=1,
    epochs=2,
    learning_rate=2e-2,
    batch_size=4,
    micro_batch_size=4,
    max_prompt_tokens=6,
    checkpoint_every=1,
)
ANSWERS = Sampling(6)
SEED = Fixed(Prompt("Solve it."))


class LuckyTask(MicroGsm8k):
    """A random model solves nothing; here a completion counts by the parity of its letters, which prompts change."""

    def grade(self, example: Example, completion: str, truncated: bool = False) -> Grade:
        score = float(sum(completion.encode()) % 2)
        return Grade(Outcome.CORRECT if score else Outcome.WRONG, completion, score)


def talkative(base: BaseModel) -> BaseModel:
    """Random models never end a turn by themselves: here one token in six does."""
    assert base.model.generation_config
    base.model.generation_config.eos_token_id = [base.tokenizer.eos_token_id, *range(3, 250, 6)]
    return base


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return talkative(load(str(random_model_dir)))


@pytest.fixture(scope="module")
def other(base: BaseModel) -> BaseModel:
    """A generator of another family, width, depth and vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocabulary = {token: i for i, token in enumerate(["<s>", *letters, "th", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        model_max_length=512,
        chat_template="{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}<s>",
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=vocabulary["</s>"],
        bos_token_id=0,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return talkative(BaseModel("other", model, wrapped, "nowhere", None))


def rows(task: MicroGsm8k, split: str, count: int) -> tuple[Example, ...]:
    made = task.generate_rows(split, count, seed=5, difficulty=0)
    return tuple(task.parse(row, f"{split}-{i}") for i, row in enumerate(made))


@dataclass
class Lab:
    base: BaseModel
    settings: JointConfig = SETTINGS
    generator: BaseModel | None = None
    engine: Engine | None = None
    ledger: Ledger = field(default_factory=Ledger)
    store: MemoryStore = field(default_factory=MemoryStore)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        task = LuckyTask()
        self.problem = Problem(
            task, rows(task, "train", 8), rows(task, "val", 4), self.base, self.generator or self.base, ANSWERS
        )
        engine = self.engine or self.make_engine(self.base)
        self.bench = Bench(
            self.base, engine, self.make_engine, self.ledger, self.store, 3, self.events.append, stage="tune"
        )

    @staticmethod
    def make_engine(base: BaseModel) -> Engine:
        return TransformersEngine(base, batch_size=16, threads=1)

    def tune(self) -> Tuned:
        return Joint(self.settings, 3, Sampling(0)).tune(SEED, self.problem, self.bench)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [dict(e.data) for e in self.events if e.kind == kind]


def changed(**values: Any) -> JointConfig:
    return SETTINGS.model_copy(update=values)


def saved(tuned: Tuned, folder: Path) -> dict[str, bytes]:
    tuned.save(folder)
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def key(tuned: Tuned, lab: Lab) -> list[tuple[str, str | None]]:
    with lab.ledger.measuring():
        found = tuned.condition(lab.problem.val, lab.bench.at("check"))
    return [(c.prompt.instruction, c.adapter.digest if c.adapter else None) for c in found]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[JointItem]]:
    """The items of every loss, in order; losses are computed as always."""
    batches: list[list[JointItem]] = []
    real = joint_module.joint_terms

    def note(tuner: Any, actor: Any, items: Sequence[JointItem], **which: bool) -> Any:
        batches.append(list(items))
        return real(tuner, actor, items, **which)

    monkeypatch.setattr(joint_module, "joint_terms", note)
    return batches


# --- rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([("a", 3, 0.0), ("b", 3, 1.0)], "b"),
        ([("a", 3, 1.0), ("b", 2, 1.0), ("c", 1, 0.0)], "b"),  # of equals the shortest
        ([("a", 2, 1.0), ("b", 2, 1.0), ("c", 1, 0.0)], "a"),  # then the first
        ([("a", 2, 0.4), ("b", 9, 0.7)], "b"),
        ([("a", 2, 1.0), ("b", 1, 1.0)], None),  # all right
        ([("a", 2, 0.0), ("b", 1, 0.0)], None),  # all wrong
        ([("a", 2, 1.0)], None),
        ([], None),
    ],
)
def test_the_best_prompt_of_a_query(candidates: list[tuple[str, int, float]], best: str | None) -> None:
    assert best_prompt([Candidate(*c) for c in candidates]) == best


def script(prompts: Sequence[str]) -> Callable[[str, str | None, int], str]:
    """G writes `prompts[sample]`; M answers "a" (odd: correct) under an instruction with "good" in it, else "b"."""

    def answer(rendered: str, _adapter: str | None, sample: int) -> str:
        if "Rewrite the instruction" in rendered:
            return prompts[sample]
        return "a" if "good" in rendered.split("<|im_end|>")[0] else "b"

    return answer


def scripted(base: BaseModel, prompts: Sequence[str], **settings: Any) -> Lab:
    return Lab(base, changed(**settings), engine=FakeEngine(script(prompts)))


def untrained(lab: Lab) -> MetaTuned:
    return Joint(lab.settings, 3, Sampling(0))._untrained(SEED.prompt, lab.problem, lab.bench)


def test_rollouts_keep_what_the_task_prefers_and_try_no_prompt_twice(base: BaseModel) -> None:
    lab = scripted(base, ["bad", "good one here", "good", " good ", "", "one two three four five six seven"])
    examples = lab.problem.train[:2]
    chosen = rollouts(untrained(lab), examples, Sampling(6, temperature=1.0, n=6), ANSWERS, lab.bench)
    assert chosen == {e.id: "good" for e in examples}
    assert isinstance(lab.bench.engine, FakeEngine)
    asked = [r.prompt for r in lab.bench.engine.calls if "Rewrite the instruction" not in r.prompt]
    assert len(asked) == 2 * 3  # bad, good one here, good: once each
    assert lab.of("rollouts") == [
        {
            "stage": "tune",
            "examples": 2,
            "prompts": 6,
            "distinct": 3,
            "kept": 2,
            "mean_score": pytest.approx(2 / 3),
            "best_score": 1.0,
            "tuning_tokens": lab.ledger.tuning.tokens,
        }
    ]


def test_a_query_whose_prompts_score_alike_is_left_out(base: BaseModel) -> None:
    lab = scripted(base, ["good", "good as well", "good too"])
    assert rollouts(untrained(lab), lab.problem.train, Sampling(6, 1.0, n=3), ANSWERS, lab.bench) == {}


@pytest.mark.parametrize(
    ("text", "truncated", "instruction"), [(" Do it.\n", False, "Do it."), ("  ", False, None), ("Do", True, None)]
)
def test_a_prompt_is_usable_if_it_is_there_and_has_an_end(text: str, truncated: bool, instruction: str | None) -> None:
    assert usable(Completion(text, (1,), 1, truncated)) == instruction


def test_the_seed_stands_in_for_an_unusable_prompt(base: BaseModel) -> None:
    lab = scripted(base, ["one two three four five six seven"])
    found = untrained(lab).condition(lab.problem.val, lab.bench)
    assert [c.prompt for c in found] == [SEED.prompt] * 4
    assert [c.adapter for c in found] == [None] * 4  # before training the update is zero
    assert lab.of("generated_prompts")[0]["fallbacks"] == 4


# --- schedule --------------------------------------------------------------------------------------------------------


def test_warm_up_reads_the_seed_prompt_and_later_rounds_what_g_writes(
    base: BaseModel, seen: list[list[JointItem]]
) -> None:
    lab = scripted(base, ["good", "bad", "bad too"])  # greedy: the first
    lab.tune()
    # 8 examples, batches of 4: 2 steps of warm-up, then 4 steps in rounds of 2
    assert [len(batch) for batch in seen] == [4] * 6
    text = [[base.decode(i.question) for i in batch] for batch in seen]
    assert all("Solve it." in t for batch in text[:2] for t in batch)
    assert all("good" in t and "Solve it." not in t for batch in text[2:] for t in batch)
    assert len(lab.of("rollouts")) == 3
    assert [e["step"] for e in lab.of("validation")] == [2, 4, 6]
    targets = {base.decode(i.target) for batch in seen for i in batch if i.target}
    assert targets == {"good"}
    per_epoch = sum(bool(i.target) for batch in seen[:2] for i in batch)
    assert per_epoch == SETTINGS.rollout_examples  # only these were rolled out
    assert all(base.decode(i.query).count("Instruction: Solve it.") == 1 for batch in seen for i in batch)
    assert all(i.completion[-1] == base.end_of_turn_ids[0] for batch in seen for i in batch)


def test_the_frozen_copy_follows_only_at_the_beginning_of_a_round(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = scripted(base, ["good", "bad", "bad too"])
    states: list[tuple[bool, torch.Tensor]] = []
    real = joint_module.joint_terms

    def note(tuner: Any, *args: Any, **which: bool) -> Any:
        name = next(n for n in tuner.prompts.own if n.endswith("lora_b"))
        frozen, own = tuner.prompts.frozen[name], tuner.prompts.own[name]
        states.append((torch.equal(frozen, own), frozen.clone()))
        return real(tuner, *args, **which)

    monkeypatch.setattr(joint_module, "joint_terms", note)
    lab.tune()
    assert [same for same, _ in states] == [True, False] * 3
    frozen = [tensor for _, tensor in states]
    assert all(torch.equal(frozen[i], frozen[i + 1]) for i in (0, 2, 4))
    assert not torch.equal(frozen[0], frozen[2]) and not torch.equal(frozen[2], frozen[4])


def test_without_the_prompt_term_nothing_is_rolled_out(base: BaseModel, seen: list[list[JointItem]]) -> None:
    lab = scripted(base, ["good", "bad", "bad too"], alpha=0.0)
    tuned = lab.tune()
    assert not lab.of("rollouts") and not any(i.target for batch in seen for i in batch)
    fresh = untrained(lab).tuner.prompts
    assert isinstance(tuned, MetaTuned)
    assert all(torch.equal(p, fresh.own[n]) for n, p in tuned.tuner.prompts.own.items())


def test_own_completions_and_none_of_them(base: BaseModel, seen: list[list[JointItem]]) -> None:
    Lab(base, changed(source="self", warmup_epochs=1, epochs=0), engine=FakeEngine(lambda *_: "a")).tune()
    assert {base.decode(i.completion) for batch in seen for i in batch} == {"a"}
    with pytest.raises(NoData, match="nothing to learn"):
        Lab(base, changed(source="self"), engine=FakeEngine(lambda *_: "b")).tune()


# --- the whole strategy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_tune_leaves_the_models_alone_and_survives_saving(
    base: BaseModel, other: BaseModel, training: str, tmp_path: Path
) -> None:
    generator = base if training == "full" else other
    before = weights_digest(base.model), weights_digest(generator.model)
    lab = Lab(base, changed(generator_training=training), generator=generator)
    tuned = lab.tune()
    assert isinstance(tuned, MetaTuned)
    assert (weights_digest(base.model), weights_digest(generator.model)) == before
    fresh = untrained(lab).tuner.parameters
    assert any(e["kept"] for e in lab.of("rollouts")) and any(
        e["fallbacks"] < e["examples"] for e in lab.of("generated_prompts")
    )
    moved = {n.split("/")[0] for n, p in tuned.tuner.parameters.items() if not torch.equal(p, fresh[n])}
    assert moved == {"shared", "prompt", "lora"}

    ours = key(tuned, lab)
    assert len({adapter for _, adapter in ours}) == len(ours)  # an adapter of its own for every example
    assert set(saved(tuned, tmp_path)) == {"tuned.json", "metatuner.safetensors"}
    again = load_tuned(tmp_path, generator)
    assert key(again, lab) == ours

    with pytest.raises(UsageError, match="generator"):
        load_tuned(tmp_path, other if generator is base else base)
    if generator is other:
        wrong = Bench(other, lab.make_engine(other), lab.make_engine, Ledger(), MemoryStore(), 3)
        with pytest.raises(UsageError, match="another model"):
            again.condition(lab.problem.val, wrong)
    (tmp_path / "metatuner.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="damaged"):
        load_tuned(tmp_path, generator)


def test_the_best_validated_state_comes_back(base: BaseModel) -> None:
    lab = Lab(base)
    tuned = lab.tune()
    scores = [e["val_score"] for e in lab.of("validation")]
    assert len(scores) == 3 and max(scores) > min(scores)  # else this shows nothing
    val = lab.problem.val[:3]
    found = evaluate(lab.problem.task, val, tuned.condition(val, lab.bench), ANSWERS, lab.bench)
    assert found.score == max(scores)
    (chosen,) = lab.of("chosen")
    assert (chosen["val_score"], chosen["round"]) == (max(scores), scores.index(max(scores)))
    pull = lab.of("agreement")
    assert pull and all(-1 <= e["cosine"] <= 1 and e["prompt_gradient"] > 0 for e in pull)


class Killed(BaseException):
    """As a kill would: not an Exception that a strategy could catch."""


@dataclass
class Stopping:
    """The real engine until batch `stop_at`."""

    inner: Engine
    stop_at: int
    name: str = "transformers"
    batches: int = 0

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        return self.inner.plan(requests, sampling)

    def token_count(self, prompt: str) -> int:
        return self.inner.token_count(prompt)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        self.batches += 1
        if self.batches > self.stop_at:
            raise Killed
        return self.inner.generate(requests, sampling)


def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Stopping(Lab.make_engine(base), stop_at=10**9)
    whole = Lab(base, engine=counter)
    expected = saved(whole.tune(), tmp_path / "whole")
    spent, batches = whole.ledger.tuning.tokens, counter.batches
    real = joint_module.joint_terms

    def resume(store: MemoryStore, name: str) -> None:
        lab = Lab(base, store=store)
        assert saved(lab.tune(), tmp_path / name) == expected
        assert lab.ledger.tuning.tokens == spent

    for stop_at in range(0, batches, 4):
        store = MemoryStore()
        with pytest.raises(Killed):
            Lab(base, store=store, engine=Stopping(Lab.make_engine(base), stop_at)).tune()
        resume(store, f"batch-{stop_at}")
    for step in (1, 4, 5):
        steps = iter(range(step))

        def stop(*args: Any, steps: Any = steps, **which: bool) -> Any:
            if next(steps, None) is None:
                raise Killed
            return real(*args, **which)

        store = MemoryStore()
        monkeypatch.setattr(joint_module, "joint_terms", stop)
        with pytest.raises(Killed):
            Lab(base, store=store).tune()
        monkeypatch.setattr(joint_module, "joint_terms", real)
        resume(store, f"step-{step}")


def test_a_budget_keeps_the_best_of_what_was_validated(base: BaseModel) -> None:
    free = Lab(base)
    free.tune()
    marks = [e["tuning_tokens"] for e in free.of("validation")]
    for limit, validated in ((0, 0), (marks[0] - 1, 0), (marks[0] + 600, 1), (marks[1] + 600, 2)):
        lab = Lab(base, ledger=Ledger(tokens=limit))
        tuned = lab.tune()
        assert len(lab.of("validation")) <= validated + 1
        assert (tuned is SEED) == (not lab.of("validation"))
        assert lab.ledger.tuning.tokens <= limit
        assert lab.of("budget")


def test_micro_batches_do_not_change_the_result(base: BaseModel) -> None:
    one, split = Lab(base, changed(epochs=0)), Lab(base, changed(epochs=0, micro_batch_size=1))
    left, right = one.tune(), split.tune()
    assert isinstance(left, MetaTuned) and isinstance(right, MetaTuned)
    for name, parameter in left.tuner.parameters.items():
        torch.testing.assert_close(parameter, right.tuner.parameters[name], atol=1e-4, rtol=1e-3)


def test_joint_starts_from_a_prompt_alone(base: BaseModel) -> None:
    lab = Lab(base)
    start = Fixed(SEED.prompt, LoraFactors.zero(base.model, ["q_proj"], 1))
    with pytest.raises(UsageError, match="without an adapter"):
        Joint(SETTINGS, 3, Sampling(0)).tune(start, lab.problem, lab.bench)


def test_without_val_examples_the_last_state_comes_back(base: BaseModel) -> None:
    lab = scripted(base, ["good", "bad", "bad too"])
    lab.problem = Problem(lab.problem.task, lab.problem.train, (), base, base, ANSWERS)
    assert isinstance(lab.tune(), MetaTuned)
    assert [e["kept"] for e in lab.of("validation")] == [True] * 3
