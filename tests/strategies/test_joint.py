"""The joint strategy as a whole on random models: what it hands over, resume, budgets. Real training, tiny sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.bench import Bench, MemoryStore
from cotune.engines.base import Engine, Request, Sampling
from cotune.errors import CotuneError, UsageError
from cotune.evaluate import evaluate
from cotune.ledger import Ledger
from cotune.metatuned import MetaTuned
from cotune.models.base import BaseModel, load, weights_digest
from cotune.models.lora import LoraFactors
from cotune.strategies import joint as joint_module
from cotune.strategies import load_tuned
from cotune.strategies.base import Fixed, Problem
from cotune.values import Completion
from tests.strategies.joint_lab import (
    ANSWERS,
    SEED,
    Lab,
    changed,
    key,
    llama,
    saved,
    scripted,
    talkative,
    untrained,
)


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return talkative(load(str(random_model_dir)))


@pytest.fixture(scope="module")
def other() -> BaseModel:
    return llama()


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_tune_leaves_the_models_alone_and_survives_saving(
    base: BaseModel, other: BaseModel, training: str, tmp_path: Path
) -> None:
    generator = base if training == "full" else other
    before = weights_digest(base.model), weights_digest(generator.model)
    lab = Lab(base, changed(generator_training=training, rollouts=8, rollout_examples=8), generator=generator)
    tuned = lab.tune()
    assert isinstance(tuned, MetaTuned)
    assert (weights_digest(base.model), weights_digest(generator.model)) == before
    fresh = untrained(lab).tuner.parameters
    assert all(e["kept"] for e in lab.of("rollouts")) and any(
        e["fallbacks"] < e["examples"] for e in lab.of("generated_prompts")
    )
    moved = {n.split("/")[0] for n, p in tuned.tuner.parameters.items() if not torch.equal(p, fresh[n])}
    assert moved == {"shared", "prompt", "lora"}

    ours = key(tuned, lab)
    assert len({adapter for _, adapter in ours}) == len(ours)  # an adapter of its own for every example
    assert set(saved(tuned, tmp_path)) == {"tuned.json", "metatuner.safetensors"}
    again = load_tuned(tmp_path, generator)
    assert key(again, lab) == ours

    with pytest.raises(UsageError, match="generator"):
        load_tuned(tmp_path, other if generator is base else base)
    if generator is other:
        wrong = Bench(other, lab.make_engine(other), lab.make_engine, Ledger(), MemoryStore(), 3)
        with pytest.raises(UsageError, match="another model"):
            again.condition(lab.problem.val, wrong)
    (tmp_path / "metatuner.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="damaged"):
        load_tuned(tmp_path, generator)


def test_the_best_validated_state_comes_back(base: BaseModel) -> None:
    lab = Lab(base)
    tuned = lab.tune()
    scores = [e["val_score"] for e in lab.of("validation")]
    assert len(scores) == 3 and max(scores) > min(scores)  # else this shows nothing
    val = lab.problem.val[:3]
    found = evaluate(lab.problem.task, val, tuned.condition(val, lab.bench), ANSWERS, lab.bench)
    assert found.score == max(scores)
    (chosen,) = lab.of("chosen")
    assert (chosen["val_score"], chosen["round"]) == (max(scores), scores.index(max(scores)))
    pull = lab.of("agreement")
    assert pull and all(-1 <= e["cosine"] <= 1 and e["prompt_gradient"] > 0 for e in pull)


class Killed(BaseException):
    """As a kill would: not an Exception that a strategy could catch."""


@dataclass
class Stopping:
    """The real engine until batch `stop_at`."""

    inner: Engine
    stop_at: int
    name: str = "transformers"
    repeats: bool = True
    rows_apart: bool = False
    batches: int = 0

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        return self.inner.plan(requests, sampling)

    def token_count(self, prompt: str) -> int:
        return self.inner.token_count(prompt)

    def release(self) -> None:
        self.inner.release()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        self.batches += 1
        if self.batches > self.stop_at:
            raise Killed
        return self.inner.generate(requests, sampling)


def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Stopping(Lab.make_engine(base), stop_at=10**9)
    whole = Lab(base, engine=counter)
    expected = saved(whole.tune(), tmp_path / "whole")
    spent, batches = whole.ledger.tuning.tokens, counter.batches
    real = joint_module.joint_terms

    def resume(store: MemoryStore, name: str) -> None:
        lab = Lab(base, store=store)
        assert saved(lab.tune(), tmp_path / name) == expected
        assert lab.ledger.tuning.tokens == spent

    for stop_at in range(0, batches, 4):
        store = MemoryStore()
        with pytest.raises(Killed):
            Lab(base, store=store, engine=Stopping(Lab.make_engine(base), stop_at)).tune()
        resume(store, f"batch-{stop_at}")
    for step in (1, 4, 5):
        steps = iter(range(step))

        def stop(*args: Any, steps: Any = steps, **which: bool) -> Any:
            if next(steps, None) is None:
                raise Killed
            return real(*args, **which)

        store = MemoryStore()
        monkeypatch.setattr(joint_module, "joint_terms", stop)
        with pytest.raises(Killed):
            Lab(base, store=store).tune()
        monkeypatch.setattr(joint_module, "joint_terms", real)
        resume(store, f"step-{step}")


def test_a_budget_keeps_the_best_of_what_was_validated(base: BaseModel) -> None:
    free = Lab(base)
    free.tune()
    marks = [e["tuning_tokens"] for e in free.of("validation")]
    for limit, validated in ((0, 0), (marks[0] - 1, 0), (marks[0] + 600, 1), (marks[1] + 600, 2)):
        lab = Lab(base, ledger=Ledger(tokens=limit))
        tuned = lab.tune()
        assert len(lab.of("validation")) <= validated + 1
        assert (tuned is SEED) == (not lab.of("validation"))
        assert lab.ledger.tuning.tokens <= limit
        assert lab.of("budget")


FIGURES = ("loss", "actor_loss", "prompt_loss", "answered", "taught", "grad_norm", "learning_rate")


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_do_not_change_the_result(base: BaseModel, micro: int) -> None:
    prompts = ["good", "bad", "bad too"]
    whole, split = (scripted(base, prompts, micro_batch_size=size, rollout_examples=8) for size in (4, micro))
    left, right = whole.tune(), split.tune()
    assert isinstance(left, MetaTuned) and isinstance(right, MetaTuned)
    for name, parameter in left.tuner.parameters.items():
        torch.testing.assert_close(parameter, right.tuner.parameters[name], atol=1e-4, rtol=1e-3)
    for one, other in zip(whole.of("step"), split.of("step"), strict=True):
        assert [one[k] for k in FIGURES] == pytest.approx([other[k] for k in FIGURES], rel=1e-3)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_bfloat16_models_are_trained_in_float32(random_model_dir: Path, training: str) -> None:
    half = talkative(load(str(random_model_dir), device="cpu", dtype="bfloat16"))
    lab = scripted(half, ["good", "bad", "bad too"], generator_training=training, learning_rate=1e-3)
    lab.problem = Problem(lab.problem.task, lab.problem.train, (), half, half, ANSWERS)  # the last state comes back
    tuned = lab.tune()
    assert isinstance(tuned, MetaTuned)
    found = lab.store.load_checkpoint("tune/joint")
    assert found is not None
    weights = {n.removeprefix("parameters/"): t for n, t in found[0].items() if n.startswith("parameters/")}
    moments = [t for n, t in found[0].items() if n.startswith("adamw/")]
    assert moments and all(t.dtype == torch.float32 for t in [*weights.values(), *moments])
    of_model = torch.bfloat16 if training == "full" else torch.float32
    for name, parameter in tuned.tuner.parameters.items():
        assert parameter.dtype == (torch.float32 if name.startswith("lora/") else of_model)
        assert torch.equal(parameter, weights[name].to(parameter.dtype))
    if training == "full":  # more is remembered than bfloat16 can say
        assert any(not torch.equal(w, w.bfloat16().float()) for n, w in weights.items() if n.startswith("shared/"))
    losses = [e["loss"] for e in lab.of("step")]
    assert losses[-1] < losses[0]


def test_divergence_names_the_examples_and_keeps_the_last_checkpoint(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = scripted(base, ["good", "bad", "bad too"])
    real, batches = joint_module.joint_loss, iter(range(10))

    def broken(terms: Any, **weights: float) -> Any:
        loss, named = real(terms, **weights)
        return (loss * float("nan") if next(batches) == 3 else loss), named

    monkeypatch.setattr(joint_module, "joint_loss", broken)
    with pytest.raises(CotuneError, match=r"loss is nan at step 4 of 6, on (train-\d, ){3}train-\d\. Lower"):
        lab.tune()
    found = lab.bench.load_checkpoint("joint")
    assert found is not None and found[1]["step"] == 3
    assert all(bool(t.isfinite().all()) for t in found[0].values())


def test_gradient_checkpointing_runs_forward_again_and_changes_no_byte(base: BaseModel, tmp_path: Path) -> None:
    plain, recomputing = (scripted(base, ["good", "bad", "bad too"], epochs=1) for _ in range(2))
    recomputing.gradient_checkpointing = True
    passes: list[int] = []
    # Before, not behind it: a second pass ends as soon as it has what the backward pass needs.
    hook = base.model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(
        lambda *_: passes.append(torch.is_grad_enabled())
    )
    expected = saved(plain.tune(), tmp_path / "plain")
    once = sum(passes)
    assert saved(recomputing.tune(), tmp_path / "recomputing") == expected
    hook.remove()
    assert sum(passes) >= 3 * once > 0  # the second run makes every pass twice, and once more to look at agreement


def test_joint_starts_from_a_prompt_alone(base: BaseModel) -> None:
    lab = Lab(base)
    start = Fixed(SEED.prompt, LoraFactors.zero(base.model, ["q_proj"], 1))
    with pytest.raises(UsageError, match="without an adapter"):
        lab.strategy.tune(start, lab.problem, lab.bench)


def test_without_val_examples_the_last_state_comes_back(base: BaseModel) -> None:
    lab = scripted(base, ["good", "bad", "bad too"])
    lab.problem = Problem(lab.problem.task, lab.problem.train, (), base, base, ANSWERS)
    assert isinstance(lab.tune(), MetaTuned)
    assert [e["kept"] for e in lab.of("validation")] == [True] * 3
