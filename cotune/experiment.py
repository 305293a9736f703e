"""The composition root: the only file that knows every layer.

run(config) loads data and model, lets the strategy tune on train and val, and only then loads the test split, measures
what the strategy hands over, and writes the run folder.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cotune import canary, cells, noise
from cotune.bench import Bench, ignore
from cotune.checks import remarks, validity
from cotune.config import RunConfig
from cotune.diagnosis import warnings
from cotune.engines import engine as make_engine
from cotune.engines.base import Engine, Sampling
from cotune.engines.cache import GenerationCache
from cotune.errors import BudgetExhausted, CotuneError, DataError, NoData, UsageError
from cotune.evaluate import evaluate
from cotune.ledger import Ledger
from cotune.methods.verifier import verifier_for
from cotune.models.base import BaseModel, load
from cotune.models.black_box import BlackBox
from cotune.openai_client import ChatClient
from cotune.plans import by_bin, check, curve, row_of
from cotune.plugins import resolve
from cotune.progress_file import ProgressFile
from cotune.record import RunFolder, environment, read_rows
from cotune.scorers import VERIFIER
from cotune.serving import per_example
from cotune.strategies import STRATEGIES
from cotune.strategies.base import Fixed, Problem, Strategy
from cotune.tasks import task as make_task
from cotune.tasks.base import Task
from cotune.tasks.data import Dataset, content_digest
from cotune.tasks.data import load as load_data
from cotune.tasks.grading import GRADER_VERSION
from cotune.tasks.mixture import Mixture, mixed
from cotune.trackers import Trackers
from cotune.values import Conditioning, Evaluation, Event, Example, Outcome, Prompt, digest

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class RunResult:
    folder: Path
    summary: dict[str, Any]


def make_strategy(config: RunConfig) -> Strategy:
    strategy: Strategy = resolve("strategies", STRATEGIES, config.strategy).from_config(config)
    return strategy


def decoding(config: RunConfig, task: Task) -> Sampling:
    """How every answer of this run is decoded."""
    chosen = config.decoding
    limit = chosen.max_new_tokens or task.max_new_tokens
    return Sampling(limit, temperature=chosen.temperature, top_p=chosen.top_p, seed=config.seed)


def learned_task(config: RunConfig, task: Task) -> Task:
    """What is tuned on: `task` itself, or the mixture of `train_tasks`."""
    return Mixture(task, [make_task(name) for name in config.train_tasks]) if config.train_tasks else task


def dataset(config: RunConfig, task: Task) -> Dataset:
    """Test of `task`; train and val of `task` too, or of `train_tasks`.

    Raises UsageError when val is to be measured and there is none.
    """

    def read(task: Task, train: int | None, val: int | None) -> Dataset:
        return load_data(
            task,
            config.data,
            seed=config.seed,
            limit_train=train,
            limit_val=val,
            limit_test=config.limit_test,
            val_max=config.val_size,
        )

    names, limits = config.train_tasks, (config.limit_train, config.limit_val)
    if not names:
        data = read(task, *limits)
        if config.measured == "val" and not data.val:
            raise UsageError("measured = 'val' but there are no val examples. Give more train rows, or measure test.")
        return data
    train, val = (None if limit is None else math.ceil(limit / len(names)) for limit in limits)
    return mixed(read(task, 0, 0), [read(make_task(name), train, val) for name in names], *limits)


def measured_examples(config: RunConfig, data: Dataset) -> tuple[Example, ...]:
    return data.test() if config.measured == "test" else data.val


def is_crossed(config: RunConfig, strategy: Strategy) -> bool:
    """Whether other cells are measured: several levers were turned, and it is not settings that are being chosen."""
    return len(strategy.levers) > 1 and config.measured == "test"


def verified(config: RunConfig, strategy: Strategy) -> bool:
    """Whether a verifier ranks samples somewhere in this run."""
    chosen = config.inference.scorer if "plan" in strategy.levers else None
    return VERIFIER in (config.plan.value.scorer, chosen)


def seed_prompt(config: RunConfig, task: Task) -> Fixed:
    """What every strategy starts from. Raises UsageError for an inference plan that cannot be carried out."""
    return Fixed(Prompt(config.seed_instruction or task.seed_instruction), plan=check(config.plan.value))


def base_model(config: RunConfig, name: str) -> BaseModel:
    """With the openai engine the model that answers is behind a server; any other is loaded."""
    if config.engine == "openai" and name == config.model:
        return black_box(config)
    return load(name, device=config.runner.device, dtype=config.runner.dtype)


def black_box(config: RunConfig) -> BlackBox:
    """Asks the server nothing yet. Raises UsageError when no server is named."""
    if config.openai.base_url is None:
        raise UsageError(
            "--engine openai needs the address of a server, for example --set openai.base_url=http://localhost:8000/v1."
        )
    client = ChatClient(config.openai.base_url, **config.openai.client())
    return BlackBox(config.model, client, config.openai.context_length)


def check_black_box(config: RunConfig, strategy: Strategy) -> list[str]:
    """What to note of a model behind a server; nothing for one that runs here.

    Raises UsageError for what only works where the weights are.
    """
    if config.engine != "openai":
        return []
    model = black_box(config)
    if "weights" in strategy.levers:
        raise UsageError(
            f"{config.strategy} tunes weights, and {model.name} is a black box behind {config.openai.base_url}: its "
            "weights cannot be reached. Take --strategy prompt-only, or --engine transformers with a model that runs "
            "here."
        )
    if verified(config, strategy):
        raise UsageError(
            f"A verifier reads the model's own states, and {model.name} is a black box behind "
            f"{config.openai.base_url}. Set plan.scorer (or inference.scorer) to log-probability or self-consistency, "
            "or take --engine transformers with a model that runs here."
        )
    if config.budget.flops is not None:
        raise UsageError(f"The FLOPs of {model.name} are unknown, so budget.flops cannot hold. Set budget.tokens.")
    return [
        f"{model.name} is a black box behind {config.openai.base_url}: that it stays the same model cannot be "
        "verified, and its FLOPs are unknown."
    ]


def generator_model(config: RunConfig, base: BaseModel) -> BaseModel:
    """MetaTuner's G, or the model of `prompt.proposer = "model:NAME"`; the base model itself when none is named."""
    return base_model(config, config.second_model) if config.second_model else base


