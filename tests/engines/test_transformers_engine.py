"""The decoding loop against one that has no batch, no padding and no cache."""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference.dense_lora import decode_one

from cotune.config import resolve
from cotune.engines import engine, vllm_engine
from cotune.engines.base import Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine, _choose, _draws, _Row
from cotune.errors import CotuneError, UsageError
from cotune.models.base import BaseModel, load, weights_digest
from cotune.models.lora import LoraFactors, init_static, target_linears
from cotune.values import Completion

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away", "from", "it"]


def random_adapter(base: BaseModel, seed: int, rank: int = 4) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (
            torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5,
            torch.randn(linear.out_features, rank, generator=generator) * 0.1,
        )
        for name, linear in target_linears(base.model, ["q_proj", "v_proj", "up_proj"]).items()
    }
    return LoraFactors(factors, 2.0)


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    """With fifteen tokens that end a turn, so that rows finish at very different lengths."""
    loaded = load(str(random_model_dir))
    loaded.model.generation_config.eos_token_id = list(range(200, 215))
    return loaded


@pytest.fixture(scope="module")
def requests(base: BaseModel) -> list[Request]:
    """Twelve prompts of 30 to 110 tokens; no adapter, a static one, and one for each of the rest."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 15))) for _ in range(12)]
    static = random_adapter(base, 99)
    adapters = [None, static, None, static, static, None, *(random_adapter(base, i) for i in range(6))]
    return [
        Request(base.render([{"role": "user", "content": text}]), adapter)
        for text, adapter in zip(texts, adapters, strict=True)
    ]


@pytest.fixture(scope="module")
def transformers_engine(base: BaseModel) -> TransformersEngine:
    return TransformersEngine(base, batch_size=8)


def oracle(base: BaseModel, request: Request, max_new_tokens: int, uniforms=None, temperature=1.0):
    adapter = request.adapter
    factors, scaling = (adapter.factors, adapter.scaling) if isinstance(adapter, LoraFactors) else ({}, 1.0)
    prompt = base.encode(request.prompt)
    return decode_one(
        base.model, prompt, factors, scaling, set(base.end_of_turn_ids), max_new_tokens, uniforms, temperature
    )


def same(one: Completion, tokens: list[int], logprobs: list[float], ended: bool) -> None:
    assert (list(one.token_ids), one.truncated) == (tokens, not ended)
    assert one.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_greedy_rows_equal_the_oracle_each_under_its_own_adapter(base, requests, transformers_engine) -> None:
    results = transformers_engine.generate(requests, Sampling(12, logprobs=True))
    for request, [completion] in zip(requests, results, strict=True):
        same(completion, *oracle(base, request, 12))
        assert completion.prompt_tokens == len(base.encode(request.prompt))
        assert completion.text == base.decode(completion.token_ids)
    lengths = {len(r[0].token_ids) for r in results}
    assert len(lengths) > 4 and any(r[0].truncated for r in results)  # rows did leave the batch at different steps


def test_sampled_rows_equal_the_oracle_on_the_same_uniform_numbers(base, requests, transformers_engine) -> None:
    sampling = Sampling(16, temperature=0.8, n=3, seed=5, logprobs=True)
    results = transformers_engine.generate(requests[:7], sampling)
    for request, row in zip(requests[:7], results, strict=True):
        for sample, completion in enumerate(row):
            content = hashlib.sha256(f"5\n{sample}\n{request.prompt}".encode()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(content[:8], "big") >> 1)
            uniforms = torch.rand(16, generator=stream, dtype=torch.float64).tolist()
            same(completion, *oracle(base, request, 16, uniforms, temperature=0.8))
    assert all(len({c.token_ids for c in row}) > 1 for row in results)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(24), Sampling(24, temperature=1.0, n=2, seed=3), Sampling(24, temperature=1.3, top_p=0.9, seed=4)],
    ids=["greedy", "sampled", "top-p"],
)
def test_tokens_do_not_depend_on_the_batch(base, requests, transformers_engine, sampling) -> None:
    whole = transformers_engine.generate(requests, sampling)
    tokens = [[c.token_ids for c in row] for row in whole]
    order = random.Random(1).sample(range(len(requests)), len(requests))
    for batches in ([order], [order[:5], order[5:6], order[6:]], [[i] for i in order]):
        for batch in batches:
            for i, row in zip(batch, transformers_engine.generate([requests[i] for i in batch], sampling), strict=True):
                assert [c.token_ids for c in row] == tokens[i]


def test_a_sample_does_not_depend_on_how_many_are_drawn_but_on_the_seed(requests, transformers_engine) -> None:
    one = transformers_engine.generate(requests[:3], Sampling(16, temperature=1.0, n=1))
    four = transformers_engine.generate(requests[:3], Sampling(16, temperature=1.0, n=4))
    other = transformers_engine.generate(requests[:3], Sampling(16, temperature=1.0, n=1, seed=1))
    assert [row[0] for row in four] == [row[0] for row in one]
    later = [replace(request, first=1) for request in requests[:3]]
    rest = transformers_engine.generate(later, Sampling(16, temperature=1.0, n=3))
    assert [row[1:] for row in four] == rest
    assert [row[0].token_ids for row in other] != [row[0].token_ids for row in one]


def test_greedy_samples_repeat_one_decoding(requests, transformers_engine) -> None:
    [[first, second]] = transformers_engine.generate(requests[:1], Sampling(8, n=2))
    assert first is second


def test_choosing_by_inverse_transform_and_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def token(u: float, **settings: float) -> int:
        return int(
            _choose(
                logits,
                Sampling(1, temperature=settings.pop("temperature", 1.0), **settings),
                torch.tensor([u], dtype=torch.float64),
            )
        )

    assert [token(u) for u in (0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96)] == [0, 0, 1, 1, 2, 2, 3]
    # top_p 0.75 keeps {0.5, 0.3}; their share is 5/8 to 3/8
    assert [token(u, top_p=0.75) for u in (0.62, 0.63, 0.999999)] == [0, 1, 1]
    assert [token(u, top_p=0.5) for u in (0.0, 0.999999)] == [0, 0]
    assert [token(u, top_p=1e-9) for u in (0.0, 0.999999)] == [0, 0]  # never empty
    # temperature 0.5 squares: 0.25, 0.09, 0.0225, 0.0025 of 0.365
    assert [token(u, temperature=0.5) for u in (0.68, 0.69, 0.99, 0.995)] == [0, 1, 2, 3]
    assert int(_choose(logits, Sampling(1), None)) == 0


def test_draws_are_where_the_model_is() -> None:
    """Else sampling on a GPU fails; here the other device is torch's one without data."""
    sampling, elsewhere = Sampling(3, temperature=1.0), torch.device("meta")
    draws_BT = _draws([_Row(0, 0), _Row(0, 1)], [Request("a")], sampling, elsewhere)
    assert (draws_BT.device, draws_BT.shape) == (elsewhere, (2, 3))
    logits_BV = torch.zeros(2, 5, device=elsewhere)
    assert _choose(logits_BV, sampling, draws_BT[:, 0]).device == elsewhere


