"""What the runs of one strategy are called when they differ in settings. Knows nothing of scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from cotune.compare.runs import Run
from cotune.config import METHODS, REPETITIONS, filled, resolve
from cotune.errors import UsageError
from cotune.values import digest

# What a run at another one's budget has from that budget, not from its contestant: it differs by task and seed.
_SCALED = ("budget.tokens", *REPETITIONS)
# Sections of the config that the built-in strategies do not read: a difference there is no other variant.
_UNUSED = {
    "zero-shot": (
        "budget", "prompt", "weights", "sequential", "joint", "train_tasks", "limit_train", "limit_val", "val_size",
        "inference", "difficulty",
    ),
    "prompt-only": ("weights", "sequential", "joint", "inference", "difficulty"),
    "lora-only": ("prompt", "sequential", "joint", "inference", "difficulty"),
    "joint": ("inference", "difficulty"),
    "plan-only": ("prompt", "weights", "sequential", "joint"),
    "inference-aware": ("weights", "sequential", "joint", "difficulty"),
}  # fmt: skip
_STAGES = {"joint": "j", "inference": "i", "difficulty": "i"}  # sections that sequential reads for these stages alone
_NEVER = (
    "seed", "data", "runner", "strategy", "task", "model", "engine", "noise_examples", "budget.matched",
    "vllm.sequences", "vllm.adapters", "vllm.adapter_gib", "vllm.tensor_parallel", "vllm.memory_fraction",
    "vllm.cache_gib", "vllm.own_process", "vllm.between", "vllm.residents",
    "openai.concurrency", "openai.requests_per_minute", "openai.tokens_per_minute", "openai.timeout",
    "openai.attempts", "openai.longest_wait", "openai.limit_name",
    "weights.micro_batch_size", "joint.micro_batch_size", "bpo.micro_batch_size",
)  # fmt: skip


def variant_labels(runs: Sequence[Run]) -> dict[Run, str]:
    """The strategy's name, with the settings that set a variant apart when there are several of it.

    A default is not named, be it of all or of the weight method alone, nor, where no variant has it, a value that most
    of them have: the plain name stands for what an ablation takes away from. Stages of `sequential` are named unless
    they are the default: they are what it does. A run that was given another one's budget is called what its contestant
    is, and whose budget it has. `runs` are of one task and model.
    """
    labels = {}
    for strategy in {run.strategy for run in runs}:
        same = [run for run in runs if run.strategy == strategy]
        settings = {run: _flat(filled(run.config), strategy) for run in same}
        own = [run for run in same if not _matched(run)] or same
        variants = list({repr(sorted(settings[run].items(), key=str)): settings[run] for run in own}.values())
        default = _default(same[0], strategy)
        usual, varying = {}, []
        # The method first: it says what the contestant is, and long labels are cut at their end.
        for key in sorted(
            {key for flat in variants for key in flat}, key=lambda key: (not key.endswith(".method"), key)
        ):
            counted = Counter(repr(flat.get(key)) for flat in variants)
            (value, count), *others = counted.most_common(2)
            usual[key] = value if not others or count > others[0][1] else None
            if others:
                varying.append(key)
            if key == "sequential.stages" or (others and default.get(key) in counted):
                usual[key] = default.get(key)
        for run in same:
            scaled = _SCALED if _matched(run) else ()
            apart = {key: settings[run].get(key) for key in usual if key not in scaled}
            own_defaults = METHODS.get(str(apart.get("weights.method")), {})
            expected = usual | {
                key: repr(value) for name, value in own_defaults.items() if (key := f"weights.{name}") in varying
            }
            inside = [
                f"{_last(key, varying)}={_brief(value)}" for key, value in apart.items() if repr(value) != expected[key]
            ]
            labels[run] = f"{strategy} ({', '.join(inside)})" if inside else strategy
            if name := _matched(run):
                labels[run] += f" @ {_brief(name)}'s budget"
    return labels


def _matched(run: Run) -> str | None:
    """Whose tuning tokens the run was given, if any."""
    budget = run.config.get("budget")
    return budget.get("matched") if isinstance(budget, Mapping) else None


def _default(run: Run, strategy: str) -> dict[str, str]:
    """Dotted setting -> its default for the run's task and model, as `repr`; empty when that is no config."""
    named = {key: run.config.get(key) for key in ("strategy", "model", "task")}
    try:
        return {k: repr(v) for k, v in _flat(filled(resolve(named).model_dump(mode="json")), strategy).items()}
    except UsageError:
        return {}


def _last(key: str, keys: Iterable[str]) -> str:
    """`joint.share` -> `share`, as long as no other key that sets variants apart ends so."""
    name = key.rsplit(".", 1)[-1]
    return name if sum(other.rsplit(".", 1)[-1] == name for other in keys) <= 1 else key


def _brief(value: Any) -> str:
    """A value in a label; a long one (a prompt) by its digest, so that different ones stay different."""
    text = str(value)
    return text if len(text) <= 40 else f"#{digest(text)[:8]}"


def _flat(config: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    """Dotted setting -> value, of the settings that can change this strategy's result."""
    unused = set(_UNUSED.get(strategy, ()))
    if strategy == "sequential":
        given = config.get("sequential")
        stages = str(given.get("stages", "")) if isinstance(given, Mapping) else ""
        unused = {section for section, kind in _STAGES.items() if kind not in stages}
    return dict(_settings(config, {*_NEVER, *unused}))


def _settings(config: Mapping[str, Any], without: Set[str], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if prefix + key in without:
            continue
        if isinstance(value, Mapping):
            yield from _settings(value, without, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted setting -> value, where it differs from the default for this model."""
    names = {key: config.get(key) for key in ("strategy", "model", "task")}
    if not all(isinstance(name, str) for name in names.values()):
        return {}
    default = filled(resolve(names).model_dump(mode="json"))
    return names | dict(_differences(config, default))


def _differences(config: Mapping[str, Any], default: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    default = default if isinstance(default, Mapping) else {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _differences(value, default.get(key), f"{prefix}{key}.")
        elif value != default.get(key):
            yield prefix + key, value
