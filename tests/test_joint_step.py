"""What the benchmarks of a joint step call still fits them: they are run seldom. Nothing here is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cotune.config import resolve


@pytest.fixture
def joint_step(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import joint_step

    yield joint_step
    for name in ("joint_step", "random_models"):
        del sys.modules[name]


def test_a_joint_step_and_its_halves_run_as_the_benchmark_builds_them(joint_step):
    settings = resolve({"strategy": "joint", "task": "micro-gsm8k", "model": "tiny"}).joint
    settings = settings.model_copy(update={"batch_size": 2, "micro_batch_size": 2})
    actor, generator = (joint_step.random_model("tiny") for _ in range(2))
    items = joint_step.items_for(actor, generator, 2)
    runs, tuner = joint_step.variants(actor, generator, settings, False, items)
    for variant in runs.values():
        before = {name: p.detach().clone() for name, p in variant.parameters.items()}
        assert variant.step()
        assert any(not before[name].equal(p) for name, p in variant.parameters.items())
    spent = joint_step.parts(actor, tuner, items, settings.alpha, False, rounds=1)
    assert len(spent) == 4
    assert all(seconds > 0 for seconds in spent.values())
