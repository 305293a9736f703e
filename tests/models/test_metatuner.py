"""MetaTuner's objective against slow references, and the facts that sheet 02 says must hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cotune.models.base import BaseModel, load, weights_digest
from cotune.models.likelihood import completion_nll
from cotune.models.lora import LoraFactors, attached, target_linears
from cotune.models.metatuner.encoder import decoder_layers
from cotune.models.metatuner.generator import MetaTuner
from cotune.models.metatuner.losses import JointItem, joint_loss, joint_terms, watch_agreement
from tests.reference import metatuner as slow

ITEMS = [
    JointItem((5, 6, 7, 8, 9, 10), (11, 12, 2), (20, 21, 22, 23), (30, 31, 2)),
    JointItem((15, 16, 17), (18, 19, 20, 21, 2), (24, 25, 26, 27, 28, 29), (32, 33, 34, 35, 2)),
    JointItem((40, 41, 42, 43), (), (44, 45), (46, 2)),
    JointItem((50, 51), (52, 2), (53, 54, 55), (56, 57, 2)),
]


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    model = load(str(random_model_dir))
    model.model.double()
    return model


def make(base: BaseModel, actor: BaseModel | None = None, **changes: Any) -> MetaTuner:
    """A MetaTuner in which nothing is zero, so that every path carries signal."""
    linears = target_linears((actor or base).model, changes.pop("target_modules", ["q_proj", "v_proj"]))
    shapes = {name: (linear.in_features, linear.out_features) for name, linear in linears.items()}
    settings: dict[str, Any] = {
        "share": 0.5,
        "sharing": True,
        "generator_training": "lora",
        "generator_rank": 3,
        "rank": 2,
        "scaling": 1.5,
        "width": 8,
        "pooling": "last",
        "layer_embedding": True,
        "seed": 1,
    }
    tuner = MetaTuner(base, shapes, **(settings | changes))
    fill(tuner)
    return tuner


def fill(tuner: MetaTuner) -> None:
    rng = torch.Generator().manual_seed(7)
    for name, parameter in tuner.parameters.items():
        if name.endswith("lora_b") or "up_b" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)


def double(tuner: MetaTuner) -> MetaTuner:
    for parameter in tuner.parameters.values():
        parameter.data = parameter.data.double()
    return tuner


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Latents in float64, and the norms of transformers too, to compare at float64 tolerance."""
    cast = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        narrowing = self.dtype == torch.float64 and args[:1] == (torch.float32,)
        return self if narrowing else cast(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "float", lambda self: self)
    monkeypatch.setattr(Tensor, "to", to)
    yield


def loss_of(
    tuner: MetaTuner, actor: BaseModel, items: Any, prompt_weight: float, actor_weight: float = 1.0
) -> tuple[Tensor, dict[str, float]]:
    """A weight of zero is the single branch: the other network does not run."""
    chosen = [
        replace(i, target=i.target if prompt_weight else (), completion=i.completion if actor_weight else ())
        for i in items
    ]
    return joint_loss(joint_terms(tuner, actor, chosen), prompt_weight, actor_weight)


def gradients(tuner: MetaTuner, loss: Tensor) -> dict[str, Tensor]:
    for parameter in tuner.parameters.values():
        parameter.grad = None
    loss.backward()
    return {n: p.grad.clone() for n, p in tuner.parameters.items() if p.grad is not None and bool(p.grad.any())}


def parts(names: Any) -> set[str]:
    return {name.split("/")[0] for name in names}


def test_completion_nll_is_the_mean_over_completion_tokens_of_each_row(base: BaseModel) -> None:
    contexts, completions = [[5, 6, 7], [8]], [[9, 2], [10, 11, 12, 2]]
    got = completion_nll(base.model, contexts, completions)
    expected = [slow.nll(base.model, c, y) for c, y in zip(contexts, completions, strict=True)]
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layer_embedding", [True, False])
def test_joint_loss_is_the_sum_of_single_examples_through_dense_weights(
    base: BaseModel, float64: None, pooling: str, layer_embedding: bool
) -> None:
    tuner = double(make(base, pooling=pooling, layer_embedding=layer_embedding))
    loss, named = loss_of(tuner, base, ITEMS, prompt_weight=0.5)

    lora = {n.rpartition(".")[0]: None for n in (tuner.prompts.shared | tuner.prompts.own)}
    tensors = tuner.prompts.shared | tuner.prompts.own
    generator = slow.merged(base.model, {m: (tensors[f"{m}.lora_a"], tensors[f"{m}.lora_b"]) for m in lora}, 2.0)
    actor_loss = prompt_loss = 0.0
    for item in ITEMS:
        states = slow.hidden(generator, tuner.prompts.depth, item.query)
        h = states[-1] if pooling == "last" else states.mean(0)
        factors = {n: (a[0], b[0]) for n, (a, b) in tuner.adapters((h / h.norm())[None]).items()}
        actor_loss += slow.nll(slow.merged(base.model, factors, 1.5), item.question, item.completion)
        if item.target:
            prompt_loss += slow.nll(generator, item.query, item.target)
    assert named["actor_loss"] == pytest.approx(actor_loss, abs=1e-9)
    assert named["prompt_loss"] == pytest.approx(prompt_loss, abs=1e-9)
    assert float(loss.detach()) == pytest.approx(actor_loss + 0.5 * prompt_loss, abs=1e-9)


