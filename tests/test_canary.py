"""The adapter canary of a run: what it says of adapters that live, that are zero, and that the engine drops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cotune import canary
from cotune.bench import MemoryStore
from cotune.engines.base import Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine
from cotune.evaluate import evaluate
from cotune.models.base import BaseModel, load
from cotune.models.lora import LoraFactors, init_static
from cotune.values import Completion, Conditioning, Prompt
from tests.toy import Sums, bench, example

EXAMPLES = tuple(example(i) for i in range(20))
SAMPLING = Sampling(24)


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir))


@pytest.fixture(scope="module")
def adapter(base: BaseModel) -> LoraFactors:
    random = torch.Generator().manual_seed(0)
    made = init_static(base.model, "all-linear", 4, random)
    return LoraFactors(
        {name: (a.detach(), torch.randn(b.shape, generator=random) / 10) for name, (a, b) in made.items()}, 2.0
    )


class Deaf(TransformersEngine):
    """Answers every request as if it had no adapter."""

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        return super().generate([Request(r.prompt) for r in requests], sampling)


def found(engine: TransformersEngine, adapters: list[LoraFactors | None], store: MemoryStore) -> dict[str, int] | None:
    at = bench(engine.base, engine, store=store)
    with at.ledger.measuring():
        given = [Conditioning(Prompt("Add."), a) for a in adapters]
        return canary.measure(evaluate(Sums(), EXAMPLES[: len(given)], given, SAMPLING, at), SAMPLING, at)


def test_a_live_adapter_has_an_effect_and_a_zero_one_has_none(base: BaseModel, adapter: LoraFactors) -> None:
    engine = TransformersEngine(base, batch_size=8)
    zero = LoraFactors.zero(base.model, "all-linear", 4)
    store = MemoryStore()
    assert found(engine, [None] * 3, store) is None
    assert found(engine, [adapter] * 20, store) == {"examples": 16, "without_effect": 0}
    mixed = found(engine, [adapter, zero, None, zero, adapter], store)
    assert mixed == {"examples": 4, "without_effect": 2}


def test_an_engine_that_drops_adapters_is_found(base: BaseModel, adapter: LoraFactors) -> None:
    assert found(Deaf(base, batch_size=8), [adapter] * 4, MemoryStore()) == {"examples": 4, "without_effect": 4}


def test_a_resumed_run_says_the_same_and_generates_nothing(
    base: BaseModel, adapter: LoraFactors, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    first = found(TransformersEngine(base, batch_size=8), [adapter] * 5, store)
    monkeypatch.setattr(TransformersEngine, "generate", lambda *_: pytest.fail("this was answered before"))
    assert found(TransformersEngine(base, batch_size=8), [adapter] * 5, store) == first
