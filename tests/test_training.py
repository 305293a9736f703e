"""The training loop on a least-squares model small enough to know what must come out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from cotune.bench import Bench, MemoryStore
from cotune.engines.fake import FakeEngine
from cotune.errors import CotuneError
from cotune.ledger import Ledger
from cotune.training import Cost, Settings, Trainer, learning_rate, shuffled_batches
from cotune.values import Event

Item = tuple[tuple[float, ...], float, float]  # inputs, target, weight
RNG = random.Random(0)
ITEMS: list[Item] = [(tuple(RNG.gauss(0, 1) for _ in range(4)), RNG.gauss(0, 1), RNG.randint(1, 5)) for _ in range(24)]
SETTINGS = Settings(
    learning_rate=0.05, batch_size=8, micro_batch_size=8, warmup=0.2, max_grad_norm=1.0, checkpoint_every=2
)


class SafetensorsStore(MemoryStore):
    """Keeps checkpoints as bytes, so that a tensor which safetensors would refuse fails here."""

    def save_checkpoint(self, name: str, tensors: Any, meta: Any) -> None:
        super().save_checkpoint(name, load_safetensors(save_safetensors(dict(tensors))), meta)


class Model:
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        start = torch.linspace(-1, 1, 4, dtype=torch.float32)
        self.weight = nn.Parameter(start.to(dtype))
        self.bias = nn.Parameter(torch.zeros((), dtype=dtype))
        self.frozen = start.clone()
        self.fail_at: int | None = None
        self.calls = 0

    def loss(self, items: Sequence[Item]) -> tuple[Tensor, dict[str, float]]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        x = torch.tensor([i[0] for i in items], dtype=self.weight.dtype)
        y = torch.tensor([i[1] for i in items])
        error = (x @ self.weight + self.bias).float() - y
        loss = (error**2 * torch.tensor([i[2] for i in items])).sum()
        return loss, {"squared": float(loss.detach())}


def bench(store: MemoryStore | None = None, tokens: int | None = None, events: list[Event] | None = None) -> Bench:
    listen = (events if events is not None else []).append
    nothing: Any = None
    return Bench(
        nothing, FakeEngine(nothing), nothing, Ledger(tokens), store or SafetensorsStore(), seed=3, listen=listen
    )


def trainer(model: Model, at: Bench, settings: Settings = SETTINGS, total_steps: int = 9) -> Trainer[Item]:
    return Trainer(
        "least-squares",
        {"weight": model.weight, "bias": model.bias},
        model.loss,
        weight=lambda item: item[2],
        cost=lambda item: Cost(10, 40.0),
        name_of=lambda item: f"item-{ITEMS.index(item)}" if item in ITEMS else "bad",
        settings=settings,
        total_steps=total_steps,
        bench=at,
        extra={"frozen": model.frozen},
    )


def batches(at: Bench, epochs: int = 3) -> list[list[Item]]:
    return [batch for e in range(epochs) for batch in shuffled_batches(ITEMS, 8, at.rng("epoch", e))]


def test_learns_and_books_every_step() -> None:
    model, events = Model(), []
    at = bench(events=events)
    assert trainer(model, at).run(batches(at))
    steps = [e.data for e in events if e.kind == "step"]
    assert [s["step"] for s in steps] == list(range(1, 10))
    told = [(e.data["done"], e.data["of"]) for e in events if e.kind == "progress"]
    assert told == [(step, 9) for step in range(1, 10)]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["squared"] == steps[0]["loss"]
    assert at.ledger.tuning.trained_tokens == 9 * 8 * 10
    assert at.ledger.tuning.flops == 9 * 8 * 40.0
    assert steps[2]["learning_rate"] == 0.05  # two steps of warm-up, then the peak


def test_engines_give_their_memory_back_before_the_first_step() -> None:
    model, order = Model(), []

    class Holding(FakeEngine):
        def release(self) -> None:
            order.append(("released", model.calls))

    at = replace(bench(), engine=Holding(lambda *_: ""))
    planned = batches(at)
    training = trainer(model, at)
    training.run([])
    assert order == []  # nothing is trained
    training.run(planned[:3])
    training.run(planned[3:])
    assert order == [("released", 0), ("released", 3)]


def test_schedule_rises_linearly_and_falls_to_zero() -> None:
    rates = [learning_rate(1.0, 0.25, step, 8) for step in range(9)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[5] == pytest.approx(0.5)  # half way down the cosine
    assert rates[8] == pytest.approx(0.0)
    assert learning_rate(1.0, 0.0, 0, 8) == 1.0
    assert learning_rate(1.0, 1.0, 7, 8) == 1.0


def test_one_step_is_adamw_on_the_weighted_mean() -> None:
    model, at = Model(), bench()
    oracle = Model()
    optimizer = torch.optim.AdamW([oracle.weight, oracle.bias], lr=0.05, weight_decay=0.0)
    loss, _ = oracle.loss(ITEMS[:8])
    (loss / sum(i[2] for i in ITEMS[:8])).backward()
    torch.nn.utils.clip_grad_norm_([oracle.weight, oracle.bias], 1.0)
    optimizer.step()
    steady = Settings(0.05, 8, 8, 0.0, 1.0, 50)
    trainer(model, at, steady).run([ITEMS[:8]])
    assert torch.equal(model.weight, oracle.weight)
    assert torch.equal(model.bias, oracle.bias)


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_micro_batches_do_not_change_the_result(micro: int) -> None:
    whole, split = Model(), Model()
    at = bench()
    trainer(whole, at).run(batches(at))
    trainer(split, bench(), Settings(0.05, 8, micro, 0.2, 1.0, 2)).run(batches(at))
    torch.testing.assert_close(split.weight, whole.weight, rtol=1e-5, atol=1e-6)
    assert split.calls == 9 * math.ceil(8 / micro)


@pytest.mark.parametrize("fail_at", [1, 4, 5, 9])
def test_interrupted_and_resumed_is_the_same_bit_for_bit(fail_at: int) -> None:
    whole, at = Model(), bench()
    trainer(whole, at).run(batches(at), {"scores": [0.5]})

    store = SafetensorsStore()
    killed = Model()
    killed.fail_at = fail_at
    with pytest.raises(KeyboardInterrupt):
        trainer(killed, bench(store)).run(batches(at), {"scores": [0.5]})

    resumed, again = Model(), bench(store)
    resumed.frozen.zero_()
    training = trainer(resumed, again)
    meta = training.restore()
    done = (fail_at - 1) // 2 * 2
    assert training.step == done
    assert meta == (None if done == 0 else {"scores": [0.5]})
    if done:
        assert torch.equal(resumed.frozen, whole.frozen)
    training.run(batches(at)[training.step :], {"scores": [0.5]})
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)
    assert again.ledger.tuning.tokens == at.ledger.tuning.tokens


def test_several_runs_are_one_training() -> None:
    whole, pieces, at = Model(), Model(), bench()
    trainer(whole, at).run(batches(at))
    training = trainer(pieces, bench())
    for i in range(0, 9, 3):
        training.run(batches(at)[i : i + 3])
    assert torch.equal(pieces.weight, whole.weight)


def test_stops_before_the_step_that_the_budget_cannot_pay() -> None:
    model, at = Model(), bench(tokens=3 * 80 + 79)
    training = trainer(model, at)
    assert training.run(batches(at)) is False
    assert training.step == 3
    assert at.ledger.tuning.tokens == 240
    fresh = trainer(Model(), at)
    fresh.restore()
    assert fresh.step == 3


def test_bfloat16_parameters_are_updated_in_float32() -> None:
    """Steps of 1e-4 are lost on a bfloat16 weight near 1 (its spacing there is 2^-8) unless they add up in float32."""
    model, at = Model(torch.bfloat16), bench()
    small = Settings(1e-4, 8, 8, 0.0, 1.0, 50)
    training = trainer(model, at, small, total_steps=100)
    training.run([ITEMS[:8]] * 100)
    assert model.weight.dtype == torch.bfloat16
    assert not torch.equal(model.weight, torch.linspace(-1, 1, 4).bfloat16())
    saved = at.load_checkpoint("least-squares")
    assert saved is not None
    assert all(t.dtype == torch.float32 for t in saved[0].values())


def test_divergence_stops_with_the_step_the_items_and_the_fix() -> None:
    model, at = Model(), bench()
    training = trainer(model, at, Settings(0.05, 8, 2, 0.2, 1.0, 2))
    training.run(batches(at)[:2])
    before = model.weight.detach().clone()
    bad: Item = ((math.inf, 0.0, 0.0, 0.0), 0.0, 1.0)
    with pytest.raises(CotuneError, match=r"loss is inf at step 3 of 9, on item-2, bad\. Lower the learning rate"):
        training.run([[ITEMS[0], ITEMS[1], ITEMS[2], bad]])  # the second micro-batch
    assert torch.equal(model.weight, before)
    kept = trainer(Model(), at)
    kept.restore()
    assert kept.step == 2


def test_a_gradient_that_is_no_number_names_the_whole_batch() -> None:
    class Root(Model):
        """A finite loss with an infinite gradient."""

        def loss(self, items: Sequence[Item]) -> tuple[Tensor, dict[str, float]]:
            return (self.weight * 0).sum().sqrt(), {}

    with pytest.raises(CotuneError, match=r"gradient norm is nan at step 1 of 9, on item-0, item-1, item-2\. Lower"):
        trainer(Root(), bench(), Settings(0.05, 8, 2, 0.2, 1.0, 2)).run([ITEMS[:3]])


def test_too_little_memory_names_what_to_change() -> None:
    class Large(Model):
        def loss(self, items: Sequence[Item]) -> tuple[Tensor, dict[str, float]]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(CotuneError, match=r"memory.*micro_batch_size \(now 8;.*gradient_checkpointing"):
        trainer(Large(), bench()).run([ITEMS[:8]])


def test_refuses_another_trainings_checkpoint() -> None:
    at = bench()
    trainer(Model(), at).run(batches(at)[:2])
    with pytest.raises(CotuneError, match="another training run"):
        trainer(Model(), at, total_steps=10).restore()


def test_a_batch_without_weight_is_an_error() -> None:
    at = bench()
    with pytest.raises(CotuneError, match="nothing to learn"):
        trainer(Model(), at).run([[((0.0, 0.0, 0.0, 0.0), 0.0, 0.0)]])


def test_an_epoch_has_every_item_once() -> None:
    epoch = shuffled_batches(ITEMS, 5, random.Random(1))
    assert [len(b) for b in epoch] == [5, 5, 5, 5, 4]
    assert sorted(i for b in epoch for i in b) == sorted(ITEMS)
