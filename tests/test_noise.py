"""Engines that do not repeat themselves: what the run records of it, to the digit, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cotune import experiment, noise, planning
from cotune.bench import MemoryStore
from cotune.config import RunConfig, resolve
from cotune.engines.base import Sampling
from cotune.engines.fake import FakeEngine
from cotune.engines.transformers_engine import TransformersEngine
from cotune.evaluate import evaluate
from cotune.models.base import BaseModel, load
from cotune.values import Conditioning, Prompt
from cotune.wording import noise_lines
from tests.toy import Sums, bench, example, question_of, right_answer

EXAMPLES = tuple(example(i) for i in range(10))
SAMPLING = Sampling(16)


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return load(str(random_model_dir))


class Noisy(FakeEngine):
    """Right the first time. Another time: the first question wrong, the second in other words, the rest as before."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        super().__init__(self._say, batch_size=4, repeats=False)

    def _say(self, rendered: str, adapter: str | None, sample: int) -> str:
        question = question_of(rendered)
        self.asked[question] = self.asked.get(question, 0) + 1
        if self.asked[question] > 1 and question == EXAMPLES[0].question:
            return "I do not know"
        again = self.asked[question] > 1 and question == EXAMPLES[1].question
        return ("so, " if again else "") + right_answer(rendered)


def measured(engine: FakeEngine, base: BaseModel, store: MemoryStore, examples: int | None) -> Any:
    """The noise of one evaluation of all examples, and the bench it ran on."""
    at = bench(base, engine, store=store)
    with at.ledger.measuring():
        first = evaluate(Sums(), EXAMPLES, [Conditioning(Prompt("Add."))] * 10, SAMPLING, at)
        return noise.measure(Sums(), first, SAMPLING, at, examples), at


def test_a_noisy_engine_is_measured_exactly(base: BaseModel) -> None:
    engine, store = Noisy(), MemoryStore()
    found, at = measured(engine, base, store, 8)
    assert found == {
        "promised": False,
        "examples": 8,
        "completions_differ": 2 / 8,
        "grades_differ": 1 / 8,
        "mean_score_difference": 1 / 8,
    }
    assert [engine.asked[e.question] for e in EXAMPLES] == [2] * 8 + [1] * 2  # generated anew, the first 8 alone
    assert (at.ledger.measuring_account.calls, at.ledger.tuning.calls) == (18, 0)

    resumed = FakeEngine(lambda *_: pytest.fail("this was answered before"), batch_size=4, repeats=False)
    assert measured(resumed, base, store, 8)[0] == found


@pytest.mark.parametrize(
    ("repeats", "examples", "answered"),
    [(True, None, None), (True, 3, 3), (False, None, 10), (False, 0, None), (False, 99, 10)],
)
def test_who_is_asked_twice(base: BaseModel, repeats: bool, examples: int | None, answered: int | None) -> None:
    """By default an engine that does not promise, up to 64 examples; a number says how many, whoever it is."""
    engine = FakeEngine(lambda rendered, *_: right_answer(rendered), repeats=repeats)
    found, _ = measured(engine, base, MemoryStore(), examples)
    assert (found["promised"], found.get("examples")) == (repeats, answered)
    assert len(engine.calls) == 10 + (answered or 0)
    if answered:
        assert found["completions_differ"] == found["grades_differ"] == found["mean_score_difference"] == 0


def test_float32_on_a_cpu_is_promised_and_16_bits_are_not(base: BaseModel, random_model_dir: Path) -> None:
    assert TransformersEngine(base).repeats
    assert not TransformersEngine(load(str(random_model_dir), dtype="bfloat16")).repeats


def test_a_run_records_it_and_show_tells_it(random_model_dir: Path, tmp_path: Path) -> None:
    small = {"limit_train": 8, "limit_val": 4, "limit_test": 6, "decoding": {"max_new_tokens": 6}}
    names = {"strategy": "zero-shot", "model": str(random_model_dir), "task": "micro-cosmosqa"}
    rough = {"runner": {"dtype": "bfloat16"}}

    def noise_of(config: RunConfig) -> tuple[dict[str, Any], int]:
        summary = experiment.run(config, tmp_path).summary
        written = json.loads((tmp_path / config.run_name / "summary.json").read_text())
        assert written["noise"] == summary["noise"]
        return summary["noise"], summary["cost"]["measuring"]["calls"]

    assert noise_of(resolve(small, names)) == ({"promised": True}, 6)
    found, calls = noise_of(resolve(small, names, rough))
    assert (found["promised"], found["examples"], calls) == (False, 6, 12)
    assert planning.plan(resolve(small, names))["measuring_at_most"]["calls"] == 6
    assert planning.plan(resolve(small, names, rough))["measuring_at_most"]["calls"] == 12
    asked = resolve(small, names, {"noise_examples": 2})
    assert noise_of(asked)[1] == planning.plan(asked)["measuring_at_most"]["calls"] == 8


def test_noise_in_words() -> None:
    found = {"promised": False, "examples": 8, "completions_differ": 0.25, "grades_differ": 0.125}
    assert noise_lines(found | {"mean_score_difference": 0.0625}) == [
        "  noise: 8 examples answered twice, 25.0% of completions and 12.5% of grades differ, "
        "scores by 0.062 on average"
    ]
    assert noise_lines({"promised": True}) == []
    assert "not measured" in noise_lines({"promised": False})[0]