def pairing(config: RunConfig, generator: BaseModel, base: BaseModel) -> list[str]:
    """A note when G is smaller than M: in the paper it is the larger one, so the two may have been swapped."""
    if config.generator is None or generator.parameters_count >= base.parameters_count:
        return []
    return [
        f"The generator {config.generator} has fewer parameters ({generator.parameters_count:,}) than the model that "
        f"answers, {config.model} ({base.parameters_count:,}). If that is not meant, swap --generator and --model."
    ]


def engine_factory(config: RunConfig) -> Callable[[BaseModel], Engine]:
    return lambda model: make_engine(model, config)


def run(
    config: RunConfig,
    out: Path,
    name: str | None = None,
    listen: Listener = ignore,
    cache: GenerationCache | None = None,
    trackers: Sequence[str] = (),
) -> RunResult:
    """Run, continue, or (when it is done already) just return the run that `config` describes.

    `cache` holds generations that other runs may have made already; it changes cost in time alone, so is no setting.
    Nor are `trackers`, the names of those that get a copy of the run's numbers; one that fails is a warning.
    A run that fails leaves a summary with status "failed" and the reason, and raises; one that is interrupted leaves no
    summary. Either goes on from where it was when the same command is given again.
    Raises CotuneError.
    """
    path = out / (name or config.run_name)
    with RunFolder.open(path, config) as folder:
        if (summary := folder.summary) is not None:
            return RunResult(path, summary)

        leave = ProgressFile(path)

        tracked = Trackers(
            trackers, path, config.model_dump(mode="json"), lambda said: listen(Event("warning", {"message": said}))
        )

        def record(event: Event) -> None:
            if row := folder.event(event):
                tracked.row(row)
            leave(event)
            listen(event)

        started = _now()
        facts = {
            "run": path.name,
            "strategy": config.strategy,
            "model": config.model,
            "task": config.task,
            "seed": config.seed,
            "started": started,
        }
        try:
            summary = _run(config, folder, record, cache)
        except NoData as error:
            summary = {"status": "no-data", "reason": str(error)}
        except (UsageError, DataError):
            folder.forget_if_untouched()  # a mistyped name is not a failed run
            tracked.end({"status": "failed"})
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, CotuneError) else f"{type(error).__name__}: {error}"
            summary = {"status": "failed", **facts, "reason": reason, "finished": _now()}
            folder.finish(summary)
            tracked.end(summary)
            raise
        except BaseException:
            tracked.end({"status": "interrupted"})
            raise
        summary = {"status": summary.pop("status"), **facts, **summary, "finished": _now()}
        folder.finish(summary)
        tracked.end(summary)
        return RunResult(path, summary)


