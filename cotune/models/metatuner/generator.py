"""MetaTuner's whole trained part, phi = {phi_s, phi_p, phi_q}, over one generator and one actor.

Ties the encoder, the prompt generator and the parameter decoder together and names their tensors. Knows nothing of
tasks, engines or training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from cotune.errors import CotuneError
from cotune.ledger import forward_flops
from cotune.models.base import BaseModel, hash_tensor
from cotune.models.likelihood import right_padded
from cotune.models.lora import LoraFactors, PendingLora
from cotune.models.metatuner.encoder import Pooling, hidden_after, latent, pool
from cotune.models.metatuner.lora_generator import LoraGenerator, Shapes
from cotune.models.metatuner.prompt_generator import PromptGenerator, Training

_ROWS = 32  # queries encoded at once; a result depends on it only in the last bits
_KEPT_BYTES = 256 * 2**20  # of adapters made last; with more at hand than fit, an adapter may be decoded again


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

    def pending_at(self, latents_BD: Tensor) -> list[PendingLora]:
        """The adapter of each latent, decoded when it is asked for; the last 256 MiB of them are kept.

        Bound to the weights as they are: raises CotuneError when they have been trained on since.
        """
        content, versions = hashlib.sha256(f"{self.scaling:.9g}".encode()), self._versions
        for name, parameter in sorted(self.adapters.named_parameters()):
            hash_tensor(content, name, parameter)
        device = latents_BD.device

        def make(i: int) -> LoraFactors:
            if self._versions != versions:
                raise CotuneError("The weights were trained on since this adapter was promised; condition again.")
            (adapter,) = self.adapters_at(latents_BD[i : i + 1])
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # its seconds are booked as those of adapters, not of answering
            return adapter

        kept = lru_cache(max(1, _KEPT_BYTES // self.adapter_bytes))(make)
        pending = []
        for i, latent_D in enumerate(latents_BD.cpu()):
            own = content.copy()
            hash_tensor(own, "latent", latent_D)
            pending.append(PendingLora(own.hexdigest()[:16], partial(kept, i)))
        return pending

    @property
    def _versions(self) -> list[int]:
        """Changes whenever a parameter of the decoder is written to."""
        return [p._version for p in self.adapters.parameters()]

    @property
    def adapter_bytes(self) -> int:
        """Of one query's adapter."""
        return self.adapters.factors_count * self.adapters.down_a.element_size()

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

    def encoding_flops(self, tokens: int) -> float:
        """Of turning queries of so many tokens together into latents: k of K layers."""
        return self.prompts.depth / self.prompts.layers * forward_flops(self.prompts.base.parameters_count, tokens)

    def decoding_flops(self, queries: int) -> float:
        """Of the parameter decoder, once for each query."""
        return forward_flops(self.adapters.work, queries)

    @property
    def sizes(self) -> dict[str, dict[str, int]]:
        """Parameters of each part, `trained` and in `total`: the encoder (phi_s and what it sits on), the prompt
        decoder (phi_p), the parameter decoder (phi_q), and without sharing the adapter branch's own encoder.
        """
        encoder, decoder = self.prompts.sizes
        own = sum(p.numel() for p in self.adapters.parameters())
        sizes = {"encoder": encoder, "prompt_decoder": decoder, "parameter_decoder": {"trained": own, "total": own}}
        return sizes if self.shares else sizes | {"adapter_encoder": self.encoder.sizes[0]}
