"""What answering with generated prompts and adapters takes: each query generated once, few adapters held at a time."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.bench import Bench, MemoryStore
from cotune.engines.base import Request, Sampling
from cotune.engines.transformers_engine import TransformersEngine
from cotune.errors import CotuneError
from cotune.evaluate import evaluate
from cotune.ledger import Ledger
from cotune.metatuned import MetaTuned
from cotune.models.base import BaseModel, load
from cotune.models.lora import LoraFactors, PendingLora
from cotune.models.metatuner import generator as generator_module
from cotune.models.metatuner.generator import MetaTuner
from cotune.values import Completion, Conditioning, Example
from tests.strategies.joint_lab import ANSWERS, Lab, changed, rows, talkative, untrained
from tests.toy import Wrapped


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return talkative(load(str(random_model_dir)))


@dataclass
class Counting(Wrapped):
    """Every request that was answered."""

    asked: list[Request] = field(default_factory=list)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        self.asked += [Request(r.prompt) for r in requests]
        return super().generate(requests, sampling)


def trained(lab: Lab) -> MetaTuned:
    """As if trained: adapters that are not zero."""
    tuned = untrained(lab)
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for up_b in tuned.tuner.adapters.up_b.values():
            up_b.copy_(0.3 * torch.randn(up_b.shape, generator=rng))
    return tuned


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[LoraFactors]]:
    """Every adapter that was decoded, in order."""
    made: list[weakref.ref[LoraFactors]] = []
    real = MetaTuner.adapters_at

    def note(self: MetaTuner, latents_BD: torch.Tensor) -> list[LoraFactors]:
        adapters = real(self, latents_BD)
        made.extend(weakref.ref(a) for a in adapters)
        return adapters

    monkeypatch.setattr(MetaTuner, "adapters_at", note)
    return made


def texts(lab: Lab, examples: Sequence[Example], conditionings: Sequence[Conditioning]) -> list[str]:
    found = evaluate(lab.problem.task, examples, conditionings, ANSWERS, lab.bench)
    return [c.text for c in found.completions]


def test_nothing_is_generated_twice_for_one_query(
    base: BaseModel, decoded: list[weakref.ref[LoraFactors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Counting(Lab.make_engine(base))
    lab = Lab(base, engine=engine)
    tuned = trained(lab)
    encoded: list[int] = []
    real = MetaTuner.latents
    monkeypatch.setattr(
        MetaTuner, "latents", lambda self, queries: (encoded.append(len(queries)), real(self, queries))[1]
    )
    distinct = list(lab.problem.val)
    repeated = [replace(e, id=f"{e.id}-{i}") for i in range(3) for e in distinct]
    with lab.bench.ledger.measuring():
        many = tuned.condition(repeated, lab.bench)
        assert len(engine.asked) == sum(encoded) == 4
        answers = texts(lab, repeated, many)
        texts(lab, repeated, [Conditioning(tuned.seed, c.adapter) for c in many])  # as the 2x2 does
    assert len(decoded) == 4

    fresh = Lab(base)
    with fresh.bench.ledger.measuring():
        few = trained(fresh).condition(distinct, fresh.bench)
        assert [c.adapter and c.adapter.digest for c in many] == [c.adapter and c.adapter.digest for c in few] * 3
        assert [c.prompt for c in many] == [c.prompt for c in few] * 3
        assert answers == texts(fresh, distinct, few) * 3
    assert len({c.adapter.digest for c in few if c.adapter}) == 4


def test_only_a_batch_of_adapters_is_held_at_a_time(
    base: BaseModel, decoded: list[weakref.ref[LoraFactors]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(kept_bytes: int) -> tuple[list[str], int]:
        monkeypatch.setattr(generator_module, "_KEPT_BYTES", kept_bytes)
        lab = Lab(base, engine=TransformersEngine(base, batch_size=2, threads=1))
        examples = rows(lab.problem.task, "test", 10)
        most = 0
        real = TransformersEngine.generate

        def watch(self: TransformersEngine, requests: Any, sampling: Sampling) -> Any:
            nonlocal most
            most = max(most, sum(ref() is not None for ref in decoded))
            return real(self, requests, sampling)

        with lab.bench.ledger.measuring(), monkeypatch.context() as patch:
            patch.setattr(TransformersEngine, "generate", watch)
            found = trained(lab).condition(examples, lab.bench)
            return texts(lab, examples, found), most

    few, held = answered(kept_bytes=1)
    assert held <= 2 + 1  # the batch, and the one kept
    decoded.clear()
    many, held = answered(kept_bytes=2**28)
    assert held == 10
    assert few == many


def test_an_adapter_is_bound_to_the_weights_it_was_promised_under(base: BaseModel) -> None:
    lab = Lab(base)
    tuned = trained(lab)

    def promised() -> list[PendingLora]:
        with lab.bench.ledger.measuring():
            found = tuned.adapters(lab.problem.val, lab.bench)
        assert all(isinstance(a, PendingLora) for a in found)
        return [a for a in found if a]

    before, same = promised(), promised()
    assert [a.digest for a in before] == [a.digest for a in same]
    assert len({a.digest for a in before}) == len(before)
    kept = before[0].make()
    with torch.no_grad():
        next(iter(tuned.tuner.adapters.up_b.values())).mul_(1.01)
    assert before[0].make() is kept  # decoded in time
    with pytest.raises(CotuneError, match="trained on since"):
        before[1].make()
    after = promised()
    assert not {a.digest for a in before} & {a.digest for a in after}
    assert after[1].make().digest != same[0].digest


def test_generation_is_booked_apart_from_answering(base: BaseModel) -> None:
    lab = Lab(base)
    tuned, val = trained(lab), lab.problem.val
    with lab.bench.ledger.measuring(), lab.bench.ledger.parts() as parts:
        texts(lab, val, tuned.condition(val, lab.bench))
    queries = [base.encode(tuned.query(e, "per-example")) for e in val]
    read = sum(map(len, queries))
    prompts, adapters, answers = parts["prompts"], parts["adapters"], parts["answers"]
    assert (prompts.prompt_tokens, adapters.encoded_tokens, adapters.prompt_tokens) == (read, read, 0)
    shapes = sum(i + o for i, o in tuned.shapes.values())
    decoder = 2 * 8 * 64 + 8 * 2 * shapes  # 2 m d + m r sum(in + out), m = 8, r = 2
    encoder = base.parameters_count / 2  # one of two layers, by the ledger's share
    assert adapters.flops == pytest.approx(2 * encoder * read + 2 * decoder * len(val))
    assert all(p.seconds > 0 for p in parts.values())
    account = lab.ledger.measuring_account
    assert account.seconds == pytest.approx(prompts.seconds + adapters.seconds + answers.seconds)
    assert account.flops == pytest.approx(prompts.flops + adapters.flops + answers.flops)

    # A run that is continued takes the seconds of decoding from its journal, and decodes nothing.
    again = Bench(base, lab.bench.engine, lab.make_engine, Ledger(), lab.store, 3, stage="tune")
    lab.bench = again
    with again.ledger.measuring(), again.ledger.parts() as replayed:
        found = tuned.condition(val, again)
        encoding = replayed["adapters"].seconds
        texts(lab, val, found)
    known = [v["adapter_seconds"] for v in lab.store._journal.values() if v.get("adapter_seconds")]
    assert len(known) == 1
    assert replayed["adapters"].seconds - encoding == pytest.approx(known[0])
    assert replayed["answers"] == answers and isinstance(lab.store, MemoryStore)


@pytest.mark.parametrize(("branch", "missing"), [("prompt_branch", "prompts"), ("adapter_branch", "adapters")])
def test_a_branch_that_is_off_costs_nothing_and_has_no_parameters(base: BaseModel, branch: str, missing: str) -> None:
    lab = Lab(base, changed(**{branch: "off"}))
    tuned, val = trained(lab), lab.problem.val
    with lab.bench.ledger.measuring(), lab.bench.ledger.parts() as parts:
        texts(lab, val, tuned.condition(val, lab.bench))
    assert {"prompts", "adapters", "answers"} - set(parts) == {missing}
    unused = {"prompts": "prompt_decoder", "adapters": "parameter_decoder"}[missing]
    assert {"encoder", "prompt_decoder", "parameter_decoder"} - set(tuned.sizes()) == {unused}