def _run(config: RunConfig, folder: RunFolder, listen: Listener, cache: GenerationCache | None) -> dict[str, Any]:
    task = make_task(config.task)
    strategy = make_strategy(config)
    start = seed_prompt(config, task)
    black_box_notes = check_black_box(config, strategy)
    data = dataset(config, task)
    sampling = decoding(config, task)
    folder.write_json("environment.json", environment())
    model = base_model(config, config.model)
    generator = generator_model(config, model)
    notes = [*data.report.warnings, *pairing(config, generator, model), *black_box_notes]
    build = engine_factory(config)
    ledger = Ledger(config.budget.tokens, config.budget.flops, config.budget.seconds)
    bench = Bench(model, build(model), build, ledger, folder, config.seed, listen, cache=cache)
    bench.emit("start", strategy=config.strategy, train=len(data.train), val=len(data.val), model_digest=model.digest)
    for note in notes:
        bench.emit("warning", message=note)

    began = time.perf_counter()
    learned = learned_task(config, task)
    problem = Problem(learned, data.train, data.val, model, generator, decoding(config, learned))
    start = with_verifier(config, start, problem, bench)
    tuned = strategy.tune(start, problem, bench.at("tune"))
    folder.keep_tuned(tuned.save)

    measured = measured_examples(config, data)
    folder.write_json("data.json", data_record(config, data, measured))
    touches = folder.touched(config.measured)
    with ledger.measuring():
        measure = bench.at(config.measured)
        with ledger.parts() as parts:
            ours = tuned.condition(measured, measure)
            evaluation = evaluate(task, measured, ours, sampling, measure, label=config.measured)
        rows = prediction_rows(evaluation)
        folder.write_rows("predictions.jsonl", rows)
        crossed: list[dict[str, Any]] = []
        if is_crossed(config, strategy):
            levers = [lever for lever in cells.LEVERS if lever in strategy.levers]
            crossed = _crossed(task, measured, start, ours, levers, sampling, measure)
            folder.write_rows("crossed.jsonl", crossed)
        repeated = noise.measure(task, evaluation, sampling, measure, config.noise_examples)
        adapters = canary.measure(evaluation, sampling, measure)
    splits = {"train": data.train, "val": data.val} | {config.measured: measured}
    checks = validity(splits, config.measured, ours, rows, touches, adapters)
    events = read_rows(folder.path / "events.jsonl")
    stopped = dict.fromkeys(str(event["message"]) for event in events if event["kind"] == "budget")
    cost, serving = ledger.report(), per_example(parts, len(measured)) | {"parameters": tuned.sizes() or None}
    return {
        "status": "done",
        "engine": bench.engine.name,
        "headline": task.headline,
        **scores(rows, crossed),
        "checks": checks,
        "noise": repeated,
        "cost": cost if model.parameters_count else without_flops(cost),
        "serving": serving if model.parameters_count else without_flops(serving),
        "wall_seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory(),
        "hardware": model.hardware,
        "comparable": {
            "task": config.task,
            "data_digest": digest({s.split: s.digest for s in data.report.splits}),
            "test_ids_digest": digest([e.id for e in measured]),
            "decoding_digest": digest(asdict(sampling) | {"seed": None}),  # seeds of one strategy are comparable
            "grader_version": GRADER_VERSION,
        },
        "notes": [*notes, *stopped, *remarks(checks, config.measured, len(measured)), *warnings(events)],
    }


def with_verifier(config: RunConfig, start: Fixed, problem: Problem, bench: Bench) -> Fixed:
    """`start` with the verifier that its plan ranks by, trained on what it answers: one for all of the run,
    whatever the strategy. `start` itself under any other plan.

    Raises CotuneError when the budget does not pay for it: the plan cannot be carried out without.
    """
    task, train, limit = problem.task, problem.train, problem.sampling.max_new_tokens
    try:
        verifier = verifier_for(config.plan.value, [start], config.verifier, task, train, limit, bench)
    except BudgetExhausted as stop:
        raise CotuneError(
            f"{stop} That is before the verifier has learned. Raise --budget, lower verifier.examples or "
            "verifier.samples, or set plan.scorer = 'log-probability'."
        ) from None
    return start.under(start.plan, verifier) if verifier else start


