"""What one takes home from a finished run: a bundle (bundle.py) whose prompt and PEFT adapter other tools load.

A joint run makes both anew for every query. Its bundle has what makes them and, for a server that holds one adapter or
a few, a static approximation: the queries of the train split are grouped by their latents (k-means); each group gets
the adapter of its centre and the prompt that G writes for the example nearest to it. What that costs in accuracy is
measured on the validation split: the test split stays touched once. Several numbers of groups give the curve from one
adapter for all to one per query. Ours; the paper has no such limit case.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn import functional

from cotune.bench import Bench, ignore
from cotune.bundle import CONTENT, GENERATOR, Aggregate, Bundle, ByDifficulty, Model, Plan, chat_frame, write_sums
from cotune.card import card
from cotune.compare.stats import compare_paired, mean_score
from cotune.errors import UsageError
from cotune.evaluate import evaluate
from cotune.experiment import Listener, dataset, decoding, learned_task
from cotune.finished import open_run
from cotune.metatuned import MetaTuned
from cotune.opened import Opened, Place, open_any
from cotune.plans import recorded
from cotune.record import read_json, write_json
from cotune.serving import per_example
from cotune.strategies import load_tuned
from cotune.strategies.base import Fixed
from cotune.values import GREEDY, Conditioning, Evaluation, Example, PlanByDifficulty

_GROUPED = 512  # train examples whose latents are grouped, at most
_NOT_MEASURED = ("split", "n", "per_example")


def export(
    folder: Path, out: Path, groups: Sequence[int] = (1,), listen: Listener = ignore, place: Place | None = None
) -> dict[str, Any]:
    """Write the bundle of a finished run into `out`, a new folder.

    The static approximation of a joint run is that of one group; other numbers of groups are written to
    `out/groups-N/` beside it. The report has a row per number of groups, and one for an adapter per example.
    Raises UsageError for a run that is not done, an `out` that is not empty, another base model than the run's, more
    groups than train examples, and groups of a run with one prompt for all.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already. Give --out a new folder.")
    if (folder / CONTENT).is_file():
        raise UsageError(f"{folder} is a bundle already. Give the folder of a finished run.")
    opened = open_any(folder, place)
    joint = isinstance(opened.tuned, MetaTuned)
    report: dict[str, Any] = {"out": str(out), "joint": joint, "metric": opened.task.headline}
    report |= dict.fromkeys(_NOT_MEASURED)
    if isinstance(opened.tuned, MetaTuned):
        report |= _approximated(opened, opened.tuned, out, sorted({1, *groups}), listen)
        opened.tuned.save(out / GENERATOR)
    elif list(groups) != [1]:
        raise UsageError(f"{folder} has one prompt for all examples already; leave --groups out.")
    else:
        assert isinstance(opened.tuned, Fixed)
        _write(opened.tuned, out, opened.base.source)
        report |= {"rows": [_row(1, *_held([opened.tuned]))]}
    static = load_tuned(out, opened.base)
    assert isinstance(static, Fixed)
    bundle = _content(folder, opened, static)
    write_json(out / CONTENT, bundle.model_dump(mode="json"))
    text = card(folder, bundle, opened.task, report, adapter=static.adapter is not None)
    (out / "README.md").write_text(text, encoding="utf-8")
    write_sums(out)
    return report


def _content(folder: Path, opened: Opened, static: Fixed) -> Bundle:
    config, base, generator, sampling = opened.config, opened.base, opened.generator, opened.sampling
    made = read_json(folder / "environment.json")
    plan, binned = static.plan, isinstance(static.plan, PlanByDifficulty)
    return Bundle(
        run=opened.name,
        config_digest=open_run(folder)[0].digest,
        cotune={"version": made["packages"]["cotune"], "commit": made["commit"]},
        strategy=config.strategy,
        task=config.task,
        model=Model.of(base),
        generator=Model.of(generator) if generator not in (None, base) else None,
        base_url=config.openai.base_url if config.engine == "openai" else None,
        rank=max(config.weights.rank, config.joint.rank, config.joint.generator_rank),
        prompt=asdict(static.prompt),
        chat=chat_frame(base, opened.task, static.prompt),
        plan=Plan(
            aggregate=None if binned or plan == GREEDY else Aggregate.model_validate(recorded(plan)),
            by_difficulty=ByDifficulty.model_validate(recorded(plan)) if binned else None,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            seed=sampling.seed,
            stop=tuple(base.tokenizer.convert_ids_to_tokens(list(base.end_of_turn_ids)))
            if base.end_of_turn_ids
            else (),
            stop_ids=base.end_of_turn_ids,
        ),
    )


