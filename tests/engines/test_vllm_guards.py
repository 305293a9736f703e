"""Faults seen with vLLM 0.32 that would give wrong numbers or hang. Each test fails without the engine's guard."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cotune
from cotune.engines.base import Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine
from cotune.engines.vllm_engine import VllmEngine, slot_bytes
from cotune.engines.vllm_server import Server, _memory_folder
from cotune.errors import CotuneError, UsageError
from cotune.models.base import BaseModel
from cotune.models.lora import LoraFactors
from cotune.tasks import task as make_task
from cotune.tasks.data import load as load_data
from cotune.values import Prompt

GREEDY = Sampling(16)
Adapter = Callable[[int], LoraFactors]


@pytest.fixture(scope="module")
def prompts(base: BaseModel) -> list[str]:
    task = make_task("micro-gsm8k")
    rows = load_data(task, None, seed=0, limit_test=16, val_max=10).test()
    return [base.render(task.messages(Prompt(task.seed_instruction), example)) for example in rows]


def said(engine: VllmEngine | TransformersEngine, requests: list[Request]) -> list[tuple[int, ...]]:
    return [row[0].token_ids for row in engine.generate(requests, GREEDY)]


def test_a_row_without_adapter_never_gets_a_neighbours(
    engine: VllmEngine, reference: TransformersEngine, prompts: list[str], adapter: Adapter
) -> None:
    """All slots are filled: from then on vLLM 0.32 on a CPU gives rows without an adapter the last slot's."""
    requests = [Request(p, adapter(i) if i % 2 else None) for i, p in enumerate(prompts)]
    assert len({r.adapter.digest for r in requests if r.adapter}) > engine.slots
    assert said(engine, requests) == said(reference, requests)


def test_adapters_are_served_in_waves_and_come_back_in_order(
    engine: VllmEngine, reference: TransformersEngine, prompts: list[str], adapter: Adapter
) -> None:
    requests = [Request(p, adapter(100 + i)) for i, p in enumerate(prompts)]
    batches = engine.plan(requests, GREEDY)
    assert sorted(i for batch in batches for i in batch) == list(range(len(requests)))
    assert all(len(batch) <= engine.slots for batch in batches)
    assert said(engine, requests) == said(reference, requests)


def test_slots_are_as_many_as_fit_the_memory(engine: VllmEngine, base: BaseModel, prompts: list[str]) -> None:
    """What is reckoned for a slot is what vLLM sets aside, or little more (it may have none for the tables)."""
    engine.generate([Request(prompts[0])], GREEDY)
    worker = engine._running()._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layers = worker.model_runner.lora_manager._adapter_manager.modules.values()
    stacks = [getattr(layer, name) for layer in layers for name in ("lora_a_stacked", "lora_b_stacked")]
    tensors = [t for stack in stacks for t in (stack if isinstance(stack, tuple | list) else [stack])]
    real = sum(t.numel() * t.element_size() for t in tensors) / engine.slots
    assert real <= slot_bytes(base, 8) <= 2 * real
    gib = slot_bytes(base, 16) * 5.5 / 1024**3  # of rank 9 served as 16
    assert VllmEngine(base, max_rank=9, adapter_gib=gib).slots == 5
    assert VllmEngine(base, max_rank=9, adapter_gib=gib, sequences=3).slots == 3
    assert VllmEngine(base, max_rank=9, adapter_gib=gib, adapters=8).slots == 8
    assert VllmEngine(base, max_rank=9, adapter_gib=1e-9).slots == 1


def test_requests_without_adapter_are_planned_apart(engine: VllmEngine, prompts: list[str], adapter: Adapter) -> None:
    one = adapter(0)
    requests = [Request(p, one if i % 2 else None) for i, p in enumerate(prompts)]
    assert [{requests[i].adapter for i in batch} for batch in engine.plan(requests, GREEDY)] == [{None}, {one}]


def test_an_adapter_for_another_model_is_an_error_and_the_engine_goes_on(
    engine: VllmEngine, prompts: list[str], adapter: Adapter
) -> None:
    """Named in a request without having been added, it would leave the next call hanging."""
    before = said(engine, [Request(prompts[0])])
    lora_a, lora_b = next(iter(adapter(0).factors.values()))
    stranger = LoraFactors({"model.layers.0.self_attn.nope": (lora_a, lora_b)}, 1.0)
    with pytest.raises(CotuneError, match="--engine transformers"):
        engine.generate([Request(prompts[0], stranger)], GREEDY)
    assert said(engine, [Request(prompts[0])]) == before


def test_a_rank_above_the_engines_is_refused(engine: VllmEngine, base: BaseModel, prompts: list[str]) -> None:
    wide = LoraFactors.zero(base.model, ["q_proj"], 16)
    with pytest.raises(UsageError, match=r"rank 16.*--engine transformers"):
        engine.generate([Request(prompts[0], wide)], GREEDY)
    with pytest.raises(UsageError, match="up to rank 512"):
        VllmEngine(base, max_rank=513)


