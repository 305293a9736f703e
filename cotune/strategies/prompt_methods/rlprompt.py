"""RLPrompt (sheet 10): a short prompt of any tokens, learned by soft Q-learning from the scores of sampled prompts.

A step samples prompts from the policy, scores each on the same few examples, and takes one optimizer step towards path
consistency. Along a round the policy's greedy prompts are noted; when it ends, they are raced like any candidates.

Deviations (ours): the policy reads the run's generator, by default the model that answers (token_policy.py); the reward
is the task's score, where the paper has a gap of label probabilities; greedy prompts are run at the end of each round
of `steps` steps, not each when it is noted; AdamW begins anew with every round, with a rate that falls to zero by a
cosine, where the paper has Adam at one rate. The prompt is the whole instruction, as in the paper; demonstrations of
the start prompt stay.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from cotune.config import RlpromptConfig, RunConfig
from cotune.errors import BudgetExhausted
from cotune.evaluate import evaluate
from cotune.ledger import Spent, forward_flops, training_flops
from cotune.methods import objectives
from cotune.search import Proposal
from cotune.strategies.base import Work, Workload
from cotune.strategies.prompt_methods.base import Finalist, Ground, needs_model_here
from cotune.strategies.prompt_methods.token_policy import TokenPolicy
from cotune.training import Cost, Settings, Trainer
from cotune.values import Conditioning, Prompt


@dataclass(frozen=True, eq=False)
class Sampled:
    """One prompt of a step: its tokens [T], the states [T, D] before them, its mean score, its stabilised reward."""

    text: str
    tokens_T: Tensor
    states_TD: Tensor
    score: float
    reward: Tensor


@dataclass(frozen=True)
class Rlprompt:
    """`minibatch` examples score the prompts of a step."""

    teaches: ClassVar[bool] = False
    demonstrations: ClassVar[int] = 0

    rounds: int
    minibatch: int
    settings: RlpromptConfig

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        needs_model_here(config, "rlprompt")
        return cls(config.prompt.rounds, config.prompt.minibatch, config.rlprompt)

    def plan(self, load: Workload, driving: int, teaching: int) -> list[Work]:
        s, steps = self.settings, self.rounds * self.settings.steps
        written = steps * s.samples * s.tokens
        rollouts = steps * s.samples * min(self.minibatch, driving)
        tried = self.rounds * -(-s.steps // s.try_every) * driving
        return [
            Work("learn token prompts", 0, written + tried * s.tokens, written),
            load.answers("score sampled prompts", rollouts, load.question),
            load.answers("score greedy prompts", tried, load.question),
        ]

    def search(self, ground: Ground) -> list[Finalist]:
        learner = _Learner(ground, self.settings, self.minibatch)
        for _ in range(self.rounds):
            learner.round()
        return ground.finalists()


class _Learner:
    def __init__(self, ground: Ground, settings: RlpromptConfig, minibatch: int) -> None:
        self._ground = ground
        self._settings = settings
        self._minibatch = minibatch
        self._base = ground.bench.base
        self._policy = TokenPolicy(ground.generator, settings.hidden, ground.bench.seed_for("rlprompt"))

    def round(self) -> None:
        """Learn, then race the greedy prompts that were met. Raises BudgetExhausted, after trying the last of them."""
        s, search = self._settings, self._ground.search
        trainer = Trainer(
            f"rlprompt-{search.number}",
            dict(self._policy.network.named_parameters()),
            self._loss,
            lambda _: 1.0,
            self._cost,
            lambda item: repr(item.text),
            Settings(s.learning_rate, s.samples, s.samples, 0.0, s.max_grad_norm, s.checkpoint_every),
            s.steps,
            self._ground.bench,
            dict(self._policy.target.named_parameters()),
        )
        meta: dict[str, Any] = trainer.restore() or {"greedy": [], "told": 0}
        try:
            finished = trainer.run(self._batches(search.number, trainer.step, meta), meta)
        except BudgetExhausted:
            self._race([self._greedy()])
            raise
        if finished and not meta["told"]:
            self._ground.bench.emit(
                "warning",
                message=f"rlprompt learned nothing in round {search.number}: in each of its {s.steps} steps all "
                f"{s.samples} prompts scored alike. Raise rlprompt.samples or prompt.minibatch.",
            )
        self._race([*meta["greedy"], self._greedy()])

    def _race(self, texts: Sequence[str]) -> None:
        search = self._ground.search
        search.race(search.admit([Proposal(self._prompt(text), "rlprompt") for text in dict.fromkeys(texts)]))
        search.end_round()

    def _prompt(self, text: str) -> Prompt:
        return Prompt(text, self._ground.search.start.demonstrations)

    def _batches(self, round: int, done: int, meta: MutableMapping[str, Any]) -> Iterator[Sequence[Sampled]]:
        """The scored prompts of each step from `done` on. Raises BudgetExhausted when what a step may cost would leave
        too little to run the prompt that was learned.

        The target follows before a step, not after it, so that a checkpoint between them loses nothing.
        """
        s, bench = self._settings, self._ground.bench
        for step in range(done, s.steps):
            self._policy.follow(s.polyak)
            if step and step % s.try_every == 0:
                meta["greedy"] = [*meta["greedy"], self._greedy()]
            sampled = self._sampled(round, step)
            meta["told"] += len({item.score for item in sampled}) > 1
            bench.engine.release()
            yield sampled

    def _sampled(self, round: int, step: int) -> list[Sampled]:
        s, ground = self._settings, self._ground
        bench, everything = ground.bench, ground.search.board.examples
        rng = bench.rng("rlprompt-examples", round, step)
        examples = rng.sample(everything, min(self._minibatch, len(everything)))
        self._reserve(step, len(examples))
        began = time.perf_counter()
        written = self._policy.write(s.samples, s.tokens, s.top_k, bench.seed_for("rlprompt", round, step))
        texts = [self._policy.text(tokens_T) for tokens_T in written.tokens_BT]
        self._book_writing(s.samples, time.perf_counter() - began)
        distinct = list(dict.fromkeys(texts))
        start = ground.start
        conditionings = [
            Conditioning(self._prompt(text), start.adapter, start.plan, start.verifier)
            for text in distinct
            for _ in examples
        ]
        done = evaluate(ground.task, examples * len(distinct), conditionings, ground.sampling, bench, "rewards")
        grades, n = [g.score for g in done.grades], len(examples)
        scores = {text: sum(grades[i * n : (i + 1) * n]) / n for i, text in enumerate(distinct)}
        scores_B = torch.tensor([scores[text] for text in texts])
        rewards_B = objectives.z_scored(scores_B, s.reward_scale).to(written.tokens_BT.device)
        rows = zip(texts, written.tokens_BT, written.states_BTD, rewards_B, strict=True)
        return [Sampled(text, tokens, states, scores[text], reward) for text, tokens, states, reward in rows]

    def _greedy(self) -> str:
        """The policy's greedy prompt as it is now."""
        self._ground.bench.ledger.allow(self._settings.tokens, self._writing_flops(1))
        began = time.perf_counter()
        text = self._policy.text(self._policy.greedy(self._settings.tokens))
        self._book_writing(1, time.perf_counter() - began)
        return text

    def _writing_flops(self, prompts: int) -> float:
        parameters = self._ground.generator.parameters_count + self._policy.parameters_count
        return forward_flops(parameters, prompts * self._settings.tokens)

    def _book_writing(self, prompts: int, seconds: float) -> None:
        tokens = prompts * self._settings.tokens
        spent = Spent(generated_tokens=tokens, flops=self._writing_flops(prompts), seconds=seconds)
        self._ground.bench.ledger.book(spent)

    def _reserve(self, step: int, examples: int) -> None:
        """Ask for what this step can cost, and for running one prompt on all search examples after it."""
        s, ground = self._settings, self._ground
        calls = s.samples * examples + len(ground.search.board.examples)
        answers = calls * self._longest
        written = (s.samples + 2) * s.tokens  # and two greedy prompts
        trained = s.samples * s.tokens
        flops = forward_flops(self._base.parameters_count, answers) + self._writing_flops(s.samples + 2)
        ground.bench.ledger.allow(answers + written + trained, flops + s.samples * self._trained_flops)

    @cached_property
    def _longest(self) -> int:
        """Tokens of the longest question under a token prompt (as its writer counts them), answered."""
        ground = self._ground
        under = [self._base.render(ground.task.messages(self._prompt(""), e)) for e in ground.search.board.examples]
        return max(map(ground.bench.engine.token_count, under)) + self._settings.tokens + ground.sampling.max_new_tokens

    @property
    def _trained_flops(self) -> float:
        """Of one prompt: through the network and the frozen head, and once through those of the target.

        The states were computed when the prompt was sampled.
        """
        network, head, tokens = self._policy.parameters_count, self._policy.head_count, self._settings.tokens
        return training_flops(head, network, tokens) + forward_flops(network + head, tokens)

    def _cost(self, item: Sampled) -> Cost:
        return Cost(self._settings.tokens, self._trained_flops)

    def _loss(self, items: Sequence[Sampled]) -> tuple[Tensor, dict[str, float]]:
        states_BTD = torch.stack([item.states_TD for item in items])
        tokens_BT = torch.stack([item.tokens_T for item in items])
        rewards_B = torch.stack([item.reward for item in items])
        online_BTV, target_BTV = self._policy.q_values(states_BTD), self._policy.q_values(states_BTD, target=True)
        loss_B = objectives.path_consistency(online_BTV, target_BTV, tokens_BT, rewards_B)
        return loss_B.sum(), {"score": sum(item.score for item in items)}
