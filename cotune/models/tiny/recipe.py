"""How the shipped tiny models are made: tokenizer, architecture, training. Run it with

    python -m cotune.models.tiny.recipe --size tiny --out FOLDER

Seeded; the same machine, library versions and thread count give the same weights. Knows the corpus as an iterator of
chats only. What it did is written next to the weights (recipe.json).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

from cotune.models.tiny.corpus import Chat, chats
from cotune.models.tiny.tokenizer import CONTEXT, train_tokenizer


@dataclass(frozen=True)
class Cycle:
    """One rise and fall of the learning rate, with fresh optimizers; at its end the weights are rounded to `store`.

    `lessons` are read in order: a name of corpus.MIXTURES, and so many tokens of it (prompts included).
    """

    learning_rate: float
    lessons: tuple[tuple[str, int], ...]
    warmup: int = 200_000  # tokens

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.lessons)


@dataclass(frozen=True)
class Recipe:
    """All settings."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    cycles: tuple[Cycle, ...]
    store: str = "float32"  # dtype of the saved weights
    autocast: bool = False  # matrix products in bfloat16; weights and optimizer state stay float32
    vocab_size: int = 1024
    tokenizer_chats: int = 20_000
    tokens_per_batch: int = 2048
    max_chat_tokens: int = 640
    weight_decay: float = 0.05
    prompt_loss: float = 0.05  # weight of the tokens outside of assistant turns
    seed: int = 0


ROPE_THETA = 10_000.0
RECIPES = {
    "tiny": Recipe(
        128, 4, 4, 2, 384,
        cycles=(
            Cycle(3e-3, (("reading", 2_500_000), ("mixture", 8_500_000))),
            Cycle(1.2e-3, (("finish", 3_000_000),)),
        ),
    ),
    "tiny-4m": Recipe(
        256, 5, 4, 2, 704,
        cycles=(
            Cycle(2e-3, (("reading", 1_400_000), ("mixture", 2_900_000))),
            Cycle(1e-3, (("finish", 900_000),)),
            Cycle(1.5e-3, (("mixture", 5_500_000), ("finish", 1_500_000))),
        ),
        store="bfloat16", autocast=True,
    ),
}  # fmt: skip


def encode(tokenizer: PreTrainedTokenizerFast, chat: Chat, prompt_loss: float) -> tuple[list[int], list[float]]:
    """Token ids and the loss weight of each: 1 in assistant turns and their ends, `prompt_loss` elsewhere."""
    ids: list[int] = []
    weights: list[float] = []
    for message in chat:
        parts = [(f"<|im_start|>{message['role']}\n", False), (f"{message['content']}<|im_end|>", True), ("\n", False)]
        for text, content in parts:
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            weights += [1.0 if content and message["role"] == "assistant" else prompt_loss] * len(piece)
    return ids, weights


def batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, chats: Iterator[Chat], seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless right-padded batches (ids [B, T], loss weights [B, T]) of chats of similar length."""
    rng = random.Random(f"batches/{seed}")
    while True:
        encoded = [encode(tokenizer, chat, recipe.prompt_loss) for chat in islice(chats, 1024)]
        encoded = sorted((e for e in encoded if len(e[0]) <= recipe.max_chat_tokens), key=lambda e: len(e[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for pair in encoded:
            if (len(groups[-1]) + 1) * len(pair[0]) > recipe.tokens_per_batch:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            pad = int(tokenizer.pad_token_id or 0)
            ids = torch.tensor([i + [pad] * (longest - len(i)) for i, _ in group])
            weights = torch.tensor([w + [0.0] * (longest - len(w)) for _, w in group])
            yield ids, weights


def learning_rate(cycle: Cycle, read: int) -> float:
    """Linear up over the warm-up, then linear down to zero; `read` counts tokens of this cycle."""
    left = (cycle.tokens - read) / (cycle.tokens - cycle.warmup)
    return cycle.learning_rate * max(0.0, min(read / cycle.warmup, left))


def reading(recipe: Recipe, number: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of all lessons of cycle `number`, in order."""
    before = sum(len(cycle.lessons) for cycle in recipe.cycles[:number])
    for lesson, (name, tokens) in enumerate(recipe.cycles[number].lessons, start=before):
        read = 0
        for ids, weights in batches(tokenizer, recipe, chats(name, recipe.seed + lesson), recipe.seed):
            yield ids, weights
            read += int((weights > 0).sum())
            if read >= tokens:
                break


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    look_back(model.model.layers[0].self_attn, ROPE_THETA)
    return model


