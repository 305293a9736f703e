"""A bench, a task and models on which joint tuning has something to learn from. Shared by the tests of joint tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cotune.bench import Bench, MemoryStore
from cotune.config import JointConfig
from cotune.engines.base import Engine, Sampling
from cotune.engines.fake import FakeEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.ledger import Ledger
from cotune.metatuned import MetaTuned
from cotune.models.base import BaseModel
from cotune.strategies.base import Fixed, Problem
from cotune.strategies.joint import Joint
from cotune.tasks.micro import MicroGsm8k
from cotune.values import Event, Example, Grade, Outcome, Prompt, Tuned

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


def llama() -> BaseModel:
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
    made = task.generate_rows(split, count, seed=5)
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
    gradient_checkpointing: bool = False

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

    @property
    def strategy(self) -> Joint:
        return Joint(self.settings, 3, Sampling(0), self.gradient_checkpointing)

    def tune(self) -> Tuned:
        return self.strategy.tune(SEED, self.problem, self.bench)

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
    return lab.strategy._untrained(SEED.prompt, lab.problem, lab.bench)