def test_loss_and_gradient_do_not_depend_on_the_split_into_batches(base: BaseModel, float64: None) -> None:
    tuner = double(make(base))
    together = gradients(tuner, loss_of(tuner, base, ITEMS, 0.5)[0])
    apart = gradients(tuner, sum((loss_of(tuner, base, [i], 0.5)[0] for i in ITEMS), torch.zeros(())))
    assert together.keys() == apart.keys()
    for name in together:
        torch.testing.assert_close(together[name], apart[name], atol=1e-10, rtol=1e-8)


def test_each_term_reaches_the_shared_layers_and_its_own_branch_only(base: BaseModel) -> None:
    tuner = make(base)
    both = gradients(tuner, loss_of(tuner, base, ITEMS, 1.0)[0])
    actor = gradients(tuner, loss_of(tuner, base, ITEMS, 0.0)[0])
    prompt = gradients(tuner, loss_of(tuner, base, ITEMS, 1.0, actor_weight=0.0)[0])
    assert parts(both) == {"shared", "prompt", "lora"}
    assert parts(actor) == {"shared", "lora"}
    assert parts(prompt) == {"shared", "prompt"}
    for name in both:  # a zero weight is the single branch, and both branches add up
        torch.testing.assert_close(
            both[name], actor.get(name, 0) + prompt.get(name, torch.zeros(())), atol=1e-5, rtol=1e-4
        )
    assert all(not t.requires_grad and t.grad is None for t in tuner.prompts.frozen.values())
    assert not any(p.requires_grad for p in base.model.parameters())


def test_without_sharing_no_term_reaches_the_encoder_of_the_other(base: BaseModel, float64: None) -> None:
    tuner, shared = double(make(base, sharing=False)), double(make(base))
    actor = gradients(tuner, loss_of(tuner, base, ITEMS, 0.0)[0])
    prompt = gradients(tuner, loss_of(tuner, base, ITEMS, 1.0, actor_weight=0.0)[0])
    assert parts(actor) == {"encoder", "lora"} and parts(prompt) == {"shared", "prompt"}
    both = gradients(tuner, loss_of(tuner, base, ITEMS, 1.0)[0])
    for name in both:
        torch.testing.assert_close(both[name], {**actor, **prompt}[name], atol=1e-10, rtol=1e-8)
    # with equal encoders both objectives have the same value
    for name, parameter in tuner.encoder.shared.items():
        parameter.data.copy_(tuner.prompts.shared[name])
    for name, parameter in shared.parameters.items():
        parameter.data.copy_(tuner.parameters[name])
    apart, together = (loss_of(t, base, ITEMS, 1.0)[0].item() for t in (tuner, shared))
    assert apart == pytest.approx(together, abs=1e-9)


def test_a_branch_may_read_another_query(base: BaseModel, float64: None) -> None:
    tuner = double(make(base))
    other = tuple(range(60, 66))
    mixed = [replace(ITEMS[0], prompt_query=other), ITEMS[1]]
    _, named = loss_of(tuner, base, mixed, 1.0)
    _, plain = loss_of(tuner, base, ITEMS[:2], 1.0)
    _, there = loss_of(tuner, base, [replace(ITEMS[0], query=other), ITEMS[1]], 1.0)
    assert named["actor_loss"] == pytest.approx(plain["actor_loss"], abs=1e-9)
    assert named["prompt_loss"] == pytest.approx(there["prompt_loss"], abs=1e-9)


def test_examples_that_no_term_counts_cost_nothing_and_move_nothing(base: BaseModel) -> None:
    tuner = make(base)
    nothing = [replace(i, target=(), completion=()) for i in ITEMS]
    loss, named = joint_loss(joint_terms(tuner, base, nothing), 1.0)
    assert (loss.item(), named, gradients(tuner, loss)) == (0.0, {}, {})


