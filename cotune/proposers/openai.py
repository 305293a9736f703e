"""Any server with OpenAI's chat-completions interface as a writer of prompts.

Replies are kept in the journal, so a resumed run does not ask again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from cotune.bench import Bench
from cotune.errors import CotuneError
from cotune.ledger import Spent
from cotune.openai_client import ChatClient
from cotune.proposers.writing import Reply
from cotune.tasks.base import Message
from cotune.values import digest

_FRAME_TOKENS = 64  # at most, for the server's chat template around the messages


@dataclass(frozen=True)
class ServerWriter:
    """A request to the server of `client` for each reply, of at most `limit` tokens.

    Tokens are booked as the server counts them; its FLOPs are unknown and booked as 0 (ours).
    """

    client: ChatClient
    model: str
    temperature: float
    limit: int

    @property
    def name(self) -> str:
        return f"openai:{self.model}"

    def at(self, temperature: float) -> Self:
        return replace(self, temperature=temperature)

    def fits(self, messages: Sequence[Message]) -> bool:
        return True  # nobody knows before the server is asked

    def write(self, messages: Sequence[Message], count: int, bench: Bench, *names: object) -> list[Reply]:
        return [self._journaled(list(messages), bench, *names, i) for i in range(count)]

    def _journaled(self, messages: list[Message], bench: Bench, *names: object) -> Reply:
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.limit,
        }
        # The server's own count is known only afterwards, but no tokenizer makes more tokens than bytes.
        text = "\n".join(m["content"] for m in messages)
        bench.ledger.allow(len(text.encode()) + _FRAME_TOKENS + self.limit, 0.0)
        key = digest(["openai", self.client.base_url, body, bench.stage, bench.seed, *names])
        reply = bench.store.recall(key)
        if reply is None:
            reply = self._asked(body, text, bench)
            bench.store.remember(key, reply)
        bench.ledger.book(
            Spent(
                calls=1,
                prompt_tokens=reply["prompt_tokens"],
                generated_tokens=reply["generated_tokens"],
                seconds=reply["seconds"],
            )
        )
        return Reply(reply["text"], reply["truncated"])

    def _asked(self, body: dict[str, Any], text: str, bench: Bench) -> dict[str, Any]:
        began = time.perf_counter()
        [said] = self.client.ask_all([body])
        if said.refused:
            raise CotuneError(
                f"The proposer {self.model!r} refuses the meta-prompt: {said.refused.rstrip('.')}. Lower "
                "prompt.history or prompt.exemplars, or choose another proposer."
            )
        read, written = said.prompt_tokens, said.generated_tokens
        if read is None or written is None:  # a server that does not count: by our own tokenizer
            read = bench.engine.token_count(text)
            written = min(bench.engine.token_count(said.text), self.limit)
        return {
            "text": said.text,
            "truncated": said.truncated,
            "prompt_tokens": read,
            "generated_tokens": written,
            "seconds": time.perf_counter() - began,
        }
