"""Who proposes prompts: a model under a meta-prompt, a server, an offline bank of edits, the model's own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cotune.bench import Bench
from cotune.errors import UsageError
from cotune.models.base import BaseModel
from cotune.openai_client import ChatClient
from cotune.proposers.edits import EditProposer
from cotune.proposers.meta_prompt import MetaPrompt
from cotune.proposers.model import ModelProposer
from cotune.proposers.openai import OpenAIProposer
from cotune.search import Proposer
from cotune.tasks.base import Task
from cotune.values import Example

KINDS = "self, edits, model:NAME or openai:BASE_URL#MODEL"


def make_proposer(
    spec: str,
    *,
    task: Task,
    train: Sequence[Example],
    generator: BaseModel,
    bench: Bench,
    candidates: int,
    history: int,
    exemplars: int,
    temperature: float,
    server: Mapping[str, Any] | None = None,
) -> Proposer:
    """The proposer that `spec` names (see PromptConfig.proposer); `generator` is the model of `model:NAME`, `server`
    how the server of `openai:BASE_URL#MODEL` is asked (arguments of ChatClient).

    Raises UsageError for an unknown spec.
    """
    kind, _, rest = spec.partition(":")
    if spec == "edits":
        return EditProposer(task.learned, candidates)
    meta_prompt = MetaPrompt(task, tuple(train), history, exemplars)
    if spec == "self":
        return ModelProposer("self", meta_prompt, bench.base, bench.engine, candidates, temperature)
    if kind == "model" and rest:
        engine = bench.engine if generator is bench.base else bench.make_engine(generator)
        return ModelProposer(spec, meta_prompt, generator, engine, candidates, temperature)
    if kind == "openai":
        url, _, model = rest.partition("#")
        if url.startswith(("http://", "https://")) and model:
            return OpenAIProposer(ChatClient(url, **(server or {})), model, meta_prompt, candidates, temperature)
    raise UsageError(
        f"There is no proposer {spec!r}. Known: {KINDS}, for example openai:http://localhost:8000/v1#qwen."
    )
