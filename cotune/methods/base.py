"""What a weight method is: items to train on, in batches, and their loss; and the policy that all of them train.

Knows nothing of epochs, validation or which method a run asked for (strategies/lora_only.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cotune.bench import Bench
from cotune.config import WeightsConfig
from cotune.engines.base import Request, Sampling
from cotune.errors import CotuneError
from cotune.ledger import Spent, forward_flops, training_flops
from cotune.models.base import BaseModel
from cotune.models.checkpointing import checkpointed
from cotune.models.likelihood import completion_log_probs
from cotune.models.lora import Factors, LoraFactors, attached
from cotune.supervision import TokenRow
from cotune.tasks.base import Task
from cotune.training import Cost
from cotune.values import Completion, Example, Prompt

Item = TypeVar("Item")
Parameters = Mapping[str, tuple[nn.Parameter, ...]]


@dataclass(frozen=True)
class Policy:
    """The base model under the factors that are being trained, and its reference: the same weights under `start`, the
    adapter that training began with (None: no adapter). There is no second copy of the model.
    """

    base: BaseModel
    factors: Parameters
    scaling: float
    start: LoraFactors | None
    gradient_checkpointing: bool

    @contextmanager
    def training(self) -> Iterator[nn.Module]:
        """The model, with the factors attached so that losses reach them."""
        recompute = checkpointed(self.base.model) if self.gradient_checkpointing else nullcontext()
        with recompute, attached(self.base.model, self.factors, self.scaling):
            yield self.base.model

    @contextmanager
    def now(self) -> Iterator[nn.Module]:
        """The model as it would answer now, without gradients."""
        with torch.no_grad(), attached(self.base.model, self.factors, self.scaling):
            yield self.base.model

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model as it answered before training, without gradients."""
        factors: Factors = self.start.factors if self.start else {}
        with torch.no_grad(), attached(self.base.model, factors, self.start.scaling if self.start else 1.0):
            yield self.base.model

    def snapshot(self) -> LoraFactors:
        return LoraFactors.snapshot(self.factors, self.scaling)

    def cost(self, row: TokenRow) -> Cost:
        """Of training on one row once."""
        trained = sum(p.numel() for own in self.factors.values() for p in own)
        return Cost(len(row), training_flops(self.base.parameters_count, trained, len(row)))

    def reading_cost(self, row: TokenRow) -> Cost:
        """Of one forward pass over a row."""
        return Cost(len(row), forward_flops(self.base.parameters_count, len(row)))


@dataclass(frozen=True)
class Material:
    """What a method may learn from, and with what.

    Completions are sampled under the prompt that `prompts` has for their example; `learned` has the prompts they are
    learned under (those without their demonstrations, where these are dropped). `limit` is the most tokens of a
    completion.
    """

    config: WeightsConfig
    task: Task
    examples: Sequence[Example]
    prompts: Mapping[Example, Prompt]
    learned: Mapping[Example, Prompt]
    limit: int
    policy: Policy
    bench: Bench

    def asked(self, example: Example) -> str:
        """As the model reads it when it samples."""
        return self._rendered(self.prompts, example)

    def taught(self, example: Example) -> str:
        """As the model reads it when it learns."""
        return self._rendered(self.learned, example)

    def _rendered(self, prompts: Mapping[Example, Prompt], example: Example) -> str:
        return self.policy.base.render(self.task.messages(prompts[example], example))

    def sampling(self, *seed: Any) -> Sampling:
        """How own completions are drawn: `weights.samples` of each example."""
        c = self.config
        return Sampling(self.limit, c.temperature, c.top_p, n=c.samples, seed=self.bench.seed_for(*seed))

    def sample(self, examples: Sequence[Example], adapter: LoraFactors | None, *seed: Any) -> list[list[Completion]]:
        """Own completions. Raises BudgetExhausted like Bench.generate."""
        requests = [Request(self.asked(e), adapter) for e in examples]
        return self.bench.generate(requests, self.sampling(*seed), label="rollouts")

    def score(self, example: Example, completion: Completion) -> float:
        """The task's score, which is the reward. Raises CotuneError like `graded`."""
        return graded(self.task, example, completion)

    @contextmanager
    def reading(self, rows: Sequence[TokenRow]) -> Iterator[None]:
        """Book a forward pass over these rows that no engine makes. Raises BudgetExhausted before it."""
        cost = sum(map(self.policy.reading_cost, rows), Cost(0, 0.0))
        self.bench.ledger.allow(cost.tokens, cost.flops)
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.bench.ledger.book(Spent(prompt_tokens=cost.tokens, flops=cost.flops, seconds=seconds))

    def reference(self, rows: Sequence[TokenRow]) -> list[Tensor]:
        """log p of each completion token before training: one [C] per row, of its own length."""
        with self.reading(rows), self.policy.reference() as model:
            return per_token(model, rows, self.config.micro_batch_size)


def graded(task: Task, example: Example, completion: Completion) -> float:
    """The task's score. Raises CotuneError outside [0, 1]: the task breaks its promise."""
    score = task.grade(example, completion.text, completion.truncated).score
    if not 0 <= score <= 1:
        raise CotuneError(
            f"The task {task.name} gave example {example.id} the score {score}; rewards must lie in [0, 1]. "
            "Mend the task's grade."
        )
    return score


def per_token(model: nn.Module, rows: Sequence[TokenRow], micro_batch_size: int) -> list[Tensor]:
    """log p of each completion token: one [C] per row, of its own length."""
    found: list[Tensor] = []
    for i in range(0, len(rows), micro_batch_size):
        some = rows[i : i + micro_batch_size]
        log_probs_BC = completion_log_probs(model, [r.context for r in some], [r.completion for r in some])
        found += [row[: len(r.completion)] for row, r in zip(log_probs_BC, some, strict=True)]
    return found


def padded(rows: Sequence[Tensor]) -> Tensor:
    """[C] of different lengths -> [B, C], 0 behind each row's end."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


class Method(Protocol[Item]):
    """Everything that the training loop asks of a method; see `Trainer` for `loss`, `weight`, `cost` and `name_of`.

    `parameters` are trained beside the adapter (a value head). A step needs `micro_batch_size` items at once where the
    loss looks at them together; a batch may be followed by others that are made from the same rollouts, so checkpoints
    are allowed every `updates` steps only.
    """

    parameters: Mapping[str, nn.Parameter]
    micro_batch_size: int
    updates: int
    steps: int
    """Optimizer steps of one epoch."""

    def batches(self, epoch: int, done: int, meta: MutableMapping[str, Any]) -> Iterable[Sequence[Item]]:
        """The batches of an epoch from its step `done` on.

        What the method must remember after an interruption it puts into `meta`, as plain JSON.
        Raises BudgetExhausted where making the next batch could exceed the budget, NoData where nothing can be learned.
        """

    def loss(self, items: Sequence[Item]) -> tuple[Tensor, dict[str, float]]: ...

    def weight(self, item: Item) -> float: ...

    def cost(self, item: Item) -> Cost: ...

    def name_of(self, item: Item) -> str: ...