@torch.no_grad()
def look_back(attention: Any, theta: float, strength: float = 5.0) -> None:
    """Let head h of a layer begin by attending h + 1 tokens back, whatever the tokens are.

    Rotary attention of the biases alone scores distance n as the sum over frequencies of cos((n - h - 1) frequency),
    which is largest at n = h + 1. Without this start, finding "the town of X is" among like sentences took more tokens
    than we could spend: it needs both who was named some words back and a match on it, and neither helps alone.
    """
    size = attention.head_dim
    frequencies = theta ** -(torch.arange(size // 2) * 2 / size)
    keys, queries = attention.k_proj.bias.view(-1, size), attention.q_proj.bias.view(-1, size)
    keys[:, : size // 2] = strength
    for head, query in enumerate(queries):
        angle = (head + 1) * frequencies
        query.copy_(strength * torch.cat([angle.cos(), -angle.sin()]))


def train(model: Any, recipe: Recipe, number: int, tokenizer: PreTrainedTokenizerFast, out: Path) -> float:
    """One cycle; the mean assistant-token loss over the last 5% of its tokens.

    Every 500 steps the model as it stands is written to `out`, so that an interrupted run leaves something to look at.
    """
    cycle = recipe.cycles[number]
    # Muon for the matrices of the layers reaches a given loss in fewer tokens than AdamW alone; AdamW for the rest.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    read, started = 0, time.monotonic()
    recent: list[float] = []
    last: list[float] = []
    for step, (ids, weights) in enumerate(reading(recipe, number, tokenizer), start=1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(cycle, read)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # causal: padding on the right needs no mask
        losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        targets = weights[:, 1:].flatten()
        loss: Any = (losses * targets).sum() / targets.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        recent.append(losses.detach()[targets == 1.0].mean().item())
        if read > 0.95 * cycle.tokens:
            last.append(recent[-1])
        read += int((weights > 0).sum())
        if step % 200 == 0:
            speed = read / (time.monotonic() - started)
            print(f"step {step} tokens {read} loss {sum(recent) / 200:.4f} {speed:.0f} tokens/s", file=sys.stderr)
            recent = []
        if step % 500 == 0:
            save(model, tokenizer, out)
    return sum(last) / len(last)


def save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path, dtype: str = "float32") -> None:
    """A Hugging Face model folder; weights rounded to `dtype` load into float32 without further loss."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    kept = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in kept.items()}
    model.save_pretrained(out, state_dict=rounded)
    tokenizer.save_pretrained(out)


def make(recipe: Recipe, out: Path, begun: Path | None = None) -> None:
    """Train from nothing and write a Hugging Face model folder plus recipe.json.

    `begun` is a folder in which the first cycles are done: the result is the same, because a cycle takes nothing from
    the one before it but the stored weights.
    """
    texts = [m["content"] for chat in islice(chats("mixture", recipe.seed + 9), recipe.tokenizer_chats) for m in chat]
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    model = make_model(recipe, tokenizer)
    first, minutes = 0, 0.0
    if begun is not None:
        notes = json.loads((begun / "recipe.json").read_text())
        first, minutes = notes["cycles_done"], notes["minutes"]
        model = AutoModelForCausalLM.from_pretrained(begun, dtype=torch.float32)
    for number in range(first, len(recipe.cycles)):
        started = time.monotonic()
        loss = train(model, recipe, number, tokenizer, out)
        minutes += (time.monotonic() - started) / 60
        save(model, tokenizer, out, recipe.store)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        notes = {
            "recipe": asdict(recipe),
            "cycles_done": number + 1,
            "parameters": sum(p.numel() for p in model.parameters()),
            "final_loss": round(loss, 4),
            "minutes": round(minutes, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        (out / "recipe.json").write_text(json.dumps(notes, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny model from nothing.")
    parser.add_argument("--size", choices=sorted(RECIPES), default="tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--begun", type=Path, help="go on from a folder in which the first cycles are done")
    given = parser.parse_args()
    torch.set_num_threads(1)  # small matrices: more threads are slower
    make(RECIPES[given.size], given.out, given.begun)


if __name__ == "__main__":
    main()
