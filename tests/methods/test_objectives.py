"""Each loss against TRL's own code on the same tensors (values and gradients, float64), and against known values.

TRL keeps its losses in methods of its trainers; these are called with stand-ins that hand over our tensors.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM
from trl import import_utils

from cotune.methods import objectives
from cotune.models.base import BaseModel
from cotune.supervision import TokenRow, completion_loss

import_utils.is_vllm_available = lambda *_, **__: False  # else it is imported, and warned of, for nothing
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

B, C = 6, 5
LENGTHS_B = torch.tensor([5, 3, 1, 4, 5, 2])
MASK_BC = (torch.arange(C) < LENGTHS_B[:, None]).double()


def drawn(seed: int, low: float = -3.0, high: float = 0.0) -> Tensor:
    """Log-probabilities [B, C], 0 behind a row's end."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(B, C, generator=generator, dtype=torch.float64) * (high - low) + low) * MASK_BC


def stand_in(**settings: Any) -> Any:
    """A trainer that is one process and keeps its metrics."""
    same = SimpleNamespace(
        gather_for_metrics=lambda x: x, gather=lambda x: x, reduce=lambda x, reduction: x, device=torch.device("cpu")
    )
    return MagicMock(
        model=SimpleNamespace(training=True),
        accelerator=same,
        _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def model_saying(*answers: Tensor) -> Any:
    """A model whose outputs are these per-token log-probabilities, one after the other."""
    left = iter(answers)

    def forward(**_: Any) -> SimpleNamespace:
        log_probs = next(left)
        logged = dict.fromkeys(("entropy", "mean_logits"), log_probs.detach()) | {"is_top1": log_probs > -1}
        return SimpleNamespace(log_probs=log_probs, **logged)

    return forward


def ids() -> dict[str, Tensor]:
    """A row of C tokens behind one prompt token."""
    mask = torch.nn.functional.pad(MASK_BC, (1, 0)).long()
    return {"input_ids": torch.ones(B, C + 1, dtype=torch.long), "completion_mask": mask, "attention_mask": mask}


def agree(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    [mine] = torch.autograd.grad(ours, leaf)
    [other] = torch.autograd.grad(theirs, leaf)
    assert mine.abs().max() > 1e-4
    torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


# -- supervised fine-tuning ------------------------------------------------------------------------------------------

ROWS = [
    TokenRow((5, 9, 2), (7, 7, 3, 1), "a"),
    TokenRow((4,), (8, 1), "b"),
    TokenRow((6, 6, 6, 6, 2), (1,), "c"),
    TokenRow((3, 2), (9, 5, 4, 8, 7, 1), "d"),
]
TOKENS = sum(len(row.completion) for row in ROWS)


def trls_sft(model: Any, rows: list[TokenRow], tokens: int | None = None) -> Tensor:
    """TRL's loss on its own collator's batch; only completion tokens have labels (`completion_only_loss`)."""
    trainer = stand_in(
        compute_loss_func=None,
        label_smoother=None,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
    )
    trainer.accelerator.parallelism_config = None
    examples = [
        {"input_ids": [*row.context, *row.completion], "labels": [*[-100] * len(row.context), *row.completion]}
        for row in rows
    ]
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
    return SFTTrainer.compute_loss(trainer, model, batch, num_items_in_batch=tokens)


def based_on(model: Any) -> BaseModel:
    return SimpleNamespace(model=model)  # all that the loss reads of it


class Saying(nn.Module):
    """A model that says the same logits [B, T, V] whatever it reads, to our loss and to TRL's."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits_BTV = nn.Parameter(3 * torch.randn(4, 8, 10, generator=generator, dtype=torch.float64))

    def forward(self, labels: Tensor | None = None, logits_to_keep: Tensor | None = None, **_: Any) -> SimpleNamespace:
        if labels is None:
            return SimpleNamespace(logits=self.logits_BTV[:, logits_to_keep])
        mask = labels[:, 1:] != -100
        log_probs = self.logits_BTV[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0] * mask
        logged = dict.fromkeys(("entropy", "is_top1"), log_probs.detach())
        return SimpleNamespace(log_probs=log_probs, label_mask=mask, **logged)


def test_sft_is_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean over all completion tokens of the batch, whichever row they are in; prompts and padding carry none."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # ours goes to float32 for the loss; here nothing is to be lost
    model = Saying()
    agree(completion_loss(based_on(model), ROWS) / TOKENS, trls_sft(model, ROWS), model.logits_BTV)


def test_sft_of_a_whole_model_is_trls_however_the_batch_is_split(random_base: BaseModel) -> None:
    """With TRL's collator, output head and loss, in float32, which its head computes in; gradients of all weights."""
    ours: Qwen2ForCausalLM = copy.deepcopy(random_base.model).requires_grad_()
    theirs = copy.deepcopy(ours)
    add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "is_top1"))
    loss = completion_loss(based_on(ours), ROWS) / TOKENS
    torch.testing.assert_close(loss, trls_sft(theirs, ROWS), rtol=1e-5, atol=0)
    for rows in (ROWS[:3], ROWS[3:]):  # gradient accumulation: each micro-batch over all tokens of the batch
        trls_sft(theirs, rows, TOKENS).backward()
    loss.backward()
    compared = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None, name
        assert mine.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5 * float(other.grad.abs().max()))
        compared += 1
    assert compared > 20


