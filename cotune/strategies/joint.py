"""MetaTuner: prompts and adapters generated per query from one shared encoder, trained together (sheet 02).

Here is the schedule alone: when to roll out, synchronise, train and validate. The networks and their losses are in
models/metatuner, rollouts in rollouts.py, what a step trains on in joint_items.py, what is handed over in metatuned.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Self

from torch import Tensor

from cotune.bench import Bench
from cotune.config import JointConfig, RunConfig
from cotune.engines.base import Sampling
from cotune.errors import BudgetExhausted, NoData, UsageError
from cotune.evaluate import evaluate
from cotune.joint_items import Items, Turn
from cotune.ledger import training_flops
from cotune.metatuned import Branches, MetaTuned, usable
from cotune.models.base import BaseModel
from cotune.models.checkpointing import checkpointed
from cotune.models.lora import PendingLora, target_linears
from cotune.models.metatuner.lora_generator import Shapes
from cotune.models.metatuner.losses import JointItem, joint_loss, joint_terms, watch_agreement
from cotune.models.metatuner.measures import adapter_measures, probe, weights_norm
from cotune.models.metatuner.relaxation import same_vocabulary
from cotune.rollouts import rollouts
from cotune.strategies.base import Fixed, Problem, Work, Workload, fixed
from cotune.training import Cost, Settings, Trainer, shuffled_batches
from cotune.values import Conditioning, Example, Prompt, Tuned

__all__ = ["Joint", "MetaTuned"]

# Micro-batches between looks at how the two terms pull on phi_s. A look costs two backward passes through the shared
# layers, not booked because they measure and change nothing.
AGREEMENT_EVERY = 10
LOOKED_AT = 64  # val examples whose adapters and latents are measured at each validation
PROBED_FROM = 16  # fewer give a probe nothing to go by


@dataclass(frozen=True)
class Joint:
    """`choice_examples`: val examples that choose the state to keep. `teacher`: how D1's own completions are sampled
    (with `source` self or both); its `max_new_tokens` is replaced by the task's limit. `gradient_checkpointing` trades
    time for memory in training.
    """

    settings: JointConfig
    choice_examples: int
    teacher: Sampling
    gradient_checkpointing: bool
    levers: ClassVar[frozenset[str]] = frozenset({"prompt", "weights"})

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        own = config.weights
        teacher = Sampling(0, temperature=own.temperature, top_p=own.top_p, n=own.samples)
        return cls(config.joint, config.prompt.choice_examples, teacher, config.runner.gradient_checkpointing)

    def plan(self, load: Workload) -> list[Work]:
        s, n = self.settings, self.teacher.n
        rows = load.train * {"gold": 1, "self": n, "both": 1 + n}[s.source]
        rounds = [(end - begin) * s.batch_size for begin, end in pairwise([0, *round_ends(s, rows)])]  # items of each
        rolled = sum(min(s.rollout_examples, load.train, items) for items in rounds) * s.rollouts
        rolled = rolled if s.alpha and s.prompt_branch != "off" else 0
        chosen = sum(items > 0 for items in rounds) * min(self.choice_examples, load.val)
        written = rolled + sum(min(load.train, items) for items in rounds[1:]) + chosen
        written = written if s.prompt_branch != "off" else 0
        works = [
            load.rewriting(written, s.max_prompt_tokens, "write prompts"),
            Work.generation("score rollouts", rolled, load.question, load.limit),
            Work(
                "train",
                0,
                0,
                (s.warmup_epochs + s.epochs)
                * rows
                * (load.query + s.max_prompt_tokens + load.question + load.reference),
            ),
            load.answers("choose the round on val", chosen + min(self.choice_examples, load.val), load.question),
        ]
        if s.source != "gold":
            works.insert(0, Work.generation("own completions", load.train * n, load.question, load.limit))
        return works

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        """The state with the best validation score, of those at the end of the warm-up and of each round.

        `start` gives p~, and comes back when it is better on val than every state (ours), and when the budget does not
        reach the first validation. Raises UsageError if `start` has an adapter: M is frozen but for what is generated.
        """
        begin = fixed(start, "joint")
        if begin.adapter is not None:
            raise UsageError("Joint tuning starts from a prompt without an adapter; it generates its own adapters.")
        if self.settings.prompt_signal == "gumbel" and not same_vocabulary(problem.generator, problem.base):
            raise UsageError(
                f"With joint.prompt_signal = 'gumbel' {problem.base.name} reads the token distribution of "
                f"{problem.generator.name}, so both need one vocabulary. Give a --generator of the same family."
            )
        tuned = self._untrained(begin.prompt, problem, bench).under(begin.plan, begin.verifier)
        teacher = replace(self.teacher, max_new_tokens=problem.sampling.max_new_tokens, seed=bench.seed_for("teacher"))
        val = problem.val[: self.choice_examples]
        run = _Run(self.settings, teacher, begin, tuned, problem, val, bench, self.gradient_checkpointing)
        try:
            run.train()
        except BudgetExhausted as error:
            bench.emit("budget", message=str(error))
        return tuned if run.take_best() else start

    def _untrained(self, seed: Prompt, problem: Problem, bench: Bench) -> MetaTuned:
        s = self.settings
        settings, shapes = tuner_arguments(s, problem.base, bench.seed_for("initial weights"))
        branches = Branches(s.prompt_branch, s.adapter_branch, s.max_prompt_tokens)
        return MetaTuned.create(problem.task, seed, branches, problem.generator, problem.base.digest, settings, shapes)


def tuner_arguments(s: JointConfig, actor: BaseModel, seed: int) -> tuple[dict[str, Any], Shapes]:
    """What MetaTuner is made with, besides G: its settings, and the layers of M that it makes adapters for."""
    settings = {
        "share": s.share,
        "sharing": s.sharing,
        "generator_training": s.generator_training,
        "generator_rank": s.generator_rank,
        "rank": s.rank,
        "scaling": s.lora_alpha / s.rank,
        "width": s.width,
        "pooling": s.pooling,
        "layer_embedding": s.layer_embedding,
        "seed": seed,
    }
    linears = target_linears(actor.model, s.target_modules, s.rank)
    return settings, {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}


def round_ends(settings: JointConfig, items: int) -> list[int]:
    """The step behind each round: the warm-up (0 if there is none), then every `sync_every` steps of joint training."""
    per_epoch = math.ceil(items / settings.batch_size)
    warm, total = settings.warmup_epochs * per_epoch, (settings.warmup_epochs + settings.epochs) * per_epoch
    later = range(warm + settings.sync_every, total, settings.sync_every)
    return [warm, *later, *([total] if total > warm else [])]


@dataclass
class _State:
    """What a checkpoint keeps besides tensors: the round, its D2 and its prompts for term 1 (by example id), the val
    score of the start, and the best validation so far with its round.
    """

    round: int = 0
    targets: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    untuned: float = 0.0
    best: float | None = None
    best_round: int = 0


class _Run:
    """One training run.

    Round 0 is the warm-up: G learns the winners of a first rollout round, F learns D1 under p~ (the paper warms both
    up by supervised fine-tuning on unknown data; here both losses run in the same steps, and since M stays frozen it is
    F that is warmed up). Every later round is `sync_every` steps of the joint objective. At its beginning phi_p' is
    synchronised, D2 is rolled out anew and the prompts of term 1 are generated by G_(phi_s, phi_p'); they stay until
    the next round (the paper's formula has them follow phi_s at every step, which would cost a generation per step).
    At its end the state is validated.
    """

    def __init__(
        self,
        settings: JointConfig,
        teacher: Sampling,
        start: Fixed,
        tuned: MetaTuned,
        problem: Problem,
        val: Sequence[Example],
        bench: Bench,
        gradient_checkpointing: bool,
    ) -> None:
        self._settings, self._teacher, self._start, self._tuned = settings, teacher, start, tuned
        self._problem, self._val, self._bench = problem, val, bench
        self._gradient_checkpointing = gradient_checkpointing
        self._state = _State()
        self._unseen = AGREEMENT_EVERY  # micro-batches since the last look
        self._best: dict[str, Tensor] = {n: p.detach().clone() for n, p in tuned.tuner.parameters.items()}
        self._items = Items(settings, tuned, problem.base, bench)

    def train(self) -> None:
        """Ends, or raises BudgetExhausted, where the budget does; what was validated by then can be taken.

        Raises NoData.
        """
        pairs, counts = self._items.pairs(self._problem.train, self._teacher)
        if not pairs:
            raise NoData(
                f"There is nothing to learn from: {counts}. Tune the prompt first, raise weights.samples, or set "
                "joint.source = 'gold'."
            )
        ends = round_ends(self._settings, len(pairs))
        trainer = self._trainer(ends[-1])
        saved = trainer.restore()
        if saved is not None:
            self._state = _State(**saved)
        elif self._val and ends[-1]:
            self._state.untuned = self._score(self._start.condition(self._val, self._bench))
            self._bench.emit("start", val_score=self._state.untuned)
        batches = [
            batch
            for epoch in range(self._settings.warmup_epochs + self._settings.epochs)
            for batch in shuffled_batches(pairs, self._settings.batch_size, self._bench.rng("batches", epoch))
        ]
        for number, (begin, end) in enumerate(pairwise([0, *ends])):
            if number < self._state.round or end == 0:
                continue
            if saved is None or number > self._state.round:
                self._begin(number, [pair.example for batch in batches[begin:end] for pair in batch])
            now = self._state
            steps = [
                [
                    self._items.item(pair, self._turn(step - ends[0]), now.round, now.targets, now.prompts)
                    for pair in batches[step]
                ]
                for step in range(trainer.step, end)
            ]
            if not trainer.run(steps, vars(now)):
                return
            self._validate(trainer.step)

    def take_best(self) -> bool:
        """Give MetaTuner the best validated weights; False when none was validated, or none as good as the start."""
        if self._state.best is None:
            return False
        if self._state.untuned > self._state.best:
            self._bench.emit("chosen", round=None, val_score=self._state.untuned)
            return False
        self._bench.emit("chosen", round=self._state.best_round, val_score=self._state.best if self._val else None)
        self._tuned.tuner.load(self._best)
        return True

    def _begin(self, number: int, examples: Sequence[Example]) -> None:
        """Synchronise, roll out, write the prompts of term 1: for the examples of the round's steps alone (ours)."""
        s, bench, distinct = self._settings, self._bench, list(dict.fromkeys(examples))
        self._tuned.tuner.prompts.sync()
        chosen = bench.rng("rollouts", number).sample(distinct, min(s.rollout_examples, len(distinct)))
        seed = bench.seed_for("rollouts", number)
        sampling = Sampling(s.max_prompt_tokens, temperature=s.rollout_temperature, n=s.rollouts, seed=seed)
        targets: dict[str, str] = {}
        prompts: dict[str, str] = {}
        gumbel = s.prompt_signal == "gumbel" and number > 0
        if s.alpha and s.prompt_branch != "off" and not gumbel:
            targets = rollouts(self._tuned, chosen, sampling, self._problem.sampling, bench)
        if gumbel:
            one = Sampling(s.max_prompt_tokens, temperature=1.0, seed=seed)
            sampled = self._tuned.sample_prompts(distinct, one, bench)
            prompts = {e.id: text for e, row in zip(distinct, sampled, strict=True) if (text := usable(row[0]))}
        elif number and s.prompt_branch != "off":
            written = self._tuned.greedy_prompts(distinct, bench, frozen=True)
            prompts = {e.id: p.instruction for e, p in zip(distinct, written, strict=True)}
        self._state = replace(self._state, round=number, targets=targets, prompts=prompts)

    def _validate(self, step: int) -> None:
        """Keep the state if no earlier one scored as high on the val examples (without any: the last state)."""
        score = 0.0
        if self._val:
            conditionings = self._tuned.condition(self._val, self._bench)
            self._look(conditionings)
            score = self._score(conditionings)
        kept = not self._val or self._state.best is None or score > self._state.best
        if kept:
            self._state.best, self._state.best_round = score, self._state.round
            for name, parameter in self._tuned.tuner.parameters.items():
                self._best[name].copy_(parameter.detach())
        self._bench.emit(
            "validation", round=self._state.round, step=step, val_score=score if self._val else None, kept=kept
        )

    def _score(self, conditionings: Sequence[Conditioning]) -> float:
        task, sampling = self._problem.task, self._problem.sampling
        return evaluate(task, self._val, conditionings, sampling, self._bench, label="validation").score

    def _look(self, conditionings: Sequence[Conditioning]) -> None:
        """Events on what F makes and what its encoding knows; they measure and change nothing, so are not booked."""
        tuned, branch = self._tuned, self._settings.adapter_branch
        if branch == "off":
            return
        pending = [c.adapter for c in conditionings if isinstance(c.adapter, PendingLora)]
        adapters = [adapter.make() for adapter in pending[:LOOKED_AT]]
        if adapters:
            measures = adapter_measures(adapters, self._base_norm)
            self._bench.emit("adapters", examples=len(adapters), fixed=branch == "fixed", **measures)
        seen = self._val[:LOOKED_AT]
        if len(seen) >= PROBED_FROM and branch == "per-example":
            latents = tuned.latents(seen)
            features = {
                "question_length": [float(len(self._problem.task.question_text(e))) for e in seen],
                "solution_length": [float(len(self._problem.task.reference_completion(e))) for e in seen],
            }
            self._bench.emit("probe", examples=len(seen), **probe(latents, features))

    @cached_property
    def _base_norm(self) -> float:
        return weights_norm(self._problem.base.model, list(self._tuned.shapes))

    def _turn(self, step: int) -> Turn:
        """The term of a step, counted from the end of the warm-up. MetaTuner-I begins with term 1 (ours)."""
        s = self._settings
        if s.variant == "sum" or step < 0 or "off" in (s.prompt_branch, s.adapter_branch):
            return "both"
        return "prompt" if step // s.alternate_every % 2 else "adapter"

    def _trainer(self, total_steps: int) -> Trainer[JointItem]:
        s, tuner = self._settings, self._tuned.tuner
        extra = {f"frozen/{n}": t for n, t in tuner.prompts.frozen.items()}
        extra |= {f"best/{n}": t for n, t in self._best.items()}
        return Trainer(
            "joint",
            tuner.parameters,
            self._loss,
            lambda _item: 1.0,
            self._cost,
            lambda item: item.example,
            Settings(s.learning_rate, s.batch_size, s.micro_batch_size, s.warmup, s.max_grad_norm, s.checkpoint_every),
            total_steps,
            self._bench,
            extra,
        )

    def _loss(self, items: Sequence[JointItem]) -> tuple[Tensor, dict[str, float]]:
        tuner, actor = self._tuned.tuner, self._problem.base
        models = (tuner.prompts.base.model, tuner.encoder.base.model, actor.model)
        with checkpointed(*models) if self._gradient_checkpointing else nullcontext():
            terms = joint_terms(tuner, actor, items)
        self._unseen += 1
        if tuner.shares and self._unseen > AGREEMENT_EVERY:
            shared = list(tuner.prompts.shared.values())
            if watch_agreement(terms, shared, lambda pull: self._bench.emit("agreement", **pull)):
                self._unseen = 0
        return joint_loss(terms, prompt_weight=self._settings.alpha)

    def _cost(self, item: JointItem) -> Cost:
        """G reads a query and its target in all layers, and for an adapter alone in k of them. M reads prompt, question
        and completion.
        """
        tuner = self._tuned.tuner
        trained = sum(p.numel() for p in [*tuner.prompts.shared.values(), *tuner.prompts.own.values()])
        inside = trained if self._settings.generator_training == "full" else 0
        per_token = training_flops(tuner.prompts.base.parameters_count - inside, trained, 1)
        tokens, flops = 0, 0.0
        written = len(item.relaxed.prompt) if item.relaxed else len(item.target)
        if written:
            tokens += len(item.written_from) + written
            flops += per_token * tokens
        if item.completion:
            if not (written and tuner.shares and not item.prompt_query):
                tokens += len(item.query)
                flops += per_token * len(item.query) * tuner.prompts.depth / tuner.prompts.layers
            in_m = len(item.question) + len(item.completion)
            tokens += in_m
            flops += training_flops(self._problem.base.parameters_count, 0, in_m)
            flops += training_flops(0, tuner.adapters.work, 1)
        return Cost(tokens, flops)
