"""On the packaged model in float32 a completion is the same tokens in whatever batch it is made."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from cotune.engines.base import Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine
from cotune.models.base import BaseModel, load
from cotune.models.lora import LoraFactors, target_linears
from cotune.values import Completion

NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load("tiny")


@pytest.fixture(scope="module")
def requests(base: BaseModel) -> list[Request]:
    rng = random.Random(0)
    adapters: list[LoraFactors | None] = [None]
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        factors = {
            name: (
                torch.randn(4, linear.in_features, generator=generator) / linear.in_features**0.5,
                torch.randn(linear.out_features, 4, generator=generator) * 0.02,
            )
            for name, linear in target_linears(base.model, "all-linear").items()
        }
        adapters.append(LoraFactors(factors, 2.0))

    def request(i: int) -> Request:
        start, more, instruction = (
            rng.randint(2, 60),
            rng.randint(2, 40),
            rng.choice(["Think step by step.", "Answer."]),
        )
        question = f"Tom has {start} apples and buys {more} more." + " Then he goes home." * rng.randint(0, 3)
        turns = [{"role": "system", "content": instruction}, {"role": "user", "content": question + " How many now?"}]
        return Request(base.render(turns), adapters[i % 6])

    return [request(i) for i in range(48)]


def differences(engine: TransformersEngine, request: Request, one: Completion, other: Completion) -> Sequence[str]:
    """Empty if the tokens are the same, or if they part at a near-tie."""
    if one.token_ids == other.token_ids:
        return []
    end = engine.base.end_of_turn_ids[0]
    first, second = (*one.token_ids, end), (*other.token_ids, end)
    at = next(i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y)
    scores = engine.score([request] * 2, [first[: at + 1], second[: at + 1]])
    return [] if abs(scores[0][-1] - scores[1][-1]) < NEAR_TIE else [f"token {at}: {one.text!r} or {other.text!r}"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shuffled_split_and_single(base: BaseModel, requests: list[Request], temperature: float) -> None:
    engine = TransformersEngine(base, batch_size=16)
    sampling = Sampling(40, temperature=temperature, seed=1)
    planned: dict[int, Completion] = {}
    for batch in engine.plan(requests, sampling):
        done = engine.generate([requests[i] for i in batch], sampling)
        planned |= {i: row[0] for i, row in zip(batch, done, strict=True)}
    order = random.Random(1).sample(range(48), 48)
    found: list[str] = []
    for batch in (order, order[:31], order[31:], *([i] for i in order[:8])):
        for i, [completion] in zip(batch, engine.generate([requests[i] for i in batch], sampling), strict=True):
            found += differences(engine, requests[i], planned[i], completion)
    # Sampling has one more excuse: a uniform number within rounding of the border between two tokens (1e-6 a token).
    assert not found
