"""Gradient checkpointing: the same numbers to the last bit, from graphs that hold less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cotune.errors import UsageError
from cotune.models.base import BaseModel, load
from cotune.models.checkpointing import checkpointed
from cotune.models.likelihood import completion_nll
from cotune.models.lora import attached, init_static
from cotune.models.metatuner.generator import MetaTuner
from cotune.models.metatuner.losses import joint_loss, joint_terms, watch_agreement
from cotune.models.metatuner.relaxation import Relaxed
from tests.models.test_metatuner import ITEMS, gradients, make

RELAXED = [replace(ITEMS[0], target=(), relaxed=Relaxed((21, 22), 1, 5, 1.0)), ITEMS[1]]


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir))


@pytest.fixture(scope="module")
def other(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir))


def passed(model: nn.Module) -> list[int]:
    """One entry per pass through the MLP of the first layer, from now on."""
    passes: list[int] = []
    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    # Before, not behind it: a second pass ends as soon as it has what the backward pass needs.
    layer.get_submodule("mlp").register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def step(tuner: MetaTuner, actor: BaseModel, items: Any, recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of both terms; the backward pass runs behind all contexts, as in the trainer."""
    models = [tuner.prompts.base.model, tuner.encoder.base.model, actor.model] if recompute else []
    with checkpointed(*models):
        loss, _ = joint_loss(joint_terms(tuner, actor, items), 0.5)
    return loss.detach(), gradients(tuner, loss)


@pytest.mark.parametrize("items", [ITEMS, RELAXED], ids=["tokens", "relaxed"])
@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("one_model", [True, False])
def test_joint_loss_and_gradients_are_the_same_bit_for_bit(
    base: BaseModel, other: BaseModel, items: Any, sharing: bool, training: str, one_model: bool
) -> None:
    actor = base if one_model else other
    tuner = make(base, actor, generator_training=training, sharing=sharing, target_modules="all-linear")
    plain, plain_gradients = step(tuner, actor, items, recompute=False)
    loss, found = step(tuner, actor, items, recompute=True)
    assert torch.equal(loss, plain)
    assert found.keys() == plain_gradients.keys() and {n.split("/")[0] for n in found} >= {"shared", "prompt", "lora"}
    assert all(torch.equal(found[name], plain_gradients[name]) for name in found)


def test_the_backward_pass_runs_each_layer_again_under_the_adapter_it_had(base: BaseModel) -> None:
    rng = torch.Generator().manual_seed(0)
    mine, another = (init_static(base.model, "all-linear", 2, rng) for _ in range(2))
    for pair in (*mine.values(), *another.values()):
        pair[1].data.normal_(generator=rng)
    passes = passed(base.model)

    def gradient(recompute: bool, during: Any = None) -> Tensor:
        with checkpointed(*[base.model] if recompute else []), attached(base.model, mine):
            nll = completion_nll(base.model, [[5, 6, 7], [8]], [[9, 2], [10, 2]]).sum()
        with attached(base.model, during or {}):
            return torch.cat(
                [g.flatten() for g in torch.autograd.grad(nll, [p for pair in mine.values() for p in pair])]
            )

    plain = gradient(False)
    assert len(passes) == 1
    assert torch.equal(gradient(True), plain)
    assert len(passes) == 3
    assert torch.equal(gradient(True, during=another), plain)  # even inside another adapter's context
    assert not any("forward" in module.__dict__ for module in base.model.modules())


def test_graphs_hold_less(base: BaseModel) -> None:
    tuner = make(base)

    def held(recompute: bool) -> int:
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            checkpointed(*[base.model] if recompute else []),
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        ):
            joint_terms(tuner, base, [replace(i, question=i.question * 20) for i in ITEMS])
        weights = {p.untyped_storage().data_ptr() for p in base.model.parameters()}
        return sum(size for place, size in kept.items() if place not in weights)

    assert held(True) < 0.5 * held(False)


def test_a_look_at_the_agreement_inside_a_backward_pass(base: BaseModel) -> None:
    tuner = make(base)
    plain = joint_terms(tuner, base, ITEMS)
    with checkpointed(base.model):
        terms = joint_terms(tuner, base, ITEMS)
    looks: list[dict[str, float]] = []
    for each in (terms, plain):
        assert watch_agreement(each, list(tuner.prompts.shared.values()), looks.append)
    found, expected = (gradients(tuner, joint_loss(t, 1.0)[0]) for t in (terms, plain))
    assert looks[0] == looks[1]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="Linear has no layers"), checkpointed(nn.Linear(2, 2)):
        pass
