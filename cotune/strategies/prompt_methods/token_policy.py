"""A policy that writes token prompts: a small network between the states of the frozen model and its frozen head.

RLPrompt (sheet 10, items 2, 3). The paper's model is distilgpt2, whatever answers; here it is the run's generator, by
default the one that answers (ours), read without any adapter. Knows nothing of scores, losses or tasks.

Axes: B prompts, T their tokens, D width of the model, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from cotune.models.base import BaseModel
from cotune.proposers.filters import unreadable


@dataclass(frozen=True, eq=False)
class Written:
    """Prompts: `tokens_BT`, and `states_BTD`, what the model's head would have read before each of them."""

    tokens_BT: Tensor
    states_BTD: Tensor


class TokenPolicy:
    """Q values of the next token are head(network(state)); `target` is a second network, a slower copy.

    Reads one constant token, then what it has written (paper). That token is the beginning of a text, or its end where
    the tokenizer has none (ours). Special tokens, and those that are no readable text alone, are never written (ours:
    such prompts would be rejected).
    """

    def __init__(self, base: BaseModel, hidden: int, seed: int) -> None:
        """Both layers near zero, so that all tokens are about equally likely (paper; the gain of 1e-4 is ours)."""
        self._base = base
        self._head: nn.Linear = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        width = self._head.weight.shape[1]
        inner, outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.network = nn.Sequential(inner, nn.ReLU(), outer)
        generator = torch.Generator().manual_seed(seed)
        for layer in (inner, outer):
            nn.init.xavier_uniform_(layer.weight, gain=1e-4, generator=generator)
            nn.init.zeros_(layer.bias)
        self.network.to(base.model.device)
        self.target = copy.deepcopy(self.network).requires_grad_(False)

    @property
    def parameters_count(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    @property
    def head_count(self) -> int:
        """Parameters of the model's output head."""
        return int(self._head.weight.numel())

    def follow(self, rate: float) -> None:
        """target += rate * (network - target): Polyak averaging."""
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.network.parameters(), strict=True):
                slow.lerp_(fast, rate)

    def q_values(self, states_BTD: Tensor, target: bool = False) -> Tensor:
        """q_BTV in float32, -inf for what may not be written."""
        made_BTD = (self.target if target else self.network)(states_BTD.float())
        q_BTV: Tensor = self._head(made_BTD.to(self._head.weight.dtype)).float()
        return q_BTV.masked_fill(self._forbidden_V, float("-inf"))

    @torch.no_grad()
    def write(self, count: int, length: int, top_k: int, seed: int) -> Written:
        """`count` prompts of `length` tokens, each token drawn by softmax(Q) among the `top_k` likeliest."""
        generator = torch.Generator().manual_seed(seed)
        body, cache = self._base.model.base_model, None
        read_BT = torch.full((count, 1), self._start, device=self._base.model.device)
        tokens: list[Tensor] = []
        states: list[Tensor] = []
        for _ in range(length):
            out = body(input_ids=read_BT, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            states.append(out.last_hidden_state)
            q_BV = self.q_values(states[-1])[:, -1]
            top = q_BV.topk(min(top_k, q_BV.shape[1]))
            # drawn on the CPU, so that a seed gives the same on every device
            drawn_B1 = torch.multinomial(top.values.softmax(1).cpu(), 1, generator=generator)
            read_BT = top.indices.gather(1, drawn_B1.to(top.indices.device))
            tokens.append(read_BT)
        return Written(torch.cat(tokens, 1), torch.cat(states, 1))

    def greedy(self, length: int) -> Tensor:
        """tokens_T of the likeliest prompt, token by token."""
        return self.write(1, length, 1, 0).tokens_BT[0]

    def text(self, tokens_T: Tensor) -> str:
        return self._base.decode(tokens_T.tolist()).strip()

    @cached_property
    def _start(self) -> int:
        first = self._base.tokenizer.bos_token_id
        return int(first if first is not None else self._base.end_of_turn_ids[0])

    @cached_property
    def _forbidden_V(self) -> Tensor:
        tokenizer = self._base.tokenizer
        known, special = len(tokenizer), set(tokenizer.all_special_ids)
        texts = [self._base.decode([i]) for i in range(min(known, self._head.weight.shape[0]))]
        allowed = [i for i, text in enumerate(texts) if i not in special and text.strip() and not unreadable(text)]
        forbidden_V = torch.ones(self._head.weight.shape[0], dtype=torch.bool)
        forbidden_V[allowed] = False
        return forbidden_V.to(self._base.model.device)