def test_scores_equal_the_log_probabilities_of_generation(requests, transformers_engine) -> None:
    results = transformers_engine.generate(requests, Sampling(12, temperature=1.0, logprobs=True))
    scores = transformers_engine.score(requests, [row[0].token_ids for row in results])
    for row, score in zip(results, scores, strict=True):
        assert score == pytest.approx(row[0].logprobs, abs=1e-4) and len(score) == len(row[0].token_ids)
    assert transformers_engine.score(requests[:2], [(), (5,)])[0] == []
    assert transformers_engine.score([], []) == []
    assert transformers_engine.score(requests[:1], [()]) == [[]]


def test_the_plan_holds_its_limits_and_covers_every_request_once(base, requests) -> None:
    planner = TransformersEngine(base, batch_size=6, max_batch_tokens=600)
    lengths = [planner.token_count(r.prompt) for r in requests]
    sampling = Sampling(20, temperature=1.0, n=2)
    batches = planner.plan(requests, sampling)
    assert sorted(i for batch in batches for i in batch) == list(range(12))
    for batch in batches:
        assert 2 * len(batch) <= 6
        assert 2 * len(batch) * (max(lengths[i] for i in batch) + 20) <= 600
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)
    assert planner.plan(requests, sampling) == batches
    assert planner.plan([], sampling) == [] and planner.generate([], sampling) == []
    # one request too large for the limits still gets a batch of its own
    assert planner.plan(requests[:2], Sampling(20, temperature=1.0, n=50)) in ([[0], [1]], [[1], [0]])


