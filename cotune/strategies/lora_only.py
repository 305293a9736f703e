"""Tune the weights alone: one LoRA adapter, trained on worked answers or on own accepted completions.

BetterTogether's BootstrapFinetune (sheet 01) for one module, with gold rationales as an option.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from cotune.bench import Bench
from cotune.config import RunConfig, TargetModules
from cotune.engines.base import Sampling
from cotune.errors import BudgetExhausted, CotuneError
from cotune.evaluate import evaluate
from cotune.ledger import training_flops
from cotune.models.checkpointing import checkpointed
from cotune.models.lora import LoraFactors, attached, init_static, target_linears
from cotune.strategies.base import Fixed, NoData, Problem, Work, Workload, fixed
from cotune.supervision import TokenRow, Trace, accepted, completion_loss, gold, token_row
from cotune.training import Cost, Settings, Trainer, shuffled_batches
from cotune.values import Tuned

Parameters = Mapping[str, tuple[nn.Parameter, nn.Parameter]]


@dataclass(frozen=True)
class LoraOnly:
    """The fields are those of WeightsConfig, which has units and sources.

    `drop_demonstrations` trains on the prompt without its demonstrations, so that the weights learn to do without
    them; the result still carries them (Algorithm 1 returns the tuned prompt with the tuned weights).
    `choice_examples` val examples choose the epoch. `gradient_checkpointing` trades time for memory in training.
    """

    levers: ClassVar[frozenset[str]] = frozenset({"weights"})

    source: Literal["gold", "self", "both"]
    samples: int
    temperature: float
    top_p: float
    rank: int
    alpha: float
    target_modules: TargetModules
    epochs: int
    learning_rate: float
    batch_size: int
    micro_batch_size: int
    warmup: float
    max_grad_norm: float
    checkpoint_every: int
    choice_examples: int
    drop_demonstrations: bool
    gradient_checkpointing: bool

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls(
            **config.weights.model_dump(),
            choice_examples=config.prompt.choice_examples,
            drop_demonstrations=config.sequential.drop_demonstrations,
            gradient_checkpointing=config.runner.gradient_checkpointing,
        )

    def plan(self, load: Workload) -> list[Work]:
        rows = load.train * {"gold": 1, "self": self.samples, "both": 1 + self.samples}[self.source]
        works = []
        if self.source != "gold":
            works.append(Work.generation("own completions", load.train * self.samples, load.question, load.limit))
        works.append(Work("train", 0, 0, self.epochs * rows * (load.question + load.reference)))
        chosen = min(self.choice_examples, load.val)
        return [*works, Work.generation("choose the epoch on val", self.epochs * chosen, load.question, load.limit)]

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        """The adapter of the epoch that is best on val (ties: the earlier), under the prompt of `start`.

        An adapter that `start` brings is trained further (ours: w after w, and p,w after w); it must have this
        rank, scaling and these layers. `start` itself comes back only if the budget ends before an epoch is trained
        and scored. Raises NoData when nothing was accepted, CotuneError when training diverges.
        """
        begin = fixed(start, "lora-only")
        parameters = self._parameters(begin, problem, bench)
        try:
            rows = self._rows(begin, problem, bench)
        except BudgetExhausted as stop:
            bench.emit("budget", where="rollouts", message=str(stop))
            return start
        return self._train(parameters, rows, begin, problem, bench) or start

    def _parameters(self, begin: Fixed, problem: Problem, bench: Bench) -> Parameters:
        """Fresh factors, or a trainable float32 copy of those that `start` brings."""
        model = problem.base.model
        if begin.adapter is None:
            generator = torch.Generator().manual_seed(bench.seed_for("lora"))
            return init_static(model, self.target_modules, self.rank, generator)
        given, device = begin.adapter, model.device
        layers = target_linears(model, self.target_modules, self.rank)
        if given.rank != self.rank or given.scaling != self.alpha / self.rank or given.factors.keys() != layers.keys():
            raise CotuneError(
                f"The adapter to train further has rank {given.rank}, scaling {given.scaling:g} and "
                f"{len(given.factors)} layers; the config asks for rank {self.rank}, scaling "
                f"{self.alpha / self.rank:g} and {len(layers)} layers. Give both stages the same weights.rank, "
                "weights.alpha and weights.target_modules."
            )

        def trainable(factor: Tensor) -> nn.Parameter:
            return nn.Parameter(factor.detach().to(device, torch.float32, copy=True))

        return {name: (trainable(given.factors[name][0]), trainable(given.factors[name][1])) for name in layers}

    def _rows(self, begin: Fixed, problem: Problem, bench: Bench) -> list[TokenRow]:
        """What to train on. Emits "traces" with what survived each step before any training."""
        task, base = problem.task, problem.base
        traces: list[Trace] = gold(task, problem.train) if self.source != "self" else []
        counts: dict[str, Any] = {"gold": len(traces), "sampled": 0, "accepted": 0}
        if self.source != "gold":
            limit, seed = problem.sampling.max_new_tokens, bench.seed_for("rollouts")
            sampling = Sampling(limit, self.temperature, self.top_p, n=self.samples, seed=seed)
            own, counts["sampled"] = accepted(
                task, problem.train, begin.condition(problem.train, bench), sampling, bench
            )
            counts["accepted"] = len(own)
            counts["solved"] = len({t.example.id for t in own})
            traces += own
        prompt = replace(begin.prompt, demonstrations=()) if self.drop_demonstrations else begin.prompt
        distinct = {(t.example.id, t.completion): t for t in traces}.values()
        rows = [token_row(base, base.render(task.messages(prompt, t.example)), t) for t in distinct]
        fitting = [row for row in rows if len(row) <= base.context_length]
        counts |= {"distinct": len(rows), "over_context": len(rows) - len(fitting), "kept": len(fitting)}
        bench.emit("traces", use="weights", source=self.source, examples=len(problem.train), **counts)
        if not fitting:
            raise NoData(
                f"There is nothing to train on: of {counts['sampled']} own completions the grader accepted "
                f"{counts['accepted']}, there were {counts['gold']} gold ones, and {counts['over_context']} did not "
                "fit the context. Tune the prompt first, raise weights.samples, or set weights.source = 'gold'."
            )
        return fitting

    def _train(
        self, parameters: Parameters, rows: list[TokenRow], begin: Fixed, problem: Problem, bench: Bench
    ) -> Fixed | None:
        """Train and score epoch by epoch. The best factors so far travel with the checkpoint."""
        scaling = self.alpha / self.rank
        named = {f"{name}.{part}": p for name, pair in parameters.items() for part, p in zip("ab", pair, strict=True)}
        best = {name: p.detach().clone() for name, p in named.items()}
        trained = sum(p.numel() for p in named.values())
        base = problem.base

        def loss(batch: Any) -> tuple[Tensor, dict[str, float]]:
            recompute = checkpointed(base.model) if self.gradient_checkpointing else nullcontext()
            with recompute, attached(base.model, parameters, scaling):
                return completion_loss(base, batch), {}

        def cost(row: TokenRow) -> Cost:
            return Cost(len(row), training_flops(base.parameters_count, trained, len(row)))

        epochs = [shuffled_batches(rows, self.batch_size, bench.rng("epoch", e)) for e in range(self.epochs)]
        steps = sum(len(epoch) for epoch in epochs)
        trainer = Trainer(
            "lora",
            named,
            loss,
            lambda row: len(row.completion),
            cost,
            lambda row: row.example,
            self._settings,
            steps,
            bench,
            best,
        )
        scores: list[float] = list((trainer.restore() or {}).get("scores", []))
        for number, epoch in list(enumerate(epochs))[len(scores) :]:  # a resumed run has scored some already
            already = trainer.step - number * len(epoch)
            if not trainer.run(epoch[already:], {"scores": list(scores)}):
                break
            now = Fixed(begin.prompt, LoraFactors.snapshot(parameters, scaling))
            score = self._score(now, problem, bench)
            if score is None:
                break
            if not scores or score > max(scores):
                for name, parameter in named.items():
                    best[name].copy_(parameter.detach())
            scores.append(score)
            bench.emit("epoch", epoch=len(scores), of=self.epochs, val_score=score)
        if not scores:
            return None
        bench.emit("chosen", epoch=scores.index(max(scores)) + 1, val_score=max(scores))
        factors = {name: (best[f"{name}.a"], best[f"{name}.b"]) for name in parameters}
        return Fixed(begin.prompt, LoraFactors(factors, scaling))

    def _score(self, candidate: Fixed, problem: Problem, bench: Bench) -> float | None:
        """Val score, or None when the budget cannot pay for it."""
        examples = problem.val[: self.choice_examples]
        try:
            conditionings = candidate.condition(examples, bench)
            return evaluate(problem.task, examples, conditionings, problem.sampling, bench, label="val").score
        except BudgetExhausted as stop:
            bench.emit("budget", where="val", message=str(stop))
            return None

    @property
    def _settings(self) -> Settings:
        return Settings(
            self.learning_rate,
            self.batch_size,
            self.micro_batch_size,
            self.warmup,
            self.max_grad_norm,
            self.checkpoint_every,
        )