def test_a_prefix_cached_under_one_adapter_does_not_serve_another(
    engine: VllmEngine, reference: TransformersEngine, prompts: list[str], adapter: Adapter
) -> None:
    """The same prompts under one adapter after the other, each in the slot of the one before."""
    for seed in (200, 201, 200, 202):
        requests = [Request(p, adapter(seed)) for p in prompts]
        assert said(engine, requests) == said(reference, requests)
    loaded = engine._running().loaded
    assert [lora.lora_name for lora in loaded.values()] == list(loaded)  # a name is a content


def test_an_adapter_is_loaded_once(
    engine: VllmEngine, prompts: list[str], adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    loads = []
    load = WorkerLoRAManager._load_adapter
    monkeypatch.setattr(
        WorkerLoRAManager, "_load_adapter", lambda self, lora: (loads.append(lora.lora_name), load(self, lora))[1]
    )
    one = adapter(300)
    for _ in range(2):
        engine.generate([Request(p, one) for p in prompts], GREEDY)
    assert loads == [one.digest]


def test_files_of_adapters_do_not_pile_up(engine: VllmEngine, prompts: list[str], adapter: Adapter) -> None:
    engine.generate([Request(p, adapter(400 + i)) for i, p in enumerate(prompts)], GREEDY)
    server = engine._running()
    folders = [path for path in Path(server._folder.name).iterdir() if path.is_dir()]
    assert len(folders) == len(server.loaded) <= engine.slots


def test_weights_changed_in_memory_are_refused(base: BaseModel) -> None:
    with pytest.raises(UsageError, match="generator_training"):
        VllmEngine(replace(base, folder=None))


def test_nothing_is_pickled_to_another_process() -> None:
    for path in (Path(cotune.__file__).parent / "engines").glob("vllm_*.py"):
        text = path.read_text(encoding="utf-8")
        assert "collective_rpc" not in text and "INSECURE" not in text, path.name
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in os.environ


def test_the_canary_finds_an_adapter_that_does_nothing(
    engine: VllmEngine, base: BaseModel, prompts: list[str], adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Server._add

    def dead(self: Server, real: LoraFactors) -> None:
        zero = LoraFactors({n: (a, torch.zeros_like(b)) for n, (a, b) in real.factors.items()}, real.scaling)
        add(self, zero)
        self.loaded[real.digest] = self.loaded.pop(zero.digest)

    monkeypatch.setattr(Server, "_add", dead)
    with pytest.raises(CotuneError, match="changes no log-probability"):
        engine.generate([Request(prompts[0], adapter(500))], GREEDY)


def test_the_canary_finds_an_adapter_that_is_not_a_number(
    engine: VllmEngine, prompts: list[str], adapter: Adapter
) -> None:
    broken = LoraFactors({n: (a, b * float("nan")) for n, (a, b) in adapter(0).factors.items()}, 1.0)
    with pytest.raises(CotuneError, match="not numbers"):
        engine.generate([Request(prompts[0], broken)], GREEDY)


def test_after_a_failed_canary_the_adapter_is_not_kept(
    engine: VllmEngine, prompts: list[str], adapter: Adapter
) -> None:
    broken = LoraFactors({n: (a, b * float("nan")) for n, (a, b) in adapter(1).factors.items()}, 1.0)
    for _ in range(2):
        with pytest.raises(CotuneError, match="not numbers"):
            engine.generate([Request(prompts[0], broken)], GREEDY)


def test_engines_with_the_same_weights_and_settings_share_one_vllm(
    engine: VllmEngine, base: BaseModel, prompts: list[str], reference: TransformersEngine, adapter: Adapter
) -> None:
    """And others live beside it: G and M, or the runs of a study in one process."""
    twin = VllmEngine(base, sequences=16, adapters=4, max_rank=8, cache_gib=0.25)
    other = VllmEngine(base, sequences=4, adapters=2, max_rank=8, cache_gib=0.25)
    requests = [Request(prompts[0], adapter(0)), Request(prompts[1])]
    assert said(engine, requests) == said(twin, requests) == said(other, requests) == said(reference, requests)
    assert engine._running() is twin._running() is not other._running()
    del other
    assert said(engine, requests) == said(reference, requests)


def test_adapters_left_by_a_killed_process_are_swept() -> None:
    left = (
        Path(tempfile.gettempdir() if not os.access("/dev/shm", os.W_OK) else "/dev/shm")
        / "cotune-adapters-999999999-x"
    )
    left.mkdir()
    _memory_folder().cleanup()
    assert not left.exists()


def test_more_prompt_tokens_than_fit_one_step_can_be_sampled(engine: VllmEngine, base: BaseModel) -> None:
    """A prompt that vLLM reads in pieces makes a seeded request fail on a CPU."""
    requests = [Request(f"{i} " + "x y " * 600) for i in range(20)]
    assert sum(engine.token_count(r.prompt) for r in requests) > 2 * 8192
    rows = engine.generate(requests, Sampling(4, temperature=1.0, seed=1))
    assert all(row[0].token_ids or not row[0].truncated for row in rows)


def test_threads_stay_as_they_were(engine: VllmEngine, prompts: list[str]) -> None:
    engine.generate([Request(prompts[0])], GREEDY)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)
