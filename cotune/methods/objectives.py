"""The losses of what is trained on scores, one function for each equation; tensors in, tensors out.

Knows nothing of models, tokens, tasks or optimizers. Losses are per row or per token, so that sums over any split of a
batch agree. Log-probabilities are in nats; those of the policy carry the gradient.

Axes: B rows, C completion tokens (padded behind each row's end; `mask_BC` is 1 on tokens), G samples of one question,
T tokens of a prompt, A tokens that it may have.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_TINY = 1e-4  # keeps a group's standard deviation off zero, as TRL does


def dpo(right_B: Tensor, wrong_B: Tensor, reference_right_B: Tensor, reference_wrong_B: Tensor, beta: float) -> Tensor:
    """loss_B of Direct Preference Optimization (Rafailov et al. 2023, eq. 7; sheet 08).

    -log sigmoid(beta * [log pi(y+|x) / pi_ref(y+|x) - log pi(y-|x) / pi_ref(y-|x)]), from log-probabilities of whole
    completions.
    """
    return -functional.logsigmoid(beta * ((right_B - reference_right_B) - (wrong_B - reference_wrong_B)))


def soft_cross_entropy(logits_B: Tensor, scores_B: Tensor) -> Tensor:
    """loss_B of a verifier (Snell et al. 2024; sheet 03).

    -(s log p + (1 - s) log(1 - p)) with p = sigmoid(logit) and the soft target s in [0, 1].
    """
    return functional.binary_cross_entropy_with_logits(logits_B, scores_B, reduction="none")


def kto(policy_B: Tensor, reference_B: Tensor, is_right_B: Tensor, kl: Tensor | float, beta: float) -> Tensor:
    """loss_B of Kahneman-Tversky Optimization (Ethayarajh et al. 2024, eq. 7), before its weights lambda_D, lambda_U.

    1 - sigmoid(beta * (log pi/pi_ref - kl)) for a right completion, 1 - sigmoid(beta * (kl - log pi/pi_ref)) for a
    wrong one. `kl` is the paper's z_0 (see `reference_point`).
    """
    above_B = (policy_B - reference_B) - kl
    return 1 - torch.sigmoid(beta * torch.where(is_right_B, above_B, -above_B))


def reference_point(policy_B: Tensor, reference_B: Tensor) -> Tensor:
    """z_0 of KTO: the KL of policy and reference, from completions that belong to other questions; no gradient.

    max(0, mean(log pi(y_j|x_i) - log pi_ref(y_j|x_i))), i != j (Ethayarajh et al. 2024).
    """
    return (policy_B - reference_B).mean().clamp(min=0).detach()


def clipped_surrogate(policy_BC: Tensor, old_BC: Tensor, advantages_BC: Tensor, clip: float) -> Tensor:
    """loss_BC: minus L^CLIP of Schulman et al. 2017 (eq. 7), token by token.

    -min(r A, clamp(r, 1 - clip, 1 + clip) A) with r = pi / pi_old.
    """
    ratio_BC = (policy_BC - old_BC).exp()
    return -torch.min(ratio_BC * advantages_BC, ratio_BC.clamp(1 - clip, 1 + clip) * advantages_BC)


def k3(policy_BC: Tensor, reference_BC: Tensor) -> Tensor:
    """kl_BC: an unbiased, never negative estimate of KL(pi || pi_ref) from tokens of pi (Shao et al. 2024, eq. 4)."""
    log_ratio_BC = reference_BC - policy_BC
    return log_ratio_BC.exp() - log_ratio_BC - 1


def grpo(
    policy_BC: Tensor,
    old_BC: Tensor,
    reference_BC: Tensor,
    advantages_B: Tensor,
    mask_BC: Tensor,
    clip: float,
    beta: float,
) -> Tensor:
    """loss_B of Group Relative Policy Optimization with outcome rewards (Shao et al. 2024, eq. 3).

    The mean over a completion's tokens of the clipped surrogate plus beta * k3.
    """
    surrogate_BC = clipped_surrogate(policy_BC, old_BC, advantages_B[:, None], clip)
    loss_BC = surrogate_BC + beta * k3(policy_BC, reference_BC)
    return (loss_BC * mask_BC).sum(1) / mask_BC.sum(1)


def group_advantages(rewards_G: Tensor) -> Tensor:
    """advantages_G: (r - mean) / std over the samples of one question (Shao et al. 2024, section 4.1.2).

    Exactly zero where all rewards are alike: such a group teaches nothing. The standard deviation has G - 1 below it
    and 1e-4 added, as in TRL; the paper gives neither.
    """
    if bool((rewards_G == rewards_G[0]).all()):
        return torch.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + _TINY)


def token_rewards(score_B: Tensor, old_BC: Tensor, reference_BC: Tensor, mask_BC: Tensor, beta: float) -> Tensor:
    """rewards_BC of PPO on a language model: the score at the last token, minus beta * log pi_old/pi_ref at each.

    Ziegler et al. 2019, eq. 2, with a fixed beta.
    """
    rewards_BC = -beta * (old_BC - reference_BC) * mask_BC
    last_B = mask_BC.sum(1).long() - 1
    return rewards_BC.scatter_add(1, last_B[:, None], score_B[:, None])


def generalized_advantages(rewards_BC: Tensor, values_BC: Tensor, mask_BC: Tensor, decay: float) -> Tensor:
    """advantages_BC: sum over l of decay^l * delta_{t+l}, delta_t = r_t + V_{t+1} - V_t, V = 0 behind the end.

    Schulman et al. 2016, eq. 16, with gamma = 1 (Ziegler et al. 2019): a completion is one episode.
    """
    values_BC = values_BC * mask_BC
    next_BC = functional.pad(values_BC[:, 1:], (0, 1))
    delta_BC = (rewards_BC + next_BC - values_BC) * mask_BC
    advantages_BC, running_B = torch.zeros_like(delta_BC), torch.zeros_like(delta_BC[:, 0])
    for c in reversed(range(delta_BC.shape[1])):
        running_B = delta_BC[:, c] + decay * running_B
        advantages_BC[:, c] = running_B
    return advantages_BC * mask_BC


def whitened(advantages_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """advantages_BC shifted and scaled to mean 0 and standard deviation 1 over all tokens (Ziegler et al. 2019)."""
    tokens = mask_BC.sum()
    mean = (advantages_BC * mask_BC).sum() / tokens
    variance = ((advantages_BC - mean) ** 2 * mask_BC).sum() / tokens
    return (advantages_BC - mean) * (variance + 1e-8).rsqrt() * mask_BC


def z_scored(scores_B: Tensor, scale: float) -> Tensor:
    """rewards_B of RLPrompt: scale * (score - mean) / (std + 1e-4) over the prompts of one step (sheet 10, item 5).

    Scores that are all alike give zeros. The standard deviation has B - 1 below it (ours; the sheet does not say).
    """
    return scale * (scores_B - scores_B.mean()) / (scores_B.std() + _TINY)


def path_consistency(online_BTA: Tensor, target_BTA: Tensor, actions_BT: Tensor, rewards_B: Tensor) -> Tensor:
    """loss_B of soft Q-learning by path consistency (RLPrompt, Deng et al. 2022; sheet 10, item 6: "v2_v2r_v3_v3r").

    Logits are Q values, V_t = logsumexp_a Q_t(a), A_t = Q_t(a_t) - V_t = log pi(a_t). The reward r comes at the end.
    The mean over t and over four squared residuals: with A online and V' of the target network,

        single step   A_t - (V'_{t+1} - V'_t), at the last token A_T - (r - V'_T)
        multi step    (A_t + ... + A_T) - (r - V'_t)

    and the same two with the roles of the networks swapped. The target carries no gradient.
    """
    residuals = [
        residual_BT
        for policy_BTA, other_BTA in ((online_BTA, target_BTA.detach()), (target_BTA.detach(), online_BTA))
        for residual_BT in _path_residuals(policy_BTA, other_BTA, actions_BT, rewards_B)
    ]
    return torch.stack([residual_BT.square().mean(1) for residual_BT in residuals]).mean(0)


def _path_residuals(
    policy_BTA: Tensor, other_BTA: Tensor, actions_BT: Tensor, rewards_B: Tensor
) -> tuple[Tensor, Tensor]:
    """(single step [B, T], multi step [B, T]), with A of the policy and V of the other network."""
    taken_BT = policy_BTA.gather(2, actions_BT[:, :, None]).squeeze(2)
    advantages_BT = taken_BT - policy_BTA.logsumexp(2)
    values_BT = other_BTA.logsumexp(2)
    next_BT = torch.cat([values_BT[:, 1:], rewards_B[:, None]], 1)
    to_come_BT = advantages_BT.flip(1).cumsum(1).flip(1)
    return advantages_BT - (next_BT - values_BT), to_come_BT - (rewards_B[:, None] - values_BT)
