"""Gradient checkpointing: a decoder layer keeps its input alone and computes the rest again in the backward pass.

Knows nothing of adapters: it remembers every `forward` that someone (`attached`) has put on a module of the layer, and
the backward pass, which runs when those contexts are long left, finds them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from cotune.errors import UsageError

Forward = Callable[..., Any]


@contextmanager
def checkpointed(*models: nn.Module) -> Iterator[None]:
    """Graphs built within this context hold one input per layer of `models`; same losses and gradients, bit for bit.

    Costs one more forward pass in each backward pass (also in a second one through a kept graph). Acts in eval mode
    too, where transformers' own switch does nothing, on the layers that transformers itself would checkpoint; these
    must not draw random numbers (no dropout). Raises UsageError for a model without such layers.
    """
    layers: dict[nn.Module, None] = {}  # G and M may be one model
    for model in models:
        found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not found:
            raise UsageError(
                f"{type(model).__name__} has no layers that can be checkpointed; "
                "leave runner.gradient_checkpointing off."
            )
        layers |= dict.fromkeys(found)
    with _forwards(list(layers), [_recomputing(layer) for layer in layers]):
        yield


def _recomputing(layer: nn.Module) -> Forward:
    """The layer's forward, to be called again in the backward pass with the modules below as they are at the call."""
    forward: Forward = layer.forward
    below = [module for module in layer.modules() if module is not layer]

    def call(*args: Any, **kwargs: Any) -> Any:
        now = [module.__dict__.get("forward") for module in below]

        def run(*args: Any, **kwargs: Any) -> Any:
            with _forwards(below, now):
                return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return call


@contextmanager
def _forwards(modules: Sequence[nn.Module], forwards: Sequence[Forward | None]) -> Iterator[None]:
    """Give each module a forward of its own (None: its class's) inside this context."""
    kept = [module.__dict__.get("forward") for module in modules]
    _put(modules, forwards)
    try:
        yield
    finally:
        _put(modules, kept)


def _put(modules: Sequence[nn.Module], forwards: Sequence[Forward | None]) -> None:
    for module, forward in zip(modules, forwards, strict=True):
        if forward:
            module.__dict__["forward"] = forward
        else:
            module.__dict__.pop("forward", None)
