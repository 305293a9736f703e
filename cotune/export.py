"""What one takes home from a finished run: a prompt and a PEFT adapter that other tools load.

A joint run makes both anew for every query. For a server that holds one adapter, or a few, the queries of the train
split are grouped by their latents (k-means); each group gets the adapter of its centre and the prompt that G writes for
the example nearest to it. What that costs in accuracy is measured on the validation split: the test split stays
touched once. Ours; the paper has no such limit case.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.cluster.vq import kmeans2
from torch.nn import functional

from cotune.bench import Bench, MemoryStore, ignore
from cotune.compare.stats import paired
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.experiment import Listener, base_model, dataset, decoding, engine_factory, generator_model
from cotune.finished import open_run
from cotune.ledger import Ledger
from cotune.metatuned import MetaTuned
from cotune.strategies import load_tuned
from cotune.strategies.base import Fixed
from cotune.tasks import task as make_task
from cotune.values import Conditioning, Example

_GROUPED = 512  # train examples whose latents are grouped, at most


def export(folder: Path, out: Path, groups: int = 1, listen: Listener = ignore) -> dict[str, Any]:
    """Write `out/tuned.json` and `out/adapter/` (PEFT); with `groups` > 1 one such folder per group and `groups.json`.

    A group's folder is loaded by `strategies.load_tuned` and its adapter by PEFT, unchanged. Raises UsageError for a
    run that is not done, an `out` that is not empty, and more groups than one for a run with one prompt for all.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already. Give --out a new folder.")
    config, _ = open_run(folder)
    model = base_model(config, config.model)
    tuned = load_tuned(folder / "tuned", generator_model(config, model))
    if isinstance(tuned, Fixed):
        if groups > 1:
            raise UsageError(f"{folder} has one prompt for all examples already; leave --groups out.")
        _write(tuned, out, model.source)
        return {"out": str(out), "groups": 1, "adapter": tuned.adapter is not None, "measured": None}
    assert isinstance(tuned, MetaTuned)
    task = make_task(config.task)
    data = dataset(config, task)
    build = engine_factory(config)
    bench = Bench(model, build(model), build, Ledger(), MemoryStore(), config.seed, listen, "export")
    with bench.ledger.measuring():
        grouped = group(tuned, data.train[:_GROUPED], groups, bench)
        sampling, val = decoding(config, task), data.val
        measured = None
        if val:
            each, few = (
                evaluate(task, val, t.condition(val, bench), sampling, bench, label=name)
                for name, t in (("per example", tuned), ("exported", grouped))
            )
            lost = paired([f.score - e.score for e, f in zip(each.grades, few.grades, strict=True)])
            measured = {
                "split": "val",
                "n": len(val),
                "per_example": each.score,
                "exported": few.score,
                "difference": lost.mean,
                "difference_low": lost.low,
                "difference_high": lost.high,
            }
    if len(grouped.members) == 1:
        _write(grouped.members[0], out, model.source)
    else:
        for i, member in enumerate(grouped.members):
            _write(member, out / f"group-{i}", model.source)
        content = {"kind": "groups", "sizes": grouped.sizes, "centres": grouped.centres}
        (out / "groups.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    adapter = any(member.adapter is not None for member in grouped.members)
    return {"out": str(out), "groups": len(grouped.members), "adapter": adapter, "measured": measured}


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
        latents = self.maker.latents(examples)
        nearest = (latents @ torch.tensor(self.centres, device=latents.device).T).argmax(-1)
        return [Conditioning(self.members[i].prompt, self.members[i].adapter) for i in nearest.tolist()]


def group(tuned: MetaTuned, examples: Sequence[Example], groups: int, bench: Bench) -> Grouped:
    """k-means (k-means++ start, seeded) over the latents of `examples`; empty groups are dropped."""
    latents = tuned.latents(examples)
    if groups > len(examples):
        raise UsageError(f"There are {len(examples)} train examples to group; give --groups {len(examples)} or fewer.")
    centres, labels = kmeans2(
        latents.double().cpu().numpy(), groups, minit="++", rng=bench.seed_for("groups") % 2**32, missing="warn"
    )
    kept = [i for i in range(groups) if (labels == i).any()]
    centre = functional.normalize(torch.tensor(centres[kept], dtype=torch.float32), dim=-1)
    nearest = [examples[i] for i in (centre @ latents.cpu().T).argmax(-1).tolist()]
    adapters = tuned.adapters_at(centre.to(latents.device))
    prompts = tuned.greedy_prompts(nearest, bench)
    members = tuple(Fixed(p, a) for p, a in zip(prompts, adapters, strict=True))
    return Grouped(tuned, members, centre.tolist(), [int((labels == i).sum()) for i in kept])
