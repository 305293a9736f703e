"""Reinforcement learning from the task's score: Group Relative Policy Optimization (grpo) and PPO (ppo).

Each round samples completions of one batch of questions under the adapter as it is now, scores them, and takes
`weights.updates` optimizer steps on all of them. Policies are trained under the prompt that they answered (with its
demonstrations), on the very tokens that were sampled.

Axes: B rows, C completion tokens, D width of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.errors import NoData
from cotune.methods import objectives
from cotune.methods.base import Material, padded, per_token
from cotune.models.likelihood import completion_log_probs, completion_states
from cotune.supervision import TokenRow
from cotune.training import Cost, shuffled_batches
from cotune.values import Completion, Example


@dataclass(frozen=True)
class Sampled:
    """A completion that was sampled, and its score."""

    row: TokenRow
    reward: float
    cut_off: bool


@dataclass(frozen=True, eq=False)
class Target:
    """What the loss knows of one completion, tensors [C] of its own length.

    `old` is log pi of the policy that sampled it, `reference` of the policy before training, `returns` are what the
    values should have been (ppo). What the loss does not ask for is empty.
    """

    row: TokenRow
    advantages: Tensor
    old: Tensor
    reference: Tensor
    returns: Tensor


class _PolicyGradient(ABC):
    """Rounds of sampling and training."""

    def __init__(self, material: Material) -> None:
        """Leaves out questions whose answers may not fit the context, and says so. Raises NoData when that is all."""
        c, base = material.config, material.policy.base
        self._material = material
        self.parameters: Mapping[str, nn.Parameter] = {}
        self.micro_batch_size = c.micro_batch_size
        self.updates = c.updates
        room = base.context_length - material.limit
        self._examples = [e for e in material.examples if base.token_count(material.asked(e)) <= room]
        if not self._examples:
            raise NoData(
                f"There is nothing to reinforce: no question leaves room for an answer of {material.limit} tokens in "
                f"the context of {base.context_length}. Shorten the prompt or lower decoding.max_new_tokens."
            )
        if left_out := len(material.examples) - len(self._examples):
            material.bench.emit(
                "warning",
                message=f"{left_out} of {len(material.examples)} train questions leave no room for an answer in the "
                "context; they are not learned from.",
            )
        self.steps = -(-len(self._examples) // c.batch_size) * c.updates

    def batches(self, epoch: int, done: int, meta: MutableMapping[str, Any]) -> Iterator[Sequence[Target]]:
        """Emits "rewards" for each round. Raises NoData after a first epoch in which no score told anything."""
        m = self._material
        rounds = shuffled_batches(self._examples, m.config.batch_size, m.bench.rng("epoch", epoch))
        for number in range(done // self.updates, len(rounds)):
            groups = self._groups(rounds[number], epoch, number)
            meta["told"] = meta.get("told", 0) + self._told(groups)
            targets = self._targets(groups)
            cost = sum(map(self.cost, targets), Cost(0, 0.0))
            m.bench.ledger.allow(self.updates * cost.tokens, self.updates * cost.flops)  # no half rounds
            m.bench.engine.release()
            for _ in range(self.updates):
                yield targets
        if epoch == 0 and not meta["told"]:
            raise NoData(
                f"There is nothing to reinforce: in the first epoch {self._alike} scored alike "
                f"({m.config.samples} completions of each of {len(self._examples)} questions). Raise weights.samples, "
                "tune the prompt first, or set weights.method = 'sft'."
            )

    def cost(self, item: Target) -> Cost:
        return self._material.policy.cost(item.row)

    def name_of(self, item: Target) -> str:
        return item.row.example

    _alike: str
    """What must differ in score for anything to be learned."""

    @abstractmethod
    def _told(self, groups: Sequence[Sequence[Sampled]]) -> int:
        """How many scores, or groups of them, say which completions are better."""

    @abstractmethod
    def _targets(self, groups: Sequence[Sequence[Sampled]]) -> list[Target]: ...

    def _groups(self, examples: Sequence[Example], epoch: int, number: int) -> list[list[Sampled]]:
        """The scored completions of each example, of the policy as it is now."""
        m, base = self._material, self._material.policy.base
        answered = m.sample(examples, m.policy.snapshot(), "rollouts", epoch, number)
        groups = []
        for example, completions in zip(examples, answered, strict=True):
            context = tuple(base.encode(m.asked(example)))
            group = []
            for c in completions:
                row = TokenRow(context, _tokens(c, base.end_of_turn_ids[0]), example.id)
                group.append(Sampled(row, m.score(example, c), c.truncated))
            groups.append(group)
        every = [s for group in groups for s in group]
        m.bench.emit(
            "rewards",
            epoch=epoch + 1,
            round=number + 1,
            completions=len(every),
            mean_score=sum(s.reward for s in every) / len(every),
            constant_groups=sum(len({s.reward for s in group}) == 1 for group in groups),
            groups=len(groups),
            cut_off=sum(s.cut_off for s in every),
            mean_tokens=sum(len(s.row.completion) for s in every) / len(every),
        )
        return groups


def _tokens(completion: Completion, end_of_turn: int) -> tuple[int, ...]:
    """What was sampled, the end of the turn included (the one that the template writes, whichever it was)."""
    return completion.token_ids if completion.truncated else (*completion.token_ids, end_of_turn)


class Grpo(_PolicyGradient):
    """Group Relative Policy Optimization: a completion is as good as it is better than others of its question.

    Groups that score alike have no advantage; of them only the pull to the reference is left.
    """

    _alike = "all completions of each question"

    def weight(self, item: Target) -> float:
        return 1.0

    def loss(self, items: Sequence[Target]) -> tuple[Tensor, dict[str, float]]:
        c = self._material.config
        with self._material.policy.training() as model:
            policy_BC = completion_log_probs(model, [i.row.context for i in items], [i.row.completion for i in items])
        same_BC = policy_BC.detach()
        old_BC = padded([i.old for i in items]) if c.updates > 1 else same_BC
        reference_BC = padded([i.reference for i in items]) if c.beta else same_BC
        mask_BC = padded([torch.ones_like(i.advantages) for i in items])
        advantages_B = torch.stack([i.advantages[0] for i in items])
        loss_B = objectives.grpo(policy_BC, old_BC, reference_BC, advantages_B, mask_BC, c.clip_range, c.beta)
        kl_BC = objectives.k3(same_BC, reference_BC) * mask_BC
        return loss_B.sum(), {"kl": float((kl_BC.sum(1) / mask_BC.sum(1)).sum())}

    def _told(self, groups: Sequence[Sequence[Sampled]]) -> int:
        return sum(len({s.reward for s in group}) > 1 for group in groups)

    def _targets(self, groups: Sequence[Sequence[Sampled]]) -> list[Target]:
        m = self._material
        rows = [s.row for group in groups for s in group]
        device = m.policy.base.model.device
        advantages = torch.cat([objectives.group_advantages(torch.tensor([s.reward for s in g])) for g in groups])
        nothing = torch.empty(0, device=device)
        old = [nothing] * len(rows)
        if m.config.updates > 1:
            with m.reading(rows), m.policy.now() as model:
                old = per_token(model, rows, self.micro_batch_size)
        reference = m.reference(rows) if m.config.beta else [nothing] * len(rows)
        return [
            Target(row, advantage.to(device).expand(len(row.completion)), old_C, reference_C, nothing)
            for row, advantage, old_C, reference_C in zip(rows, advantages, old, reference, strict=True)
        ]


class Ppo(_PolicyGradient):
    """Proximal Policy Optimization with a value head, generalized advantages and a per-token pull to the reference.

    The value of a token is linear in what the output head reads there, scaled to mean square 1; its gradient stays in
    the head (ours: the papers train a second network). As in Ziegler et al. 2019 advantages are whitened over the
    tokens of a round and gamma is 1; values are not clipped (ours).
    """

    _alike = "all completions of every batch"

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        head = material.policy.base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._value_D = nn.Parameter(torch.zeros(head.weight.shape[1], device=head.weight.device))
        self.parameters = {"value": self._value_D}

    def weight(self, item: Target) -> float:
        return len(item.row.completion)

    def loss(self, items: Sequence[Target]) -> tuple[Tensor, dict[str, float]]:
        c = self._material.config
        with self._material.policy.training() as model:
            policy_BC, values_BC = self._read(model, [i.row for i in items])
        old_BC, advantages_BC = padded([i.old for i in items]), padded([i.advantages for i in items])
        mask_BC = padded([torch.ones_like(i.advantages) for i in items])
        surrogate_BC = objectives.clipped_surrogate(policy_BC, old_BC, advantages_BC, c.clip_range)
        wrong_BC = ((values_BC - padded([i.returns for i in items])) * mask_BC) ** 2
        # Over D, so that the clipped gradient norm is the policy's; AdamW does not see a factor.
        loss = (surrogate_BC * mask_BC).sum() + 0.5 * wrong_BC.sum() / self._value_D.numel()
        kl = ((old_BC - padded([i.reference for i in items])) * mask_BC).sum()
        return loss, {"kl": float(kl), "value_error": float(wrong_BC.detach().sum())}

    def _told(self, groups: Sequence[Sequence[Sampled]]) -> int:
        return len({s.reward for group in groups for s in group}) > 1

    def _targets(self, groups: Sequence[Sequence[Sampled]]) -> list[Target]:
        m, c = self._material, self._material.config
        sampled = [s for group in groups for s in group]
        rows = [s.row for s in sampled]
        old, values = list[Tensor](), list[Tensor]()
        with m.reading(rows), m.policy.now() as model:
            for i in range(0, len(rows), self.micro_batch_size):
                some = rows[i : i + self.micro_batch_size]
                for row, *read in zip(some, *self._read(model, some), strict=True):
                    old.append(read[0][: len(row.completion)])
                    values.append(read[1][: len(row.completion)])
        reference = m.reference(rows)
        old_BC, values_BC = padded(old), padded(values)
        mask_BC = padded([torch.ones_like(row) for row in old])
        score_B = old_BC.new_tensor([s.reward for s in sampled])
        rewards_BC = objectives.token_rewards(score_B, old_BC, padded(reference), mask_BC, c.beta)
        advantages_BC = objectives.generalized_advantages(rewards_BC, values_BC, mask_BC, c.gae_lambda)
        returns_BC = advantages_BC + values_BC
        white_BC = objectives.whitened(advantages_BC, mask_BC)
        return [
            Target(row, *(found[:n] for found in (white, old_C, reference_C, returns)))
            for row, n, white, old_C, reference_C, returns in zip(
                rows, (len(r.completion) for r in rows), white_BC, old, reference, returns_BC, strict=True
            )
        ]

    def _read(self, model: nn.Module, rows: Sequence[TokenRow]) -> tuple[Tensor, Tensor]:
        """log_probs_BC and values_BC of the completions' tokens."""
        log_probs_BC, states_BCD = completion_states(model, [r.context for r in rows], [r.completion for r in rows])
        return log_probs_BC, functional.rms_norm(states_BCD, states_BCD.shape[-1:]) @ self._value_D
