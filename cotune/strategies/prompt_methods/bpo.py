"""BPO (sheet 10): a trained rewriter that gives every question its own instruction.

Completions of each teaching example are sampled under the start prompt. Where one scores higher than another, the
proposer sees both and improves the instruction for this question; the rewriter learns by cross-entropy to write what
the proposer wrote, from instruction and question alone. It is MetaTuner's generator without adapters (metatuned.py),
which asks, saves and serves it.

Deviations (ours): preferences are the task's scores of own completions, where the paper has annotators' on four data
sets; the question itself, which is the task's, is not rewritten; improved instructions that are junk, or answer the
question, are left out, where the paper has rules on their format; the rewriter is the run's own model by default and
trains LoRA; it writes greedily, where the paper samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from cotune.bench import Bench
from cotune.config import BpoConfig, JointConfig, RunConfig
from cotune.engines.base import Request, Sampling
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.ledger import training_flops
from cotune.metatuned import Branches, MetaTuned
from cotune.models.checkpointing import checkpointed
from cotune.models.metatuner.losses import JointItem, prompt_term
from cotune.proposers import KINDS, Proposing
from cotune.proposers.meta_prompt import asks_for_tags, read_reply
from cotune.proposers.writing import Writer
from cotune.search import size
from cotune.strategies.base import Work, Workload
from cotune.strategies.prompt_methods.base import Finalist, Ground, needs_model_here
from cotune.tasks.base import Message
from cotune.training import Cost, Settings, Trainer, shuffled_batches
from cotune.values import Example, Outcome


@dataclass(frozen=True)
class Bpo:
    """`rounds` rounds of sampling; `generator` says how the rewriter is trained."""

    teaches: ClassVar[bool] = True
    demonstrations: ClassVar[int] = 0

    rounds: int
    settings: BpoConfig
    generator: JointConfig
    proposing: Proposing
    gradient_checkpointing: bool

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        needs_model_here(config, "bpo")
        proposing = Proposing.from_config(config)
        if not proposing.asks:
            raise UsageError(
                f"prompt.method = 'bpo' learns from instructions that a model improved, and prompt.proposer = 'edits' "
                f"asks none. Take another proposer ({KINDS.replace('edits, ', '')})."
            )
        checkpointing = config.runner.gradient_checkpointing
        return cls(config.prompt.rounds, config.bpo, config.joint, proposing, checkpointing)

    def plan(self, load: Workload, driving: int, teaching: int) -> list[Work]:
        s = self.settings
        improved = self.rounds * teaching
        length = self.proposing.max_characters // 4  # about 4 characters a token
        works = [
            Work.generation("own completions", improved * s.samples, load.question, load.limit),
            Work.generation("improve instructions", improved, load.question + 2 * load.limit, length),
            Work("train the rewriter", 0, 0, s.epochs * improved * (load.query + s.max_prompt_tokens)),
            load.rewriting(driving + load.val, s.max_prompt_tokens),
            load.answers("score the rewriter", driving, load.question),
        ]
        return [work for work in works if work.calls or work.trained_tokens]

    def search(self, ground: Ground) -> list[Finalist]:
        """The rewriter beside the start prompt, or that alone where there is nothing to learn from."""
        tuned, bench = self._untrained(ground), ground.bench
        improved = self._improved(tuned, ground)
        if not improved:
            return ground.finalists()
        self._train(tuned, improved, bench)
        examples = ground.search.board.examples
        conditionings = tuned.condition(examples, bench)
        done = evaluate(ground.task, examples, conditionings, ground.sampling, bench, label="search")
        longest = max(size(c.prompt) for c in conditionings)
        found = [Finalist(tuned, "bpo", done.score, longest), *ground.finalists()]
        return sorted(found, key=lambda f: (-f.score, f.size))

    def _improved(self, tuned: MetaTuned, ground: Ground) -> list[JointItem]:
        """What the proposer wrote for examples that were answered better and worse. Emits "improved" for each round."""
        bench = ground.bench
        examples = ground.teaching or ground.search.board.examples
        writer = self.proposing.writer(ground.generator, bench)
        assert writer is not None
        improver = _Improver(writer.at(self.settings.proposer_temperature), tuned, ground)
        found: dict[JointItem, None] = {}
        rejected: Counter[str] = Counter()
        mixed = 0
        for number in range(self.rounds):
            pairs = improver.pairs(examples, self.settings, number)
            mixed += len(pairs)
            for example, better, worse in pairs:
                said = improver.improve(example, better, worse, number)
                if isinstance(said, JointItem):
                    found[said] = None
                else:
                    rejected[said] += 1
            counted = {"mixed": mixed, "rejected": dict(sorted(rejected.items())), "kept": len(found)}
            bench.emit("improved", round=number + 1, examples=len(examples), **counted)
        if not found:
            why = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in rejected.most_common())
            told = (
                f"all {mixed} improved instructions were rejected ({why})" if mixed else "no example was answered both"
            )
            told += "" if mixed else " better and worse"
            bench.emit(
                "warning",
                message=f"bpo has nothing to learn from: in {self.rounds} rounds over {len(examples)} examples {told}. "
                "Raise bpo.samples, or take another prompt.proposer.",
            )
        return list(found)

    def _train(self, tuned: MetaTuned, improved: Sequence[JointItem], bench: Bench) -> None:
        """All epochs, or as far as the budget reaches."""
        s, prompts = self.settings, tuned.tuner.prompts
        parameters = prompts.shared | prompts.own
        trained = sum(p.numel() for p in parameters.values())
        inside = trained if prompts.training == "full" else 0
        per_token = training_flops(prompts.base.parameters_count - inside, trained, 1)

        def cost(item: JointItem) -> Cost:
            tokens = len(item.query) + len(item.target)
            return Cost(tokens, per_token * tokens)

        def loss(items: Sequence[JointItem]) -> tuple[Tensor, dict[str, float]]:
            with checkpointed(prompts.base.model) if self.gradient_checkpointing else nullcontext():
                return prompt_term(tuned.tuner, items)[0].sum(), {}

        batches = [
            batch
            for epoch in range(s.epochs)
            for batch in shuffled_batches(improved, s.batch_size, bench.rng("bpo", epoch))
        ]
        trainer = Trainer(
            "bpo",
            parameters,
            loss,
            lambda _: 1.0,
            cost,
            lambda item: item.example,
            Settings(s.learning_rate, s.batch_size, s.micro_batch_size, s.warmup, s.max_grad_norm, s.checkpoint_every),
            len(batches),
            bench,
        )
        trainer.restore()
        trainer.run(batches[trainer.step :])

    def _untrained(self, ground: Ground) -> MetaTuned:
        """The generator as it is; no adapters are generated, that of the start (w before p) answers every query."""
        branches = Branches("per-example", "off", self.settings.max_prompt_tokens)
        settings: dict[str, Any] = {
            "share": self.generator.share,
            "sharing": True,
            "generator_training": self.generator.generator_training,
            "generator_rank": self.generator.generator_rank,
            "rank": 1,
            "scaling": 0.0,
            "width": 1,
            "pooling": self.generator.pooling,
            "layer_embedding": True,
            "seed": ground.bench.seed_for("bpo"),
        }
        start, actor = ground.search.start, ground.bench.base.digest
        made = MetaTuned.create(ground.task, start, branches, ground.generator, actor, settings, {})
        return replace(made, adapter=ground.start.adapter, plan=ground.start.plan, verifier=ground.start.verifier)


@dataclass(frozen=True)
class _Improver:
    """Samples answers and asks for better instructions. The wording is ours; what it asks for is the paper's."""

    writer: Writer
    tuned: MetaTuned
    ground: Ground

    def pairs(self, examples: Sequence[Example], s: BpoConfig, number: int) -> list[tuple[Example, str, str]]:
        """(example, its best and its worst completion) where their scores differ; cut off ones do not count."""
        ground, bench, base = self.ground, self.ground.bench, self.ground.bench.base
        limit, seed = ground.sampling.max_new_tokens, bench.seed_for("bpo", number)
        sampling = Sampling(limit, s.temperature, n=s.samples, seed=seed)
        requests = [
            Request(base.render(ground.task.messages(ground.search.start, e)), ground.start.adapter) for e in examples
        ]
        found = []
        for example, completions in zip(examples, bench.generate(requests, sampling, label="rollouts"), strict=True):
            scores = {c.text: ground.task.grade(example, c.text).score for c in completions if not c.truncated}
            if len(set(scores.values())) > 1:
                found.append((example, max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__)))
        return found

    def improve(self, example: Example, better: str, worse: str, number: int) -> JointItem | str:
        """The instruction as the rewriter learns it, or why there is none."""
        ground, generator = self.ground, self.tuned.generator
        messages = self._messages(example, better, worse)
        if not self.writer.fits(messages):
            return "over_context"
        [reply] = self.writer.write(messages, 1, ground.bench, "improve", number, example.id)
        said = read_reply(reply.text, reply.truncated, self.writer.name, ground.search.start)
        text = said.prompt.instruction
        if text == ground.search.start.instruction:
            return "duplicate"
        if reason := ground.search.junk(said):
            return reason
        if ground.task.grade(example, text).outcome is Outcome.CORRECT:
            return "answers"
        query, target = tuple(generator.encode(self.tuned.query(example, "per-example"))), generator.encode_answer(text)
        if len(target) > self.tuned.branches.max_prompt_tokens:
            return "too_long"
        if len(query) + len(target) > generator.context_length:
            return "over_context"
        return JointItem(query, target, (), (), example=example.id)

    def _messages(self, example: Example, better: str, worse: str) -> list[Message]:
        parts = [
            "A language model got an instruction and a question, and answered twice.",
            f"Instruction:\n{self.ground.search.start.instruction}",
            f"Question:\n{self.ground.task.question_text(example)}",
            f"Better answer:\n{better.strip()}",
            f"Worse answer:\n{worse.strip()}",
            "Find what makes the better answer better: first whether it is right, then how helpful it is. Rewrite the "
            "instruction so that the model answers this question like that. Keep everything that it says, add no "
            "details beyond what is needed, do not answer the question and do not speak of the two answers. "
            f"{asks_for_tags()}",
        ]
        return [{"role": "user", "content": "\n\n".join(parts)}]
