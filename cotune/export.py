"""What one takes home from a finished run: a prompt and a PEFT adapter that other tools load.

A joint run makes both anew for every query. For a server that holds one adapter, or a few, the queries of the train
split are grouped by their latents (k-means); each group gets the adapter of its centre and the prompt that G writes for
the example nearest to it. What that costs in accuracy is measured on the validation split: the test split stays
touched once. Several numbers of groups give the curve from one adapter for all to one per query. Ours; the paper has no
such limit case.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn import functional

from cotune.bench import Bench, MemoryStore, ignore
from cotune.compare.stats import compare_paired, mean_score
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.experiment import (
    Listener,
    base_model,
    dataset,
    decoding,
    engine_factory,
    generator_model,
    learned_task,
)
from cotune.finished import open_run
from cotune.ledger import Ledger
from cotune.metatuned import MetaTuned
from cotune.serving import per_example
from cotune.strategies import load_tuned
from cotune.strategies.base import Fixed
from cotune.tasks import task as make_task
from cotune.values import Conditioning, Evaluation, Example

_GROUPED = 512  # train examples whose latents are grouped, at most


def export(folder: Path, out: Path, groups: Sequence[int] = (1,), listen: Listener = ignore) -> dict[str, Any]:
    """Write `out/tuned.json` and `out/adapter/` (PEFT); with more groups than one one such folder each, `groups.json`.

    Several numbers of groups are written to `out/groups-N/` each. A group's folder is loaded by `strategies.load_tuned`
    and its adapter by PEFT, unchanged. The report has a row per number of groups, and one for an adapter per example.
    Raises UsageError for a run that is not done, an `out` that is not empty, more groups than train examples, and
    groups of a run with one prompt for all.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already. Give --out a new folder.")
    config, _ = open_run(folder)
    model = base_model(config, config.model)
    tuned = load_tuned(folder / "tuned", generator_model(config, model))
    task = make_task(config.task)
    report: dict[str, Any] = {"out": str(out), "metric": task.headline, "split": None, "n": None, "per_example": None}
    if isinstance(tuned, Fixed):
        if list(groups) != [1]:
            raise UsageError(f"{folder} has one prompt for all examples already; leave --groups out.")
        _write(tuned, out, model.source)
        return report | {"rows": [_row(1, *_held([tuned]))]}
    assert isinstance(tuned, MetaTuned)
    learned, data = learned_task(config, task), dataset(config, task)
    tuned = replace(tuned, task=learned)
    train, val, sampling = data.train[:_GROUPED], data.val, decoding(config, learned)
    if max(groups) > len(train):
        raise UsageError(f"There are {len(train)} train examples to group; give --groups {len(train)} or fewer.")
    build = engine_factory(config)
    bench = Bench(model, build(model), build, Ledger(), MemoryStore(), config.seed, listen, "export")

    def measured(policy: MetaTuned | Grouped, label: str) -> tuple[Evaluation, dict[str, Any]]:
        with bench.ledger.parts() as parts:
            found = evaluate(learned, val, policy.condition(val, bench), sampling, bench, label=label)
        return found, per_example(parts, len(val))

    with bench.ledger.measuring():
        latents = tuned.latents(train)
        policies = {count: group(tuned, train, latents, count, bench) for count in groups}
        rows = {count: _row(count, *_held(policy.members)) for count, policy in policies.items()}
        if val:
            each, cost = measured(tuned, "an adapter per example")
            made = len({c.adapter.digest for c in each.conditionings if c.adapter})
            own = _row(None, made, made * tuned.tuner.adapter_bytes) | _scored(each, None) | {"serving": cost}
            report |= {"split": "val", "n": len(val), "per_example": own}
            for count, policy in policies.items():
                few, cost = measured(policy, f"groups: {count}")
                rows[count] |= _scored(few, each) | {"serving": cost}
    for count, policy in policies.items():
        _write_groups(policy, out if len(policies) == 1 else out / f"groups-{count}", model.source)
    return report | {"rows": list(rows.values())}


