"""Straight-through Gumbel-softmax: the conditional noise, the forward value, the gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cotune.models.base import BaseModel, load
from cotune.models.likelihood import completion_nll
from cotune.models.lora import attached
from cotune.models.metatuner.encoder import hidden_after, latent
from cotune.models.metatuner.losses import JointItem, joint_loss, joint_terms, relaxed_term, watch_agreement
from cotune.models.metatuner.relaxation import Relaxed, gumbels_given, prompt_logits, straight_through
from tests.models.test_metatuner import ITEMS, agreement_of, gradients, make


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir))


def relaxed(item: JointItem, start: int, length: int, seed: int) -> JointItem:
    prompt = item.question[start : start + length]
    return replace(item, target=(), relaxed=Relaxed(prompt, start, seed, 0.7))


RELAXED = [relaxed(ITEMS[0], 1, 2, 11), relaxed(ITEMS[1], 0, 4, 12), relaxed(ITEMS[3], 1, 1, 13)]


def test_noise_given_the_sample_is_the_noise_of_sampling() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=torch.float64).expand(200_000, 4)
    free = logits - torch.log(-torch.log(torch.rand(logits.shape, generator=rng, dtype=torch.float64)))
    tokens = torch.multinomial(logits[0].softmax(-1), len(logits), replacement=True, generator=rng)
    given = gumbels_given(logits, tokens, rng)
    assert torch.equal(given.argmax(-1), tokens)
    for temperature in (0.5, 1.0, 3.0):
        ours, theirs = ((x / temperature).softmax(-1) for x in (given, free))
        torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=5e-3, rtol=0)
        torch.testing.assert_close(ours.std(0), theirs.std(0), atol=5e-3, rtol=0)


def test_forward_is_the_token_and_backward_the_perturbed_softmax() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    sample = Relaxed((4, 0, 2), 0, 5, 0.5)
    rows = straight_through(logits, sample)
    torch.testing.assert_close(rows.detach(), torch.eye(6, dtype=torch.float64)[[4, 0, 2]])
    weights = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (rows * weights).sum().backward()

    def soft(at: torch.Tensor) -> torch.Tensor:
        return (gumbels_given(at, torch.tensor(sample.prompt), torch.Generator().manual_seed(5)) / 0.5).softmax(-1)

    step, expected = 1e-6, torch.zeros_like(weights)  # finite differences
    for p in range(3):
        for v in range(6):
            moved = logits.detach().clone()
            moved[p, v] += step
            expected[p, v] = ((soft(moved) - soft(logits.detach())) * weights).sum() / step
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, atol=1e-5, rtol=1e-3)


def test_the_value_is_that_of_the_tokens_and_the_gradient_reaches_all_three_parts(base: BaseModel) -> None:
    tuner = make(base)
    hard = [replace(i, relaxed=None) for i in RELAXED]
    with torch.no_grad():
        expected = joint_terms(tuner, base, hard).actor
        found = joint_terms(tuner, base, RELAXED)
    assert expected is not None and found.actor is not None
    torch.testing.assert_close(found.actor, expected, atol=1e-4, rtol=1e-5)
    assert (found.answered, found.taught, found.prompt) == (3, 0, None)
    loss = relaxed_term(tuner, base, RELAXED)[0].sum()
    assert {n.split("/")[0] for n in gradients(tuner, loss)} == {"shared", "prompt", "lora"}
    mixed = joint_terms(tuner, base, [*RELAXED[:2], ITEMS[2], ITEMS[0]])
    assert (mixed.answered, mixed.taught) == (4, 1)


@pytest.mark.parametrize("sharing", ["one query", "two queries"])
def test_agreement_counts_what_term_1_sends_through_the_prompt(base: BaseModel, sharing: str) -> None:
    tuner = make(base)
    other = replace(RELAXED[1], prompt_query=RELAXED[1].query if sharing == "two queries" else ())
    terms = joint_terms(tuner, base, [RELAXED[0], other, ITEMS[2], ITEMS[0]])
    assert terms.actor is not None and terms.prompt is not None
    shared = list(tuner.prompts.shared.values())
    left, right = (
        torch.cat([g.flatten() for g in torch.autograd.grad(t, shared, retain_graph=True, materialize_grads=True)])
        for t in (terms.actor, terms.prompt)
    )
    found: list[dict[str, float]] = []
    assert watch_agreement(terms, shared, found.append)
    joint_loss(terms, 0.5)[0].backward()
    assert found == [agreement_of(left, right)]


def test_the_gradient_is_that_of_one_example_at_a_time_by_the_chain_rule(base: BaseModel) -> None:
    tuner = make(base)
    got = gradients(tuner, relaxed_term(tuner, base, RELAXED)[0].sum())
    total: dict[str, torch.Tensor] = {}
    table = base.model.get_input_embeddings().weight
    for item in RELAXED:
        assert item.relaxed is not None
        r = item.relaxed
        ids = torch.tensor([[*item.question, *item.completion]])
        embeddings = table[ids].detach().clone().requires_grad_(True)
        with tuner.prompts.encoding():
            h = hidden_after(base.model, tuner.prompts.depth, torch.tensor([item.query]))[:, -1]
        with attached(base.model, tuner.adapters(latent(h)), tuner.scaling):
            nll = completion_nll(base.model, [item.question], [item.completion], embeddings)
        (pull,) = torch.autograd.grad(nll.sum(), embeddings, retain_graph=True)
        with tuner.prompts.trainable():
            (logits,) = prompt_logits(base.model, [item.query], [r.prompt])
        rows = straight_through(logits, r)
        surrogate = (rows * (pull[0, r.start : r.start + len(r.prompt)] @ table.T)).sum()
        for name, gradient in gradients(tuner, nll.sum() + surrogate).items():
            total[name] = total.get(name, torch.zeros(())) + gradient
    assert got.keys() == total.keys()
    for name in got:
        torch.testing.assert_close(got[name], total[name], atol=1e-4, rtol=1e-3)
