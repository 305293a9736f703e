"""Rollouts and the schedule of joint tuning, with a scripted generator and real training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cotune.engines.base import Sampling
from cotune.engines.fake import FakeEngine
from cotune.errors import NoData
from cotune.metatuned import MetaTuned, usable
from cotune.models.base import BaseModel, load
from cotune.models.metatuner.losses import JointItem
from cotune.rollouts import Candidate, best_prompt, rollouts
from cotune.strategies import joint as joint_module
from cotune.strategies.base import Workload
from cotune.strategies.joint import round_ends
from cotune.values import Completion
from tests.strategies.joint_lab import (
    ANSWERS,
    SEED,
    SETTINGS,
    Lab,
    changed,
    script,
    scripted,
    talkative,
    untrained,
)


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return talkative(load(str(random_model_dir)))


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([("a", 3, 0.0), ("b", 3, 1.0)], "b"),
        ([("a", 3, 1.0), ("b", 2, 1.0), ("c", 1, 0.0)], "b"),  # of equals the shortest
        ([("a", 2, 1.0), ("b", 2, 1.0), ("c", 1, 0.0)], "a"),  # then the first
        ([("a", 2, 0.4), ("b", 9, 0.7)], "b"),
        ([("a", 2, 1.0), ("b", 1, 1.0)], None),  # all right
        ([("a", 2, 0.0), ("b", 1, 0.0)], None),  # all wrong
        ([("a", 2, 1.0)], None),
        ([], None),
    ],
)
def test_the_best_prompt_of_a_query(candidates: list[tuple[str, int, float]], best: str | None) -> None:
    assert best_prompt([Candidate(*c) for c in candidates]) == best


def test_rollouts_keep_what_the_task_prefers_and_try_no_prompt_twice(base: BaseModel) -> None:
    lab = scripted(base, ["bad", "good one here", "good", " good ", "", "one two three four five six seven"])
    examples = lab.problem.train[:2]
    chosen = rollouts(untrained(lab), examples, Sampling(6, temperature=1.0, n=6), ANSWERS, lab.bench)
    assert chosen == {e.id: "good" for e in examples}
    assert isinstance(lab.bench.engine, FakeEngine)
    asked = [r.prompt for r in lab.bench.engine.calls if "Rewrite the instruction" not in r.prompt]
    assert len(asked) == 2 * 3  # bad, good one here, good: once each
    assert lab.of("rollouts") == [
        {
            "stage": "tune",
            "examples": 2,
            "prompts": 6,
            "distinct": 3,
            "kept": 2,
            "mean_tokens": pytest.approx(5 / 3),
            "spread": 1.0,
            "mean_score": pytest.approx(2 / 3),
            "best_score": 1.0,
            "tuning_tokens": lab.ledger.tuning.tokens,
        }
    ]


def test_a_query_whose_prompts_score_alike_is_left_out(base: BaseModel) -> None:
    lab = scripted(base, ["good", "good as well", "good too"])
    assert rollouts(untrained(lab), lab.problem.train, Sampling(6, 1.0, n=3), ANSWERS, lab.bench) == {}


@pytest.mark.parametrize(
    ("text", "truncated", "instruction"), [(" Do it.\n", False, "Do it."), ("  ", False, None), ("Do", True, None)]
)
def test_a_prompt_is_usable_if_it_is_there_and_has_an_end(text: str, truncated: bool, instruction: str | None) -> None:
    assert usable(Completion(text, (1,), 1, truncated)) == instruction


def test_the_seed_stands_in_for_an_unusable_prompt(base: BaseModel) -> None:
    lab = scripted(base, ["one two three four five six seven"])
    found = untrained(lab).condition(lab.problem.val, lab.bench)
    assert [c.prompt for c in found] == [SEED.prompt] * 4
    assert [c.adapter for c in found] == [None] * 4  # before training the update is zero
    assert lab.of("generated_prompts")[0]["fallbacks"] == 4


def test_warm_up_reads_the_seed_prompt_and_later_rounds_what_g_writes(
    base: BaseModel, seen: list[list[JointItem]]
) -> None:
    lab = scripted(base, ["good", "bad", "bad too"])  # greedy: the first
    lab.tune()
    # 8 examples, batches of 4: 2 steps of warm-up, then 4 steps in rounds of 2
    assert [len(batch) for batch in seen] == [4] * 6
    text = [[base.decode(i.question) for i in batch] for batch in seen]
    assert all("Solve it." in t for batch in text[:2] for t in batch)
    assert all("good" in t and "Solve it." not in t for batch in text[2:] for t in batch)
    assert len(lab.of("rollouts")) == 3
    assert [e["step"] for e in lab.of("validation")] == [2, 4, 6]
    targets = {base.decode(i.target) for batch in seen for i in batch if i.target}
    assert targets == {"good"}
    per_epoch = sum(bool(i.target) for batch in seen[:2] for i in batch)
    assert per_epoch == SETTINGS.rollout_examples  # only these were rolled out
    assert all(base.decode(i.query).count("Instruction: Solve it.") == 1 for batch in seen for i in batch)
    assert all(i.completion[-1] == base.end_of_turn_ids[0] for batch in seen for i in batch)


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, [2, 4, 6]),
        ({"sync_every": 3}, [2, 5, 6]),
        ({"sync_every": 50}, [2, 6]),
        ({"warmup_epochs": 0}, [0, 2, 4]),
        ({"epochs": 0}, [2]),
        ({"warmup_epochs": 0, "epochs": 0}, [0]),
        ({"batch_size": 3}, [3, 5, 7, 9]),
    ],
)
def test_rounds_end_after_the_warm_up_and_at_each_synchronisation(changes: dict[str, int], ends: list[int]) -> None:
    assert round_ends(changed(**changes), items=8) == ends


def test_without_a_warm_up_the_first_round_is_joint(base: BaseModel, seen: list[list[JointItem]]) -> None:
    lab = scripted(base, ["good", "bad", "bad too"], warmup_epochs=0)
    assert isinstance(lab.tune(), MetaTuned)
    assert len(seen) == 4 and not any("Solve it." in base.decode(i.question) for batch in seen for i in batch)
    assert [e["round"] for e in lab.of("validation")] == [1, 2]
    idle = scripted(base, ["good"], warmup_epochs=0, epochs=0)
    assert idle.tune() is SEED and idle.ledger.tuning.tokens == 0


@pytest.mark.parametrize(("written", "score"), [("bad", 0.0), (SEED.prompt.instruction, 1.0)])
def test_the_start_comes_back_if_it_is_better_on_val_than_every_round(
    base: BaseModel, written: str, score: float
) -> None:
    """M is right under the seed prompt alone."""
    write = script([written] * 3)

    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        return write(rendered.replace(SEED.prompt.instruction, "good"), adapter, sample)

    lab = Lab(base, engine=FakeEngine(answer))
    tuned = lab.tune()
    assert [e["val_score"] for e in lab.of("start") + lab.of("validation")] == [1.0, *3 * [score]]
    assert (tuned is SEED) == (score < 1.0)
    [chosen] = lab.of("chosen")
    assert (chosen["round"], chosen["val_score"]) == (None if tuned is SEED else 0, 1.0)


def test_the_plan_is_an_upper_bound_of_the_same_kind_of_work(base: BaseModel) -> None:
    lab = Lab(base)
    lab.tune()
    lengths = [len(base.encode(base.render(lab.problem.task.messages(SEED.prompt, e)))) for e in lab.problem.train]
    references = [len(base.encode(lab.problem.task.reference_completion(e))) for e in lab.problem.train]
    load = Workload(8, 3, max(lengths) + 110, max(references) + 1, ANSWERS.max_new_tokens)  # a token is a byte here
    works = lab.strategy.plan(load)
    spent = lab.ledger.tuning
    assert sum(w.calls for w in works) >= spent.calls
    assert sum(w.trained_tokens for w in works) >= spent.trained_tokens
    assert sum(w.forward_tokens for w in works) >= spent.prompt_tokens + spent.generated_tokens
    assert sum(w.calls for w in works) == 3 * 5 * 3 * 2 + 2 * 8 + 2 * 3 * 3 + 3  # the start on val


def test_the_frozen_copy_follows_only_at_the_beginning_of_a_round(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = scripted(base, ["good", "bad", "bad too"])
    states: list[tuple[bool, torch.Tensor]] = []
    real = joint_module.joint_terms

    def note(tuner: Any, *args: Any) -> Any:
        name = next(n for n in tuner.prompts.own if n.endswith("lora_b"))
        frozen, own = tuner.prompts.frozen[name], tuner.prompts.own[name]
        states.append((torch.equal(frozen, own), frozen.clone()))
        return real(tuner, *args)

    monkeypatch.setattr(joint_module, "joint_terms", note)
    lab.tune()
    assert [same for same, _ in states] == [True, False] * 3
    frozen = [tensor for _, tensor in states]
    assert all(torch.equal(frozen[i], frozen[i + 1]) for i in (0, 2, 4))
    assert not torch.equal(frozen[0], frozen[2]) and not torch.equal(frozen[2], frozen[4])


def test_without_the_prompt_term_nothing_is_rolled_out(base: BaseModel, seen: list[list[JointItem]]) -> None:
    lab = scripted(base, ["good", "bad", "bad too"], alpha=0.0)
    tuned = lab.tune()
    assert not lab.of("rollouts") and not any(i.target for batch in seen for i in batch)
    fresh = untrained(lab).tuner.prompts
    assert isinstance(tuned, MetaTuned)
    assert all(torch.equal(p, fresh.own[n]) for n, p in tuned.tuner.prompts.own.items())


def test_own_completions_and_none_of_them(base: BaseModel, seen: list[list[JointItem]]) -> None:
    Lab(base, changed(source="self", warmup_epochs=1, epochs=0), engine=FakeEngine(lambda *_: "a")).tune()
    assert {base.decode(i.completion) for batch in seen for i in batch} == {"a"}
    with pytest.raises(NoData, match="nothing to learn"):
        Lab(base, changed(source="self"), engine=FakeEngine(lambda *_: "b")).tune()
