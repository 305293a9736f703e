"""The same requests through both engines: the same tokens up to near-ties, the same log-probabilities."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import islice, zip_longest
from pathlib import Path

import pytest

from cotune.engines.base import Engine, Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine
from cotune.engines.vllm_engine import VllmEngine
from cotune.models.base import BaseModel
from cotune.models.lora import LoraFactors
from cotune.tasks import TASKS
from cotune.tasks import task as make_task
from cotune.tasks.data import load as load_data
from cotune.values import Completion, Prompt

PROMPTS = 500
GREEDY = Sampling(32, logprobs=True)
NEAR_TIE = 1e-4
CLOSE = 1e-3
LONGEST = 600  # tokens of a prompt: vLLM gathers an adapter's factors for every token on a CPU


@pytest.fixture(scope="module")
def prompts(base: BaseModel) -> list[str]:
    """500 rendered questions: of all eight tasks where the benchmarks' rows are at hand, else of the offline ones."""
    data = os.environ.get("COTUNE_DATA", str(Path(__file__).parents[3] / "shared" / "data"))
    names = [name for name in TASKS if name.startswith("micro-") or Path(data, name).is_dir()]
    of_task: list[list[str]] = []
    for name in names:
        task = make_task(name)
        rows = load_data(
            task, None if name.startswith("micro-") else data, seed=0, limit_test=PROMPTS, val_max=10
        ).test()
        rendered = (base.render(task.messages(Prompt(task.seed_instruction), example)) for example in rows)
        of_task.append([prompt for prompt in rendered if len(base.encode(prompt)) <= LONGEST])
    in_turn = (prompt for row in zip_longest(*of_task) for prompt in row if prompt is not None)
    return list(islice(in_turn, PROMPTS))


def answers(engine: Engine, requests: Sequence[Request], sampling: Sampling = GREEDY) -> list[list[Completion]]:
    done: list[list[Completion]] = [[] for _ in requests]
    for batch in engine.plan(requests, sampling):
        for i, completions in zip(batch, engine.generate([requests[i] for i in batch], sampling), strict=True):
            done[i] = completions
    return done


@pytest.mark.parametrize("adapters", ["none", "static", "generated"])
def test_both_engines_say_the_same(
    engine: VllmEngine,
    reference: TransformersEngine,
    prompts: list[str],
    adapter: Callable[[int], LoraFactors],
    adapters: str,
) -> None:
    assert len(prompts) == PROMPTS
    chosen = {"none": lambda i: None, "static": lambda i: adapter(0), "generated": adapter}[adapters]
    requests = [Request(prompt, chosen(i)) for i, prompt in enumerate(prompts)]
    ours, theirs = (answers(e, requests) for e in (reference, engine))
    equal = 0
    for request, [a], [b] in zip(requests, ours, theirs, strict=True):
        shared = next((t for t, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y), None)
        if shared is None and a.token_ids == b.token_ids:
            equal += 1
            assert a.truncated == b.truncated
            assert a.logprobs == pytest.approx(b.logprobs, abs=CLOSE)
        else:
            at = shared if shared is not None else min(len(a.token_ids), len(b.token_ids))
            assert gap(reference, request, a.token_ids[:at]) < NEAR_TIE
    assert equal >= 0.995 * PROMPTS


def gap(reference: TransformersEngine, request: Request, said: tuple[int, ...]) -> float:
    """Between the two likeliest next tokens, in log-probability."""
    import torch

    from cotune.models.lora import attached, stack

    ids = torch.tensor([reference.base.encode(request.prompt) + list(said)])
    adapter = request.adapter
    assert adapter is None or isinstance(adapter, LoraFactors)
    with torch.no_grad(), attached(reference.base.model, *stack([adapter])):
        best = reference.base.model(input_ids=ids).logits[0, -1].log_softmax(-1).topk(2).values
    return float(best[0] - best[1])


def test_samples_have_their_own_streams_and_come_again(engine: VllmEngine, prompts: list[str]) -> None:
    requests = [Request(prompt) for prompt in prompts[:8]]
    sampling = Sampling(16, temperature=1.0, n=4, seed=3, logprobs=True)
    once, again = engine.generate(requests, sampling), engine.generate(requests, sampling)
    assert once == again
    assert len({c.token_ids for row in once for c in row}) > 16
    assert engine.generate(requests, Sampling(16, temperature=1.0, n=4, seed=4, logprobs=True)) != once


def test_sampled_log_probabilities_are_those_of_the_reference(
    engine: VllmEngine, reference: TransformersEngine, prompts: list[str]
) -> None:
    requests = [Request(prompt) for prompt in prompts[:8]]
    rows = engine.generate(requests, Sampling(16, temperature=1.5, top_p=0.9, seed=1, logprobs=True))
    scored = reference.score(requests, [row[0].token_ids for row in rows])
    for [completion], expected in zip(rows, scored, strict=True):
        assert completion.logprobs == pytest.approx(expected, abs=CLOSE)


def test_greedy_samples_are_one_decoded_and_repeated(engine: VllmEngine, prompts: list[str]) -> None:
    [row] = engine.generate([Request(prompts[0])], Sampling(8, n=3))
    assert row == [row[0]] * 3


def test_a_prompt_without_room_is_truncated_and_empty(engine: VllmEngine, base: BaseModel) -> None:
    long = "x " * base.context_length
    rows = engine.generate([Request(long), Request("x")], Sampling(8))
    assert rows[0] == [Completion("", (), len(base.encode(long)), truncated=True)]
    assert rows[1][0].token_ids
