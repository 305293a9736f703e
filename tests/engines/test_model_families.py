"""The same decoding loop and adapters on the architectures that users bring, random and small.

Sliding windows (Mistral, Gemma 2), soft-capped logits (Gemma 2), fused projections (Phi 3) and parallel blocks
(GPT-NeoX) go through the same code as Qwen2, and equal the loop without batch, padding or cache.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.dense_lora import decode_one
from transformers import AutoConfig, AutoModelForCausalLM

from cotune.engines.base import Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine
from cotune.models.base import BaseModel
from cotune.models.lora import LoraFactors, target_linears

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "gemma2": {"sliding_window": 12, "head_dim": 16},
    "phi3": {},
    "qwen3": {"head_dim": 16},
    "gpt_neox": {},
}


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, random_base: BaseModel) -> BaseModel:
    config = AutoConfig.for_model(
        request.param,
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=list(range(200, 220)),
        pad_token_id=0,
        **FAMILIES[request.param],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train(False).requires_grad_(False)
    return BaseModel(request.param, model, random_base.tokenizer, source="random", revision=None)


def test_a_mixed_batch_equals_the_oracle(base: BaseModel) -> None:
    def adapter(seed: int) -> LoraFactors:
        generator = torch.Generator().manual_seed(seed)
        factors = {
            name: (
                torch.randn(4, linear.in_features, generator=generator) / 8,
                torch.randn(linear.out_features, 4, generator=generator) * 0.1,
            )
            for name, linear in target_linears(base.model, "all-linear").items()
        }
        return LoraFactors(factors, 1.5)

    requests = [
        Request("the quick brown fox " * repeats + str(i), adapter(i) if i % 3 else None)
        for i, repeats in enumerate((1, 3, 2, 4, 1, 2))
    ]
    engine = TransformersEngine(base)
    results = engine.generate(requests, Sampling(20, logprobs=True))
    scores = engine.score(requests, [row[0].token_ids for row in results])
    for request, [completion], score in zip(requests, results, scores, strict=True):
        factors = request.adapter.factors if isinstance(request.adapter, LoraFactors) else {}
        tokens, logprobs, ended = decode_one(
            base.model, base.encode(request.prompt), factors, 1.5, set(base.end_of_turn_ids), 20
        )
        assert (list(completion.token_ids), completion.truncated) == (tokens, not ended)
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert score == pytest.approx(logprobs, abs=1e-4)
