"""The meta encoder: the first k decoder layers of G, and the one vector per query that they give.

Reads hidden states through a hook, so it works for any decoder of the Hugging Face library and copies none of its code.
Knows nothing of prompts, adapters or losses.

Axes: B batch, T tokens, D width of G.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotune.errors import UsageError

Pooling = Literal["last", "mean"]


def shared_depth(share: float, layers: int) -> int:
    """k = max(1, round(share * K)), at most K - 1 so that the prompt decoder keeps a layer (K = 1: k = 1).

    MetaTuner, "first k decoder layers of G" (sheet 02): best k is K/4 for a 7B generator, 3K/4 for a 3B one.
    """
    return max(1, min(round(share * layers), layers - 1))


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(module name, list) of G's decoder layers. Raises UsageError for a model that is not built as a stack."""
    decoder: Any = getattr(model, "get_decoder", lambda: None)()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UsageError(
            f"{type(model).__name__} has no list of decoder layers to share; choose another --generator, "
            "for example a Qwen, Llama or Mistral model."
        )
    return next(name for name, module in model.named_modules() if module is layers), layers


class _Reached(Exception):
    """Layer k has run; what follows is not needed."""


class Seam(NamedTuple):
    """One tensor on its way out of the encoder, as it was `made` and as it is `read`: the same values, and the gradient
    of `read` is what its readers send back, apart from what others who read `made` do.
    """

    made: Tensor
    read: Tensor

    @classmethod
    def at(cls, made: Tensor) -> Seam:
        return cls(made, made.view_as(made))


@contextmanager
def tapped(model: nn.Module, depth: int, stop: bool = False) -> Iterator[list[Seam]]:
    """Collect hidden_BTD after layer `depth` (1-based) of each forward pass, `read` by the layers above it; `stop` ends
    the pass there.
    """
    caught: list[Seam] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden_BTD, *others = output if isinstance(output, tuple) else (output,)
        caught.append(Seam.at(hidden_BTD))
        if stop:
            raise _Reached
        return (caught[-1].read, *others) if isinstance(output, tuple) else caught[-1].read

    handle = decoder_layers(model)[1][depth - 1].register_forward_hook(catch)
    try:
        yield caught
    except _Reached:
        pass
    finally:
        handle.remove()


def hidden_after(model: nn.Module, depth: int, ids_BT: Tensor) -> Tensor:
    """hidden_BTD after layer `depth` of right-padded rows; the layers above it do not run."""
    with tapped(model, depth, stop=True) as caught:
        model(input_ids=ids_BT, use_cache=False)
    return caught[0].made


def pool(hidden_BTD: Tensor, lengths: Sequence[int], pooling: Pooling) -> Tensor:
    """One state per query, pooled_BD: that of the last of the first `lengths[b]` tokens, or their mean.

    Tokens are right-padded, so with causal attention what stands behind them (the prompt that G is trained to write)
    has no influence. Sheet 02 leaves pooling open; "last" is its suggestion for cotune.
    """
    length_B = torch.tensor(lengths, device=hidden_BTD.device)
    if pooling == "last":
        return hidden_BTD[torch.arange(len(lengths), device=hidden_BTD.device), length_B - 1]
    inside_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) < length_B[:, None]
    return (hidden_BTD * inside_BT[..., None].to(hidden_BTD)).sum(1) / length_B[:, None].to(hidden_BTD)


def latent(pooled_BD: Tensor) -> Tensor:
    """h_i: the pooled state in float32, scaled to unit length.

    Scaling is ours (the paper feeds the hidden state itself): the size of a residual stream differs by orders of
    magnitude between models, and the learning rate of everything behind h_i would have to follow it.
    """
    return functional.normalize(pooled_BD.float(), dim=-1, eps=1e-6)
