"""DoRA against PEFT's own, against eq. 5 on dense weights, and in batches that mix it with what it is not."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from cotune.errors import CotuneError, UsageError
from cotune.models.base import BaseModel, load
from cotune.models.dora import column_norm
from cotune.models.lora import LoraFactors, attached, canary, init_static, stack, target_linears

TARGETS = ["q_proj", "v_proj", "down_proj"]
SCALING = 1.75


def adapter(base: BaseModel, seed: int, rank: int = 3, dora: bool = True, scaling: float = SCALING) -> LoraFactors:
    """Far from a fresh one: an update as large as the weights, magnitudes half to twice the weights' own."""
    rng = torch.Generator().manual_seed(seed)
    factors = {}
    for name, linear in target_linears(base.model, TARGETS).items():
        own = linear.weight.norm(dim=1)
        lora_a = torch.randn(rank, linear.in_features, generator=rng) / linear.in_features**0.5
        lora_b = torch.randn(linear.out_features, rank, generator=rng) * 0.3
        magnitude = own * (0.5 + 1.5 * torch.rand(linear.out_features, generator=rng))
        factors[name] = (lora_a, lora_b, magnitude) if dora else (lora_a, lora_b)
    return LoraFactors(factors, scaling)


@pytest.fixture(scope="module")
def ids_BT() -> Tensor:
    return torch.randint(3, 259, (4, 9), generator=torch.Generator().manual_seed(7))


def logits(base: BaseModel, ids: Tensor, factors=None, scaling: float = 1.0) -> Tensor:
    with torch.no_grad(), attached(base.model, factors or {}, scaling):
        return base.model(input_ids=ids, use_cache=False).logits


class Small(nn.Module):
    """One layer with a bias and one without, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def small() -> Small:
    torch.manual_seed(3)
    return Small().double().requires_grad_(False)


def pefts(model: nn.Module, rank: int = 3) -> peft.PeftModel:
    """PEFT's DoRA of the same scaling, with random factors and magnitudes."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=SCALING * rank, use_dora=True, target_modules=["first", "second"], init_lora_weights=False
    )
    torch.manual_seed(4)
    model = peft.get_peft_model(model, config).double()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(0.5 + torch.rand(len(parameter)))
    return model


def taken(model: peft.PeftModel) -> dict[str, tuple[Tensor, ...]]:
    """PEFT's parameters, by layer, in our order."""
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in ("first", "second")}
    return {
        name: (m.lora_A["default"].weight, m.lora_B["default"].weight, m.lora_magnitude_vector["default"].weight)
        for name, m in layers.items()
    }


def test_outputs_and_gradients_are_pefts_in_float64() -> None:
    theirs = pefts(small())
    factors = {n: tuple(t.detach().clone().requires_grad_() for t in own) for n, own in taken(theirs).items()}
    x, weights = torch.randn(2, 7, 6).double(), torch.randn(2, 7, 4).double()
    expected = theirs(x)
    (expected * weights).sum().backward()
    ours = small()
    plain = ours(x)
    with attached(ours, factors, SCALING):
        got = ours(x)
    (got * weights).sum().backward()
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    assert (got - plain).abs().max() > 0.1  # magnitudes and factors do something
    for name, own in taken(theirs).items():
        for mine, their in zip(factors[name], own, strict=True):
            torch.testing.assert_close(mine.grad, their.grad, atol=1e-10, rtol=0)
            assert mine.grad.abs().max() > 1e-2


def test_equation_5_on_dense_weights() -> None:
    """W' = m (W + s B A) / ||W + s B A||, by rows of PyTorch's weight; and the norm gets no gradient (section 4.3)."""
    model, factors = small(), taken(pefts(small()))
    weights = {}
    for name, (lora_a, lora_b, magnitude) in factors.items():
        moved = model.get_submodule(name).weight + SCALING * (lora_b @ lora_a)
        norm = moved.norm(dim=1)
        torch.testing.assert_close(column_norm(model.get_submodule(name).weight, lora_a, lora_b, SCALING), norm)
        weights[f"{name}.weight"] = magnitude[:, None] * moved / norm.detach()[:, None]
    x = torch.randn(3, 6).double()
    expected = functional_call(model, weights, x)
    with attached(model, factors, SCALING):
        got = model(x)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    leaves = [t for own in factors.values() for t in own]
    mine, dense = torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    for one, other in zip(mine, dense, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_a_row_of_zeros_stays_at_its_bias() -> None:
    model = small()
    model.first.weight[2] = 0
    fresh = init_static(model, ["first"], 2, torch.Generator().manual_seed(0), dora=True)
    x = torch.randn(3, 6).double()
    with attached(model, fresh):
        out = model.first(x)
    assert torch.equal(out[:, 2], model.first.bias[2].expand(3)) and out.isfinite().all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in fresh["first"])


