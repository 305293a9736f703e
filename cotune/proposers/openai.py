"""Proposals by any server with OpenAI's chat-completions interface.

Replies are kept in the journal, so a resumed run does not ask again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cotune.bench import Bench
from cotune.errors import CotuneError
from cotune.ledger import Spent
from cotune.openai_client import ChatClient
from cotune.proposers.meta_prompt import MetaPrompt, read_reply
from cotune.search import Proposal, Scored
from cotune.tasks.base import Message
from cotune.values import Prompt, digest

MAX_NEW_TOKENS = 256  # of one proposal (ours)
_FRAME_TOKENS = 64  # at most, for the server's chat template around the one message


class OpenAIProposer:
    """`candidates` requests a round to the server of `client`.

    Tokens are booked as the server counts them; its FLOPs are unknown and booked as 0 (ours).
    """

    def __init__(
        self,
        client: ChatClient,
        model: str,
        meta_prompt: MetaPrompt,
        candidates: int,
        temperature: float,
    ) -> None:
        self._client = client
        self._model = model
        self._meta_prompt = meta_prompt
        self._candidates = candidates
        self._temperature = temperature

    def propose(self, round: int, history: Sequence[Scored], best: Prompt, bench: Bench) -> list[Proposal]:
        messages = self._meta_prompt.messages(
            history,
            bench.rng("exemplars", round),
            most_history=self._meta_prompt.history,
            most_exemplars=self._meta_prompt.exemplars,
        )
        origin = f"openai:{self._model}"
        replies = [self._journaled(messages, round, i, bench) for i in range(self._candidates)]
        return [read_reply(r["text"], r["truncated"], origin, best) for r in replies]

    def _journaled(self, messages: list[Message], round: int, index: int, bench: Bench) -> dict[str, Any]:
        body = {
            "model": self._model,
            "messages": messages,
            "temperature": self._temperature,
            "max_tokens": MAX_NEW_TOKENS,
        }
        # The server's own count is known only afterwards, but no tokenizer makes more tokens than bytes.
        most = len(messages[0]["content"].encode()) + _FRAME_TOKENS
        bench.ledger.allow(most + MAX_NEW_TOKENS, 0.0)
        key = digest(["openai", self._client.base_url, body, bench.stage, bench.seed, round, index])
        reply = bench.store.recall(key)
        if reply is None:
            began = time.perf_counter()
            [said] = self._client.ask_all([body])
            if said.refused:
                raise CotuneError(
                    f"The proposer {self._model!r} refuses the meta-prompt: {said.refused.rstrip('.')}. Lower "
                    "prompt.history or prompt.exemplars, or choose another proposer."
                )
            read, written = said.prompt_tokens, said.generated_tokens
            if read is None or written is None:  # a server that does not count: by our own tokenizer
                read = bench.engine.token_count(messages[0]["content"])
                written = min(bench.engine.token_count(said.text), MAX_NEW_TOKENS)
            reply = {"text": said.text, "truncated": said.truncated, "prompt_tokens": read, "generated_tokens": written}
            reply["seconds"] = time.perf_counter() - began
            bench.store.remember(key, reply)
        bench.ledger.book(
            Spent(
                calls=1,
                prompt_tokens=reply["prompt_tokens"],
                generated_tokens=reply["generated_tokens"],
                seconds=reply["seconds"],
            )
        )
        return dict(reply)