def agreement_of(actor: Tensor, prompt: Tensor) -> dict[str, Any]:
    """What `watch_agreement` should find, of the two gradients."""
    return {
        "actor_gradient": pytest.approx(float(actor.norm()), rel=1e-4),
        "prompt_gradient": pytest.approx(float(prompt.norm()), rel=1e-4),
        "cosine": pytest.approx(float(actor @ prompt / actor.norm() / prompt.norm()), abs=1e-4),
    }


def test_agreement_of_the_terms_is_that_of_their_gradients(base: BaseModel) -> None:
    tuner = make(base)
    actor = gradients(tuner, loss_of(tuner, base, ITEMS, 0.0)[0])
    prompt = gradients(tuner, loss_of(tuner, base, ITEMS, 1.0, actor_weight=0.0)[0])
    names = [f"shared/{n}" for n in tuner.prompts.shared]
    left, right = (
        torch.cat([g.get(n, torch.zeros_like(tuner.parameters[n])).flatten() for n in names]) for g in (actor, prompt)
    )
    terms = joint_terms(tuner, base, ITEMS)  # ITEMS[2] has no target: its query is read apart
    found: list[dict[str, float]] = []
    assert watch_agreement(terms, list(tuner.prompts.shared.values()), found.append)
    assert not found
    watched = gradients(tuner, joint_loss(terms, 0.5)[0] / 7)
    assert found == [agreement_of(left, right)]
    plain = gradients(tuner, joint_loss(joint_terms(tuner, base, ITEMS), 0.5)[0] / 7)
    assert watched.keys() == plain.keys()
    assert all(torch.equal(watched[name], plain[name]) for name in plain)  # it looks and changes no bit
    alone = joint_terms(tuner, base, ITEMS[2:3])
    assert not watch_agreement(alone, list(tuner.prompts.shared.values()), found.append)


def test_a_zero_output_map_is_the_actor_alone_and_gets_all_of_the_first_gradient(base: BaseModel) -> None:
    tuner = make(base)
    for up in tuner.adapters.up_b.values():
        up.data.zero_()
    loss, named = loss_of(tuner, base, ITEMS, 0.0)
    ids = torch.tensor([[5, 6, 7, 8]] * 4)
    with attached(base.model, tuner.adapters(tuner.latents([i.query for i in ITEMS])), 1.5):
        under = base.model(ids).logits
    assert torch.equal(under, base.model(ids).logits)
    alone = completion_nll(base.model, [i.question for i in ITEMS], [i.completion for i in ITEMS])
    assert named["actor_loss"] == pytest.approx(float(alone.sum()), abs=1e-9)
    first = gradients(tuner, loss)
    assert first and all(name.startswith("lora/up_b") for name in first)
    with torch.no_grad():
        for name, gradient in first.items():
            tuner.parameters[name] -= 0.1 * gradient
    second = gradients(tuner, loss_of(tuner, base, ITEMS, 0.0)[0])
    assert {n.split(".")[0] for n in second if n.startswith("lora/")} == {
        f"lora/{n}_{x}" for n in ("down", "up", "embedding") for x in "ab"
    }
    assert "shared" in parts(second)


def test_full_training_moves_copies_of_layers_and_splits_them_at_k(base: BaseModel) -> None:
    before = weights_digest(base.model)
    tuner = make(base, generator_training="full")
    assert tuner.prompts.base is not base and tuner.prompts.base.model is not base.model
    assert all(".layers.0." in n for n in tuner.prompts.shared)
    assert any(".layers.1." in n for n in tuner.prompts.own) and any(
        n.endswith("norm.weight") for n in tuner.prompts.own
    )
    assert not any("embed" in n or "lm_head" in n for n in tuner.prompts.shared | tuner.prompts.own)
    both = gradients(tuner, loss_of(tuner, base, ITEMS, 1.0)[0])
    assert parts(both) == {"shared", "prompt", "lora"}
    with torch.no_grad():
        for parameter in tuner.parameters.values():
            parameter += 0.01
    assert weights_digest(base.model) == before


