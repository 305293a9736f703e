"""Who proposes prompts: a model under a meta-prompt, a server, an offline bank of edits, the model's own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from cotune.bench import Bench
from cotune.config import RunConfig
from cotune.errors import UsageError
from cotune.models.base import BaseModel
from cotune.openai_client import ChatClient
from cotune.proposers.edits import EditProposer
from cotune.proposers.instructions import InstructionProposer
from cotune.proposers.meta_prompt import MetaPrompt
from cotune.proposers.model import ModelWriter
from cotune.proposers.openai import ServerWriter
from cotune.proposers.writing import Writer, reply_limit
from cotune.search import Proposer
from cotune.tasks.base import Task
from cotune.values import Example

KINDS = "self, edits, model:NAME or openai:BASE_URL#MODEL"


@dataclass(frozen=True)
class Proposing:
    """Who proposes and how, as PromptConfig says it; `server` is how the server of openai:BASE_URL#MODEL is asked."""

    spec: str
    candidates: int
    history: int
    exemplars: int
    temperature: float
    max_characters: int
    server: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        prompt = config.prompt
        return cls(
            prompt.proposer,
            prompt.candidates,
            prompt.history,
            prompt.exemplars,
            prompt.temperature,
            prompt.longest,
            config.openai.client(),
        )

    def proposer(self, task: Task, train: Sequence[Example], generator: BaseModel, bench: Bench) -> Proposer:
        """Proposes `candidates` instructions a round. `generator` is the model of `model:NAME`.

        Raises UsageError for an unknown spec.
        """
        writer = self.writer(generator, bench)
        if writer is None:
            return EditProposer(task.learned, self.candidates)
        return InstructionProposer(
            writer, MetaPrompt(task, tuple(train), self.history, self.exemplars), self.candidates
        )

    def writer(self, generator: BaseModel, bench: Bench) -> Writer | None:
        """Who writes what it is asked for; None for `edits`, which asks nobody. Raises UsageError like `proposer`."""
        kind, _, rest = self.spec.partition(":")
        limit = reply_limit(self.max_characters)
        if self.spec == "edits":
            return None
        if self.spec == "self":
            return ModelWriter("self", bench.base, bench.engine, self.temperature, limit)
        if kind == "model" and rest:
            engine = bench.engine if generator is bench.base else bench.make_engine(generator)
            return ModelWriter(self.spec, generator, engine, self.temperature, limit)
        if kind == "openai":
            url, _, model = rest.partition("#")
            if url.startswith(("http://", "https://")) and model:
                return ServerWriter(ChatClient(url, **self.server), model, self.temperature, limit)
        raise UsageError(
            f"There is no proposer {self.spec!r}. Known: {KINDS}, for example openai:http://localhost:8000/v1#qwen."
        )

    @property
    def asks(self) -> bool:
        """Whether a model is asked at all."""
        return self.spec != "edits"
