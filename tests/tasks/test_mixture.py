"""Tuning on some tasks to be tested on another: who renders and grades what, and which rows are taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune import experiment
from cotune.config import resolve
from cotune.errors import UsageError
from cotune.record import read_rows
from cotune.tasks import task
from cotune.tasks.mixture import Mixture
from cotune.values import Outcome

SOURCES = ("micro-gsm8k", "micro-hotpotqa")
SMALL = {"model": "tiny", "task": "micro-cosmosqa", "limit_train": 5, "limit_val": 4, "limit_test": 6}


def test_train_comes_by_turns_from_the_sources_and_test_from_the_target() -> None:
    config = resolve(SMALL, {"strategy": "zero-shot", "train_tasks": list(SOURCES)})
    target = task("micro-cosmosqa")
    data = experiment.dataset(config, target)
    assert [e.id.partition("/")[0] for e in data.train] == [*SOURCES, *SOURCES, "micro-gsm8k"]
    assert [e.id.partition("/")[0] for e in data.val] == [*SOURCES, *SOURCES]
    alone = experiment.dataset(resolve(SMALL, {"strategy": "zero-shot"}), target)
    assert data.test() == alone.test()
    assert {s.split for s in data.report.splits} == {
        "test", "micro-gsm8k/train", "micro-gsm8k/val", "micro-hotpotqa/train", "micro-hotpotqa/val",
    }  # fmt: skip


def test_every_example_is_rendered_and_graded_by_its_own_task() -> None:
    config = resolve(SMALL, {"strategy": "zero-shot", "train_tasks": list(SOURCES)})
    target = task("micro-cosmosqa")
    mixture, data = experiment.learned_task(config, target), experiment.dataset(config, target)
    own = {name: task(name) for name in SOURCES}
    for example in data.train:
        home = own[example.id.partition("/")[0]]
        assert mixture.question_text(example) == home.question_text(example)
        assert mixture.grade(example, home.reference_completion(example)).outcome is Outcome.CORRECT
        assert mixture.reference_completion(example) == home.reference_completion(example)
    for example in data.test():
        assert mixture.question_text(example) == target.question_text(example)
        assert mixture.grade(example, target.reference_completion(example)).outcome is Outcome.CORRECT
    assert isinstance(mixture, Mixture)
    assert mixture.learned == SOURCES
    assert mixture.max_new_tokens == max(t.max_new_tokens for t in [target, *own.values()])


@pytest.mark.parametrize("strategy", ["sequential", "joint"])
def test_a_run_learns_from_the_sources_alone(strategy: str, tmp_path: Path) -> None:
    quick = {
        "decoding": {"max_new_tokens": 8},
        "prompt": {
            "rounds": 1,
            "candidates": 2,
            "search_examples": 4,
            "method": "opro+bootstrap",
            "demonstration_sets": 1,
        },
        "weights": {"epochs": 1},
        "joint": {"epochs": 1, "rollout_examples": 2, "rollouts": 2, "max_prompt_tokens": 8},
    }
    config = resolve(SMALL, quick, {"strategy": strategy, "train_tasks": list(SOURCES)})
    folder = experiment.run(config, tmp_path).folder
    data = json.loads((folder / "data.json").read_text())
    assert {i.partition("/")[0] for i in data["used"]["train"]["ids"]} == set(SOURCES)
    rows = read_rows(folder / "predictions.jsonl")
    assert len(rows) == 6
    assert all(len(row["choices"]) == 4 for row in rows)


def test_wrong_train_tasks() -> None:
    with pytest.raises(UsageError, match="named twice"):
        resolve(SMALL, {"strategy": "zero-shot", "train_tasks": ["micro-math", "micro-math"]})
    config = resolve(SMALL, {"strategy": "zero-shot", "train_tasks": ["micro-gsm"]})
    with pytest.raises(UsageError, match="micro-gsm8k"):
        experiment.dataset(config, task("micro-cosmosqa"))