# -- preferences and policy gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_is_trls(beta: float) -> None:
    policy_BC, reference_BC = drawn(0).requires_grad_(), drawn(1)
    reference_B = reference_BC.sum(1)
    trainer = stand_in(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
    )
    half = {"ref_chosen_logps": reference_B[: B // 2], "ref_rejected_logps": reference_B[B // 2 :]}
    theirs = DPOTrainer._compute_loss(trainer, model_saying(policy_BC), ids() | half, False)
    right_B, wrong_B = policy_BC.sum(1).chunk(2)
    agree(objectives.dpo(right_B, wrong_B, *reference_B.chunk(2), beta).mean(), theirs, policy_BC)


@pytest.mark.parametrize("others", [5, 6])  # once with z_0 above 0, once clamped to it
def test_kto_is_trls(others: int) -> None:
    policy_BC, reference_BC, label_B = drawn(0).requires_grad_(), drawn(1), torch.tensor([1, 0, 0, 1, 1, 0])
    others_BC, reference_others_BC = drawn(2), drawn(others)
    lambda_right, lambda_wrong, beta = 1.3, 1.0, 0.2
    trainer = stand_in(
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=lambda_right,
        undesirable_weight=lambda_wrong,
        _compute_kl_logps=lambda model, batch: others_BC.sum(1),
    )
    batch = ids() | {
        "label": label_B,
        "ref_logps": reference_BC.sum(1),
        "ref_KL_logps": reference_others_BC.sum(1),
    }
    theirs = KTOTrainer._compute_loss(trainer, model_saying(policy_BC), batch, False)
    kl = objectives.reference_point(others_BC.sum(1), reference_others_BC.sum(1))
    assert float(kl) == pytest.approx(trainer._metrics["train"]["kl"][0])
    loss_B = objectives.kto(policy_BC.sum(1), reference_BC.sum(1), label_B.bool(), kl, beta)
    lambda_B = torch.tensor([lambda_right if label else lambda_wrong for label in label_B], dtype=torch.float64)
    agree((lambda_B * loss_B).mean(), theirs, policy_BC)


def trls_grpo(policy_BC: Tensor, inputs: dict[str, Tensor], loss_type: str, beta: float) -> Tensor:
    trainer = stand_in(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy_BC, policy_BC.detach(), None),
    )
    whole = {
        "prompt_ids": torch.ones(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.ones(B, C, dtype=torch.long),
        "completion_mask": MASK_BC,
    }
    return GRPOTrainer._compute_loss(trainer, None, whole | inputs)


@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
def test_grpo_is_trls(beta: float) -> None:
    policy_BC, old_BC, reference_BC = drawn(0).requires_grad_(), drawn(1), drawn(2)
    advantages_B = torch.tensor([1.0, -0.5, 0.0, 2.0, -2.0, 0.3], dtype=torch.float64)
    given = {"advantages": advantages_B, "old_per_token_logps": old_BC, "ref_per_token_logps": reference_BC}
    theirs = trls_grpo(policy_BC, given, "grpo", beta)
    loss_B = objectives.grpo(policy_BC, old_BC, reference_BC, advantages_B, MASK_BC, 0.2, beta)
    agree(loss_B.mean(), theirs, policy_BC)


def test_the_clipped_surrogate_is_trls_with_an_advantage_per_token() -> None:
    """TRL has no PPO trainer any more; its GRPO loss without KL, over all tokens alike, is PPO's."""
    policy_BC, old_BC = drawn(0).requires_grad_(), drawn(1)
    advantages_BC = drawn(3, -2.0, 2.0)
    theirs = trls_grpo(policy_BC, {"advantages": advantages_BC, "old_per_token_logps": old_BC}, "bnpo", 0.0)
    surrogate_BC = objectives.clipped_surrogate(policy_BC, old_BC, advantages_BC, 0.2)
    agree((surrogate_BC * MASK_BC).sum() / MASK_BC.sum(), theirs, policy_BC)
    assert ((policy_BC - old_BC).exp() > 1.2).any()  # it was clipped


def test_group_advantages() -> None:
    advantages = objectives.group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    std = math.sqrt(1 / 3)  # of 0, 0, 1, 1 with n - 1
    assert advantages.tolist() == pytest.approx([0.5 / (std + 1e-4) * s for s in (1, -1, -1, 1)])
    for constant in (0.0, 0.1, 1.0):
        assert objectives.group_advantages(torch.full((7,), constant)).tolist() == [0.0] * 7


def test_token_rewards_and_advantages_by_hand() -> None:
    """Schulman et al. 2016 eq. 16 as the double sum that it is."""
    old_BC, reference_BC, values_BC = drawn(0), drawn(1), drawn(2, -1.0, 1.0)
    score_B, beta, decay = torch.arange(B, dtype=torch.float64) / B, 0.3, 0.9
    rewards_BC = objectives.token_rewards(score_B, old_BC, reference_BC, MASK_BC, beta)
    advantages_BC = objectives.generalized_advantages(rewards_BC, values_BC, MASK_BC, decay)
    for b, length in enumerate(LENGTHS_B.tolist()):
        rewards = [-beta * float(old_BC[b, c] - reference_BC[b, c]) for c in range(length)]
        rewards[-1] += b / B
        assert rewards_BC[b].tolist() == pytest.approx(rewards + [0.0] * (C - length))
        values = [*values_BC[b, :length].tolist(), 0.0]
        delta = [rewards[c] + values[c + 1] - values[c] for c in range(length)]
        expected = [sum(decay ** (k - c) * delta[k] for k in range(c, length)) for c in range(length)]
        assert advantages_BC[b].tolist() == pytest.approx(expected + [0.0] * (C - length))
    assert objectives.generalized_advantages(rewards_BC, values_BC, MASK_BC, 1.0)[0, 0] == pytest.approx(
        float(rewards_BC[0].sum() - values_BC[0, 0])  # lambda = 1: what came of it, less what was expected
    )


def test_whitened_has_mean_zero_and_deviation_one_over_tokens() -> None:
    white_BC = objectives.whitened(drawn(4, -9.0, 5.0), MASK_BC)
    tokens = white_BC[MASK_BC.bool()]
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-12)
    assert float(tokens.std(unbiased=False)) == pytest.approx(1, rel=1e-6)
    assert not white_BC[~MASK_BC.bool()].any()


# -- known optima ----------------------------------------------------------------------------------------------------


def minimum(loss: Any, parameter: Tensor, steps: int = 200) -> None:
    optimizer = torch.optim.LBFGS([parameter], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)


def test_dpos_optimum_is_the_reference_tilted_by_the_reward() -> None:
    """Preferences of a Bradley-Terry judge with rewards r: pi* = pi_ref exp(r / beta) / Z (Rafailov et al. eq. 4)."""
    reward = torch.tensor([0.0, 0.5, -0.3, 1.0], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    beta, n = 0.5, len(reward)
    logits = torch.zeros(n, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        policy = logits.log_softmax(0)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                preferred = torch.sigmoid(reward[i] - reward[j])
                pair = (policy[i], policy[j], reference[i].log(), reference[j].log())
                total = total + preferred * objectives.dpo(*pair, beta)
        return total

    minimum(loss, logits)
    tilted = reference * (reward / beta).exp()
    torch.testing.assert_close(logits.softmax(0).detach(), tilted / tilted.sum(), atol=1e-5, rtol=0)


def test_ktos_optimum_on_two_answers() -> None:
    """Where right and wrong come up alike often for both answers, KTO moves nothing; else to the better one."""
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64).log()

    def policy_after(share_right_of_first: float) -> float:
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        rows = torch.tensor([0, 0, 1, 1])
        right = torch.tensor([True, False, True, False])
        weight = torch.tensor([share_right_of_first, 1 - share_right_of_first, 0.5, 0.5], dtype=torch.float64)
        for _ in range(200):
            loss = (weight * objectives.kto(logits.log_softmax(0)[rows], reference[rows], right, 0.0, 1.0)).sum()
            [gradient] = torch.autograd.grad(loss, logits)
            logits = (logits - gradient).detach().requires_grad_()
        return float(logits.detach().softmax(0)[0])

    assert policy_after(0.5) == pytest.approx(0.5, abs=1e-9)
    assert policy_after(1.0) > 0.95
    assert policy_after(0.0) < 0.05


def test_grpos_optimum_on_two_tokens_with_a_pull_to_the_reference() -> None:
    """Completions of one token with advantages 1 and -1, each as often as the policy samples it.

    The gradient of k3 over samples of pi is that of KL(pi_ref || pi), so at the optimum
    2 p (1 - p) = beta (p - pi_ref), a quadratic equation for the share p of the first token.
    """
    reference, beta = torch.tensor([0.3, 0.7], dtype=torch.float64), 0.8
    advantages_B, mask_BC = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(150):
        policy_BC = logits.log_softmax(0)[:, None]
        given = (policy_BC, policy_BC.detach(), reference.log()[:, None], advantages_B, mask_BC)
        loss = (policy_BC.detach().exp()[:, 0] * objectives.grpo(*given, 0.2, beta)).sum()
        [gradient] = torch.autograd.grad(loss, logits)
        logits = (logits - gradient).detach().requires_grad_()
    expected = (2 - beta + math.sqrt((2 - beta) ** 2 + 8 * beta * 0.3)) / 4
    assert float(logits.detach().softmax(0)[0]) == pytest.approx(expected, abs=1e-9)
