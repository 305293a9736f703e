"""LoRA training on a random model of 90k parameters, and its data on a fake engine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lab import SMALL, START, half, strategy
from toy import Sums, bench, fake, of_kind, problem, right_answer

from cotune.bench import MemoryStore
from cotune.config import resolve
from cotune.engines.fake import FakeEngine
from cotune.errors import CotuneError, NoData
from cotune.models.base import BaseModel, load, weights_digest
from cotune.models.lora import LoraFactors, attached
from cotune.strategies.base import Fixed
from cotune.strategies.lora_only import LoraOnly
from cotune.supervision import completion_loss, gold, token_row
from cotune.values import Demonstration, Event, Prompt


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load(str(random_model_dir), device="cpu", dtype="float32")


def scripted(untuned: float, scores: dict[int, float]) -> FakeEngine:
    """Right on a share of the questions that depends on how many adapters were seen before; `untuned` without one."""
    seen: list[str] = []

    def share(rendered: str, adapter: str | None) -> float:
        if adapter is None:
            return untuned
        if adapter not in seen:
            seen.append(adapter)
        return scores[seen.index(adapter)]

    return fake(share)


def train_loss(base: BaseModel, given: Any, fixed: Fixed) -> float:
    rows = [
        token_row(base, base.render(Sums().messages(fixed.prompt, t.example)), t) for t in gold(Sums(), given.train)
    ]
    factors, scaling = (fixed.adapter.factors, fixed.adapter.scaling) if fixed.adapter else ({}, 1.0)
    with torch.no_grad(), attached(base.model, factors, scaling):
        return float(completion_loss(base, rows)) / sum(len(r.completion) for r in rows)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(base: BaseModel, variant: str) -> None:
    before, events, given = weights_digest(base.model), list[Event](), problem(base, train=12, val=4)
    at = bench(base, fake(half), events=events)
    tuned = strategy(variant=variant).tune(START, given, at)
    assert isinstance(tuned, Fixed) and tuned.adapter is not None
    assert weights_digest(base.model) == before
    assert tuned.prompt == START.prompt and START.adapter is None
    assert tuned.adapter.scaling == 2.0 and tuned.adapter.is_dora == (variant == "dora")
    assert train_loss(base, given, tuned) < 0.8 * train_loss(base, given, START)
    assert not any(t.requires_grad for pair in tuned.adapter.factors.values() for t in pair)

    [traces] = of_kind(events, "traces")
    assert (traces["gold"], traces["sampled"], traces["kept"], traces["over_context"]) == (12, 0, 12, 0)
    assert [e["epoch"] for e in of_kind(events, "epoch")] == [1, 2, 3]
    assert len(of_kind(events, "step")) == 9
    kinds = [e.kind for e in events]
    assert kinds.index("traces") < kinds.index("step")
    # FLOPs: 4 N for frozen weights and 6 N for trained ones, per token trained.
    trained = sum(t.numel() for pair in tuned.adapter.factors.values() for t in pair)
    tokens = at.ledger.tuning.trained_tokens
    generation = 2.0 * base.parameters_count * (at.ledger.tuning.prompt_tokens + at.ledger.tuning.generated_tokens)
    assert at.ledger.tuning.flops == pytest.approx((4.0 * base.parameters_count + 6.0 * trained) * tokens + generation)


@pytest.mark.parametrize(
    ("untuned", "scores", "best"),
    [
        (0.0, (0.2, 0.9, 0.5), 1),
        (0.0, (0.9, 0.9, 0.1), 0),
        (0.5, (0.0, 0.1, 0.9), 2),
        (0.9, (0.2, 0.9, 0.5), 1),
        (1.0, (0.2, 0.9, 0.5), None),
    ],
)
def test_the_best_epoch_on_val_comes_back_ties_the_earlier_and_the_start_only_if_it_is_better(
    base: BaseModel, untuned: float, scores: Any, best: int | None
) -> None:
    engine = scripted(untuned, dict(enumerate(scores)))
    given = problem(base, train=8, val=20)
    sections = {"weights": SMALL, "prompt": {"choice_examples": 20}}
    config = resolve({"strategy": "lora-only", "model": "x", "task": "micro-gsm8k"}, sections)
    events: list[Event] = []
    tuned = LoraOnly.from_config(config).tune(START, given, bench(base, engine, events=events))
    assert of_kind(events, "chosen")[0]["epoch"] == (0 if best is None else best + 1)
    if best is None:
        assert tuned is START
        return
    assert isinstance(tuned, Fixed) and tuned.adapter is not None
    digests = list(dict.fromkeys(r.adapter.digest for r in engine.calls if r.adapter))
    assert tuned.adapter.digest == digests[best]


@pytest.mark.parametrize(("variant", "stops"), [("lora", range(1, 8)), ("dora", (3,))])
def test_interrupted_and_resumed_is_the_same_bit_for_bit(base: BaseModel, variant: str, stops: Iterable[int]) -> None:
    class Stopping(MemoryStore):
        def __init__(self, saves: int) -> None:
            super().__init__()
            self.left = saves

        def save_checkpoint(self, name: str, tensors: Any, meta: Any) -> None:
            super().save_checkpoint(name, tensors, meta)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    given = problem(base, train=12, val=4)
    whole = bench(base, fake(half))
    expected = strategy(variant=variant).tune(START, given, whole)
    assert isinstance(expected, Fixed) and expected.adapter
    for saves in stops:
        store = Stopping(saves)
        with pytest.raises(KeyboardInterrupt):
            strategy(variant=variant).tune(START, given, bench(base, fake(half), store=store))
        again = bench(base, fake(half), store=store)
        resumed = strategy(variant=variant).tune(START, given, again)
        assert isinstance(resumed, Fixed) and resumed.adapter
        assert resumed.adapter.digest == expected.adapter.digest
        assert again.ledger.tuning.tokens == whole.ledger.tuning.tokens
        assert again.ledger.tuning.flops == whole.ledger.tuning.flops


def test_own_completions_are_sampled_under_the_whole_prompt_and_learned_without_demonstrations(base: BaseModel) -> None:
    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        return right_answer(rendered) if sample == 0 else f"well , {right_answer(rendered)}"

    demo = (Demonstration("What is 1 + 1 ?", "2"),)
    start = Fixed(Prompt("Add.", demo))
    trained: dict[bool, int] = {}
    for drop in (True, False):
        events: list[Event] = []
        engine = FakeEngine(answer)
        at = bench(base, engine, events=events)
        chosen = strategy(method="rft", samples=2, temperature=0.5, epochs=1, drop_demonstrations=drop)
        tuned = chosen.tune(start, problem(base, train=4, val=4), at)
        assert isinstance(tuned, Fixed) and tuned.prompt == start.prompt
        assert all("What is 1 + 1 ?" in r.prompt for r in engine.calls)  # rollouts and val alike
        [traces] = of_kind(events, "traces")
        expected = {"gold": 0, "sampled": 8, "accepted": 8, "solved": 4, "kept": 8, "examples": 4}
        assert {k: traces[k] for k in expected} == expected
        trained[drop] = at.ledger.tuning.trained_tokens
    difference = len(base.encode("<|im_start|>user\nWhat is 1 + 1 ?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"))
    assert trained[False] - trained[True] == 8 * difference


def test_nothing_accepted_is_no_data_with_counts(base: BaseModel) -> None:
    events: list[Event] = []
    at = bench(base, fake(lambda rendered, adapter: 0.0), events=events)
    with pytest.raises(NoData, match="of 12 own completions the grader accepted 0"):
        strategy(method="rft", samples=3).tune(START, problem(base, train=4, val=4), at)
    assert of_kind(events, "traces")[0]["kept"] == 0


def test_examples_over_the_context_are_dropped_and_counted(base: BaseModel) -> None:
    events: list[Event] = []
    given = problem(base, train=4, val=4)
    start = Fixed(Prompt("x" * (base.context_length - 100)))
    strategy(epochs=1).tune(start, given, bench(base, fake(half), events=events))
    kept = of_kind(events, "traces")[0]
    assert kept["kept"] + kept["over_context"] == 4
    with pytest.raises(NoData, match="4 did not fit"):
        strategy().tune(Fixed(Prompt("x" * base.context_length)), given, bench(base, fake(half)))


def test_an_adapter_is_trained_further_not_anew(base: BaseModel) -> None:
    given = problem(base, train=12, val=4)
    first = strategy().tune(START, given, bench(base, fake(half)))
    assert isinstance(first, Fixed) and first.adapter
    digest = LoraFactors(first.adapter.factors, first.adapter.scaling).digest
    events: list[Event] = []
    second = strategy(epochs=1).tune(first, given, bench(base, fake(half), events=events).at("again"))
    assert isinstance(second, Fixed)
    assert LoraFactors(first.adapter.factors, first.adapter.scaling).digest == digest  # start is not mutated
    # The first batch of the second training starts from the loss that the first has reached.
    assert of_kind(events, "step")[0]["loss"] < 0.8 * train_loss(base, given, START)
    assert train_loss(base, given, second) < train_loss(base, given, first)
    with pytest.raises(CotuneError, match="Give both stages the same"):
        strategy(rank=2).tune(first, given, bench(base, fake(half)))
    with pytest.raises(CotuneError, match="Give both stages the same"):
        strategy(target_modules=["q_proj"]).tune(first, given, bench(base, fake(half)))
    with pytest.raises(CotuneError, match=r"further is LoRA of rank 4.*asks for DoRA of rank 4.*weights\.variant"):
        strategy(variant="dora").tune(first, given, bench(base, fake(half)))


def test_magnitudes_are_trained_and_trained_further(base: BaseModel) -> None:
    """Checkpointed layers hold the same gains: the same bytes."""
    given, own = (
        problem(base, train=8, val=4),
        base.model.get_submodule("model.layers.0.mlp.up_proj").weight.norm(dim=1),
    )
    dora = {"variant": "dora", "epochs": 1}
    first = strategy(**dora).tune(START, given, bench(base, fake(half)))
    assert isinstance(first, Fixed) and first.adapter
    magnitude = first.adapter.factors["model.layers.0.mlp.up_proj"][2]
    assert magnitude.shape == own.shape and (magnitude - own).abs().min() > 0
    again = strategy(**dora, gradient_checkpointing=True).tune(START, given, bench(base, fake(half)))
    assert isinstance(again, Fixed) and again.adapter and again.adapter.digest == first.adapter.digest
    second = strategy(**dora).tune(first, given, bench(base, fake(half)).at("again"))
    assert isinstance(second, Fixed) and second.adapter and second.adapter.digest != first.adapter.digest
    assert train_loss(base, given, second) < train_loss(base, given, first) < train_loss(base, given, START)


def test_budgets(base: BaseModel) -> None:
    given = problem(base, train=12, val=4)
    free = bench(base, fake(half), events=(events := []))
    strategy().tune(START, given, free)
    epochs = [e["tuning_tokens"] for e in of_kind(events, "epoch")]
    assert strategy().tune(START, given, bench(base, fake(half), tokens=0)) is START
    [start] = of_kind(events, "start")
    assert strategy().tune(START, given, bench(base, fake(half), tokens=start["tuning_tokens"])) is START
    # Up to the end of an epoch's training, but not its val score: not fully evaluated, so start.
    assert strategy().tune(START, given, bench(base, fake(half), tokens=epochs[0] - 10)) is START
    at = bench(base, fake(half), tokens=epochs[1] - 10)
    tuned = strategy().tune(START, given, at)
    assert isinstance(tuned, Fixed) and tuned.adapter is not None
    assert at.ledger.tuning.tokens <= epochs[1] - 10
    assert strategy(epochs=0).tune(START, given, bench(base, fake(half))) is START


def test_micro_batches_and_seeds(base: BaseModel) -> None:
    given = problem(base, train=8, val=4)

    def adapter(seed: int = 0, **changes: Any) -> LoraFactors:
        tuned = strategy(epochs=1, **changes).tune(START, given, bench(base, fake(half), seed=seed))
        assert isinstance(tuned, Fixed) and tuned.adapter
        return tuned.adapter

    whole, split, other = adapter(), adapter(micro_batch_size=3), adapter(seed=1)
    assert whole.digest == adapter().digest != other.digest
    # AdamW divides by the gradient's size, so rounding shows where that is near 0: 10% of one step of 1e-2.
    for name, (lora_a, lora_b) in whole.factors.items():
        torch.testing.assert_close(split.factors[name][0], lora_a, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(split.factors[name][1], lora_b, rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing_runs_forward_again_and_changes_no_byte(base: BaseModel) -> None:
    given, passes = problem(base, train=8, val=4), list[int]()
    # Before, not behind it: a second pass ends as soon as it has what the backward pass needs.
    hook = base.model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(lambda *_: passes.append(1))
    digests, counts = [], []
    for on in (False, True):
        tuned = strategy(epochs=1, gradient_checkpointing=on).tune(START, given, bench(base, fake(half)))
        assert isinstance(tuned, Fixed) and tuned.adapter
        digests.append(tuned.adapter.digest)
        counts.append(len(passes))
    hook.remove()
    assert digests[0] == digests[1]
    assert counts == [2, 2 + 4]  # 2 steps


def test_a_bfloat16_base_trains_float32_factors(random_model_dir: Path) -> None:
    half_precision = load(str(random_model_dir), device="cpu", dtype="bfloat16")
    given, events = problem(half_precision, train=8, val=4), list[Event]()
    tuned = strategy().tune(START, given, bench(half_precision, fake(half), events=events))
    assert isinstance(tuned, Fixed) and tuned.adapter is not None
    assert all(t.dtype == torch.float32 for pair in tuned.adapter.factors.values() for t in pair)
    losses = [s["loss"] for s in of_kind(events, "step")]
    assert losses[-1] < losses[0]
