"""Variants and ablations of joint tuning: what each trains, generates and hands over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cotune.config import resolve
from cotune.errors import UsageError
from cotune.metatuned import MetaTuned
from cotune.models.base import BaseModel, load
from cotune.models.metatuner.losses import JointItem
from cotune.rollouts import Candidate, pooled
from cotune.strategies import joint as joint_module
from cotune.strategies import load_tuned
from cotune.strategies.base import Workload
from tests.strategies.joint_lab import ANSWERS, SEED, Lab, changed, key, llama, saved, scripted, talkative, untrained


@pytest.fixture(scope="module")
def base(random_model_dir: Path) -> BaseModel:
    return talkative(load(str(random_model_dir)))


def moved(tuned: object, lab: Lab) -> set[str]:
    assert isinstance(tuned, MetaTuned)
    fresh = untrained(lab).tuner.parameters
    return {n.split("/")[0] for n, p in tuned.tuner.parameters.items() if not torch.equal(p, fresh[n])}


def test_alternating_counts_one_term_per_step_after_the_warm_up(base: BaseModel, seen: list[list[JointItem]]) -> None:
    lab = scripted(base, ["good", "bad", "bad too"], variant="alternating", alternate_every=2, epochs=3)
    tuned = lab.tune()
    counted = [(any(i.completion for i in batch), any(i.target for i in batch)) for batch in seen]
    both, adapter, prompt = (True, True), (True, False), (False, True)
    assert counted == [both, both, adapter, adapter, prompt, prompt, adapter, adapter]
    assert all(i.completion for batch in seen[2:4] for i in batch)
    assert moved(tuned, lab) == {"shared", "prompt", "lora"}


def test_without_the_adapter_branch_g_learns_and_m_stays_as_it_is(
    base: BaseModel, seen: list[list[JointItem]], tmp_path: Path
) -> None:
    lab = scripted(base, ["good", "bad", "bad too"], adapter_branch="off")
    tuned = lab.tune()
    assert not any(i.completion for batch in seen for i in batch) and any(i.target for batch in seen for i in batch)
    assert moved(tuned, lab) == {"shared", "prompt"}
    assert set(key(tuned, lab)) == {("good", None)}
    saved(tuned, tmp_path)
    assert key(load_tuned(tmp_path, base), lab) == key(tuned, lab)


def test_without_the_prompt_branch_every_query_gets_the_seed_prompt(
    base: BaseModel, seen: list[list[JointItem]]
) -> None:
    lab = Lab(base, changed(prompt_branch="off"))
    tuned = lab.tune()
    assert not lab.of("rollouts") and not lab.of("generated_prompts")
    assert moved(tuned, lab) == {"shared", "lora"}
    assert all("Solve it." in base.decode(i.question) and not i.target for batch in seen for i in batch)
    found = key(tuned, lab)
    assert {prompt for prompt, _ in found} == {"Solve it."} and len({adapter for _, adapter in found}) == len(found)


def test_without_sharing_three_parts_and_an_encoder_are_trained_and_saved(base: BaseModel, tmp_path: Path) -> None:
    lab = Lab(base, changed(sharing=False, rollouts=8, rollout_examples=8))
    tuned = lab.tune()
    assert moved(tuned, lab) == {"shared", "prompt", "lora", "encoder"} and not lab.of("agreement")
    saved(tuned, tmp_path)
    assert key(load_tuned(tmp_path, base), lab) == key(tuned, lab)


@pytest.mark.parametrize("branch", ["prompt_branch", "adapter_branch"])
def test_a_fixed_branch_makes_one_for_all_and_reads_no_question(
    base: BaseModel, seen: list[list[JointItem]], branch: str
) -> None:
    lab = Lab(base, changed(**{branch: "fixed"}, rollouts=8, rollout_examples=8))
    tuned = lab.tune()
    found = key(tuned, lab)
    prompts, adapters = ({c[i] for c in found} for i in (0, 1))
    fixed, free = (prompts, adapters) if branch == "prompt_branch" else (adapters, prompts)
    assert len(fixed) == 1 and len(free) > 1
    for item in (i for batch in seen for i in batch):
        writes, reads = base.decode(item.written_from), base.decode(item.query)
        assert ("Question:" in writes, "Question:" in reads) == (branch != "prompt_branch", branch == "prompt_branch")
    targets = {i.target for batch in seen[:2] for i in batch if i.target}
    assert len(targets) == 1 if branch == "prompt_branch" else len(targets) > 1


def test_each_validation_measures_adapters_and_probes_latents(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_module, "PROBED_FROM", 3)
    lab = Lab(base)
    lab.tune()
    assert len(lab.of("adapters")) == len(lab.of("probe")) == len(lab.of("validation")) == 3
    for event in lab.of("adapters"):
        assert event["examples"] == 3 and event["relative_norm"] > 0
        assert 1 <= event["effective_rank"] <= 2 and 0 < event["variation"] < 1
    assert set(lab.of("probe")[0]) >= {"question_length", "solution_length"}
    assert all(0 < e["answered"] <= 1 and 0 <= e["taught"] <= 1 for e in lab.of("step"))


def test_gumbel_has_one_term_through_prompts_sampled_from_g(base: BaseModel, seen: list[list[JointItem]]) -> None:
    settings = changed(prompt_signal="gumbel", rollouts=8, rollout_examples=8)
    lab = Lab(base, settings)
    tuned = lab.tune()
    warm, later = [i for batch in seen[:2] for i in batch], [i for batch in seen[2:] for i in batch]
    assert any(i.target for i in warm) and not any(i.relaxed for i in warm)
    assert len(lab.of("rollouts")) == 1 and not any(i.target for i in later)
    relaxed = [i for i in later if i.relaxed]
    assert relaxed
    for item in relaxed:
        assert item.relaxed and item.question[item.relaxed.start :][: len(item.relaxed.prompt)] == item.relaxed.prompt
        assert base.decode(item.question[: item.relaxed.start]) == "system\n"
    assert moved(tuned, lab) == {"shared", "prompt", "lora"}
    again = Lab(base, settings)
    assert key(again.tune(), again) == key(tuned, lab)


def test_gumbel_needs_one_vocabulary(base: BaseModel) -> None:
    with pytest.raises(UsageError, match="both need one vocabulary"):
        Lab(base, changed(prompt_signal="gumbel"), generator=llama()).tune()


def test_prompts_that_serve_several_examples_are_scored_by_their_mean() -> None:
    rows = [[Candidate("a", 2, 1.0), Candidate("b", 1, 0.0)], [Candidate("a", 2, 0.5), Candidate("b", 1, 1.0)]]
    assert pooled(rows) == [Candidate("a", 2, 0.75), Candidate("b", 1, 0.5)]


@pytest.mark.parametrize(
    "changes",
    [{"prompt_branch": "off"}, {"adapter_branch": "off"}, {"prompt_branch": "fixed"}, {"variant": "alternating"}],
    ids=str,
)
def test_the_plan_is_an_upper_bound_for_every_variant(base: BaseModel, changes: dict[str, str]) -> None:
    lab = Lab(base, changed(**changes))
    lab.tune()
    lengths = [len(base.encode(base.render(lab.problem.task.messages(SEED.prompt, e)))) for e in lab.problem.train]
    references = [len(base.encode(lab.problem.task.reference_completion(e))) for e in lab.problem.train]
    works = lab.strategy.plan(Workload(8, 3, max(lengths) + 110, max(references) + 1, ANSWERS.max_new_tokens))
    spent = lab.ledger.tuning
    assert sum(w.calls for w in works) >= spent.calls
    assert sum(w.trained_tokens for w in works) >= spent.trained_tokens
    assert sum(w.forward_tokens for w in works) >= spent.prompt_tokens + spent.generated_tokens


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prompt_branch": "off", "adapter_branch": "off"}, "cannot both be off"),
        ({"prompt_signal": "gumbel", "adapter_branch": "off"}, "one term through both branches"),
        ({"prompt_signal": "gumbel", "variant": "alternating"}, "one term through both branches"),
        ({"adapter_branch": "off", "alpha": 0}, "only the prompt term is left"),
    ],
)
def test_nothing_to_tune_is_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        resolve({"strategy": "joint", "model": "tiny", "task": "micro-math", "joint": settings})
