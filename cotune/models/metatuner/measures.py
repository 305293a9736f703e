"""How large, how rich and how different generated adapters are, and what the encoding knows of its query.

For diagnostics alone: nothing is trained or chosen by these numbers.

Axes: N examples, R rank, I/O features in and out, D width of the latent, P penalties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cotune.models.lora import LoraFactors

_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # for latents of unit length


@torch.no_grad()
def weights_norm(model: nn.Module, names: Sequence[str]) -> float:
    """Frobenius norm of the named layers' weights taken together."""
    modules = dict(model.named_modules())
    weights = [modules[name].get_parameter("weight").float() for name in names]
    return float(torch.stack([weight.square().sum() for weight in weights]).sum().sqrt())


@torch.no_grad()
def adapter_measures(adapters: Sequence[LoraFactors], base_norm: float) -> dict[str, float]:
    """What the updates Delta W_i = scaling B_i A_i of N examples are like, all adapted layers taken together.

    `relative_norm`: mean over examples of ||Delta W_i|| / `base_norm` (Frobenius).
    `effective_rank`: exp of the entropy of the singular values of a layer's update (Roy and Vetterli 2007), mean over
    layers and examples; between 1 and R.
    `variation`: 1 - ||mean_i Delta W_i||^2 / mean_i ||Delta W_i||^2; 0 when all examples get the same update,
    (N - 1) / N when theirs have nothing in common.
    """
    inner_NN = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    ranks: list[Tensor] = []
    for name in adapters[0].factors:
        lora_a_NRI, lora_b_NOR = (torch.stack([a.factors[name][i].double().cpu() for a in adapters]) for i in (0, 1))
        # <B_i A_i, B_j A_j> = sum of (B_i' B_j) * (A_i A_j'): R x R per pair, never O x I
        left = torch.einsum("nor,mos->nmrs", lora_b_NOR, lora_b_NOR)
        right = torch.einsum("nri,msi->nmrs", lora_a_NRI, lora_a_NRI)
        inner_NN += adapters[0].scaling ** 2 * (left * right).sum((-1, -2))
        # singular values of B A are those of R_b R_a', the triangles of the QR decompositions of B and A'
        triangle_b_NRR, triangle_a_NRR = (
            torch.linalg.qr(x, mode="r").R for x in (lora_b_NOR, lora_a_NRI.transpose(1, 2))
        )
        values_NR = torch.linalg.svdvals(triangle_b_NRR @ triangle_a_NRR.transpose(1, 2))
        share_NR = values_NR / values_NR.sum(-1, keepdim=True).clamp(min=1e-300)
        ranks.append(torch.special.entr(share_NR).sum(-1).exp())
    squares_N = inner_NN.diagonal()
    mean_square = float(squares_N.mean())
    return {
        "relative_norm": float(squares_N.clamp(min=0).sqrt().mean()) / base_norm,
        "effective_rank": float(torch.stack(ranks).mean()),
        "variation": max(0.0, 1.0 - float(inner_NN.mean()) / mean_square) if mean_square else 0.0,
    }


def probe(latent_ND: Tensor, features: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """How well each feature of the examples can be read off their latents: R^2 of a ridge regression, leave-one-out.

    1 is perfect, 0 no better than the mean of the others. The best of a few penalties is reported, so a little above 0
    may be chance. None where a feature is the same for all examples.
    """
    x_ND = latent_ND.double().cpu()
    x_ND = x_ND - x_ND.mean(0)
    n = len(x_ND)
    found: dict[str, float | None] = {}
    for name, values in features.items():
        y_N = torch.tensor(values, dtype=torch.float64)
        null_N = (y_N - y_N.mean()) * n / (n - 1)  # residual of the mean of the others
        if not bool(null_N.abs().max() > 0):
            found[name] = None
            continue
        errors = []
        for penalty in _PENALTIES:
            inner = x_ND.T @ x_ND + penalty * torch.eye(x_ND.shape[1], dtype=torch.float64)
            hat_NN = torch.full((n, n), 1 / n, dtype=torch.float64) + x_ND @ torch.linalg.solve(inner, x_ND.T)
            residual_N = (y_N - hat_NN @ y_N) / (1 - hat_NN.diagonal())
            errors.append(float(residual_N.square().sum()))
        found[name] = 1 - min(errors) / float(null_N.square().sum())
    return found
