"""The parameter decoder: from one vector per query to LoRA factors for every adapted layer of the actor.

MetaTuner (arXiv 2509.24245, sheet 02): theta^a = MM(ReLU(MM(W_d^a, h)), W_u^a), theta^b likewise. Knows nothing of
where h comes from or of the actor beyond the sizes of its layers.

Axes: B batch, L layers of one kind, D width of G, M width of the decoder, R rank, I/O features in and out,
F = R * I or O * R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cotune.models.lora import Factors

Shapes = Mapping[str, tuple[int, int]]
"""Module name of the actor -> (features in, features out)."""


def decode(latent_BD: Tensor, down_MD: Tensor, up_MF: Tensor, embedding_LM: Tensor) -> Tensor:
    """theta_BLF = MM(ReLU(MM(W_d, h_i)), W_u): one row of F numbers per query and layer (sheet 02, parameter decoder).

    Read as "row vector times W_u, then reshape" (the caller reshapes); with a column vector and no reshape the product
    would be a factor of rank 1. Layer l adds `embedding_LM[l]` before the ReLU, which is W_d acting on h_i with a
    one-hot layer index appended (ours, after DyPRAG); zero rows are the paper's formula as it stands.
    """
    code_BLM = torch.relu((latent_BD @ down_MD.T)[:, None, :] + embedding_LM)
    return code_BLM @ up_MF


class LoraGenerator(nn.Module):
    """F's own part, phi_q: h_i -> (lora_a [B, R, I], lora_b [B, O, R]) for each adapted layer.

    W_d^a and W_d^b are shared by all layers (the paper leaves it open). With `layer_embedding`, layers of one kind
    (same last part of the name, same shape) share W_u and are told apart by a learned embedding; without, each layer
    has its own W_u and phi_q has 2 m d + m r sum_l (in_l + out_l) numbers.

    At the start (ours): W_u^b = 0, so the update is exactly zero; lora_a has the spread of PEFT's own initialisation,
    1 / sqrt(3 I), for h_i of unit length; W_d and the embeddings have standard deviation 1 / sqrt(D).
    """

    def __init__(
        self, shapes: Shapes, latent_size: int, width: int, rank: int, layer_embedding: bool, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.rank = rank
        self.kinds: dict[str, list[str]] = {}  # kind -> its modules; a parameter's name may not hold a dot
        for name, (features_in, features_out) in shapes.items():
            kind = f"{name.rpartition('.')[2]}:{features_in}:{features_out}" if layer_embedding else name
            self.kinds.setdefault(kind.replace(".", ":"), []).append(name)
        spread = 1 / math.sqrt(latent_size)

        def normal(*size: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=rng) * std)

        self.down_a = normal(width, latent_size, std=spread)
        self.down_b = normal(width, latent_size, std=spread)
        self.up_a, self.up_b = nn.ParameterDict(), nn.ParameterDict()
        self.embedding_a, self.embedding_b = nn.ParameterDict(), nn.ParameterDict()
        for kind, names in self.kinds.items():
            features_in, features_out = shapes[names[0]]
            # E[ReLU(x)^2] is half the variance of x: 1/D from W_d h, as much again from the embedding.
            squares = width * spread**2 * (1.0 if layer_embedding else 0.5)
            self.up_a[kind] = normal(width, rank * features_in, std=1 / math.sqrt(3 * features_in * squares))
            self.up_b[kind] = nn.Parameter(torch.zeros(width, features_out * rank))
            if layer_embedding:
                self.embedding_a[kind] = normal(len(names), width, std=spread)
                self.embedding_b[kind] = normal(len(names), width, std=spread)

    def forward(self, latent_BD: Tensor) -> Factors:
        """Differentiable factors per row, as `attached` takes them."""
        factors = {}
        rows, none = latent_BD.shape[0], latent_BD.new_zeros(1, self.down_a.shape[0])
        for kind, names in self.kinds.items():
            embedding_a, embedding_b = (e.get(kind, none) for e in (self.embedding_a, self.embedding_b))
            theta_a_BLF = decode(latent_BD, self.down_a, self.up_a[kind], embedding_a)
            theta_b_BLF = decode(latent_BD, self.down_b, self.up_b[kind], embedding_b)
            lora_a_BLRI = theta_a_BLF.view(rows, len(names), self.rank, -1)
            lora_b_BLOR = theta_b_BLF.view(rows, len(names), -1, self.rank)
            for name, lora_a, lora_b in zip(names, lora_a_BLRI.unbind(1), lora_b_BLOR.unbind(1), strict=True):
                factors[name] = (lora_a, lora_b)
        return factors

    @property
    def is_zero(self) -> bool:
        """Whether every update is zero whatever h_i is, as before any training."""
        return not any(bool(self.up_a[k].any()) and bool(self.up_b[k].any()) for k in self.kinds)

    @property
    def factors_count(self) -> int:
        """Numbers in one query's adapter."""
        ups = ((len(names), kind) for kind, names in self.kinds.items())
        return sum(n * (self.up_a[kind].shape[1] + self.up_b[kind].shape[1]) for n, kind in ups)

    @property
    def work(self) -> int:
        """Multiplications per query: each W_d once, each W_u once for every layer that uses it."""
        work: int = self.down_a.numel() + self.down_b.numel()
        for kind, names in self.kinds.items():
            work += len(names) * (self.up_a[kind].numel() + self.up_b[kind].numel())
        return work