def test_too_long_prompts_count_as_truncated_and_are_never_cut(base, transformers_engine, caplog) -> None:
    requests = [Request("x" * n) for n in (10, 500, 509)]
    assert sorted(i for batch in transformers_engine.plan(requests, Sampling(20)) for i in batch) == [0, 1, 2]
    assert (
        "2 of 3 prompts are too long" in caplog.text
        and "has 509 tokens, and with 20 new ones only 492 fit its context of 512" in caplog.text
    )
    fits, *over = transformers_engine.generate(requests, Sampling(20, temperature=1.0, n=2))
    assert fits == transformers_engine.generate(requests[:1], Sampling(20, temperature=1.0, n=2))[0]
    assert over == [[Completion("", (), n, truncated=True)] * 2 for n in (500, 509)]
    with pytest.raises(UsageError, match="1 of 1 prompts"):
        transformers_engine.plan(requests[2:], Sampling(20))
    assert transformers_engine.generate([Request("x" * 508)], Sampling(4))[0][0].token_ids  # exactly the context


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_a_batch_without_memory_is_halved_and_says_so(random_model_dir, requests, monkeypatch, caplog, error) -> None:
    base = load(str(random_model_dir))
    cramped = TransformersEngine(base)
    sampling = Sampling(6, temperature=1.0, n=2)
    expected = cramped.generate(requests, sampling)
    forward = base.model.forward

    def no_room_for_more_than_three_rows(*, input_ids, **rest):
        if len(input_ids) > 3:
            raise error
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(base.model, "forward", no_room_for_more_than_three_rows)
    with caplog.at_level(logging.WARNING):
        assert cramped.generate(requests, sampling) == expected
    assert "Out of memory with 24 rows in a batch: going on with halves" in caplog.text
    assert all("forward" not in m.__dict__ for m in base.model.modules() if m is not base.model)


def test_one_row_without_memory_and_other_failures_are_errors(random_model_dir, requests, monkeypatch) -> None:
    base = load(str(random_model_dir))
    plain = TransformersEngine(base)

    def no_room(**_):
        raise MemoryError

    monkeypatch.setattr(base.model, "forward", no_room)
    with pytest.raises(CotuneError, match="one row alone"):
        plain.generate([requests[0], requests[2]], Sampling(2))

    def broken(**_):
        raise RuntimeError("something else")

    monkeypatch.setattr(base.model, "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        plain.generate([requests[0]], Sampling(2))


def test_an_adapter_that_changes_nothing_stops_the_generation(random_model_dir, monkeypatch) -> None:
    base = load(str(random_model_dir))
    adapter = random_adapter(base, 0)
    for layer in base.model.model.layers:  # a fused layer that ignores its submodules' forward
        monkeypatch.setattr(layer, "forward", lambda hidden_states, **_: hidden_states)
    with pytest.raises(CotuneError, match="changes no log-probability"):
        TransformersEngine(base).generate([Request("a"), Request("b", adapter)], Sampling(2))


def test_generation_leaves_the_model_as_it_was(base, requests, transformers_engine) -> None:
    transformers_engine.generate(requests, Sampling(4))
    assert weights_digest(base.model) == base.digest
    assert all("forward" not in m.__dict__ for m in base.model.modules())


def test_adapters_of_another_kind_are_refused(requests, transformers_engine) -> None:
    class Other:
        digest = "x"

    with pytest.raises(UsageError, match="takes LoraFactors as adapters, not Other"):
        transformers_engine.generate([Request("a", Other())], Sampling(2))


def test_engines_by_name(base) -> None:
    config = resolve({"strategy": "zero-shot", "model": "m", "task": "t", "runner": {"batch_size": 3}})
    made = engine(base, config)
    assert isinstance(made, TransformersEngine) and made.batch_size == 3
    with pytest.raises(UsageError, match=r"no engine 'transformer'\. Did you mean 'transformers'"):
        engine(base, config.model_copy(update={"engine": "transformer"}))


def test_vllm_that_is_not_installed_says_how_to(base, monkeypatch) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"vLLM is not installed.*pip install.*--engine transformers"):
        vllm_engine.VllmEngine(base)


@pytest.mark.parametrize("strategy", ["lora-only", "sequential"])
def test_dora_is_refused_by_vllm_before_anything_is_trained(base, strategy: str) -> None:
    """Whether it is installed or not; left alone, it refuses such an adapter when it is first loaded."""
    layer = {"strategy": strategy, "model": "m", "task": "t", "engine": "vllm", "weights": {"variant": "dora"}}
    with pytest.raises(UsageError, match=r"'dora' trains what vLLM does not serve.*Take --engine transformers"):
        engine(base, resolve(layer))


def test_vllm_refuses_a_dora_adapter_that_it_is_given(base, monkeypatch) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: name)  # it is refused before vLLM is started
    served = vllm_engine.VllmEngine(base, max_rank=4)
    adapter = LoraFactors.snapshot(init_static(base.model, ["q_proj"], 4, torch.Generator(), dora=True), 1.0)
    with pytest.raises(UsageError, match=rf"Adapter {adapter.digest} is what vLLM does not serve.*DoRA"):
        served.generate([Request("a", adapter)], Sampling(2))


def test_threads_are_a_setting_with_one_for_small_models(base) -> None:
    before = torch.get_num_threads()
    try:
        TransformersEngine(base, threads=2)
        assert torch.get_num_threads() == 2
        TransformersEngine(base)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