def _crossed(
    task: Task,
    test: Sequence[Example],
    start: Fixed,
    ours: Sequence[Conditioning],
    levers: Sequence[str],
    sampling: Sampling,
    bench: Bench,
) -> list[dict[str, Any]]:
    """The rows of every cell of the tuned `levers` but the last, `ours` (sheet 01 for prompt and weights; ours).

    A plan that was not chosen is that of `ours` in all cells. One that was chosen is turned back to that of `start`,
    decoded anew: a greedy answer is not the first of N samples. Requests that two cells share are generated once.
    """
    *others, _ = cells.named(levers).items()
    rows = []
    for cell, tuned in others:
        planned = [start if "plan" in levers and "plan" not in tuned else c for c in ours]
        conditionings = [
            Conditioning(
                c.prompt if "prompt" in tuned else start.prompt,
                c.adapter if "weights" in tuned else None,
                p.plan,
                p.verifier,
            )
            for c, p in zip(ours, planned, strict=True)
        ]
        evaluation = evaluate(task, test, conditionings, sampling, bench, label=cell)
        rows += [{"cell": cell, **row} for row in prediction_rows(evaluation)]
    return rows


def scores(rows: Sequence[Mapping[str, Any]], crossed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the summary says of the rows of predictions.jsonl and crossed.jsonl: means, outcomes, cells (or None)."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    score = mean([row["score"] for row in rows])
    outcomes = Counter(row["outcome"] for row in rows)
    others = {row["cell"]: 0.0 for row in crossed}
    for cell in others:
        others[cell] = mean([row["score"] for row in crossed if row["cell"] == cell])
    last = list(cells.named(cells.levers_of(others)))[-1] if others else ""
    metrics = sorted({name for row in rows for name in row["metrics"]})
    sampled = [row["plan"] for row in rows if "plan" in row]
    plans = [plan for i, plan in enumerate(sampled) if plan not in sampled[:i]]
    plan = {"plans": plans, "examples": len(sampled), "curve": curve(rows)}
    if bins := by_bin(rows):
        plan |= {"bins": bins, "samples": sum(b["share"] * b["samples"] for b in bins)}
    return {
        "n": len(rows),
        **({"plan": plan} if sampled else {}),
        "score": score,
        "metrics": {name: mean([row["metrics"].get(name, 0.0) for row in rows]) for name in metrics},
        "outcomes": {o.value: outcomes[o.value] for o in Outcome},
        "cells": others | {last: score} if others else None,
    }


def without_flops(report: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every number of FLOPs None: of a black box they are unknown."""
    return {
        key: None if key == "flops" else without_flops(value) if isinstance(value, Mapping) else value
        for key, value in report.items()
    }


def data_record(config: RunConfig, data: Dataset, measured: Sequence[Example]) -> dict[str, Any]:
    """data.json: where the rows came from, what was in them, and the ids of each split of this run."""
    splits = {"train": data.train, "val": data.val, config.measured: measured}
    return {
        "task": data.task,
        "source": config.data,
        **asdict(data.report),
        "used": {
            name: {"n": len(examples), "digest": content_digest(examples), "ids": [e.id for e in examples]}
            for name, examples in splits.items()
        },
    }


def prediction_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The rows of predictions.jsonl. Prompt tokens are the question's, generated ones of all completions of it."""
    e = evaluation
    columns = (e.examples, e.conditionings, e.rendered, e.completions, e.grades, e.samples, e.worth)
    return [
        {
            "id": example.id,
            "prompt": digest(rendered),
            "instruction": c.prompt.instruction,
            "adapter": c.adapter.digest if c.adapter else None,
            "completion": completion.text,
            "prediction": grade.prediction,
            "reference": example.reference,
            **({"choices": list(example.choices)} if example.choices else {}),
            "outcome": grade.outcome.value,
            "score": grade.score,
            "metrics": dict(grade.metrics),
            "truncated": completion.truncated,
            "prompt_tokens": (
                samples.completions[0] if samples and samples.plan.chain > 1 else completion
            ).prompt_tokens,
            "generated_tokens": sum(s.generated_tokens for s in (samples.completions if samples else [completion])),
            "note": grade.note,
            **(row_of(samples, worth) if samples and worth is not None else {}),
        }
        for example, c, rendered, completion, grade, samples, worth in zip(*columns, strict=True)
    ]


def peak_memory() -> int:
    """Peak resident bytes of this process, or of the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
