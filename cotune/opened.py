"""A finished run, or the bundle exported from it, opened to answer questions: model, task, what was tuned, decoding.

Refuses a base model that it was not tuned for. Knows nothing of where questions come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.bench import Bench, MemoryStore, ignore
from cotune.bundle import CONTENT, GENERATOR, Bundle, Model, read_bundle
from cotune.config import RunConfig, merged, resolve
from cotune.engines.base import Sampling
from cotune.errors import UsageError
from cotune.experiment import Listener, base_model, decoding, engine_factory, generator_model
from cotune.finished import open_run
from cotune.ledger import Ledger
from cotune.models.base import BaseModel
from cotune.record import read_json, read_rows
from cotune.strategies import load_tuned
from cotune.tasks import task as make_task
from cotune.tasks.base import Task
from cotune.values import Tuned

_HERE = ("runner", "vllm")  # sections that say how this machine computes, not what


@dataclass(frozen=True)
class Place:
    """What may differ where it is used: where the models are, which engine, settings of `runner` and `vllm`.

    None is as it was in the run. Raises UsageError for settings that would change what was tuned.
    """

    model: str | None = None
    generator: str | None = None
    engine: str | None = None
    settings: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for section in self.settings or {}:
            if section not in _HERE:
                raise UsageError(
                    f"--set {section} would change what was tuned. Here it takes runner.* and vllm.* only."
                )
        if self.engine == "openai":
            raise UsageError(
                "What was tuned is applied where the weights are, so --engine is auto, transformers or vllm here."
            )

    def layer(self) -> dict[str, Any]:
        named = {"model": self.model, "generator": self.generator, "engine": self.engine}
        return {key: value for key, value in named.items() if value is not None} | dict(self.settings or {})


@dataclass(frozen=True)
class Opened:
    """`name` is the run's. `generator` is MetaTuner's G for a joint run, else None."""

    name: str
    config: RunConfig
    task: Task
    base: BaseModel
    generator: BaseModel | None
    tuned: Tuned

    @property
    def sampling(self) -> Sampling:
        return decoding(self.config, self.task)

    def bench(self, stage: str, listen: Listener = ignore, store: MemoryStore | None = None) -> Bench:
        """A bench over a new engine."""
        build, store = engine_factory(self.config), store or MemoryStore()
        return Bench(self.base, build(self.base), build, Ledger(), store, self.config.seed, listen, stage)


def open_any(folder: Path, place: Place | None = None, static: bool = False) -> Opened:
    """A run folder that is done, or a bundle. `static`: a joint bundle's one prompt and adapter for all queries.

    Raises UsageError for any other folder, a damaged or changed bundle, and a base model that is not the one it was
    tuned for.
    """
    layer = (place or Place()).layer()
    if (folder / CONTENT).is_file():
        return _bundle(folder, layer, static)
    if static:
        raise UsageError(f"--static is for bundles, and {folder} is none. Export the run first: cotune export.")
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{str(folder)!r} is neither a finished run folder nor a bundle. Give the folder of a run that is done, or "
            "one that `cotune export` wrote."
        )
    config, _ = open_run(folder)
    config = resolve(merged(config.model_dump(mode="json"), layer))
    base = base_model(config, config.model)
    _check_run(folder, base)
    return _load(folder.resolve().name, config, base, folder / "tuned")


def _bundle(folder: Path, layer: Mapping[str, Any], static: bool) -> Opened:
    bundle = read_bundle(folder)
    made = folder / GENERATOR
    rewrites = made.is_dir() and bundle.strategy == "prompt-only"
    config = resolve(_settings(bundle), {"prompt": {"method": "bpo", "proposer": "self"}} if rewrites else {}, layer)
    try:
        base = base_model(config, config.model)
    except UsageError as error:
        raise UsageError(f"{error} It is the base model of {folder}; --model says where it is now.") from error
    bundle.model.check(base, str(folder))
    opened = _load(bundle.run, config, base, made if made.is_dir() and not static else folder)
    if opened.generator is not None and bundle.generator is not None:
        bundle.generator.check(opened.generator, f"What writes the prompts of {folder}")
    return opened


def _settings(bundle: Bundle) -> dict[str, Any]:
    plan, model, generator = bundle.plan, bundle.model, bundle.generator
    return {
        "strategy": bundle.strategy,
        "task": bundle.task,
        "model": model.reference,
        "generator": generator.reference if generator else None,
        "seed": plan.seed,
        "engine": "openai" if bundle.base_url else "auto",
        "openai": {"base_url": bundle.base_url},
        "decoding": {"temperature": plan.temperature, "top_p": plan.top_p, "max_new_tokens": plan.max_new_tokens},
        "runner": {"dtype": model.dtype or "auto"},
        "weights": {"rank": bundle.rank},
    }


def _load(name: str, config: RunConfig, base: BaseModel, tuned: Path) -> Opened:
    """Where one prompt serves all, neither G nor a model that proposed prompts is needed any more."""
    made = read_json(tuned / "tuned.json")["kind"] != "fixed"
    generator = generator_model(config, base) if made else None
    return Opened(name, config, make_task(config.task), base, generator, load_tuned(tuned, generator or base))


def _check_run(folder: Path, base: BaseModel) -> None:
    """A run says in its first event which weights it was tuned on."""
    start = next((event for event in read_rows(folder / "events.jsonl") if event["kind"] == "start"), {})
    wanted, name, model = start.get("model_digest"), read_json(folder / "config.json")["model"], Model.of(base)
    if model.digest is not None and wanted not in (None, model.digest):
        raise UsageError(
            f"{folder} was tuned for {name} (weights {wanted}), but {base.name} in {model.dtype} has other weights "
            f"({model.digest}). Give --model the one it was tuned for, and its type with --set runner.dtype=..."
        )
