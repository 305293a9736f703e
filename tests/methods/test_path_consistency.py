"""Soft Q-learning by path consistency: by hand, at its known optimum, and on the way to it."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from cotune.methods import objectives

# The return of every prompt of two tokens out of three: the best is (1, 2).
RETURNS = torch.tensor([[0.0, 1.0, 0.5], [0.3, -1.0, 2.0], [1.5, 0.2, 0.0]], dtype=torch.float64)
PROMPTS = torch.tensor(list(product(range(3), range(3))))


def optimal_q() -> Tensor:
    """Q of every prompt, [9, 2, 3]: Q_2 = return, Q_1 = logsumexp over the second token (soft Bellman)."""
    first = RETURNS.logsumexp(1)
    return torch.stack([torch.stack([first, RETURNS[a]]) for a, _ in PROMPTS.tolist()])


def rewards() -> Tensor:
    return torch.stack([RETURNS[a, b] for a, b in PROMPTS.tolist()])


def test_the_loss_is_that_of_the_formula() -> None:
    """By plain loops, as the docstring writes it."""
    generator = torch.Generator().manual_seed(0)
    online, target = (torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    actions, r = torch.randint(5, (4, 3), generator=generator), torch.randn(4, generator=generator).double()
    found = objectives.path_consistency(online, target, actions, r)
    for b in range(4):
        total = 0.0
        for policy, other in ((online, target), (target, online)):
            value = [math.log(sum(math.exp(q) for q in other[b, t].tolist())) for t in range(3)]
            log_pi = [float(policy[b, t].log_softmax(0)[actions[b, t]]) for t in range(3)]
            after = [*value[1:], float(r[b])]
            total += sum((log_pi[t] - (after[t] - value[t])) ** 2 for t in range(3)) / 3
            total += sum((sum(log_pi[t:]) - (float(r[b]) - value[t])) ** 2 for t in range(3)) / 3
        assert float(found[b]) == pytest.approx(total / 4, rel=1e-12)


def test_the_optimum_is_consistent_on_every_path_and_what_is_shifted_from_it_is_not() -> None:
    best = optimal_q()
    assert objectives.path_consistency(best, best, PROMPTS, rewards()).abs().max() < 1e-24
    assert objectives.path_consistency(best + 0.1, best + 0.1, PROMPTS, rewards()).min() > 1e-3
    assert objectives.path_consistency(best, best, PROMPTS, rewards() + 0.1).min() > 1e-3


def test_the_target_gets_no_gradient_and_the_online_network_gets_all_of_it() -> None:
    online, target = optimal_q().requires_grad_(), (optimal_q() + 0.3).requires_grad_()
    objectives.path_consistency(online, target, PROMPTS, rewards()).sum().backward()
    assert target.grad is None
    assert online.grad is not None and bool(online.grad.any())


def test_a_bandit_of_two_tokens_is_learned_up_to_its_known_optimum() -> None:
    """From zero, with a slow target: pi(prompt) becomes exp(return) / sum, the maximum-entropy optimum."""
    first, second = (nn.Parameter(torch.zeros(n, 3, dtype=torch.float64)) for n in (1, 3))
    slow = [p.detach().clone() for p in (first, second)]
    optimizer = torch.optim.Adam([first, second], 0.05)

    def q(one: Tensor, two: Tensor) -> Tensor:
        return torch.stack([one.expand(9, 3), two[PROMPTS[:, 0]]], 1)

    for _ in range(400):
        loss = objectives.path_consistency(q(first, second), q(*slow), PROMPTS, rewards()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for copy, p in zip(slow, (first, second), strict=True):
            copy.lerp_(p.detach(), 0.1)
    log_pi = q(first, second).detach().log_softmax(2).gather(2, PROMPTS[:, :, None]).sum((1, 2))
    assert torch.allclose(log_pi.exp(), rewards().softmax(0), atol=5e-3)
    assert PROMPTS[int(log_pi.argmax())].tolist() == [1, 2]


def test_rewards_are_z_scores_and_equal_scores_are_worth_nothing() -> None:
    scores = torch.tensor([0.0, 0.5, 1.0, 0.5])
    found = objectives.z_scored(scores, 5.0)
    deviation = math.sqrt(0.5 / 3)
    assert found.tolist() == pytest.approx([-2.5 / (deviation + 1e-4), 0, 2.5 / (deviation + 1e-4), 0], rel=1e-5)
    assert objectives.z_scored(torch.full((4,), 0.3), 5.0).tolist() == [0, 0, 0, 0]