@pytest.mark.parametrize("training", ["lora", "full"])
def test_frozen_copy_answers_until_it_is_synchronised(base: BaseModel, training: str) -> None:
    tuner = make(base, generator_training=training)
    tuner.prompts.sync()
    ids = torch.tensor([[5, 6, 7]])

    def logits(frozen: bool) -> tuple[Tensor, str]:
        with tuner.prompts.rewriter(frozen) as r, torch.no_grad():
            identity = r.version or (r.adapter.digest if r.adapter else "")
            with attached(
                r.base.model, r.adapter.factors if r.adapter else {}, r.adapter.scaling if r.adapter else 1.0
            ):
                return r.base.model(ids).logits, identity

    start, named = logits(True)
    assert torch.equal(start, logits(False)[0]) and logits(False)[1] == named
    with torch.no_grad():
        for parameter in tuner.prompts.own.values():
            parameter += 0.05
    assert torch.equal(logits(True)[0], start) and logits(True)[1] == named
    assert not torch.equal(logits(False)[0], start) and logits(False)[1] != named
    tuner.prompts.sync()
    assert torch.equal(logits(True)[0], logits(False)[0]) and logits(True)[1] == logits(False)[1]


def test_generated_adapters_are_those_of_training_and_differ_between_queries(base: BaseModel) -> None:
    tuner = make(base)
    queries = [i.query for i in ITEMS]
    adapters = tuner.adapters_at(tuner.latents(queries))
    alone = [tuner.adapters_at(tuner.latents([q]))[0] for q in queries]
    assert all(isinstance(a, LoraFactors) and a.rank == 2 and a.scaling == 1.5 for a in adapters)
    assert len({a.digest for a in adapters}) == len(ITEMS)
    for one, other in zip(adapters, alone, strict=True):
        for name in one.factors:
            torch.testing.assert_close(one.factors[name], other.factors[name], atol=1e-6, rtol=1e-5)
    # term 1 with these adapters, example by example, is the training loss
    _, named = loss_of(tuner, base, ITEMS, 1.0)
    total = 0.0
    for adapter, item in zip(adapters, ITEMS, strict=True):
        with attached(base.model, adapter.factors, adapter.scaling):
            total += slow.nll(base.model, item.question, item.completion)
    assert named["actor_loss"] == pytest.approx(total, abs=1e-4)


def test_generator_and_actor_may_differ_in_size_family_and_depth(base: BaseModel) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=120,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    other = BaseModel("llama", model, base.tokenizer, "nowhere", None)
    for generator, actor in ((other, base), (base, other)):
        tuner = make(generator, actor, target_modules="all-linear")
        assert set(tuner.adapters(tuner.latents([[1, 2]]))) == set(target_linears(actor.model, "all-linear"))
        assert parts(gradients(tuner, loss_of(tuner, actor, ITEMS, 1.0)[0])) == {"shared", "prompt", "lora"}
    assert make(other, base).prompts.depth == 2


def test_same_seed_same_tensors_other_seed_others(base: BaseModel) -> None:
    one, same, other = make(base), make(base), make(base, seed=2)
    assert all(torch.equal(p, same.parameters[n]) for n, p in one.parameters.items())
    assert any(not torch.equal(p, other.parameters[n]) for n, p in one.parameters.items())


def test_load_restores_every_tensor_and_the_frozen_copy(base: BaseModel) -> None:
    one, other = make(base), make(base, seed=2)
    other.load(one.parameters)
    assert all(torch.equal(p, other.parameters[n]) for n, p in one.parameters.items())
    assert all(torch.equal(t, one.prompts.own[n]) for n, t in other.prompts.frozen.items())


@pytest.mark.parametrize("training", ["lora", "full"])
def test_the_parts_are_counted_with_what_they_sit_on(base: BaseModel, training: str) -> None:
    tuner = make(base, generator_training=training)
    sizes = tuner.sizes
    of = {
        part: sum(p.numel() for n, p in tuner.parameters.items() if n.startswith(part))
        for part in parts(tuner.parameters)
    }
    names = {"encoder": "shared", "prompt_decoder": "prompt", "parameter_decoder": "lora"}
    assert {part: size["trained"] for part, size in sizes.items()} == {part: of[n] for part, n in names.items()}
    beside = of["shared"] + of["prompt"] if training == "lora" else 0
    both = sizes["encoder"]["total"] + sizes["prompt_decoder"]["total"]
    assert both == base.parameters_count + beside
    layer = sum(p.numel() for p in decoder_layers(base.model)[1][0].parameters())
    embedding = base.model.get_input_embeddings().weight.numel()
    assert sizes["encoder"]["total"] == embedding + layer + (of["shared"] if training == "lora" else 0)
    apart = make(base, generator_training=training, sharing=False).sizes
    assert apart["adapter_encoder"] == apart["encoder"] == sizes["encoder"]
