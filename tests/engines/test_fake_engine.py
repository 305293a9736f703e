"""The fake engine keeps the promises that strategies rely on."""

from __future__ import annotations

from cotune.engines.base import Request, Sampling
from cotune.engines.fake import FakeEngine
from cotune.models.lora import LoraFactors


def test_answers_depend_on_prompt_adapter_and_sample(random_base) -> None:
    adapter = LoraFactors.zero(random_base.model, ["q_proj"], 1)
    engine = FakeEngine(lambda prompt, digest, sample: f"{prompt} {digest} {sample}")
    out = engine.generate([Request("a b"), Request("c", adapter)], Sampling(9, temperature=1.0, n=2, logprobs=True))
    assert [[c.text for c in row] for row in out] == [
        ["a b None 0", "a b None 1"],
        [f"c {adapter.digest} 0", f"c {adapter.digest} 1"],
    ]
    assert [row[0].prompt_tokens for row in out] == [2, 1]
    assert len(out[0][0].token_ids) == len(out[0][0].logprobs) == 4 and not out[0][0].truncated
    assert [r.prompt for r in engine.calls] == ["a b", "c"]


def test_greedy_samples_are_alike_and_long_texts_are_cut() -> None:
    engine = FakeEngine(lambda prompt, digest, sample: f"one two {sample}")
    [row] = engine.generate([Request("x")], Sampling(2, n=2))
    assert [(c.text, c.truncated, len(c.token_ids)) for c in row] == [("one two", True, 2)] * 2


def test_the_plan_covers_every_request_once() -> None:
    engine = FakeEngine(lambda *_: "", batch_size=2)
    assert engine.plan([Request("x")] * 5, Sampling(1)) == [[0, 1], [2, 3], [4]]