def test_a_fresh_adapter_leaves_every_bit_of_the_logits(random_base, ids_BT) -> None:
    fresh = init_static(random_base.model, "all-linear", 4, torch.Generator().manual_seed(0), dora=True)
    assert torch.equal(logits(random_base, ids_BT, fresh, 2.0), logits(random_base, ids_BT))
    for name, (lora_a, lora_b, magnitude) in fresh.items():
        assert lora_a.any() and not lora_b.any() and all(p.requires_grad for p in fresh[name])
        torch.testing.assert_close(magnitude, random_base.model.get_submodule(name).weight.norm(dim=1))
    plain = init_static(random_base.model, "all-linear", 4, torch.Generator().manual_seed(0))
    assert all(torch.equal(plain[n][0], fresh[n][0]) for n in plain)  # the same draw as without magnitudes


def test_an_export_loads_in_peft_and_gives_the_same_logits(random_model_dir, random_base, tmp_path, ids_BT) -> None:
    ours = adapter(random_base, 0)
    ours.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    again = LoraFactors.load(tmp_path)
    assert again.digest == ours.digest and again.is_dora
    with_peft = peft.PeftModel.from_pretrained(load(str(random_model_dir)).model, tmp_path).eval()
    got = logits(random_base, ids_BT, ours.factors, ours.scaling)
    with torch.no_grad():
        torch.testing.assert_close(with_peft(input_ids=ids_BT).logits, got, atol=1e-4, rtol=1e-4)
        merged = with_peft.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids_BT).logits, got, atol=2e-4, rtol=1e-4)
    assert (got - logits(random_base, ids_BT)).abs().max() > 1


def test_what_peft_writes_loads_here(random_model_dir, random_base, tmp_path, ids_BT) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=["q_proj", "up_proj"])
    torch.manual_seed(1)
    with_peft = peft.get_peft_model(load(str(random_model_dir)).model, config).eval()
    with torch.no_grad():
        untouched = with_peft(input_ids=ids_BT).logits
        torch.testing.assert_close(untouched, logits(random_base, ids_BT), atol=1e-5, rtol=1e-5)  # B = 0 in PEFT too
        for name, parameter in with_peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            elif "magnitude" in name:
                parameter.mul_(1.5)
        theirs = with_peft(input_ids=ids_BT).logits
    with_peft.save_pretrained(tmp_path)
    read = LoraFactors.load(tmp_path)
    assert read.is_dora and read.rank == 3 and read.scaling == 7 / 3 and len(read.factors) == 4
    torch.testing.assert_close(logits(random_base, ids_BT, read.factors, read.scaling), theirs, atol=1e-4, rtol=1e-4)


