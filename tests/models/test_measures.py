"""Measures of generated adapters against dense matrices, and the probe against a regression done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cotune.models.lora import LoraFactors
from cotune.models.metatuner.measures import adapter_measures, probe, weights_norm


def adapter(seed: int, scaling: float = 0.5) -> LoraFactors:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"x": (7, 5), "y.z": (4, 6)}
    return LoraFactors(
        {n: (torch.randn(3, i, generator=rng), torch.randn(o, 3, generator=rng)) for n, (i, o) in shapes.items()},
        scaling,
    )


def test_measures_are_those_of_the_dense_updates() -> None:
    adapters = [adapter(s) for s in range(4)]
    dense = [{n: 0.5 * (b @ a).double() for n, (a, b) in x.factors.items()} for x in adapters]
    flat = torch.stack([torch.cat([w.flatten() for w in d.values()]) for d in dense])
    ranks = []
    for weight in (w for d in dense for w in d.values()):
        share = torch.linalg.svdvals(weight)[:3]
        share = share / share.sum()
        ranks.append(float((-(share * share.log()).sum()).exp()))
    found = adapter_measures(adapters, 2.0)
    assert found == {
        "relative_norm": pytest.approx(float(flat.norm(dim=1).mean()) / 2, rel=1e-5),
        "effective_rank": pytest.approx(sum(ranks) / len(ranks), rel=1e-5),
        "variation": pytest.approx(1 - float(flat.mean(0).square().sum() / flat.square().sum(1).mean()), rel=1e-5),
    }
    assert 1 < found["effective_rank"] < 3


def test_the_same_adapter_for_all_does_not_vary_and_rank_one_is_one() -> None:
    one = LoraFactors({"x": (torch.ones(2, 4), torch.ones(5, 2))}, 1.0)
    found = adapter_measures([one, one, one], 1.0)
    assert found["variation"] == pytest.approx(0, abs=1e-9) and found["effective_rank"] == pytest.approx(1, abs=1e-6)
    opposite = LoraFactors({"x": (-torch.ones(2, 4), torch.ones(5, 2))}, 1.0)
    assert adapter_measures([one, opposite], 1.0)["variation"] == pytest.approx(1)


def test_the_norm_of_the_weights_is_taken_over_all_named_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(1, 1))
    for layer, value in zip(model, (1.0, 2.0, 9.0), strict=True):
        nn.init.constant_(layer.weight, value)
    assert weights_norm(model, ["0", "1"]) == pytest.approx((4 * 1 + 2 * 4) ** 0.5)


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    rng = torch.Generator().manual_seed(0)
    latent = torch.randn(60, 5, generator=rng)
    linear = (latent @ torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5]) + 7).tolist()
    noise = torch.randn(60, generator=rng).tolist()
    found = probe(latent, {"linear": linear, "noise": noise, "constant": [3.0] * 60})
    assert found["linear"] is not None and found["linear"] > 0.999
    assert found["noise"] is not None and found["noise"] < 0.15
    assert found["constant"] is None


def test_leave_one_out_is_a_fit_without_each_example() -> None:
    rng = torch.Generator().manual_seed(1)
    latent, y = torch.randn(12, 3, generator=rng).double(), torch.randn(12, generator=rng).double()
    best = float("inf")
    for penalty in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        total = 0.0
        for i in range(12):
            keep = [j for j in range(12) if j != i]
            x = torch.cat([latent[keep], torch.ones(11, 1).double()], 1)
            weights = torch.linalg.solve(
                x.T @ x + torch.diag(torch.tensor([penalty] * 3 + [0.0]).double()), x.T @ y[keep]
            )
            total += float((y[i] - torch.cat([latent[i], torch.ones(1).double()]) @ weights) ** 2)
        best = min(best, total)
    null = sum(float((y[i] - (y.sum() - y[i]) / 11) ** 2) for i in range(12))
    assert probe(latent, {"y": y.tolist()})["y"] == pytest.approx(1 - best / null, rel=1e-4)
