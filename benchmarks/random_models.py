"""Qwen2 models of known shapes with random weights: speed and memory do not depend on what a model knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from cotune.models.attention import share_keys
from cotune.models.base import BaseModel


class Shape(NamedTuple):
    """`spread` is the standard deviation of the weights: 0.1 keeps greedy choices of small models from near-ties."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int
    tied: bool = True
    spread: float = 0.1


SHAPES = {
    "tiny": Shape(128, 4, 4, 2, 384, 1024),  # 1M parameters, as the packaged tiny model
    "105m": Shape(768, 12, 12, 12, 2048, 26_000),
    "qwen2.5-3b-shape": Shape(2048, 36, 16, 2, 11_008, 151_936, spread=0.02),
    "qwen2.5-7b-shape": Shape(3584, 28, 28, 4, 18_944, 152_064, tied=False, spread=0.02),
}


def random_model(shape: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> BaseModel:
    """Made on `device`; its tokenizer has one token per byte and no end of turn."""
    s = SHAPES[shape]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    config = Qwen2Config(
        vocab_size=s.vocabulary,
        hidden_size=s.hidden,
        intermediate_size=s.width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=s.tied,
        initializer_range=s.spread,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    share_keys(model)  # as `load` does
    return BaseModel(shape, model.train(False).requires_grad_(False), wrapped, source="random", revision=None)
