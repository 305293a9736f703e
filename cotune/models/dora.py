"""DoRA's magnitudes: the length of each row of an adapted weight is a parameter of its own.

DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv 2402.09353), eq. 5. Knows nothing of adapters, files
or of how layers get their terms (models/lora.py).

Axes: B rows of a batch, T tokens, R rank, I/O features in and out of one linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@torch.no_grad()
def column_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """||W + scaling * B A||_c of eq. 5: [O], or [B, O] for factors per row; in float32 or wider.

    The paper's columns are the rows of PyTorch's weight [O, I], one per output, as in PEFT. No gradient flows through
    it (section 4.3). From ||w + s b A||^2 = ||w||^2 + 2 s b (A w) + s^2 b (A A^T) b^T for each row w with its b [R], so
    that the dense update is never built (ours; the same number up to rounding).
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    lora_a, lora_b = lora_a.to(weight), lora_b.to(weight)
    mixed = (lora_b * (lora_a @ weight.T).mT).sum(-1)
    update = (lora_b @ (lora_a @ lora_a.mT) * lora_b).sum(-1)
    return (weight.square().sum(-1) + 2 * scaling * mixed + scaling**2 * update).clamp(min=0).sqrt()


@dataclass
class Gain:
    """What eq. 5 multiplies each output by, m / ||W + scaling * B A||_c: `magnitude` and `norm` are [O] or [B, O].

    A NaN in a magnitude per row stands for none: that row keeps the length it has, bit for bit. `bias` is the layer's
    own; it is not scaled (as in PEFT).
    """

    magnitude: Tensor
    norm: Tensor
    bias: Tensor | None

    def select(self, rows: Tensor) -> None:
        if self.magnitude.dim() == 2:
            self.magnitude, self.norm = self.magnitude[rows], self.norm[rows]

    def times(self, y: Tensor) -> Tensor:
        """(W + scaling * B A) x + bias, [..., O] or [B * n, T, O] -> the same with every output but the bias scaled.

        A weight row of zeros has no direction to scale: it yields magnitude 0 and stays at its bias (ours; PEFT: NaN).
        """
        gain = self.magnitude / self.norm.where(self.norm > 0, 1.0)
        if gain.dim() == 2:
            gain = gain.where(~self.magnitude.isnan(), 1.0)[:, None]
        gain = gain.to(y.dtype)
        scaled = y.reshape(-1, y.shape[-1]) if gain.dim() == 1 else y.reshape(gain.shape[0], -1, y.shape[-1])
        scaled = scaled * gain
        if self.bias is not None:
            scaled = scaled + self.bias * (1 - gain)
        return scaled.view_as(y)
