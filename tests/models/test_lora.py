"""Low-rank adapters against dense weights, against PEFT, and against nothing (zero factors)."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from reference.dense_lora import decode_one, dense_logits
from torch import Tensor, nn
from torch.nn import functional

from cotune.errors import CotuneError, UsageError
from cotune.models.base import BaseModel, load, weights_digest
from cotune.models.lora import LoraFactors, attached, canary, init_static, stack, target_linears

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def random_adapter(base: BaseModel, seed: int, rank: int = 4, scaling: float = 2.0, targets=TARGETS) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(
        {
            name: (
                torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5,
                torch.randn(linear.out_features, rank, generator=generator) * 0.3,
            )
            for name, linear in target_linears(base.model, targets).items()
        },
        scaling,
    )


@pytest.fixture(scope="module")
def ids_BT() -> Tensor:
    return torch.randint(3, 259, (4, 11), generator=torch.Generator().manual_seed(7))


def logits(base: BaseModel, ids: Tensor, factors=None, scaling: float = 1.0) -> Tensor:
    with torch.no_grad(), attached(base.model, factors or {}, scaling):
        return base.model(input_ids=ids, use_cache=False).logits


@pytest.fixture(scope="module")
def adapters(random_base: BaseModel) -> list[LoraFactors]:
    return [random_adapter(random_base, seed) for seed in range(4)]


def test_per_row_factors_equal_dense_weights_row_by_row(random_base, adapters, ids_BT) -> None:
    batched = logits(random_base, ids_BT, *stack(adapters))
    for row, adapter in enumerate(adapters):
        expected = dense_logits(random_base.model, ids_BT[row], adapter.factors, adapter.scaling)
        torch.testing.assert_close(batched[row], expected, atol=2e-4, rtol=1e-4)
    base_logits = logits(random_base, ids_BT)
    assert (batched - base_logits).abs().max() > 1  # the adapters do something


def test_shared_factors_equal_dense_weights(random_base, adapters, ids_BT) -> None:
    shared = logits(random_base, ids_BT, adapters[0].factors, adapters[0].scaling)
    for row in range(4):
        expected = dense_logits(random_base.model, ids_BT[row], adapters[0].factors, adapters[0].scaling)
        torch.testing.assert_close(shared[row], expected, atol=2e-4, rtol=1e-4)


def test_zero_lora_b_leaves_every_bit_of_the_logits(random_base, ids_BT) -> None:
    fresh = init_static(random_base.model, "all-linear", 4, torch.Generator().manual_seed(0))
    assert torch.equal(logits(random_base, ids_BT, fresh, 2.0), logits(random_base, ids_BT))


def test_rows_without_adapter_keep_every_bit_in_a_mixed_batch(random_base, adapters, ids_BT) -> None:
    mixed = logits(random_base, ids_BT, *stack([adapters[0], None, adapters[1], None]))
    plain = logits(random_base, ids_BT)
    assert torch.equal(mixed[[1, 3]], plain[[1, 3]])
    assert not torch.equal(mixed[[0, 2]], plain[[0, 2]])


def test_gradients_of_both_factors_match_dense_weights_per_row(random_base, adapters, ids_BT) -> None:
    factors, scaling = stack(adapters)
    leaves = {n: (a.clone().requires_grad_(), b.clone().requires_grad_()) for n, (a, b) in factors.items()}
    with attached(random_base.model, leaves, scaling):
        out = random_base.model(input_ids=ids_BT, use_cache=False).logits
        functional.cross_entropy(out[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum").backward()
    for row, adapter in enumerate(adapters):
        own = {n: (a.clone().requires_grad_(), b.clone().requires_grad_()) for n, (a, b) in adapter.factors.items()}
        expected = dense_logits(random_base.model, ids_BT[row], own, adapter.scaling)
        functional.cross_entropy(expected[:-1], ids_BT[row, 1:], reduction="sum").backward()
        for name in own:
            for mine, dense in zip(leaves[name], own[name], strict=True):
                scale = dense.grad.abs().max()
                torch.testing.assert_close(mine.grad[row] / scale, dense.grad / scale, atol=2e-4, rtol=0)
    assert all(p.grad is None for p in random_base.model.parameters())


# -- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(adapters, tmp_path_factory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("adapter") / f"a{i}" for i in range(4)]
    for adapter, folder in zip(adapters, folders, strict=True):
        adapter.save(folder)
    return folders


def test_an_export_loads_in_peft_and_gives_the_same_logits(random_model_dir, random_base, adapters, exported, ids_BT):
    with_peft = peft.PeftModel.from_pretrained(load(str(random_model_dir)).model, exported[0]).eval()
    ours = logits(random_base, ids_BT, adapters[0].factors, adapters[0].scaling)
    with torch.no_grad():
        torch.testing.assert_close(with_peft(input_ids=ids_BT).logits, ours, atol=1e-4, rtol=1e-4)
        merged = with_peft.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids_BT).logits, ours, atol=2e-4, rtol=1e-4)


def test_a_batch_equals_pefts_mixed_batch(random_model_dir, random_base, adapters, exported, ids_BT) -> None:
    with_peft = peft.PeftModel.from_pretrained(load(str(random_model_dir)).model, exported[0], adapter_name="a0")
    for i in (1, 2):
        with_peft.load_adapter(exported[i], adapter_name=f"a{i}")
    with_peft.eval()
    with torch.no_grad():
        theirs = with_peft(input_ids=ids_BT, adapter_names=["a2", "__base__", "a0", "a1"]).logits
    ours = logits(random_base, ids_BT, *stack([adapters[2], None, adapters[0], adapters[1]]))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_what_peft_writes_loads_here(random_model_dir, random_base, tmp_path, ids_BT) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    with_peft = peft.get_peft_model(load(str(random_model_dir)).model, config).eval()
    with_peft.save_pretrained(tmp_path)
    adapter = LoraFactors.load(tmp_path)
    assert adapter.rank == 3 and adapter.scaling == 7 / 3 and len(adapter.factors) == 4
    with torch.no_grad():
        theirs = with_peft(input_ids=ids_BT).logits
    torch.testing.assert_close(
        logits(random_base, ids_BT, adapter.factors, adapter.scaling), theirs, atol=1e-4, rtol=1e-4
    )


def test_rslora_of_peft_loads_with_its_scaling(random_model_dir, random_base, tmp_path, ids_BT) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    with_peft = peft.get_peft_model(load(str(random_model_dir)).model, config).eval()
    with_peft.save_pretrained(tmp_path)
    adapter = LoraFactors.load(tmp_path)
    assert adapter.scaling == 3 / 2  # alpha / sqrt(rank)
    with torch.no_grad():
        theirs = with_peft(input_ids=ids_BT).logits
    torch.testing.assert_close(
        logits(random_base, ids_BT, adapter.factors, adapter.scaling), theirs, atol=1e-4, rtol=1e-4
    )


def test_initial_factors_have_pefts_distribution(random_model_dir, random_base) -> None:
    config = peft.LoraConfig(r=8, target_modules=TARGETS)
    torch.manual_seed(0)
    with_peft = peft.get_peft_model(load(str(random_model_dir)).model, config)
    ours = init_static(random_base.model, TARGETS, 8, torch.Generator().manual_seed(0))
    for name, (lora_a, lora_b) in ours.items():
        theirs = with_peft.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
        bound = lora_a.shape[1] ** -0.5
        assert lora_a.abs().max() <= bound and theirs.abs().max() <= bound
        assert lora_a.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        assert theirs.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        assert not lora_b.any() and lora_a.requires_grad and lora_b.requires_grad
    again = init_static(random_base.model, TARGETS, 8, torch.Generator().manual_seed(0))
    assert all(torch.equal(ours[n][0], again[n][0]) for n in ours)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [2.0, 0.1, 16 / 3, 1 / 49])
def test_saving_and_loading_keeps_content_and_digest(random_base, tmp_path, scaling: float) -> None:
    adapter = random_adapter(random_base, 5, rank=3, scaling=scaling)
    adapter.save(tmp_path)
    adapter.save(tmp_path)  # over itself
    again = LoraFactors.load(tmp_path)
    assert again.digest == adapter.digest and again.scaling == pytest.approx(scaling, rel=1e-14)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for name, pair in adapter.factors.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, again.factors[name], strict=True))


def test_the_digest_sees_every_part(random_base) -> None:
    adapter = random_adapter(random_base, 5)
    name, (lora_a, lora_b) = next(iter(adapter.factors.items()))
    changed = lora_b.clone()
    changed[0, 0] += 1e-6
    others = [
        LoraFactors({**adapter.factors, name: (lora_a, changed)}, adapter.scaling),
        LoraFactors(adapter.factors, adapter.scaling + 1e-6),
        LoraFactors({k: v for k, v in adapter.factors.items() if k != name}, adapter.scaling),
    ]
    assert len({adapter.digest, *(o.digest for o in others)}) == 4
    assert LoraFactors(dict(reversed(adapter.factors.items())), adapter.scaling).digest == adapter.digest


def test_a_snapshot_does_not_follow_training(random_base) -> None:
    parameters = init_static(random_base.model, TARGETS, 2, torch.Generator().manual_seed(0))
    snapshot = LoraFactors.snapshot(parameters, 1.0)
    before = snapshot.digest
    with torch.no_grad():
        next(iter(parameters.values()))[1].fill_(1.0)
    assert LoraFactors(snapshot.factors, 1.0).digest == before
    assert not any(t.requires_grad for pair in snapshot.factors.values() for t in pair)


@pytest.mark.parametrize("change", [{"rank_pattern": {"x": 1}}, {"bias": "all"}, {"peft_type": "LOHA"}])
def test_other_kinds_of_adapters_are_refused(adapters, tmp_path, change) -> None:
    adapters[0].save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match="not a plain LoRA"):
        LoraFactors.load(tmp_path)


def test_missing_and_damaged_adapter_files_are_named(adapters, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"lacks adapter_model\.safetensors or adapter_config\.json"):
        LoraFactors.load(tmp_path)
    adapters[0].save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UsageError, match="damaged"):
        LoraFactors.load(tmp_path)


# -- attaching -------------------------------------------------------------------------------------------------------


def test_the_model_is_as_before_after_the_context_and_after_an_exception(random_base, adapters, ids_BT) -> None:
    before, weights = logits(random_base, ids_BT), weights_digest(random_base.model)
    with pytest.raises(ZeroDivisionError), attached(random_base.model, adapters[0].factors):
        _ = 1 / 0
    assert all("forward" not in m.__dict__ for m in random_base.model.modules())
    assert torch.equal(logits(random_base, ids_BT), before)
    assert weights_digest(random_base.model) == weights == random_base.digest


def test_nothing_is_patched_when_one_name_is_wrong(random_base, adapters) -> None:
    factors = {
        **adapters[0].factors,
        "model.layers.9.self_attn.q_proj": adapters[0].factors["model.layers.0.self_attn.q_proj"],
    }
    with pytest.raises(UsageError, match=r"another model.*Did you mean"), attached(random_base.model, factors):
        pass
    assert all("forward" not in m.__dict__ for m in random_base.model.modules())


def test_shapes_that_do_not_fit_are_named(random_base) -> None:
    name = "model.layers.0.self_attn.v_proj"  # 64 -> 32
    with (
        pytest.raises(UsageError, match=r"does not fit layer .*v_proj \(64 -> 32\)"),
        attached(random_base.model, {name: (torch.zeros(2, 64), torch.zeros(64, 2))}),
    ):
        pass


def test_nested_contexts_add_up_and_unwind_one_by_one(random_base, adapters, ids_BT) -> None:
    one, two = adapters[:2]
    both = LoraFactors(
        {
            n: (torch.cat([one.factors[n][0], two.factors[n][0]]), torch.cat([one.factors[n][1], two.factors[n][1]], 1))
            for n in one.factors
        },
        2.0,
    )  # rank 4 + 4: the sum of both updates
    expected_one = logits(random_base, ids_BT, one.factors, 2.0)
    with attached(random_base.model, one.factors, 2.0):
        sum_of_both = logits(random_base, ids_BT, two.factors, 2.0)
        assert torch.equal(logits(random_base, ids_BT), expected_one)
    torch.testing.assert_close(sum_of_both, logits(random_base, ids_BT, both.factors, 2.0), atol=2e-4, rtol=1e-4)


def test_rows_may_repeat_in_blocks_and_select_moves_them(random_base, adapters, ids_BT) -> None:
    factors, scaling = stack(adapters)
    plain = logits(random_base, ids_BT, factors, scaling)
    blocks = logits(random_base, ids_BT.repeat_interleave(3, dim=0), factors, scaling)
    torch.testing.assert_close(blocks, plain.repeat_interleave(3, dim=0), atol=1e-4, rtol=1e-4)
    rows = torch.tensor([3, 1, 1])
    with torch.no_grad(), attached(random_base.model, factors, scaling) as select:
        select(rows)
        moved = random_base.model(input_ids=ids_BT[rows], use_cache=False).logits
    torch.testing.assert_close(moved, plain[rows], atol=1e-4, rtol=1e-4)


def test_a_batch_that_is_no_multiple_of_the_factors_is_refused(random_base, adapters, ids_BT) -> None:
    with pytest.raises(CotuneError, match="B a multiple of 4"):
        logits(random_base, ids_BT[:3], *stack(adapters))


def test_hugging_face_generate_runs_under_factors_per_row(random_base, adapters) -> None:
    """Left padding, KV cache and two samples a row, greedy so that both samples must equal the oracle."""
    prompts = [random_base.encode("abc" * n) for n in (1, 3, 2, 4)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    with attached(random_base.model, *stack(adapters)):
        out = random_base.model.generate(
            input_ids=ids.repeat_interleave(2, 0),
            attention_mask=(ids > 0).long().repeat_interleave(2, 0),
            do_sample=False,
            max_new_tokens=6,
            min_new_tokens=6,
            pad_token_id=0,
        )
    for row, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        expected, _, _ = decode_one(random_base.model, prompt, adapter.factors, adapter.scaling, set(), 6)
        assert out[2 * row, width:].tolist() == out[2 * row + 1, width:].tolist() == expected


# -- choosing layers, stacking, canary -------------------------------------------------------------------------------


def test_target_layers_by_last_part_by_name_and_all(random_base) -> None:
    q_and_v = target_linears(random_base.model, ["v_proj", "q_proj"])
    assert list(q_and_v) == [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1) for m in "qv"]
    assert list(target_linears(random_base.model, ["model.layers.1.mlp.up_proj"])) == ["model.layers.1.mlp.up_proj"]
    every = target_linears(random_base.model, "all-linear")
    assert len(every) == 2 * 7 and "lm_head" not in every
    assert all(isinstance(m, nn.Linear) for m in every.values())


def test_unknown_layers_and_ranks_too_large_are_usage_errors(random_base) -> None:
    with pytest.raises(UsageError, match=r"no linear layer 'query_proj'\. Did you mean 'q_proj'"):
        target_linears(random_base.model, ["v_proj", "query_proj"])
    with pytest.raises(UsageError, match=r"Rank 33 does not fit layer .*v_proj \(64 -> 32\); choose 1 to 32"):
        target_linears(random_base.model, ["q_proj", "v_proj"], rank=33)
    with pytest.raises(UsageError, match="Rank 0"):
        init_static(random_base.model, ["q_proj"], 0, torch.Generator())


def test_stack_shares_what_is_equal(random_base, adapters) -> None:
    assert stack([None, None]) == ({}, 1.0)
    factors, scaling = stack([adapters[0], random_adapter(random_base, 0)])  # equal content, two objects
    assert factors is adapters[0].factors and scaling == 2.0


def test_stack_pads_ranks_layers_and_scalings(random_base, ids_BT) -> None:
    rows = [
        random_adapter(random_base, 1, rank=2, scaling=0.5, targets=["q_proj"]),
        random_adapter(random_base, 2, rank=5, scaling=3.0, targets=["q_proj", "up_proj"]),
        None,
        random_adapter(random_base, 3, rank=1, scaling=1.0, targets=["down_proj"]),
    ]
    factors, scaling = stack(rows)
    assert scaling == 1.0 and all(a.shape[:2] == (4, 5) for a, _ in factors.values())
    got = logits(random_base, ids_BT, factors, scaling)
    for row, adapter in enumerate(rows):
        own = logits(random_base, ids_BT, adapter.factors if adapter else None, adapter.scaling if adapter else 1.0)
        torch.testing.assert_close(got[row], own[row], atol=1e-4, rtol=1e-4)


def test_factors_of_uneven_rank_are_refused() -> None:
    with pytest.raises(CotuneError, match=r"must be \[R, I\] and \[O, R\] with R = 2"):
        LoraFactors({"a": (torch.zeros(2, 4), torch.zeros(4, 2)), "b": (torch.zeros(3, 4), torch.zeros(4, 3))}, 1.0)
    with pytest.raises(CotuneError, match="at least one layer"):
        LoraFactors({}, 1.0)


def test_the_canary_stops_an_adapter_that_changes_nothing(random_model_dir, random_base, monkeypatch) -> None:
    base = load(str(random_model_dir))
    mlp = base.model.model.layers[0].mlp
    adapter = random_adapter(base, 0, targets=["model.layers.0.mlp.up_proj"])
    prompt = base.encode("hello")
    canary(base, adapter, prompt)  # works here

    def fused(x: Tensor) -> Tensor:  # as an optimised kernel would: the weights without the layers' forward
        gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
        return (functional.silu(gate) * up) @ mlp.down_proj.weight.T

    monkeypatch.setattr(mlp, "forward", fused)
    with pytest.raises(CotuneError, match="changes no log-probability"):
        canary(base, adapter, prompt)
    canary(base, LoraFactors.zero(base.model, "all-linear", 4), prompt)  # zero factors may change nothing


def test_the_canary_stops_factors_that_are_not_numbers(random_base) -> None:
    adapter = random_adapter(random_base, 0)
    next(iter(adapter.factors.values()))[1][0, 0] = torch.nan
    with pytest.raises(CotuneError, match="not numbers: training diverged"):
        canary(random_base, adapter, random_base.encode("hello"))


def test_bfloat16_models_take_float32_factors(random_model_dir, ids_BT) -> None:
    base = load(str(random_model_dir), dtype="bfloat16")
    adapter = random_adapter(base, 0)
    under = logits(base, ids_BT, adapter.factors, adapter.scaling)
    assert under.dtype == torch.bfloat16 and not torch.equal(under, logits(base, ids_BT))
    mixed = logits(base, ids_BT, *stack([adapter, None, adapter, None]))
    assert torch.equal(mixed[1], logits(base, ids_BT)[1])
