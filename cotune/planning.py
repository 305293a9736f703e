"""What a run would do and the most that it can cost, before anything runs. Loads data and tokenizers, no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from cotune import cells, noise
from cotune.config import RunConfig
from cotune.errors import CotuneError
from cotune.experiment import (
    black_box,
    check_black_box,
    dataset,
    decoding,
    is_crossed,
    learned_task,
    make_strategy,
    measured_examples,
    pairing,
    seed_prompt,
    verified,
)
from cotune.ledger import forward_flops, training_flops
from cotune.models.base import BaseModel, outline
from cotune.revision import KEPT, revision_messages
from cotune.scorers import VERIFIER
from cotune.strategies.base import Strategy, Work, Workload
from cotune.tasks import task as make_task
from cotune.tasks.base import Task
from cotune.tasks.data import Dataset


def plan(config: RunConfig) -> dict[str, Any]:
    """The resolved config, what would be run and the most it would cost; runs nothing, loads no weights.

    Lengths are means over at most 64 train examples. FLOPs are by the ledger's formula, with every trained token
    counted at 4 N (the trained part itself is small). Of a model behind a server, which is not asked, parameters and
    FLOPs are None and every byte of a prompt counts as a token.
    Raises CotuneError like `run` for a config, data or model that cannot be used.
    """
    task = make_task(config.task)
    strategy = make_strategy(config)
    notes = check_black_box(config, strategy)
    outlined = _answering(config)
    generator = _outlined(config.second_model) if config.second_model else outlined
    data = dataset(config, task)
    sampling, load = decoding(config, task), _workload(config, task, data, outlined)
    test = len(measured_examples(config, data))
    tuning = _cost(_tuning(config, strategy, load), outlined.parameters_count)
    limits = config.budget.model_dump(include={"tokens", "flops"}, exclude_none=True)
    twice = min(test, _answered_twice(config))
    measuring = replace(
        load,
        limit=sampling.max_new_tokens,
        samples=_deployed(config, strategy, load),
        verified=verified(config, strategy),
    )
    asked = [
        load.samples if "plan" in strategy.levers and "plan" not in tuned else measuring.samples
        for tuned in cells.cells(sorted(strategy.levers))
    ]  # completions that a question takes in each cell
    answers = test * (sum(asked) if is_crossed(config, strategy) else measuring.samples)
    measured = [
        replace(measuring, samples=1).answers(f"measure on {config.measured}", answers, load.question),
        *([measuring.answers("noise", twice, load.question)] if twice else []),
    ]
    return {
        "config": config.model_dump(mode="json"),
        "run": config.run_name,
        "parameters": outlined.parameters_count or None,
        "examples": {"train": len(data.train), "val": len(data.val), "test": test},
        "mean_tokens": {
            "question": load.question,
            "reference": load.reference,
            "completion_limit": sampling.max_new_tokens,
        },
        "tuning_at_most": tuning | {unit: min(limit, tuning[unit]) for unit, limit in limits.items()},
        "measuring_at_most": _cost(measured, outlined.parameters_count),
        "notes": [*data.report.warnings, *pairing(config, generator, outlined), *notes],
    }


def tuning_tokens(config: RunConfig) -> Callable[[RunConfig], int]:
    """What tuning would take at most under settings that differ from `config` in how strategies tune alone.

    Raises CotuneError like `plan`.
    """
    task = make_task(config.task)
    load = _workload(config, task, dataset(config, task), _answering(config))
    return lambda other: sum(w.forward_tokens + w.trained_tokens for w in _tuning(other, make_strategy(other), load))


def _tuning(config: RunConfig, strategy: Strategy, load: Workload) -> list[Work]:
    """The verifier of the run's plan, if it ranks by one, and the strategy's own work."""
    return [*([load.verifier(config.verifier, load.question)] if load.verified else []), *strategy.plan(load)]


def _workload(config: RunConfig, task: Task, data: Dataset, outlined: BaseModel) -> Workload:
    learned, start = learned_task(config, task), seed_prompt(config, task)
    sample = data.train[:64]

    def mean_tokens(texts: list[str]) -> int:
        return math.ceil(sum(outlined.token_count(t) for t in texts) / len(texts))

    chats = [learned.messages(start.prompt, e) for e in sample]
    question = mean_tokens([outlined.render(chat) for chat in chats])
    reference = mean_tokens([learned.reference_completion(e) for e in sample])
    limit = decoding(config, learned).max_new_tokens
    length, revising = config.plan.value.chain, 0
    if length > 1:
        asked_again = mean_tokens([outlined.render(revision_messages(chat, [""])) for chat in chats]) - question
        seen = sum(min(place, KEPT) for place in range(length))  # by all attempts of a chain
        revising = math.ceil(seen * (max(limit, decoding(config, task).max_new_tokens) + asked_again) / length)
    samples, reads = start.plan.samples, start.plan.scorer == VERIFIER
    return Workload(len(data.train), len(data.val), question, reference, limit, samples, revising, reads)


def _deployed(config: RunConfig, strategy: Strategy, load: Workload) -> int:
    """Completions that an answer takes at most once tuning is over."""
    return config.inference.samples if "plan" in strategy.levers else load.samples


def _answering(config: RunConfig) -> BaseModel:
    return black_box(config) if config.engine == "openai" else _outlined(config.model)


def _answered_twice(config: RunConfig) -> int:
    """At most; the engine, which says whether it is needed, is not made here."""
    if config.noise_examples is not None:
        return config.noise_examples
    device = config.runner.device
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    promised = on_cpu and config.runner.dtype in ("auto", "float32") and config.engine in ("auto", "transformers")
    return 0 if promised else noise.EXAMPLES


def _outlined(name: str) -> BaseModel:
    found = _looked_up(name)
    if isinstance(found, CotuneError):
        raise found
    return found


@cache
def _looked_up(name: str) -> BaseModel | CotuneError:
    """Once for all runs of a study: a hub that cannot be reached takes half a minute to say so."""
    try:
        return outline(name)
    except CotuneError as error:
        return error


def _cost(works: Sequence[Work], parameters: int) -> dict[str, Any]:
    forward, trained = sum(w.forward_tokens for w in works), sum(w.trained_tokens for w in works)
    return {
        "work": [f"{w.what}: {w.calls:,} calls, {w.forward_tokens + w.trained_tokens:,} tokens" for w in works],
        "calls": sum(w.calls for w in works),
        "tokens": forward + trained,
        "flops": forward_flops(parameters, forward) + training_flops(parameters, 0, trained) if parameters else None,
    }