def test_a_lora_that_calls_itself_dora_is_refused(random_base, tmp_path) -> None:
    adapter(random_base, 0, dora=False).save(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(UsageError, match="not the 3 of each linear layer that DoRA has"):
        LoraFactors.load(tmp_path)
    adapter(random_base, 0).save(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": False}))
    with pytest.raises(UsageError, match="not the 2 of each linear layer that LoRA has"):
        LoraFactors.load(tmp_path)


def test_a_batch_may_mix_dora_lora_and_rows_without_an_adapter(random_base, ids_BT) -> None:
    """PEFT refuses such a batch ("Cannot pass `adapter_names` when DoRA is enabled"), so each row is held alone."""
    rows = [
        adapter(random_base, 1, rank=2, scaling=0.5),
        None,
        adapter(random_base, 2, rank=4, dora=False),
        adapter(random_base, 3, rank=1),
    ]
    rows[0] = LoraFactors(dict(list(rows[0].factors.items())[:2]), rows[0].scaling)  # not in every layer
    factors, scaling = stack(rows)
    mixed = logits(random_base, ids_BT, factors, scaling)
    for i, own in enumerate(rows):
        alone = logits(random_base, ids_BT, *((own.factors, own.scaling) if own else ()))
        torch.testing.assert_close(mixed[i], alone[i], atol=1e-4, rtol=1e-4)
    assert torch.equal(mixed[1], logits(random_base, ids_BT)[1])  # every bit
    blocks = logits(random_base, ids_BT.repeat_interleave(2, dim=0), factors, scaling)
    torch.testing.assert_close(blocks, mixed.repeat_interleave(2, dim=0), atol=1e-4, rtol=1e-4)
    moved = torch.tensor([3, 0, 1])
    with torch.no_grad(), attached(random_base.model, factors, scaling) as select:
        select(moved)
        got = random_base.model(input_ids=ids_BT[moved], use_cache=False).logits
    torch.testing.assert_close(got, mixed[moved], atol=1e-4, rtol=1e-4)


def test_the_same_factors_with_and_without_magnitudes_are_two_adapters(random_base, ids_BT) -> None:
    one = adapter(random_base, 1)
    other = LoraFactors({n: own[:2] for n, own in one.factors.items()}, one.scaling)
    assert one.digest != other.digest
    assert one.nbytes - other.nbytes == sum(4 * m.numel() for *_, m in one.factors.values())
    got = logits(random_base, ids_BT[:2], *stack([one, other]))
    assert not torch.allclose(got[0], logits(random_base, ids_BT[:2], other.factors, other.scaling)[0], atol=1e-2)
    same, scaling = stack([one, adapter(random_base, 1)])
    assert same is one.factors and scaling == SCALING


def test_gradients_per_row_are_those_of_the_row_alone(random_base, ids_BT) -> None:
    rows = [adapter(random_base, seed) for seed in range(2)]
    ids = ids_BT[:2]

    def leaves(factors):
        return {n: tuple(t.clone().requires_grad_() for t in own) for n, own in factors.items()}

    def loss(factors, some: Tensor) -> None:
        with attached(random_base.model, factors, SCALING):
            out = random_base.model(input_ids=some, use_cache=False).logits
            functional.cross_entropy(out[:, :-1].flatten(0, 1), some[:, 1:].flatten(), reduction="sum").backward()

    together = leaves(stack(rows)[0])
    loss(together, ids)
    for i, row in enumerate(rows):
        alone = leaves(row.factors)
        loss(alone, ids[i : i + 1])
        for name in alone:
            for mine, own in zip(together[name], alone[name], strict=True):
                scale = own.grad.abs().max()
                torch.testing.assert_close(mine.grad[i] / scale, own.grad / scale, atol=2e-4, rtol=0)


def test_bfloat16_models_take_float32_magnitudes(random_model_dir, ids_BT) -> None:
    base = load(str(random_model_dir), dtype="bfloat16")
    plain = logits(base, ids_BT)
    fresh = init_static(base.model, "all-linear", 4, torch.Generator().manual_seed(0), dora=True)
    assert torch.equal(logits(base, ids_BT, fresh), plain)
    under = logits(base, ids_BT, *stack([adapter(base, 0), None, adapter(base, 1, dora=False), None]))
    assert under.dtype == torch.bfloat16 and torch.equal(under[[1, 3]], plain[[1, 3]])
    assert not torch.equal(under[0], plain[0])


def test_magnitudes_that_do_not_fit_or_are_no_numbers_are_refused(random_base) -> None:
    layers = adapter(random_base, 0).factors
    name, (lora_a, lora_b, magnitude) = list(layers.items())[-1]
    for wrong in ((lora_a, lora_b), (lora_a, lora_b, magnitude[1:])):
        with pytest.raises(CotuneError, match=r"one for each of its 64 outputs, in every layer of a DoRA adapter"):
            LoraFactors({**layers, name: wrong}, 1.0)
    for number in (torch.nan, torch.inf):
        with pytest.raises(CotuneError, match="not numbers: training diverged"):
            LoraFactors({**layers, name: (lora_a, lora_b, magnitude * number)}, 1.0)
    with (
        pytest.raises(UsageError, match=r"its magnitude is \[63\]"),
        attached(random_base.model, {name: (lora_a, lora_b, magnitude[1:])}),
    ):
        pass


def test_the_canary_knows_a_fresh_adapter_from_one_without_effect(random_model_dir: Path, monkeypatch) -> None:
    base = load(str(random_model_dir))
    mlp, target = base.model.model.layers[0].mlp, ["model.layers.0.mlp.up_proj"]
    fresh = LoraFactors.snapshot(init_static(base.model, target, 2, torch.Generator().manual_seed(0), dora=True), 2.0)
    longer = LoraFactors({n: (a, b, 1.1 * m) for n, (a, b, m) in fresh.factors.items()}, 2.0)
    prompt = base.encode("hello")
    canary(base, fresh, prompt)
    canary(base, longer, prompt)  # magnitudes alone change something

    def fused(x: Tensor) -> Tensor:
        return (functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T

    monkeypatch.setattr(mlp, "forward", fused)
    canary(base, fresh, prompt)
    with pytest.raises(CotuneError, match="changes no log-probability"):
        canary(base, longer, prompt)
