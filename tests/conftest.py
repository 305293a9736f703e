"""Fixtures that every test may use. Tests run offline and on one thread, so they measure cotune and nothing else."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub, which reads it once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cotune.models.base import BaseModel

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def random_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of about 90k random parameters with a byte-level tokenizer and ChatML, as real checkpoints are laid out.

    The weights are ten times larger than usual at the start of training: the next-token distributions are then
    peaked enough that greedy choices are no near-ties.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("random-model")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        chat_template=CHATML,
    )
    wrapped.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=vocabulary["<|im_end|>"],
        bos_token_id=None,
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_base(random_model_dir: Path) -> BaseModel:
    """The random model, loaded once. Tests that change anything about it load their own."""
    from cotune.models.base import load

    return load(str(random_model_dir))


def finished_run(out: Path, model: Path, strategy: str, tokens: int, **settings: object) -> Path:
    """A finished run on eight train, four val and two test examples of micro-gsm8k, through the command line."""
    from typer.testing import CliRunner

    from cotune.cli import app

    given = {"decoding.max_new_tokens": tokens} | {k.replace("__", "."): v for k, v in settings.items()}
    sets = [part for key, value in given.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    limits = ["--limit-train", "8", "--limit-val", "4", "--limit-test", "2"]
    args = ["--strategy", strategy, "--model", str(model), "--task", "micro-gsm8k", "--out", str(out)]
    result = CliRunner().invoke(app, ["run", *args, "--name", strategy, *limits, *sets])
    assert result.exit_code == 0, result.output
    return out / strategy


@pytest.fixture(scope="session")
def joint_run(tmp_path_factory: pytest.TempPathFactory, random_model_dir: Path) -> Path:
    return finished_run(
        tmp_path_factory.mktemp("joint"), random_model_dir, "joint", 4,
        joint__rank=2, joint__width=8, joint__generator_rank=2, joint__rollouts=2, joint__rollout_examples=4,
        joint__warmup_epochs=1, joint__epochs=1, joint__learning_rate=0.02, joint__max_prompt_tokens=6,
    )  # fmt: skip


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory, random_model_dir: Path) -> Path:
    """Its rate is high enough that a few steps change the completions."""
    return finished_run(
        tmp_path_factory.mktemp("lora"), random_model_dir, "lora-only", 12,
        weights__rank=2, weights__epochs=2, weights__learning_rate=0.05, weights__batch_size=4,
    )  # fmt: skip


@pytest.fixture(scope="session")
def lora_bundle(tmp_path_factory: pytest.TempPathFactory, lora_run: Path) -> Path:
    """For reading only; tests that change it copy it."""
    from cotune.export import export

    out = tmp_path_factory.mktemp("home") / "bundle"
    export(lora_run, out)
    return out
