"""Which runs stand side by side, and the numbers of each row, against hand-computed values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference.run_folders import write_rows, write_run

from cotune.compare.runs import Run
from cotune.compare.stats import tango
from cotune.compare.tables import Group, Row, _arm, budget_used, compare, cost, overall, record, score_range, spread
from cotune.errors import UsageError

BASE = {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0}
BETTER = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0}


def only(groups: list[Group]) -> Group:
    assert len(groups) == 1
    return groups[0]


def row(group: Group, strategy: str) -> Row:
    found = [r for r in group.rows if r.strategy == strategy]
    assert len(found) == 1, [r.strategy for r in group.rows]
    return found[0]


def test_score_and_paired_difference(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", BASE)
    write_run(tmp_path, "lora-only", BETTER, tuning={"tokens": 100, "flops": 5e9, "seconds": 3.5})
    group = only(compare([tmp_path]))
    assert (group.task, group.model, group.engine, group.baseline) == (
        "micro-gsm8k", "tiny", "transformers", "zero-shot",
    )  # fmt: skip
    assert [r.strategy for r in group.rows] == ["zero-shot", "lora-only"]
    base, ours = group.rows
    assert base.is_baseline
    assert base.difference is None
    assert base.score is not None
    assert base.score.mean == 0.25
    assert ours.difference is not None
    assert ours.difference.estimate.mean == 0.5  # 1, 0, 0, 1
    low, high = tango(2, 0, 4)
    assert (ours.difference.estimate.low, ours.difference.estimate.high) == (low, high)
    assert (ours.difference.p, ours.difference.p_exact) == (0.25, 0.5)  # 2 wins, no loss: 2 / 4, mid-p half of it
    assert (cost(ours, "tuning", "tokens"), cost(ours, "tuning", "seconds")) == (100, 3.5)


def test_serving_is_the_mean_per_run_and_empty_where_nothing_is_generated(tmp_path: Path) -> None:
    def served(flops: float, prompts: dict[str, float] | None) -> dict[str, Any]:
        answers = {"read_tokens": 9.0, "written_tokens": 3.0, "flops": flops, "seconds": 0.5}
        total = {"flops": flops + (prompts or {}).get("flops", 0.0), "seconds": 0.5}
        return {"examples": 4, "prompts": prompts, "adapters": None, "answers": answers, **total}

    written = {"read_tokens": 5.0, "written_tokens": 2.0, "flops": 10.0, "seconds": 0.25}
    write_run(tmp_path, "zero-shot", BASE, serving=served(100.0, None))
    write_run(tmp_path, "joint", BETTER, seed=0, serving=served(100.0, written))
    write_run(tmp_path, "joint", BASE, seed=1, serving=served(200.0, written))
    write_run(tmp_path, "lora-only", BASE)  # a run of an earlier version
    group = only(compare([tmp_path]))
    found = {r.strategy: record(group, r) for r in group.rows}
    columns = ("prompts_flops", "prompts_seconds", "adapters_flops", "answers_flops", "flops", "seconds")
    values = {name: [flat[f"serving_{column}"] for column in columns] for name, flat in found.items()}
    assert values["zero-shot"] == [None, None, None, 100.0, 100.0, 0.5]
    assert values["joint"] == [10.0, 0.25, None, 150.0, 160.0, 0.5]
    assert values["lora-only"] == [None] * 6


def test_pairing_is_by_id_not_by_position(tmp_path: Path) -> None:
    """The same test set in one order; the scores are looked up, so an equal run differs by exactly nothing."""
    write_run(tmp_path, "zero-shot", BETTER)
    write_run(tmp_path, "prompt-only", dict(BETTER))
    difference = row(only(compare([tmp_path])), "prompt-only").difference
    assert difference is not None
    assert (difference.estimate.mean, difference.p) == (0.0, 1.0)


def test_seeds_of_one_strategy_are_pooled_example_by_example(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", BASE)
    write_run(tmp_path, "joint", BETTER, seed=0, tuning={"tokens": 100})
    write_run(tmp_path, "joint", BASE, seed=1, tuning={"tokens": 300})
    group = only(compare([tmp_path]))
    ours = row(group, "joint")
    assert len(ours.runs) == 2
    assert ours.score is not None
    assert (ours.score.mean, ours.score.n) == (0.5, 4)  # (0.75 + 0.25) / 2, over four examples, not eight
    assert ours.difference is not None
    assert ours.difference.estimate.mean == 0.25  # 0.5, 0, 0, 0.5
    assert cost(ours, "tuning", "tokens") == 200
    flat = record(group, ours)
    assert (flat["seeds"], flat["runs"], flat["correct"], flat["wrong"]) == ([0, 1], 2, 4, 4)


def test_two_by_two_and_interaction(tmp_path: Path) -> None:
    ones, zeros = dict.fromkeys("abcd", 1.0), dict.fromkeys("abcd", 0.0)
    cells = {"seed/base": zeros, "tuned/base": BASE, "seed/tuned": {**zeros, "a": 1.0}}
    write_run(tmp_path, "sequential", ones, cells=cells)
    ours = row(only(compare([tmp_path])), "sequential")
    assert ours.cells == {"seed/base": 0.0, "tuned/base": 0.25, "seed/tuned": 0.25, "tuned/tuned": 1.0}
    assert ours.interaction is not None
    assert ours.interaction.estimate.mean == 0.5  # per example both - prompt - weights + neither: 0, 1, 0, 1
    assert ours.interaction.p == 0.5  # of four sign patterns of two ones, two are as far out


def test_every_run_that_is_not_done_is_a_row_with_its_reason(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", BASE)
    write_run(tmp_path, "joint", status="failed", reason="loss is NaN at step 3")
    write_run(tmp_path, "lora-only", status="no-data", reason="no accepted rollouts")
    write_run(tmp_path, "sequential", status=None)
    (write_run(tmp_path, "prompt-only", BETTER) / "predictions.jsonl").write_text('{"id": "a", "score": 1}\n')
    group = only(compare([tmp_path]))
    assert {r.strategy: r.status for r in group.rows} == {
        "zero-shot": "done",
        "prompt-only": "damaged",
        "lora-only": "no-data",
        "sequential": "unfinished",
        "joint": "failed",
    }
    assert row(group, "joint").reason == "loss is NaN at step 3"
    assert "1 rows but the summary says n = 4" in row(group, "prompt-only").reason
    flat = record(group, row(group, "joint"))
    numbers = {k: v for k, v in flat.items() if k not in ("task", "model", "engine", "strategy", "status", "runs")}
    assert {v for k, v in numbers.items() if k not in ("seeds", "run_names", "reason")} == {None}  # empty, never 0


def test_a_failed_seed_does_not_hide_among_the_finished(tmp_path: Path) -> None:
    write_run(tmp_path, "joint", BETTER, seed=0)
    write_run(tmp_path, "joint", status="failed", reason="killed", seed=1)
    assert [(r.status, len(r.runs)) for r in only(compare([tmp_path])).rows] == [("done", 1), ("failed", 1)]


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("data_digest", "data"),
        ("test_ids_digest", "test examples"),
        ("decoding_digest", "decoding"),
        ("grader_version", "grader version"),
    ],
)
def test_mixtures_are_refused_naming_runs_and_difference(tmp_path: Path, field: str, word: str) -> None:
    write_run(tmp_path, "zero-shot", BASE, name="one")
    if field == "test_ids_digest":
        write_run(tmp_path, "joint", {**BASE, "e": 1.0}, name="two")
    else:
        write_run(tmp_path, "joint", BASE, name="two", comparable={field: "other"})
    with pytest.raises(UsageError, match=rf"because their {word} differ.*one.*two|{word} differ.*two.*one"):
        compare([tmp_path])


def test_unlike_runs_of_different_tasks_or_models_are_groups(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", BASE, task="micro-math", comparable={"data_digest": "m"})
    write_run(tmp_path, "zero-shot", BASE)
    write_run(tmp_path, "zero-shot", BASE, model="tiny-4m")
    assert [(g.task, g.model) for g in compare([tmp_path])] == [
        ("micro-gsm8k", "tiny"),
        ("micro-gsm8k", "tiny-4m"),
        ("micro-math", "tiny"),
    ]


def test_a_run_that_never_chose_its_engine_stands_beside_its_siblings(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", BASE)
    write_run(tmp_path, "joint", status="failed", reason="no such model")
    assert len(only(compare([tmp_path])).rows) == 2


def test_variants_of_one_strategy_are_rows_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path, "sequential", BASE, settings={"sequential": {"stages": "w,p"}})
    write_run(tmp_path, "sequential", BETTER, settings={"sequential": {"stages": "p,w,p"}})
    write_run(tmp_path, "sequential", BETTER, seed=1, settings={"sequential": {"stages": "p,w,p"}})
    rows = only(compare([tmp_path])).rows
    assert [(r.strategy, len(r.runs)) for r in rows] == [
        ("sequential", 1),  # the tiny models' default
        ("sequential (stages=p,w,p)", 2),
    ]


def test_different_hardware_is_told_and_silence_is_none(tmp_path: Path) -> None:
    cpu, gpu = ({"hardware": made} for made in (["cpu", "AVX512"], ["cuda", "NVIDIA H100"]))
    write_run(tmp_path, "zero-shot", BASE, more=cpu)
    write_run(tmp_path, "prompt-only", BASE, more={"hardware": 7})
    write_run(tmp_path, "sequential", BASE, more=cpu)
    assert only(compare([tmp_path])).notes == ()
    write_run(tmp_path, "joint", BETTER, more=gpu)
    (note,) = only(compare([tmp_path])).notes
    assert "cuda NVIDIA H100, cpu AVX512" in note


def test_stages_are_named_unless_they_are_the_default_even_of_a_single_variant(tmp_path: Path) -> None:
    write_run(tmp_path, "sequential", BASE, settings={"sequential": {"stages": "w,i"}})
    assert [r.strategy for r in only(compare([tmp_path])).rows] == ["sequential (stages=w,i)"]
    more = {"sequential": {"stages": "w,i"}, "difficulty": {"bins": 5}}
    write_run(tmp_path, "sequential", BASE, settings=more)
    write_run(tmp_path, "sequential", BASE, settings={"sequential": {"stages": "p,i"}})
    assert [r.strategy for r in only(compare([tmp_path])).rows] == [
        "sequential (bins=5, stages=w,i)", "sequential (stages=p,i)", "sequential (stages=w,i)",
    ]  # fmt: skip


def test_what_a_weight_method_brings_by_itself_is_not_named(tmp_path: Path) -> None:
    for weights in ({}, {"method": "dpo"}, {"method": "dpo", "beta": 0.2}, {"method": "ppo", "micro_batch_size": 2}):
        write_run(tmp_path, "lora-only", BETTER, settings={"weights": weights})
    assert [r.strategy for r in only(compare([tmp_path])).rows] == [
        "lora-only", "lora-only (method=dpo)", "lora-only (method=dpo, beta=0.2)", "lora-only (method=ppo)",
    ]  # fmt: skip


def test_where_no_variant_has_the_default_the_plain_name_is_what_most_have(tmp_path: Path) -> None:
    for settings in ({"rank": 2}, {"rank": 2, "sharing": False}, {"rank": 4}):
        write_run(tmp_path, "joint", BETTER, settings={"joint": settings})
    rows = only(compare([tmp_path])).rows
    assert [r.strategy for r in rows] == ["joint", "joint (rank=4)", "joint (sharing=False)"]


def test_an_ablation_is_named_by_what_sets_it_apart_and_can_be_the_baseline(tmp_path: Path) -> None:
    for settings in ({}, {"adapter_branch": "off"}, {"prompt_branch": "off"}, {"sharing": False}):
        write_run(tmp_path, "joint", BETTER if settings else BASE, settings={"joint": settings})
    group = only(compare([tmp_path], "joint"))
    assert [row.strategy for row in group.rows] == [
        "joint",
        "joint (adapter_branch=off)",
        "joint (prompt_branch=off)",
        "joint (sharing=False)",
    ]
    assert (group.baseline, group.notes) == ("joint", ())
    assert only(compare([tmp_path], "joint (sharing=False)")).baseline == "joint (sharing=False)"


def test_what_was_measured_on_val_is_said_to_be(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", BASE, settings={"measured": "val"})
    assert only(compare([tmp_path])).notes == (
        "Measured on val, where strategies may also have chosen: for choosing settings, not for a claim.",
    )


def test_settings_that_a_strategy_does_not_read_make_no_variant(tmp_path: Path) -> None:
    write_run(tmp_path, "zero-shot", BASE)
    write_run(tmp_path, "zero-shot", BASE, settings={"joint": {"rank": 4}, "runner": {"batch_size": 4}})
    write_run(tmp_path, "zero-shot", BASE, settings={"noise_examples": 8, "vllm": {"between": "stop", "sequences": 4}})
    assert len(only(compare([tmp_path])).rows) == 1
    write_run(tmp_path, "zero-shot", BASE, settings={"vllm": {"quantization": "fp8"}})
    assert len(only(compare([tmp_path])).rows) == 2


def test_baseline_can_be_chosen_and_a_missing_one_is_said(tmp_path: Path) -> None:
    write_run(tmp_path, "prompt-only", BASE)
    write_run(tmp_path, "joint", BETTER)
    group = only(compare([tmp_path]))
    assert group.baseline == "prompt-only"
    assert group.notes == ("No finished run of zero-shot: differences are to prompt-only.",)
    assert only(compare([tmp_path], "joint")).baseline == "joint"
    with pytest.raises(UsageError, match=r"No run is called 'lora-only'\. Give --baseline one of: prompt"):
        compare([tmp_path], "lora-only")


def test_a_folder_given_twice_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "joint", BETTER)
    assert len(only(compare([tmp_path, folder, tmp_path / "." / folder.name])).rows[0].runs) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', '{"strategy": "joint"}', "\x00\x01", "[" * 10_000])
def test_a_config_that_is_no_config_is_a_damaged_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    assert [r.status for g in compare([tmp_path]) for r in g.rows] == ["damaged"]


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"status": "done"}', '{"status": 3}', '{"status":"done","n":0}']
)
def test_a_summary_that_is_none_is_a_damaged_run(tmp_path: Path, content: str) -> None:
    (write_run(tmp_path, "joint", BETTER) / "summary.json").write_text(content)
    assert [r.status for r in only(compare([tmp_path])).rows if r.status == "done"] == []


@pytest.mark.parametrize("score", [float("nan"), -0.5, 1.5, float("inf")])
def test_a_score_outside_its_range_takes_part_in_no_number(tmp_path: Path, score: float) -> None:
    write_run(tmp_path, "joint", {"a": score, "b": 0.0})
    (broken,) = only(compare([tmp_path])).rows
    assert broken.status == "damaged"
    assert "is not in [0, 1]" in broken.reason


def test_long_settings_stay_different_in_their_labels(tmp_path: Path) -> None:
    for end in ("one", "two"):
        write_run(tmp_path, "joint", BASE, settings={"seed_instruction": "Think about it for a long time. " * 9 + end})
    labels = [r.strategy for r in only(compare([tmp_path])).rows]
    assert len(set(labels)) == 2
    assert all(len(label) < 40 for label in labels)


def test_a_seed_that_was_run_twice_is_seen(tmp_path: Path) -> None:
    write_run(tmp_path, "joint", BASE, name="first")
    write_run(tmp_path, "joint", BASE, name="copy")
    group = only(compare([tmp_path]))
    assert record(group, group.rows[0])["seeds"] == [0, 0]


def test_relative_gain_over_tasks_is_the_papers(tmp_path: Path) -> None:
    """Sheet 02: MetaTuner-J gains 17.11 / 16.18 / 4.32 / 2.73 % over BetterTogether, 10.08 % on average."""
    table = {
        "math": (0.4156, 0.4867),
        "gsm8k": (0.6793, 0.7892),
        "hotpotqa": (0.5230, 0.5456),
        "cosmosqa": (0.898, 0.9225),
    }
    for task, (theirs, ours) in table.items():
        write_run(tmp_path, "sequential", dict.fromkeys("abcd", theirs), task=task)
        write_run(tmp_path, "joint", dict.fromkeys("abcd", ours), task=task)
    base, joint = overall(compare([tmp_path], "sequential"))
    assert (base.strategy, base.difference, base.relative_gain) == ("sequential", None, None)
    assert joint.tasks == ("cosmosqa", "gsm8k", "hotpotqa", "math")
    assert joint.relative_gain is not None
    assert joint.relative_gain.estimate.mean == pytest.approx(0.1008, abs=5e-5)
    assert joint.score.mean == pytest.approx((0.4867 + 0.7892 + 0.5456 + 0.9225) / 4)
    assert joint.difference is not None
    assert joint.difference.estimate.mean == pytest.approx((0.0711 + 0.1099 + 0.0226 + 0.0245) / 4)
    assert joint.difference.estimate.low is None  # every example differs alike


def test_a_strategy_that_lacks_a_task_has_no_mean_over_tasks(tmp_path: Path) -> None:
    for task in ("math", "gsm8k"):
        write_run(tmp_path, "zero-shot", BASE, task=task)
    write_run(tmp_path, "joint", BETTER, task="math")
    groups = compare([tmp_path])
    assert [over.strategy for over in overall(groups)] == ["zero-shot"]
    assert overall(groups[:1]) == []


def test_the_range_is_over_the_runs_of_a_row(tmp_path: Path) -> None:
    for seed, scores in enumerate((BASE, BETTER)):
        write_run(tmp_path, "joint", scores, seed=seed)
    (pooled,) = only(compare([tmp_path])).rows
    assert score_range(pooled) == (0.25, 0.75)


# ---- statistics of a comparison ----

MANY = [f"e{i}" for i in range(60)]


def marks(right: int, of: list[str] = MANY) -> dict[str, float]:
    return {name: float(i < right) for i, name in enumerate(of)}


def test_holm_is_over_all_differences_shown_and_decides_the_star(tmp_path: Path) -> None:
    """7 wins of 60 without a loss: mid-p 2^-7 = 0.008 alone; among eight, 0.0625."""
    for task in ("gsm8k", "math"):
        write_run(tmp_path, "zero-shot", marks(20), task=task)
        for k, stages in enumerate(("w,p", "p,w", "p,w,p", "p,p")):
            right = 27 if (task, k) == ("math", 0) else 20
            write_run(tmp_path, "sequential", marks(right), task=task, settings={"sequential": {"stages": stages}})
    groups = compare([tmp_path])
    found = row(groups[1], "sequential").difference
    assert found is not None
    assert (found.p, found.p_holm) == (pytest.approx(2**-7), pytest.approx(8 * 2**-7))
    assert found.estimate.excludes_zero
    assert not found.significant
    assert "below 0.05 alone (p 0.008), not among the 8 shown (p 0.062)" in row(groups[1], "sequential").sentence
    alone = compare([tmp_path / r.runs[0].name for r in groups[1].rows[:2]])
    assert row(only(alone), "sequential").difference is not None
    assert row(only(alone), "sequential").sentence.startswith(
        "sequential is better than zero-shot by 11.7 points (95% "
    )


def test_interactions_are_a_family_of_their_own(tmp_path: Path) -> None:
    cells = {"seed/base": marks(0), "tuned/base": marks(0), "seed/tuned": marks(0)}
    write_run(tmp_path, "zero-shot", marks(0))
    write_run(tmp_path, "joint", marks(20), cells=cells)
    ours = row(only(compare([tmp_path])), "joint")
    assert ours.interaction is not None
    assert ours.interaction.p_holm == ours.interaction.p
    assert ours.interaction_sentence.startswith(
        "joint: prompt and weights together gain 33.3 points more than the sum of what each gains alone (95% "
    )


def test_a_greedy_zero_shot_needs_no_seeds_a_sampled_one_does(tmp_path: Path) -> None:
    for name, temperature in (("greedy", 0.0), ("sampled", 0.7)):
        settings = {"decoding": {"temperature": temperature}}
        write_run(tmp_path / name, "zero-shot", marks(10), settings=settings)
        write_run(tmp_path / name, "joint", marks(50), settings=settings)
    greedy, sampled = (row(only(compare([tmp_path / name])), "joint").sentence for name in ("greedy", "sampled"))
    assert greedy.endswith(" One seed: other seeds are not covered.")
    assert sampled.endswith(" One seed: other seeds are not covered.")
    for seed in (1, 2):
        write_run(tmp_path / "greedy", "joint", marks(50 + seed), seed=seed)
        settings = {"decoding": {"temperature": 0.7}}
        write_run(tmp_path / "sampled", "joint", marks(50 + seed), seed=seed, settings=settings)
    greedy, sampled = (row(only(compare([tmp_path / name])), "joint").sentence for name in ("greedy", "sampled"))
    assert "not covered" not in greedy
    assert sampled.endswith(" Zero-shot has one seed: its other seeds are not covered.")


def test_spread_of_seeds_examples_and_engine_are_apart(tmp_path: Path) -> None:
    for seed, right in enumerate((10, 30, 50)):
        folder = write_run(tmp_path, "joint", marks(right), seed=seed)
        summary = json.loads((folder / "summary.json").read_text())
        summary["noise"] = {"examples": 60, "promised": False, "mean_score_difference": 0.03}
        (folder / "summary.json").write_text(json.dumps(summary))
    found = spread(only(compare([tmp_path])).rows[0])
    assert found is not None
    assert found.seeds is not None
    assert 0.25 < found.seeds <= 1 / 3  # means 1/6, 1/2, 5/6 have a standard deviation of 1/3
    assert found.engine == pytest.approx((0.03 / 120) ** 0.5)
    flat = record(only(compare([tmp_path])), only(compare([tmp_path])).rows[0])
    assert (flat["seed_sd"], flat["example_se"], flat["engine_sd"]) == (found.seeds, found.examples, found.engine)


@pytest.mark.parametrize(
    "noise", [None, {}, [], "x", {"mean_score_difference": "much"}, {"mean_score_difference": 7}, {"promised": False}]
)
def test_noise_that_was_not_measured_is_empty(tmp_path: Path, noise: Any) -> None:
    folder = write_run(tmp_path, "joint", marks(10))
    summary = json.loads((folder / "summary.json").read_text()) | {"noise": noise}
    (folder / "summary.json").write_text(json.dumps(summary))
    found = spread(only(compare([tmp_path])).rows[0])
    assert found is not None
    assert found.engine is None


def test_an_engine_that_promises_to_repeat_itself_has_no_noise(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "joint", marks(10))
    summary = json.loads((folder / "summary.json").read_text()) | {"noise": {"promised": True}}
    (folder / "summary.json").write_text(json.dumps(summary))
    found = spread(only(compare([tmp_path])).rows[0])
    assert found is not None
    assert found.engine == 0.0


def test_duplicate_ids_make_a_run_damaged_not_its_number_wrong(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "joint", BASE)
    rows = (folder / "predictions.jsonl").read_text()
    (folder / "predictions.jsonl").write_text(rows + rows.splitlines()[0] + "\n")
    (broken,) = only(compare([tmp_path])).rows
    assert (broken.status, broken.score) == ("damaged", None)
    assert "occurs twice" in broken.reason


def test_rows_of_other_examples_are_refused_with_a_count() -> None:
    """Their summaries are compared before; this is what stands between wrong rows and a wrong pair."""
    runs = [Run(name, "done", "", {"strategy": "joint"}) for name in ("one", "two")]
    with pytest.raises(UsageError, match=r"two has rows for 1 of the 2 test examples of the other runs, and 2 of its"):
        _arm(runs, [{"a": 1.0, "b": 0.0}, {"a": 1.0, "c": 0.0, "d": 0.0}], ["a", "b"])
    with pytest.raises(UsageError, match=r"two has rows for 0 of the 2"):
        _arm(runs, [{"a": 1.0, "b": 0.0}, {"c": 1.0}], ["a", "b"])


def test_a_seed_that_was_run_twice_is_said(tmp_path: Path) -> None:
    for name in ("first", "copy"):
        write_run(tmp_path, "joint", BASE, name=name)
    assert "joint: 2 runs have 1 different seeds." in only(compare([tmp_path])).notes[-1]


def test_relative_gain_has_an_interval_and_a_sentence(tmp_path: Path) -> None:
    for task in ("gsm8k", "math"):
        write_run(tmp_path, "zero-shot", marks(20), task=task)
        for seed in range(3):
            write_run(tmp_path, "joint", marks(40 + seed), task=task, seed=seed)
    base, joint = overall(compare([tmp_path]))
    assert (base.sentence, base.difference) == ("", None)
    assert joint.relative_gain is not None
    e = joint.relative_gain.estimate
    assert e.mean == pytest.approx(41 / 20 - 1)
    assert e.low is not None
    assert 0 < e.low < e.mean
    assert joint.sentence.startswith("Mean of 2 tasks: joint is better than zero-shot by 35.0 points (95% ")
    assert " joint against zero-shot: relative gain +105.0% (95% " in joint.sentence
    assert "not covered" not in joint.sentence


def test_one_seed_on_one_task_is_said_of_the_mean(tmp_path: Path) -> None:
    for task, seeds in (("gsm8k", 3), ("math", 1)):
        write_run(tmp_path, "zero-shot", marks(20), task=task)
        for seed in range(seeds):
            write_run(tmp_path, "joint", marks(40 + seed), task=task, seed=seed)
    assert " One seed: other seeds are not covered." in overall(compare([tmp_path]))[1].sentence


def test_another_metric_is_compared_and_runs_without_it_stay_visible(tmp_path: Path) -> None:
    for strategy, f1 in (("zero-shot", 0.25), ("joint", 0.75)):
        folder = write_run(tmp_path, strategy, BASE)
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        for k, each in enumerate(rows):
            each["metrics"]["token_f1"] = f1 + k / 16
        write_rows(folder / "predictions.jsonl", rows)
        summary = json.loads((folder / "summary.json").read_text())
        summary["metrics"]["token_f1"] = f1 + 1.5 / 16
        (folder / "summary.json").write_text(json.dumps(summary))
    write_run(tmp_path, "lora-only", BASE)
    group = only(compare([tmp_path], metric="token_f1"))
    assert group.metric == "token_f1"
    assert [r.status for r in group.rows] == ["done", "no-metric", "done"]
    assert row(group, "lora-only").reason == "it has accuracy, not token_f1"
    found = row(group, "joint").difference
    assert found is not None
    assert (found.estimate.mean, found.test, found.p) == (0.5, "sign-flip", 0.125)  # 2 of 16 sign patterns
    assert score_range(row(group, "joint")) == (0.75 + 1.5 / 16,) * 2
    assert row(only(compare([tmp_path])), "joint").sentence.startswith("joint scores the same as zero-shot on every")
    with pytest.raises(
        UsageError, match=r"No finished run has the metric 'f2'\. Give --metric one of: accuracy, token_f1"
    ):
        compare([tmp_path], metric="f2")


def test_runs_at_anothers_budget_are_one_row_whatever_they_were_scaled_to(tmp_path: Path) -> None:
    """Beside their contestants, whose labels stay what they are."""
    for seed, (rounds, tokens) in enumerate(((3, 700), (4, 900), (5, 1000))):
        write_run(tmp_path, "joint", BETTER, seed=seed, tuning={"tokens": tokens, "flops": 1.0, "seconds": 1.0})
        budget = {"tokens": tokens, "matched": "joint"}
        for variant in ({}, {"minibatch": 3}):
            write_run(tmp_path, "prompt-only", BASE, seed=seed, settings={"prompt": {"rounds": 2, **variant}})
            settings = {"prompt": {"rounds": rounds, **variant}, "budget": budget}
            spent = {"tokens": tokens / 2, "flops": 1.0, "seconds": 1.0}
            write_run(tmp_path, "prompt-only", BETTER, seed=seed, settings=settings, tuning=spent)
    group = only(compare([tmp_path]))
    assert [(r.strategy, len(r.runs)) for r in group.rows] == [
        ("prompt-only", 3),
        ("prompt-only (minibatch=3)", 3),
        ("prompt-only (minibatch=3) @ joint's budget", 3),
        ("prompt-only @ joint's budget", 3),
        ("joint", 3),
    ]
    assert [budget_used(r) for r in group.rows] == [None, None, 0.5, 0.5, None]
    alone = only(compare([r.runs[0].folder for r in group.rows if "@" in r.strategy]))
    assert [r.strategy for r in alone.rows] == [r.strategy for r in group.rows if "@" in r.strategy]
