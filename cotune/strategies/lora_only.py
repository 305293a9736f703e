"""Tune the weights alone: one LoRA adapter, trained by one of the methods in cotune/methods.

With the method rft this is BetterTogether's BootstrapFinetune (sheet 01) for one module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from cotune.bench import Bench
from cotune.config import RunConfig, WeightsConfig
from cotune.errors import BudgetExhausted, CotuneError
from cotune.evaluate import evaluate
from cotune.metatuned import MetaTuned
from cotune.methods.base import Material, Method, Parameters, Policy
from cotune.methods.policy_gradient import Grpo, Ppo
from cotune.methods.preferences import Dpo, Kto
from cotune.methods.supervised import Supervised
from cotune.models.lora import LoraFactors, init_static, target_linears
from cotune.strategies.base import Fixed, Problem, Work, Workload, one_adapter
from cotune.training import Settings, Trainer
from cotune.values import Conditioning, Example, Tuned

METHODS: Mapping[str, Callable[[Material], Method[Any]]] = {
    "sft": Supervised,
    "rft": Supervised,
    "dpo": Dpo,
    "kto": Kto,
    "grpo": Grpo,
    "ppo": Ppo,
}


@dataclass(frozen=True)
class LoraOnly:
    """`drop_demonstrations` trains on the prompt without its demonstrations, so that the weights learn to do without
    them (but not in grpo and ppo, which learn under the prompt that they answer); the result still carries them
    (Algorithm 1 returns the tuned prompt with the tuned weights). `choice_examples` val examples choose the epoch.
    `gradient_checkpointing` trades time for memory in training.
    """

    levers: ClassVar[frozenset[str]] = frozenset({"weights"})

    config: WeightsConfig
    choice_examples: int
    drop_demonstrations: bool
    gradient_checkpointing: bool

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls(
            config.weights,
            config.prompt.choice_examples,
            config.sequential.drop_demonstrations,
            config.runner.gradient_checkpointing,
        )

    def plan(self, load: Workload) -> list[Work]:
        c = self.config
        sampled, answered = load.train * c.samples, load.question + load.limit
        rolled = Work.generation("own completions", sampled, load.question, load.limit)
        chosen = min(self.choice_examples, load.val)
        choose = load.answers("choose the epoch on val", (c.epochs + 1) * chosen, load.question)  # and the start
        if c.method == "sft":
            return [Work("train", 0, 0, c.epochs * load.train * (load.question + load.reference)), choose]
        if c.method in ("grpo", "ppo"):
            # every epoch samples anew; each completion is read by the reference and by the policy that sampled it
            reads = 2 if c.method == "ppo" else (c.beta > 0) + (c.updates > 1)
            rolled = replace(
                rolled,
                calls=c.epochs * sampled,
                forward_tokens=c.epochs * (1 + reads) * rolled.forward_tokens,
            )
            return [rolled, Work("train", 0, 0, c.epochs * c.updates * sampled * answered), choose]
        # kto reads another completion beside each, before and in training; dpo's pairs repeat the scarcer side
        reads = {"rft": 0, "dpo": 1, "kto": 2}[c.method]
        learned = {"rft": c.samples, "dpo": 2 * (c.samples - 1), "kto": 2 * c.samples}[c.method]
        rolled = replace(rolled, forward_tokens=(1 + reads) * rolled.forward_tokens)
        return [rolled, Work("train", 0, 0, c.epochs * load.train * learned * answered), choose]

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        """The adapter of the epoch that is best on val (ties: the earlier), under the prompt of `start`, or the prompt
        that it writes for each example (once, before training).

        `start` itself comes back when it is better on val than every epoch (ours; the paper returns what was
        trained), and when the budget ends before an epoch is trained and scored. An adapter that `start` brings is
        trained further (ours: w after w, and p,w after w); it must have this rank, scaling and these layers.
        Raises NoData when there is nothing to learn from, CotuneError when training diverges.
        """
        begin = one_adapter(start, "lora-only")
        factors = self._factors(begin.adapter, problem, bench)
        policy = Policy(problem.base, factors, self.config.scaling, begin.adapter, self.gradient_checkpointing)
        try:
            chosen = problem.val[: self.choice_examples]
            val = _Val(problem, chosen, begin.condition(chosen, bench), bench)
            method = METHODS[self.config.method](self._material(begin, policy, problem, bench))
        except BudgetExhausted as stop:
            bench.emit("budget", where="rollouts", message=str(stop))
            return start
        best = self._train(method, policy, val, bench)
        return replace(begin, adapter=best) if best else start

    def _material(self, begin: Fixed | MetaTuned, policy: Policy, problem: Problem, bench: Bench) -> Material:
        train = problem.train
        prompts = {e: c.prompt for e, c in zip(train, begin.condition(train, bench), strict=True)}
        learned = (
            {e: replace(p, demonstrations=()) for e, p in prompts.items()} if self.drop_demonstrations else prompts
        )
        limit = problem.sampling.max_new_tokens
        return Material(self.config, problem.task, train, prompts, learned, limit, policy, bench)

    def _factors(self, given: LoraFactors | None, problem: Problem, bench: Bench) -> Parameters:
        """Fresh factors, or a trainable float32 copy of the given ones."""
        model, c = problem.base.model, self.config
        dora = c.variant == "dora"
        if given is None:
            generator = torch.Generator().manual_seed(bench.seed_for("lora"))
            return init_static(model, c.target_modules, c.rank, generator, dora)
        device = model.device
        layers = target_linears(model, c.target_modules, c.rank)
        found = (given.rank, given.scaling, given.is_dora)
        if found != (c.rank, c.scaling, dora) or given.factors.keys() != layers.keys():
            kinds = {False: "LoRA", True: "DoRA"}
            raise CotuneError(
                f"The adapter to train further is {kinds[given.is_dora]} of rank {given.rank}, scaling "
                f"{given.scaling:g} and {len(given.factors)} layers; the config asks for {kinds[dora]} of rank "
                f"{c.rank}, scaling {c.scaling:g} and {len(layers)} layers. Give both stages the same weights.rank, "
                "weights.alpha, weights.variant and weights.target_modules."
            )

        def trainable(factor: Tensor) -> nn.Parameter:
            return nn.Parameter(factor.detach().to(device, torch.float32, copy=True))

        return {name: tuple(map(trainable, given.factors[name])) for name in layers}

    def _train(self, method: Method[Any], policy: Policy, val: _Val, bench: Bench) -> LoraFactors | None:
        """Train and score epoch by epoch; None when the start is best. The checkpoint has the best factors so far."""
        c = self.config
        parts = "abm" if c.variant == "dora" else "ab"  # lora_a, lora_b, magnitude
        named = {f"{n}.{part}": p for n, own in policy.factors.items() for part, p in zip(parts, own, strict=True)}
        best = {name: p.detach().clone() for name, p in named.items()}
        trainer = Trainer(
            "lora",
            {**named, **method.parameters},
            method.loss,
            method.weight,
            method.cost,
            method.name_of,
            Settings(
                c.learning_rate,
                c.batch_size,
                method.micro_batch_size,
                c.warmup,
                c.max_grad_norm,
                c.checkpoint_every * method.updates,  # a checkpoint between them could not make the rollouts again
            ),
            c.epochs * method.steps,
            bench,
            best,
        )
        meta: dict[str, Any] = trainer.restore() or {"scores": []}
        if "untuned" not in meta:
            meta["untuned"] = val.score(policy.start)
            if meta["untuned"] is None:
                return None
            bench.emit("start", val_score=meta["untuned"])
        for number in range(len(meta["scores"]), c.epochs):  # a resumed run has scored some already
            done = trainer.step - number * method.steps
            try:
                if not trainer.run(method.batches(number, done, meta), meta):
                    break
            except BudgetExhausted as stop:
                bench.emit("budget", where="rollouts", message=str(stop))
                break
            score = val.score(policy.snapshot())
            if score is None:
                break
            if score > max(meta["scores"], default=-1.0):
                for name, parameter in named.items():
                    best[name].copy_(parameter.detach())
            meta["scores"] = [*meta["scores"], score]
            bench.emit("epoch", epoch=number + 1, of=c.epochs, val_score=score)
        scores = meta["scores"]
        if not scores:
            return None
        if meta["untuned"] > max(scores):
            bench.emit("chosen", epoch=0, val_score=meta["untuned"])
            return None
        bench.emit("chosen", epoch=scores.index(max(scores)) + 1, val_score=max(scores))
        factors = {name: tuple(best[f"{name}.{part}"] for part in parts) for name in policy.factors}
        return LoraFactors(factors, c.scaling)


@dataclass(frozen=True)
class _Val:
    """Scores adapters on these val examples; `asked` has the prompt of each."""

    problem: Problem
    examples: Sequence[Example]
    asked: Sequence[Conditioning]
    bench: Bench

    def score(self, adapter: LoraFactors | None) -> float | None:
        """None when the budget cannot pay for it."""
        p, conditionings = self.problem, [replace(c, adapter=adapter) for c in self.asked]
        try:
            return evaluate(p.task, self.examples, conditionings, p.sampling, self.bench, label="val").score
        except BudgetExhausted as stop:
            self.bench.emit("budget", where="val", message=str(stop))
            return None
