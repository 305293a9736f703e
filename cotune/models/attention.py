"""Attention for decoding on a CPU when several query heads share a key head (grouped-query attention).

Transformers copies every key and value once per query head wherever there is a mask; with hundreds of rows that copy is
most of a decoding step. torch's kernel reads them shared, to the same bits. Knows nothing of engines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GROUPED = "sdpa_grouped"


def grouped(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """attended_BTHD: transformers' `sdpa`, without the copies where that is possible (G key heads, H query heads)."""
    shared = query_BHTD.shape[1] != key_BGSD.shape[1] and query_BHTD.device.type == "cpu"
    special = any(more.get(name) is not None for name in ("position_bias", "cache"))
    if not shared or special or attention_mask is None or torch.is_grad_enabled():
        return sdpa_attention_forward(module, query_BHTD, key_BGSD, value_BGSD, attention_mask, scaling=scaling, **more)
    attended_BHTD = functional.scaled_dot_product_attention(
        query_BHTD, key_BGSD, value_BGSD, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return attended_BHTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def share_keys(model: PreTrainedModel) -> None:
    """Let a model that uses transformers' `sdpa` use `grouped` instead."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)
