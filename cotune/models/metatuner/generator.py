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
    """`scaling` is lambda, the factor of the generated update (LoRA's alpha / rank). Seeded by `seed` alone.

    Without `sharing` (the paper's ablation w/o S) the adapter branch reads from an encoder of its own: the same k
    layers of the same checkpoint, trained apart. The paper calls this k = 0; an encoder of no layers would see one
    token, so ours takes away the sharing and keeps the depth.
    """

    def __init__(
        self,
        generator: BaseModel,
        shapes: Shapes,
        *,
        share: float,
        sharing: bool,
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
        self.encoder = self.prompts
        if not sharing:
            self.encoder = PromptGenerator(generator, share, generator_training, generator_rank, rng)
        self.scaling = scaling
        self.pooling = pooling

    @property
    def shares(self) -> bool:
        """Whether both branches read from one encoder."""
        return self.encoder is self.prompts

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything trained: `shared/...` is phi_s, `prompt/...` phi_p, `lora/...` phi_q.

        Without sharing, `shared/...` is G's lower part alone, and `encoder/...` that of the adapter branch.
        """
        apart = {} if self.shares else {f"encoder/{n}": p for n, p in self.encoder.shared.items()}
        return (
            {f"shared/{n}": p for n, p in self.prompts.shared.items()}
            | {f"prompt/{n}": p for n, p in self.prompts.own.items()}
            | {f"lora/{n}": p for n, p in self.adapters.named_parameters()}
            | apart
        )

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every parameter from tensors named as in `parameters`; the frozen copy follows."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
        self.prompts.sync()

    @torch.no_grad()
    def latents(self, queries: Sequence[Sequence[int]]) -> Tensor:
        """h_i of each tokenized rewrite prompt, latent_BD, under the current encoder."""
        pooled, model = [], self.encoder.base.model
        with self.encoder.encoding():
            for i in range(0, len(queries), _ROWS):
                rows = queries[i : i + _ROWS]
                ids_BT = right_padded(rows, model.device)
                hidden_BTD = hidden_after(model, self.encoder.depth, ids_BT)
                pooled.append(pool(hidden_BTD, [len(row) for row in rows], self.pooling))
        return latent(torch.cat(pooled))

    @torch.no_grad()
    def generate_adapters(self, queries: Sequence[Sequence[int]]) -> list[LoraFactors]:
        """theta_i of each tokenized rewrite prompt, detached, one adapter per query."""
        return self.adapters_at(self.latents(queries))

    @torch.no_grad()
    def adapters_at(self, latents_BD: Tensor) -> list[LoraFactors]:
        """The parameter decoder's adapter of each latent, detached."""
        adapters = []
        for latent_BD in torch.split(latents_BD, _ROWS):
            factors = self.adapters(latent_BD)
            adapters += [
                LoraFactors({name: (a[i], b[i]) for name, (a, b) in factors.items()}, self.scaling)
                for i in range(len(latent_BD))
            ]
        return adapters

    def encoding_flops(self, tokens: int, queries: int) -> float:
        """Of turning queries of so many tokens together into adapters: k of K layers, then the parameter decoder."""
        share = self.prompts.depth / self.prompts.layers
        return share * forward_flops(self.prompts.base.parameters_count, tokens) + forward_flops(
            self.adapters.work, queries
        )
