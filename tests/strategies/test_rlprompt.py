"""Token prompts by soft Q-learning: what the policy writes, that it finds a known optimum, and what it costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import bench, fake, instruction_of, of_kind, problem

from cotune.bench import MemoryStore
from cotune.config import RunConfig, resolve
from cotune.engines.fake import FakeEngine
from cotune.errors import UsageError
from cotune.ledger import forward_flops, training_flops
from cotune.models.base import BaseModel, load, weights_digest
from cotune.strategies.base import Fixed, Workload
from cotune.strategies.prompt_methods.token_policy import TokenPolicy
from cotune.strategies.prompt_only import PromptOnly
from cotune.values import Event, Prompt

START = Fixed(Prompt("Add the numbers."))
SMALL: dict[str, Any] = {
    "tokens": 2,
    "samples": 8,
    "hidden": 16,
    "steps": 10,
    "try_every": 5,
    "learning_rate": 0.02,
    "polyak": 0.1,
    "checkpoint_every": 4,
}


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    torch.set_num_threads(1)
    return load(str(random_model_dir), device="cpu", dtype="float32")


def config(engine: str = "auto", **rlprompt: Any) -> RunConfig:
    prompt = {
        "method": "rlprompt",
        "rounds": rlprompt.pop("rounds", 1),
        "search_examples": 12,
        "choice_examples": 6,
        "minibatch": 6,
        "finalists": 2,
    }
    given = {"strategy": "prompt-only", "model": "x", "task": "micro-gsm8k", "engine": engine}
    return resolve({**given, "prompt": prompt, "rlprompt": SMALL | rlprompt})


def strategy(**rlprompt: Any) -> PromptOnly:
    return PromptOnly.from_config(config(**rlprompt))


def likes(rendered: str, _: str | None) -> float:
    """A capital letter is worth as much as a digit behind it: 260 of the 8,836 prompts of two tokens are the best."""
    said = instruction_of(rendered)
    return 0.1 + 0.4 * bool(re.match("[A-Z]", said)) + 0.4 * bool(re.match(".[0-9]", said))


def test_the_best_two_tokens_of_a_bandit_are_learned(base: BaseModel, record_property: Any) -> None:
    before, events = weights_digest(base.model), list[Event]()
    at = bench(base, engine := fake(likes), events=events)
    tuned = strategy(steps=120, try_every=20).tune(START, problem(base), at)
    assert isinstance(tuned, Fixed)
    assert re.fullmatch("[A-Z][0-9]", tuned.prompt.instruction)
    scores = [s["score"] for s in of_kind(events, "step")]
    by_chance = 0.1 + 0.4 * 26 / 94 + 0.4 * 10 / 94
    assert sum(scores[-20:]) / 20 > 2 * by_chance  # the sampled ones get better too
    assert weights_digest(base.model) == before and not any(p.requires_grad for p in base.model.parameters())
    record_property("rollouts / exhaustive", len(engine.calls) / (94**2 * 12))
    assert len(engine.calls) < 94**2 * 12 / 10


def test_the_policy_reads_what_the_head_reads_and_writes_readable_tokens(base: BaseModel) -> None:
    policy = TokenPolicy(base, 16, seed=0)
    written = policy.write(4, 5, 8, seed=1)
    start = base.end_of_turn_ids[0]
    ids = torch.cat([torch.full((4, 1), start), written.tokens_BT], 1)
    with torch.no_grad():
        logits = base.model(input_ids=ids[:, :-1]).logits
        assert torch.allclose(policy._head(written.states_BTD), logits, atol=1e-4)
        q = policy.q_values(written.states_BTD)
    assert bool((q.topk(8).indices == written.tokens_BT[:, :, None]).any(2).all())  # top-k sampling
    # printable ASCII: of 256 bytes the others are no text alone, and special tokens end turns
    assert int(q[0, 0].isfinite().sum()) == 94
    assert all(len(policy.text(row)) == 5 and policy.text(row).isprintable() for row in written.tokens_BT)
    assert torch.equal(policy.write(4, 5, 8, seed=1).tokens_BT, written.tokens_BT)
    assert not torch.equal(policy.write(4, 5, 8, seed=2).tokens_BT, written.tokens_BT)
    spread = q[q.isfinite()]
    assert float(spread.max() - spread.min()) < 1e-2  # near zero at first: any token


def test_the_target_follows_slowly(base: BaseModel) -> None:
    policy = TokenPolicy(base, 4, seed=0)
    before = policy.target[0].weight.clone()
    with torch.no_grad():
        policy.network[0].weight += 1.0
    policy.follow(0.25)
    assert torch.allclose(policy.target[0].weight, before + 0.25)
    assert not policy.target[0].weight.requires_grad


def test_writing_and_learning_are_booked(base: BaseModel) -> None:
    at = bench(base, engine := fake(likes))
    chosen = strategy(steps=6, try_every=3)
    chosen.tune(START, problem(base), at)
    spent, policy = at.ledger.tuning, TokenPolicy(base, 16, 0)
    assert spent.trained_tokens == 6 * 8 * 2
    answered = sum(base.parameters_count * 2 * t for t in [spent.prompt_tokens + spent.generated_tokens])
    wrote = (6 * 8 + 2) * 2  # two greedy prompts: after step 3, and at the end
    per_token = policy.parameters_count, policy.head_count
    learned = training_flops(per_token[1], per_token[0], 96) + forward_flops(sum(per_token), 96)
    assert spent.flops == pytest.approx(answered + forward_flops(policy.parameters_count, wrote) + learned)
    works = chosen.plan(Workload(40, 20, 20, 8, 16))
    assert spent.calls == len(engine.calls) <= sum(w.calls for w in works)
    assert spent.trained_tokens <= sum(w.trained_tokens for w in works)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.95])
def test_a_budget_is_kept_and_what_was_learned_is_still_run(base: BaseModel, share: float) -> None:
    whole = bench(base, fake(likes))
    strategy().tune(START, problem(base), whole)
    limit = int(share * whole.ledger.tuning.tokens)
    at = bench(base, fake(likes), tokens=limit, events=(events := []))
    kept = strategy().tune(START, problem(base), at)
    assert at.ledger.tuning.tokens <= limit
    tried = of_kind(events, "candidate")
    assert isinstance(kept, Fixed) and (kept == START or kept.prompt.instruction in [c["text"] for c in tried])
    if share == 0:
        assert kept is START and not tried and at.ledger.tuning.tokens == 0
    if share >= 0.3:
        assert [c["n"] for c in tried if c["origin"] == "rlprompt"][-1] > 0
    assert of_kind(events, "budget")


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_interrupted_and_resumed_is_the_same(base: BaseModel, stop: int) -> None:
    class Stopping(MemoryStore):
        left = stop

        def save_checkpoint(self, name: str, tensors: Any, meta: Any) -> None:
            super().save_checkpoint(name, tensors, meta)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def run(store: MemoryStore) -> tuple[Any, Any, list[Event]]:
        at = bench(base, fake(likes), store=store, events=(events := []))
        tuned = strategy(rounds=2).tune(START, problem(base), at)
        return tuned, at.ledger.tuning, [e for e in events if e.kind in ("candidate", "round", "chosen")]

    whole, store = run(MemoryStore()), Stopping()
    with pytest.raises(KeyboardInterrupt):
        run(store)
    resumed = run(store)
    assert resumed[0] == whole[0] and resumed[2] == whole[2]
    for counted in ("tokens", "calls", "trained_tokens", "flops"):
        assert getattr(resumed[1], counted) == getattr(whole[1], counted)


def test_scores_that_are_all_alike_are_said(base: BaseModel) -> None:
    at = bench(base, fake(lambda *_: 0.5), events=(events := []))
    strategy(steps=2).tune(START, problem(base), at)
    [told] = [w["message"] for w in of_kind(events, "warning")]
    assert told.startswith("rlprompt learned nothing in round 1: in each of its 2 steps all 8 prompts scored alike.")


def test_junk_that_was_learned_is_counted_and_not_run(base: BaseModel, monkeypatch: Any) -> None:
    monkeypatch.setattr(TokenPolicy, "text", lambda *_: "<|im_end|>")
    at = bench(base, FakeEngine(lambda *_: "1"), events=(events := []))
    assert strategy(steps=2).tune(START, problem(base), at) == START
    assert [r["rejected"] for r in of_kind(events, "round")] == [{"tags": 1}]


def test_a_black_box_is_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match=r"x is a black box .* here with --generator, or .* --set prompt.method=cfpo"):
        PromptOnly.from_config(config(engine="openai"))
