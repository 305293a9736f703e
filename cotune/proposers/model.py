"""Proposals by a model that runs here: the base model itself, or another one, under the meta-prompt."""

from __future__ import annotations

from collections.abc import Sequence

from cotune.bench import Bench
from cotune.engines.base import Engine, Request, Sampling
from cotune.errors import CotuneError
from cotune.models.base import BaseModel
from cotune.proposers.meta_prompt import MetaPrompt, read_reply
from cotune.search import Proposal, Scored
from cotune.values import Prompt

MAX_NEW_TOKENS = 256  # of one proposal (ours): 500 characters of English are about 120 tokens


class ModelProposer:
    """Samples `candidates` replies to one meta-prompt a round (OPRO: 8 at temperature 1).

    The proposer answers without an adapter, also when the prompt that is tuned runs under one (ours).
    """

    def __init__(
        self,
        origin: str,
        meta_prompt: MetaPrompt,
        model: BaseModel,
        engine: Engine,
        candidates: int,
        temperature: float,
    ) -> None:
        self._origin = origin
        self._meta_prompt = meta_prompt
        self._model = model
        self._engine = engine
        self._candidates = candidates
        self._temperature = temperature

    def propose(self, round: int, history: Sequence[Scored], best: Prompt, bench: Bench) -> list[Proposal]:
        new = min(MAX_NEW_TOKENS, self._model.context_length // 2)
        rendered = self._fitting(round, history, bench, self._model.context_length - new)
        sampling = Sampling(new, self._temperature, n=self._candidates, seed=bench.seed_for("propose", round))
        requests = [Request(rendered)]
        [replies] = bench.generate(requests, sampling, base=self._model, engine=self._engine, label="propose")
        return [read_reply(r.text, r.truncated, self._origin, best) for r in replies]

    def _fitting(self, round: int, history: Sequence[Scored], bench: Bench, limit: int) -> str:
        """The meta-prompt, with fewer exemplars and then fewer earlier instructions until it fits `limit` tokens."""
        most_history, most_exemplars = self._meta_prompt.history, self._meta_prompt.exemplars
        while True:
            messages = self._meta_prompt.messages(
                history, bench.rng("exemplars", round), most_history=most_history, most_exemplars=most_exemplars
            )
            rendered = self._model.render(messages)
            if self._engine.token_count(rendered) <= limit:
                return rendered
            if most_exemplars:
                most_exemplars -= 1
            elif most_history:
                most_history -= 1
            else:
                raise CotuneError(
                    f"{self._model.name} cannot propose prompts: its context of {self._model.context_length} tokens is "
                    "too short for the meta-prompt. Choose another proposer, for example --set prompt.proposer=edits."
                )
