"""A model behind a server: no weights, no tokenizer, only messages in and text out.

It stands where a loaded model stands, so that everything that only generates runs on either. What needs weights or
tokens gets a sentence instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cotune.errors import UsageError
from cotune.models.base import BaseModel
from cotune.openai_client import ChatClient
from cotune.values import digest

# What a server's list says of a model that is a fact about it; other fields change from day to day.
_FACTS = ("id", "root", "owned_by", "max_model_len")
_FRAME_TOKENS = 64  # at most, for what the chat template adds of its own
_NO_LIMIT = 2**31 - 1


class BlackBox(BaseModel):
    """`name` as the server of `client` calls it. `context_length` None: what the server says, else no limit.

    Asks the server only when `digest` or `context_length` is wanted, so a finished run is read without it.
    """

    def __init__(self, name: str, client: ChatClient, context_length: int | None = None) -> None:
        source = f"{client.base_url}#{name}"
        self.__dict__.update(name=name, source=source, revision=None, folder=None)  # a frozen dataclass, in part
        self.__dict__.update(client=client, _context_length=context_length)

    client: ChatClient
    _context_length: int | None

    def __repr__(self) -> str:
        return f"BlackBox({self.source!r})"

    @property
    def model(self) -> PreTrainedModel:
        self._refuse("weights")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        self._refuse("tokenizer")

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"{self.name} is a black box behind {self.client.base_url}: its {what} cannot be used. Take --engine "
            "transformers or vllm for a model that runs here."
        )

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What the server's list of models says of this one; empty where it says nothing. Raises CotuneError."""
        mine = next((entry for entry in self.client.models() if entry["id"] == self.name), {})
        return {fact: mine[fact] for fact in _FACTS if fact in mine}

    @cached_property
    def digest(self) -> str:
        """Of address, name and what the server says of the model. Weights behind it may change without notice."""
        return digest(["black box", self.source, dict(self.facts)])

    @cached_property
    def parameters_count(self) -> int:
        """Unknown, so 0: nothing is booked for what cannot be known."""
        return 0

    @property
    def hardware(self) -> list[str]:
        """Unknown, so none."""
        return []

    @cached_property
    def context_length(self) -> int:
        said = self.facts.get("max_model_len") if self._context_length is None else self._context_length
        return said if isinstance(said, int) else _NO_LIMIT

    @property
    def special_tokens(self) -> list[str]:
        """Unknown, so none."""
        return []

    @property
    def template_digest(self) -> None:
        """Unknown: the server applies its chat template."""

    @cached_property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Unknown, so none."""
        return ()

    def turns(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """The messages as they are."""
        return [{"role": m["role"], "content": m["content"]} for m in messages]

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages as JSON with one spelling; the server applies its chat template."""
        return json.dumps(self.turns(messages), ensure_ascii=False, separators=(",", ":"))

    def plain(self, text: str) -> str:
        """The text itself: special tokens are the server's matter."""
        return text

    def content(self, text: str) -> str:
        """The text: whoever makes tokens of it is the server."""
        return text

    def token_count(self, text: str) -> int:
        """No fewer tokens than the text has: no tokenizer makes more of them than there are bytes."""
        return len(text.encode("utf-8", "replace")) + _FRAME_TOKENS