def _row(groups: int | None, adapters: int, size: int) -> dict[str, Any]:
    """What is held to serve with: so many different adapters, so many bytes of them. Not measured yet."""
    scored = ("score", "score_low", "score_high", "difference", "difference_low", "difference_high", "serving")
    return {"groups": groups, "adapters": adapters, "adapter_bytes": size, **dict.fromkeys(scored)}


def _held(members: Sequence[Fixed]) -> tuple[int, int]:
    adapters = [member.adapter for member in members if member.adapter is not None]
    return len(adapters), sum(adapter.nbytes for adapter in adapters)


def _scored(found: Evaluation, each: Evaluation | None) -> dict[str, float | None]:
    """Score with its interval and, example by example, the difference to an adapter per example."""
    score = mean_score([grade.score for grade in found.grades])
    scored = {"score": score.mean, "score_low": score.low, "score_high": score.high}
    if each is None:
        return scored
    lost = compare_paired([grade.score for grade in found.grades], [grade.score for grade in each.grades]).estimate
    return scored | {"difference": lost.mean, "difference_low": lost.low, "difference_high": lost.high}


def _write_groups(grouped: Grouped, folder: Path, source: str) -> None:
    if len(grouped.members) == 1:
        _write(grouped.members[0], folder, source)
        return
    for i, member in enumerate(grouped.members):
        _write(member, folder / f"group-{i}", source)
    content = {"kind": "groups", "sizes": grouped.sizes, "centres": grouped.centres}
    (folder / "groups.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def _write(fixed: Fixed, folder: Path, source: str) -> None:
    fixed.save(folder)
    if fixed.adapter is not None:
        fixed.adapter.save(folder / "adapter", base_model=source)  # so that PEFT and servers know what it belongs to


@dataclass(frozen=True)
class Grouped:
    """One prompt and adapter per group of queries; a query belongs to the centre nearest to its latent.

    `centres` are unit vectors in the space of latents, `sizes` how many train examples each group has.
    """

    maker: MetaTuned
    members: tuple[Fixed, ...]
    centres: list[list[float]]
    sizes: list[int]

    def condition(self, examples: Sequence[Example], bench: Bench) -> list[Conditioning]:
        if len(self.members) == 1:
            return [Conditioning(self.members[0].prompt, self.members[0].adapter)] * len(examples)
        latents_UD, which = self.maker.encode(examples, bench)
        nearest = (latents_UD.cpu() @ torch.tensor(self.centres).T).argmax(-1).tolist()
        chosen = [self.members[nearest[i]] for i in which]
        return [Conditioning(member.prompt, member.adapter) for member in chosen]


def group(tuned: MetaTuned, examples: Sequence[Example], latents_BD: Tensor, groups: int, bench: Bench) -> Grouped:
    """k-means (k-means++ start, seeded) over the latents of `examples`; empty groups are dropped."""
    latents_BD = latents_BD.cpu()
    rows_BD = latents_BD.double().numpy()
    groups = min(groups, len(np.unique(rows_BD, axis=0)))  # a k-means++ start needs that many different ones
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        centres, labels = kmeans2(rows_BD, groups, minit="++", rng=bench.seed_for("groups") % 2**32, missing="warn")
    kept = [i for i in range(groups) if (labels == i).any()]
    centre = functional.normalize(torch.tensor(centres[kept], dtype=torch.float32), dim=-1)
    nearest = [examples[i] for i in (centre @ latents_BD.T).argmax(-1).tolist()]
    adapters = tuned.adapters_at(centre.to(tuned.generator.model.device))
    prompts = tuned.greedy_prompts(nearest, bench)
    members = tuple(Fixed(p, a) for p, a in zip(prompts, adapters, strict=True))
    return Grouped(tuned, members, centre.tolist(), [int((labels == i).sum()) for i in kept])
