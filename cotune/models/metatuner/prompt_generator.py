"""G, the network that rewrites the instruction for each query, and which part of it is trained.

phi_s lives in the first k decoder layers (the encoder, shared with the adapter branch), phi_p in the rest (the prompt
decoder), and phi_p' is phi_p's frozen copy (sheet 02). The checkpoint that G starts from is never changed. Knows
nothing of tasks or of how texts are sampled.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from cotune.models.base import BaseModel, hash_tensor
from cotune.models.lora import Factors, LoraFactors, attached, init_static
from cotune.models.metatuner.encoder import decoder_layers, shared_depth

Training = Literal["full", "lora"]
LORA_SCALING = 2.0  # alpha = 2 * rank, as BetterTogether's LoRA has it; ours for G


@dataclass(frozen=True)
class Rewriter:
    """G as an engine takes it: a model, an adapter on it, and a `version` that changes with the model's own weights."""

    base: BaseModel
    adapter: LoraFactors | None
    version: str


class PromptGenerator:
    """G_(phi_s, phi_p). `shared` and `own` are the trained tensors phi_s and phi_p by name, `frozen` is phi_p'.

    training "lora" (default): both are LoRA factors on G's linear layers, and the network itself is `base`'s, shared
    with whoever else uses it. "full": they are the weights of a copy of the network; the token embedding and a head
    tied to it stay fixed, because they would belong to both parts (ours).
    """

    def __init__(self, base: BaseModel, share: float, training: Training, rank: int, rng: torch.Generator) -> None:
        prefix, layers = decoder_layers(base.model)
        self.training = training
        self.layers, self.depth = len(layers), shared_depth(share, len(layers))
        self._below = below = tuple(f"{prefix}.{i}." for i in range(self.depth))
        self._modules: list[str] = []
        if training == "lora":
            self.base = base
            parameters: dict[str, nn.Parameter] = {}
            for module, (lora_a, lora_b) in init_static(base.model, "all-linear", rank, rng).items():
                self._modules.append(module)
                parameters |= {f"{module}.lora_a": lora_a, f"{module}.lora_b": lora_b}
        else:
            self.base = replace(base, model=copy.deepcopy(base.model), folder=None)
            embedding = self.base.model.get_input_embeddings().weight
            parameters = {n: p for n, p in self.base.model.named_parameters() if p is not embedding}
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self.shared = {n: p for n, p in parameters.items() if n.startswith(below)}
        self.own = {n: p for n, p in parameters.items() if not n.startswith(below)}
        self.frozen = {n: p.detach().clone() for n, p in self.own.items()}

    @property
    def sizes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Parameters of the encoder and of the prompt decoder, `trained` and in `total`.

        The token embedding counts with the encoder, a head of its own with the decoder; LoRA factors are added to the
        network they sit on.
        """
        embedding = self.base.model.get_input_embeddings().weight
        named = self.base.model.named_parameters()
        below = sum(p.numel() for n, p in named if p is embedding or n.startswith(self._below))
        shared, own = (sum(p.numel() for p in part.values()) for part in (self.shared, self.own))
        beside = self.training == "lora"
        above = self.base.parameters_count - below
        return (
            {"trained": shared, "total": below + beside * shared},
            {"trained": own, "total": above + beside * own},
        )

    @torch.no_grad()
    def sync(self) -> None:
        """phi_p' <- phi_p."""
        for name, tensor in self.frozen.items():
            tensor.copy_(self.own[name])

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Within this context `base.model` computes G_(phi_s, phi_p), differentiable in both."""
        with attached(self.base.model, self._factors(self.shared | self.own), LORA_SCALING):
            yield

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Within this context the first k layers are the encoder; those above it are as they were."""
        with attached(self.base.model, self._factors(self.shared), LORA_SCALING):
            yield

    @contextmanager
    def rewriter(self, frozen: bool = False) -> Iterator[Rewriter]:
        """G_(phi_s, phi_p), or with `frozen` G_(phi_s, phi_p'), to generate with inside this context."""
        own: Mapping[str, Tensor] = self.frozen if frozen else self.own
        if self.training == "lora":
            adapter = LoraFactors.snapshot(self._factors(self.shared | dict(own)), LORA_SCALING)
            yield Rewriter(self.base, None if adapter.is_zero else adapter, "")
            return
        content = hashlib.sha256()
        for name, tensor in sorted((self.shared | dict(own)).items()):
            hash_tensor(content, name, tensor)
        with _replaced(self.own, self.frozen) if frozen else nullcontext():
            yield Rewriter(self.base, None, content.hexdigest()[:16])

    def _factors(self, tensors: Mapping[str, Tensor]) -> Factors:
        return {
            module: (tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"])
            for module in self._modules
            if f"{module}.lora_a" in tensors
        }


@contextmanager
def _replaced(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters other values inside this context."""
    kept = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]
