"""MetaTuner's whole trained part, phi = {phi_s, phi_p, phi_q}, over one generator and one actor.

Ties the encoder, the prompt generator and the parameter decoder together and names their tensors. Knows nothing of
tasks, engines or training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cotune.ledger import forward_flops
from cotune.models.base import BaseModel
from cotune.models.likelihood import right_padded
from cotune.models.lora import LoraFactors
from cotune.models.metatuner.encoder import Pooling, hidden_after, latent, pool
from cotune.models.metatuner.lora_generator import LoraGenerator, Shapes
from cotune.models.metatuner.prompt_generator import PromptGenerator, Training

_ROWS = 32  # queries encoded at once; a result depends on it only in the last bits


class MetaTuner:
    """`scaling` is lambda, the factor of the generated update (LoRA's alpha / rank). Seeded by `seed` alone."""

    def __init__(
        self,
        generator: BaseModel,
        shapes: Shapes,
        *,
        share: float,
        generator_training: Training,
        generator_rank: int,
        rank: int,
        scaling: float,
        width: int,
        pooling: Pooling,
        layer_embedding: bool,
        seed: int,
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.prompts = PromptGenerator(generator, share, generator_training, generator_rank, rng)
        size = int(generator.model.config.get_text_config().hidden_size)
        self.adapters = LoraGenerator(shapes, size, width, rank, layer_embedding, rng).to(generator.model.device)
        self.scaling = scaling
        self.pooling = pooling

    @property
    def base(self) -> BaseModel:
        """The network that G computes with."""
        return self.prompts.base

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything trained: `shared/...` is phi_s, `prompt/...` phi_p, `lora/...` phi_q."""
        return (
            {f"shared/{n}": p for n, p in self.prompts.shared.items()}
            | {f"prompt/{n}": p for n, p in self.prompts.own.items()}
            | {f"lora/{n}": p for n, p in self.adapters.named_parameters()}
        )

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every parameter from tensors named as in `parameters`; the frozen copy follows."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
        self.prompts.sync()

    @torch.no_grad()
    def latents(self, queries: Sequence[Sequence[int]]) -> Tensor:
        """h_i of each tokenized rewrite prompt, latent_BD, under the current phi_s."""
        pooled = []
        with self.prompts.encoding():
            for i in range(0, len(queries), _ROWS):
                rows = queries[i : i + _ROWS]
                ids_BT = right_padded(rows, self.base.model.device)
                hidden_BTD = hidden_after(self.base.model, self.prompts.depth, ids_BT)
                pooled.append(pool(hidden_BTD, [len(row) for row in rows], self.pooling))
        return latent(torch.cat(pooled))

    @torch.no_grad()
    def generate_adapters(self, queries: Sequence[Sequence[int]]) -> list[LoraFactors]:
        """theta_i of each tokenized rewrite prompt, detached, one adapter per query."""
        adapters = []
        for latent_BD in torch.split(self.latents(queries), _ROWS):
            factors = self.adapters(latent_BD)
            adapters += [
                LoraFactors({name: (a[i], b[i]) for name, (a, b) in factors.items()}, self.scaling)
                for i in range(len(latent_BD))
            ]
        return adapters

    def encoding_flops(self, tokens: int, queries: int) -> float:
        """Of turning queries of so many tokens together into adapters: k of K layers, then the parameter decoder."""
        share = self.prompts.depth / self.prompts.layers
        return share * forward_flops(self.base.parameters_count, tokens) + forward_flops(self.adapters.work, queries)
