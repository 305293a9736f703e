"""Equal budgets: the contestants of a study once more, each with the tuning tokens that a reference run has spent.

A limit alone would not make them equal: who spends less of their own accord would stay below it. So what goes round
(rounds, epochs, a bandit's completions) is scaled to spend it. Knows run folders and what strategies plan; starts no
run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune import study
from cotune.config import REPETITIONS, RunConfig, filled, nested, resolve
from cotune.errors import CotuneError, UsageError
from cotune.record import FINAL, read_json
from cotune.study import Experiment
from cotune.values import digest


@dataclass(frozen=True, eq=False)
class Pair:
    """A contestant and the run of `name` (strategy or experiment file) on its task, model, seed and train_tasks."""

    name: str
    own: Experiment
    reference: Experiment


def pairs(planned: Sequence[Experiment]) -> list[Pair]:
    """Every contestant that tunes and is to be matched, but the reference itself, which has its budget by nature.

    The reference is the experiment file called so, else the strategy. Raises UsageError, before anything runs, when a
    contestant has no reference or several, or has a budget of its own.
    """
    names = list(dict.fromkeys(e.match for e in planned if e.match))
    if names:
        from cotune.experiment import make_strategy  # which takes seconds

    found = []
    for name in names:
        named = [e for e in planned if e.config and Path(e.source).stem == name]
        references = named or [e for e in planned if e.config and e.config.strategy == name]
        for own in planned:
            if own.config is None or own.match != name or own in references or not make_strategy(own.config).levers:
                continue
            alike = [e for e in references if _place(e) == _place(own)]
            if len(alike) != 1:
                raise UsageError(
                    f"{own.config.run_name} needs one run of {name!r} with its task, model, seed and train_tasks to "
                    f"match, and this study has {len(alike) or 'none'}. Name a strategy, or the experiment file "
                    "(without .toml) that holds it."
                )
            if limits := own.config.budget.model_dump(exclude_none=True):
                raise UsageError(
                    f"{own.config.run_name} has a budget of its own ({', '.join(limits)}), and is to have that of "
                    f"{name}. Take one of the two out."
                )
            found.append(Pair(name, own, alike[0]))
    return found


def _place(experiment: Experiment) -> tuple[Any, ...]:
    config = experiment.config
    assert config is not None
    return config.task, config.model, config.seed, config.train_tasks


def matched(found: Iterable[Pair], out: Path) -> list[Experiment]:
    """A run for each pair whose own run is done (one that is not is a row already), each run once.

    A reference that is not done, or settings that cannot be scaled, give an experiment without config.
    """
    runs: dict[str, Experiment] = {}
    for pair in found:
        if _status(pair.own, out) == "done":
            again = _matched(pair, out)
            runs.setdefault(again.config.run_name if again.config else again.reason, again)
    return list(runs.values())


def _matched(pair: Pair, out: Path) -> Experiment:
    from cotune import planning

    config, reference = pair.own.config, pair.reference.config
    assert config is not None
    assert reference is not None
    if (status := _status(pair.reference, out)) != "done":
        reason = (
            f"There is no budget for {config.run_name} to match: {reference.run_name} is {status or 'not finished'}"
        )
        return Experiment(pair.own.source, None, f"{reason}.", pair.name)
    try:
        tokens = planning.tuning_tokens(config)
        again = scaled(config, _spent(pair.own, out), _spent(pair.reference, out), pair.name, tokens)
        return Experiment(pair.own.source, again, match=pair.name)
    except CotuneError as error:
        return Experiment(pair.own.source, None, f"{config.run_name} cannot be matched: {error}", pair.name)


def scaled(config: RunConfig, spent: int, budget: int, name: str, tokens: Callable[[RunConfig], int]) -> RunConfig:
    """`config` limited to `budget` tuning tokens, with its repetitions scaled to use them.

    `tokens` plans the most that tuning may take under some settings; what it is expected to take is that, times
    `spent` / `tokens(config)`, the share that the run at its own settings took of it. The settings among REPETITIONS
    that change the plan are multiplied by one factor, the largest that is expected to fit, and rounded, none below 1.
    Raises UsageError when there is none, or nothing was spent.
    """
    planned, given = tokens(config), filled(config.model_dump(mode="json"))

    def having(values: Mapping[str, Any]) -> RunConfig:
        return resolve(given, *(nested(key, value) for key, value in values.items()))

    times = {key: given[section][field] for key in REPETITIONS for section, field in [key.split(".")]}
    times = {key: n for key, n in times.items() if n and tokens(having({key: n + 1})) > planned}
    if not times or not spent:
        raise UsageError(f"none of its {', '.join(REPETITIONS)} decides what it spends. Leave it out of the study.")
    most = max(times.values())

    def at(step: int) -> dict[str, int]:
        """`step` / `most` times each."""
        return {key: max(1, (2 * n * step + most) // (2 * most)) for key, n in times.items()}

    def fits(step: int) -> bool:
        return tokens(having(at(step))) * spent <= budget * planned

    beyond = 1
    while fits(beyond):
        beyond *= 2
    step = bisect_left(range(beyond), True, lo=1, key=lambda step: not fits(step)) - 1
    return having({**at(max(1, step)), "budget.tokens": budget, "budget.matched": name})


def plan_row(pair: Pair, out: Path) -> dict[str, Any] | None:
    """What is known beforehand of a matched run: it tunes with what its reference spends, at most what that plans.

    None where there will be none.
    """
    status, other = _status(pair.own, out), _status(pair.reference, out)
    if status == "done" and other in FINAL:
        return study.plan_row(_matched(pair, out), out)
    if status in FINAL:
        return None
    own, reference = (study.plan_row(experiment, None) for experiment in (pair.own, pair.reference))
    if reference["status"] == "failed":
        return None  # a row that says so is there already
    at_most = _spent(pair.reference, out) if other == "done" else reference["tuning_tokens"]
    return own | {"run": None, "matched": pair.name, "tuning_tokens": at_most, "tuning_flops": None}


def of_study(planned: Sequence[Experiment], folders: Iterable[Path]) -> list[Path]:
    """The folders, one level below `folders`, of matched runs of these contestants."""
    wanted = {(e.match, _contestant(e.config.model_dump(mode="json"))) for e in planned if e.config and e.match}
    found = []
    for path in (path for folder in folders if wanted for path in sorted(folder.glob("*/config.json"))):
        try:
            config = read_json(path)
            if (config["budget"].get("matched"), _contestant(config)) in wanted:
                found.append(path.parent)
        except (UsageError, KeyError, TypeError, AttributeError):
            continue  # damaged, or no config: of no contestant
    return found


def _contestant(config: Mapping[str, Any]) -> str:
    """What a matched run and the contestant it was made from have in common."""
    kept = {key: value for key, value in filled(config).items() if key != "budget"}
    for key in REPETITIONS:
        section, field = key.split(".")
        kept[section] = {name: value for name, value in kept[section].items() if name != field}
    return digest(kept)


def _summary(experiment: Experiment, out: Path) -> Mapping[str, Any]:
    assert experiment.config is not None
    try:
        summary: Mapping[str, Any] = read_json(out / experiment.config.run_name / "summary.json")
        return summary
    except UsageError:  # no run yet, or it has not ended
        return {}


def _status(experiment: Experiment, out: Path) -> str | None:
    return _summary(experiment, out).get("status")


def _spent(experiment: Experiment, out: Path) -> int:
    """Tuning tokens of a done run."""
    return int(_summary(experiment, out)["cost"]["tuning"]["tokens"])