def _approximated(
    opened: Opened, made: MetaTuned, out: Path, groups: Sequence[int], listen: Listener
) -> dict[str, Any]:
    """Write the groups and report what each number of them loses on val."""
    config, task = opened.config, opened.task
    learned, data = learned_task(config, task), dataset(config, task)
    tuned = replace(made, task=learned)
    train, val, sampling = data.train[:_GROUPED], data.val, decoding(config, learned)
    if max(groups) > len(train):
        raise UsageError(f"There are {len(train)} train examples to group; give --groups {len(train)} or fewer.")
    bench = opened.bench("export", listen)

    def measured(policy: MetaTuned | Grouped, label: str) -> tuple[Evaluation, dict[str, Any]]:
        with bench.ledger.parts() as parts:
            found = evaluate(learned, val, policy.condition(val, bench), sampling, bench, label=label)
        return found, per_example(parts, len(val))

    report: dict[str, Any] = {}
    with bench.ledger.measuring():
        latents = tuned.latents(train)
        policies = {count: group(tuned, train, latents, count, bench) for count in groups}
        rows = {count: _row(count, *_held(policy.members)) for count, policy in policies.items()}
        if val:
            each, cost = measured(tuned, "an adapter per example")
            own = len({c.adapter.digest for c in each.conditionings if c.adapter})
            size = tuned.adapter.nbytes if tuned.adapter else own * tuned.tuner.adapter_bytes
            row = _row(None, own, size) | _scored(each, None) | {"serving": cost}
            report = {"split": "val", "n": len(val), "per_example": row}
            for count, policy in policies.items():
                few, cost = measured(policy, f"groups: {count}")
                rows[count] |= _scored(few, each) | {"serving": cost}
    for count, policy in policies.items():
        _write_groups(policy, out if count == 1 else out / f"groups-{count}", opened.base.source)
    return report | {"rows": list(rows.values())}


def _row(groups: int | None, adapters: int, size: int) -> dict[str, Any]:
    """What is held to serve with: so many different adapters, so many bytes of them. Not measured yet."""
    scored = ("score", "score_low", "score_high", "difference", "difference_low", "difference_high", "serving")
    return {"groups": groups, "adapters": adapters, "adapter_bytes": size, **dict.fromkeys(scored)}


def _held(members: Sequence[Fixed]) -> tuple[int, int]:
    adapters = {member.adapter.digest: member.adapter for member in members if member.adapter is not None}
    return len(adapters), sum(adapter.nbytes for adapter in adapters.values())


def _scored(found: Evaluation, each: Evaluation | None) -> dict[str, float | None]:
    """Score with its interval and, example by example, the difference to an adapter per example."""
    score = mean_score([grade.score for grade in found.grades])
    scored = {"score": score.mean, "score_low": score.low, "score_high": score.high}
    if each is None:
        return scored
    lost = compare_paired([grade.score for grade in found.grades], [grade.score for grade in each.grades]).estimate
    return scored | {"difference": lost.mean, "difference_low": lost.low, "difference_high": lost.high}


def _write_groups(grouped: Grouped, folder: Path, source: str) -> None:
    """One group as the prompt and adapter that they are; more as a folder each, with what says which query is whose."""
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
            return self.members[0].condition(examples, bench)
        latents_UD, which = self.maker.encode(examples, bench)
        nearest = (latents_UD.cpu() @ torch.tensor(self.centres).T).argmax(-1).tolist()
        chosen = [self.members[nearest[i]] for i in which]
        return [Conditioning(m.prompt, m.adapter, m.plan, m.verifier) for m in chosen]


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
    members = tuple(Fixed(p, a, tuned.plan, tuned.verifier) for p, a in zip(prompts, adapters, strict=True))
    return Grouped(tuned, members, centre.tolist(), [int((labels == i).sum()) for i in kept])
