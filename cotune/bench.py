"""The bench: all a strategy may use while it tunes.

It generates through the engine, books every token, refuses what the budget cannot pay, keeps checkpoints, hands out
seeded randomness and passes events on. It knows nothing of the run folder: where journal and checkpoints live is
behind the `Store` protocol.

Resuming rests on one idea. A run is a deterministic function of its config, so after an interruption it is simply run
again: each batch of generation is looked up in the journal by its content, training loops continue from their last
checkpoint, and everything between is cheap.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from cotune.engines.base import Engine, Request, Sampling
from cotune.engines.cache import GenerationCache, completion_keys
from cotune.ledger import Ledger, Part, Spent, forward_flops
from cotune.models.base import BaseModel
from cotune.models.lora import PendingLora
from cotune.values import Completion, Event, digest

if TYPE_CHECKING:
    import torch


_SECONDS = ("seconds", "adapter_seconds")

Each = Callable[[Sequence[int], Sequence[list[Completion]]], Mapping[str, Any]]
"""Sees each finished batch of `Bench.generate`: positions and completions -> plain JSON for the progress display."""


class Store(Protocol):
    """Where a bench keeps what must survive a kill."""

    def recall(self, key: str) -> Any | None:
        """The JSON value remembered under `key`, or None."""

    def remember(self, key: str, value: Any) -> None: ...

    def load_checkpoint(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and JSON metadata of the last complete checkpoint of that name, or None."""

    def save_checkpoint(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Replace the checkpoint atomically."""


class MemoryStore:
    """A store that forgets at exit: for `predict` and for tests."""

    def __init__(self) -> None:
        self._journal: dict[str, Any] = {}
        self._checkpoints: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}

    def recall(self, key: str) -> Any | None:
        return self._journal.get(key)

    def remember(self, key: str, value: Any) -> None:
        self._journal[key] = value

    def load_checkpoint(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        return self._checkpoints.get(name)

    def save_checkpoint(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        self._checkpoints[name] = ({k: v.clone() for k, v in tensors.items()}, dict(meta))


def ignore(event: Event) -> None:
    """The listener of those who do not listen."""


@dataclass(frozen=True)
class Bench:
    """`make_engine` builds the configured engine on another model (MetaTuner's G); `stage` names where we are.

    `cache` holds generations of earlier runs; None is no cache.
    """

    base: BaseModel
    engine: Engine
    make_engine: Callable[[BaseModel], Engine]
    ledger: Ledger
    store: Store
    seed: int
    listen: Callable[[Event], None] = ignore
    stage: str = ""
    cache: GenerationCache | None = None

    def at(self, stage: str) -> Bench:
        """The same bench inside a named stage: own random streams, own checkpoints, events marked with it."""
        return replace(self, stage=f"{self.stage}/{stage}" if self.stage else stage)

    def emit(self, kind: str, **data: Any) -> None:
        """Report something that is worth a line in events.jsonl. Values are plain JSON."""
        tuning = {"tuning_tokens": self.ledger.tuning.tokens}
        self.listen(Event(kind, ({"stage": self.stage} if self.stage else {}) | data | tuning))

    def progress(self, label: str, done: int, of: int, **data: Any) -> None:
        """Report how far a piece of work is, with what tuning has spent; shown live, never kept in events.jsonl.

        Its seconds differ from run to run, which is why they are in no other event.
        """
        spent = self.ledger.tuning
        tuning = {"tuning_tokens": spent.tokens, "tuning_flops": spent.flops, "tuning_seconds": spent.seconds}
        what = {"stage": self.stage, "label": label, "done": done, "of": of}
        self.listen(Event("progress", what | data | tuning))

    def seed_for(self, *names: Any) -> int:
        """A 63-bit seed that depends on the run's seed, the stage and `names` alone, never on order of calls."""
        return int(digest([self.seed, self.stage, *names]), 16) >> 1

    def rng(self, *names: Any) -> random.Random:
        return random.Random(self.seed_for(*names))

    def save_checkpoint(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Keep tensors and JSON under a name of this stage, with what has been spent on tuning so far."""
        full = {"meta": dict(meta), "tuning": asdict(self.ledger.tuning)}
        self.store.save_checkpoint(f"{self.stage}/{name}", tensors, full)

    def load_checkpoint(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and JSON of the last complete checkpoint, or None.

        Sets the tuning account to what it was when the checkpoint was saved: everything up to that point in the
        (deterministic) order of work is paid for, whether it was replayed or skipped.
        """
        found = self.store.load_checkpoint(f"{self.stage}/{name}")
        if found is None:
            return None
        tensors, full = found
        self.ledger.restore(Spent(**full["tuning"]))
        return tensors, full["meta"]

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        base: BaseModel | None = None,
        engine: Engine | None = None,
        version: str = "",
        part: Part = "answers",
        label: str = "",
        each: Each | None = None,
    ) -> list[list[Completion]]:
        """`sampling.n` completions per request, in order, batch by batch through journal and ledger.

        `base` and `engine` are given together for another model than the base model, with a `version` that
        changes whenever that model's weights do (it is part of the journal's key). `part` is what the work is booked
        as, `label` names it for the progress display. `each` is called after each batch, in the order in which they
        finish, with the positions of its requests and their completions; what it returns is shown with the progress.
        Pending adapters are made for each batch when it runs, and their
        seconds booked as those of adapters.
        Raises BudgetExhausted before the first batch that the budget could not pay in full.
        """
        base, engine = base or self.base, engine or self.engine
        results: list[list[Completion]] = [[] for _ in requests]
        batches = engine.plan(requests, sampling)
        done = 0
        for batch in batches:
            chosen = [requests[i] for i in batch]
            made = self._batch(chosen, sampling, base, engine, version, part)
            for i, completions in zip(batch, made, strict=True):
                results[i] = completions
            done += len(batch)
            so_far = each(batch, made) if each else {}
            if label:
                self.progress(label, done, len(requests), **so_far)
        return results

    def _batch(
        self, requests: list[Request], sampling: Sampling, base: BaseModel, engine: Engine, version: str, part: Part
    ) -> list[list[Completion]]:
        reads = sampling.n if engine.rows_apart else 1
        most = reads * sum(engine.token_count(r.prompt) for r in requests)
        most += len(requests) * sampling.n * sampling.max_new_tokens
        self.ledger.allow(most, forward_flops(base.parameters_count, most))
        content = [
            [r.prompt, r.adapter.digest if r.adapter else None, *([r.first] if r.first else [])] for r in requests
        ]
        key = digest(["generate", engine.name, base.digest, version, asdict(sampling), content])
        known = self.store.recall(key)
        if known is None:
            known = self._made(requests, sampling, base, engine, version)
            self.store.remember(key, known)
        completions = [[_completion(c) for c in row] for row in known["rows"]]
        read, generated = _tokens(completions, reads)
        cached = [completions[i] for i in known["cached"]]
        self.ledger.book(
            Spent(
                calls=len(requests) * sampling.n,
                prompt_tokens=read,
                generated_tokens=generated,
                cached_calls=len(cached) * sampling.n,
                cached_tokens=sum(_tokens(cached, reads)),
                flops=forward_flops(base.parameters_count, read + generated),
                seconds=known["seconds"],
            ),
            part,
        )
        if known["adapter_seconds"]:
            self.ledger.book(Spent(seconds=known["adapter_seconds"]), "adapters")
        return completions

    def _made(
        self, requests: list[Request], sampling: Sampling, base: BaseModel, engine: Engine, version: str
    ) -> dict[str, Any]:
        """What the journal keeps of one batch: from the cache what is there, the rest generated.

        Where rows depend on their batch it is found whole or not at all. Seconds are those of the work when it was
        done.
        """
        if self.cache is None:
            return _generated(requests, sampling, engine)
        contents = [base.content(r.prompt) for r in requests]
        keys = completion_keys(engine, [base.digest, version], contents, requests, sampling)
        kept = self.cache.get([key for row in keys for key in row])
        hits = [i for i, row in enumerate(keys) if all(key in kept for key in row)]
        if not engine.rows_apart and len(hits) < len(requests):
            hits = []
        new = [i for i in range(len(requests)) if i not in set(hits)]
        if new:
            made = _generated([requests[i] for i in new], sampling, engine)
            share = {name: made[name] / (len(new) * sampling.n) for name in _SECONDS}
            fresh = {
                key: {"completion": completion, **share}
                for i, row in zip(new, made["rows"], strict=True)
                for key, completion in zip(keys[i], row, strict=True)
            }
            self.cache.put(fresh)
            kept |= fresh
        rows = [[kept[key] for key in row] for row in keys]
        return {
            "rows": [[sample["completion"] for sample in row] for row in rows],
            **{name: sum(sample[name] for row in rows for sample in row) for name in _SECONDS},
            "cached": hits,
        }


def _tokens(completions: Sequence[Sequence[Completion]], reads: int) -> tuple[int, int]:
    """Read and written, with each prompt read `reads` times."""
    read = sum(c.prompt_tokens for row in completions for c in row[:reads])
    return read, sum(c.generated_tokens for row in completions for c in row)


def _generated(requests: Sequence[Request], sampling: Sampling, engine: Engine) -> dict[str, Any]:
    began = time.perf_counter()
    ready = _ready(requests)
    made = time.perf_counter()
    completions = engine.generate(ready, sampling)
    return {
        "rows": [[asdict(c) for c in row] for row in completions],
        "seconds": time.perf_counter() - made,
        "adapter_seconds": made - began if any(isinstance(r.adapter, PendingLora) for r in requests) else 0.0,
        "cached": [],
    }


def _ready(requests: Sequence[Request]) -> list[Request]:
    """The same requests with every pending adapter made; those that share one still do."""
    pending = dict.fromkeys(r.adapter for r in requests if isinstance(r.adapter, PendingLora))
    made = {adapter: adapter.make() for adapter in pending}
    return [replace(r, adapter=made[r.adapter]) if isinstance(r.adapter, PendingLora) else r for r in requests]


def _completion(saved: Mapping[str, Any]) -> Completion:
    return Completion(**{**saved, "token_ids": tuple(saved["token_ids"]), "logprobs": tuple(saved["logprobs"])})
