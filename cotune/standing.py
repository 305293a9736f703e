"""Where a run stands: its events, folded into the few things worth watching. Pure; no files, no terminal, no torch.

Events are mappings as in events.jsonl, or "progress" events, which are never kept. Anything else that another version
or a torn file may hold is passed over: what is shown is never worth an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

KEPT = 240  # values of a series; more than any terminal is wide
_POINTS = 12  # of progress: the rate is that of the last few, so it forgets what came from the journal in no time
_WARNINGS = 3
_MOST = 1e100  # larger numbers would overflow in arithmetic, and say nothing
UNITS = ("tokens", "flops", "seconds")


@dataclass(frozen=True)
class Score:
    """Mean score of the first `n` of `of` examples that were answered; `what` names the evaluation."""

    what: str
    mean: float
    n: int
    of: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval."""
        from cotune.compare.stats import wilson  # needs scipy, which not every reader of this file does

        return wilson(self.mean, self.n)


@dataclass(frozen=True)
class Best:
    """The best fixed prompt so far and its score on the search examples of its stage."""

    stage: str
    text: str
    score: float


@dataclass(frozen=True)
class Series:
    """The last `KEPT` of `count` numbers of one stage."""

    stage: str = ""
    values: tuple[float, ...] = ()
    count: int = 0

    def then(self, stage: str, value: float) -> Series:
        """With one more; the numbers of another stage are not continued."""
        if stage != self.stage:
            return Series(stage, (value,), 1)
        return Series(stage, (*self.values, value)[-KEPT:], self.count + 1)


@dataclass(frozen=True)
class Standing:
    """What is worth showing of a run. Times are seconds since the epoch; None is "not known yet".

    `label` is the piece of work at hand, `done` of `of` of it at `at`, `rate` of them a second. `limits` and `spent`
    are the tuning budget, by unit. `losses` are those of training steps, `rewards` scores on train (of candidates or
    rollouts), `val_scores` those on val.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    began: float | None = None
    stage: str = ""
    label: str = ""
    done: int | None = None
    of: int | None = None
    at: float | None = None
    rate: float | None = None
    points: tuple[tuple[float, int], ...] = ()
    score: Score | None = None
    best: Best | None = None
    losses: Series = Series()
    rewards: Series = Series()
    val_scores: Series = Series()
    spent: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    warned: int = 0

    def eta(self, now: float) -> float | None:
        """Seconds until the piece of work at hand (not the run) is done, at its present rate.

        Between two batches it counts down, but no further than to the end of one like the last: the rest is to come.
        """
        if self.done is None or self.of is None or self.at is None or not self.rate:
            return None
        left, batch = self.of - self.done, self.points[-1][1] - self.points[-2][1] if len(self.points) > 1 else 0
        return max(left / self.rate - max(0.0, now - self.at), (left - batch) / self.rate, 0.0)


def standing(config: Mapping[str, Any]) -> Standing:
    """Before the first event. `config` is that of config.json; of it the budget matters here."""
    budget = config.get("budget")
    limits = {unit: number(budget.get(unit)) for unit in UNITS} if isinstance(budget, Mapping) else {}
    return Standing({unit: limit for unit, limit in limits.items() if limit is not None})


def folded(before: Standing, row: object) -> Standing:
    """`before` and one event more. Without a `time` it counts for no rate."""
    if not isinstance(row, Mapping):
        return before
    kind, stage = row.get("kind"), _text(row.get("stage")) or ""
    now = replace(before, spent={**before.spent, **_spent(row)})
    time = number(row.get("time"))
    if now.began is None and time is not None:
        now = replace(now, began=time)
    if stage and stage != now.stage:  # what was being done there is over
        now = replace(now, stage=stage, label="", done=None, of=None, at=None, rate=None, points=())
    if kind == "progress":
        return _progress(now, row, time)
    if kind in ("warning", "budget"):
        return _warning(now, row)
    if kind == "step" and (loss := number(row.get("loss"))) is not None:
        return replace(now, losses=now.losses.then(stage, loss))
    if kind == "candidate" or (kind == "chosen" and "text" in row):
        now = _prompt(now, row, stage)
    reward = number(
        row.get({"candidate": "score", "rollouts": "mean_score", "rewards": "mean_score"}.get(str(kind), ""))
    )
    if reward is not None and row.get("dropped") is not True:
        return replace(now, rewards=now.rewards.then(stage, reward))
    val = number(row.get("val_score"))
    if val is not None and kind not in ("chosen", "stage-result"):  # which repeat one of them
        return replace(now, val_scores=now.val_scores.then(stage, val))
    return now


def _progress(now: Standing, row: Mapping[str, Any], time: float | None) -> Standing:
    label, done, of = _text(row.get("label")), _count(row.get("done")), _count(row.get("of"))
    if label is None or done is None or of is None or done > of:
        return now
    goes_on = label == now.label and of == now.of and now.done is not None and done >= now.done
    points = now.points if goes_on else ()
    if time is not None:
        points = (*points, (time, done))[-_POINTS:]
    rate = number(row.get("rate")) or _rate(points)
    mean, score = number(row.get("score")), now.score
    if mean is not None and 0 <= mean <= 1 and done:
        score = Score(f"{now.stage} {label}".strip(), mean, done, of)
    return replace(now, label=label, done=done, of=of, at=time, rate=rate, points=points, score=score)


def _rate(points: tuple[tuple[float, int], ...]) -> float | None:
    if len(points) < 2:
        return None
    (begin, first), (end, last) = points[0], points[-1]
    return (last - first) / (end - begin) if end > begin and last > first else None


def _warning(now: Standing, row: Mapping[str, Any]) -> Standing:
    message = _text(row.get("message"))
    if not message or message in now.warnings:
        return now
    return replace(now, warnings=(*now.warnings, message)[-_WARNINGS:], warned=now.warned + 1)


def _prompt(now: Standing, row: Mapping[str, Any], stage: str) -> Standing:
    """Candidates compete within their stage, as in the search; the one that is chosen stands."""
    text, score = _text(row.get("text")), number(row.get("score"))
    if text is None or score is None or row.get("dropped") is True:
        return now
    best = now.best
    wins = best is None or best.stage != stage or score > best.score or row.get("kind") == "chosen"
    return replace(now, best=Best(stage, text, score)) if wins else now


def _spent(row: Mapping[str, Any]) -> dict[str, float]:
    found = {unit: number(row.get(f"tuning_{unit}")) for unit in UNITS}
    return {unit: value for unit, value in found.items() if value is not None}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST else None


def number(value: object) -> float | None:
    """A finite number of a reasonable size, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _MOST else None  # so neither infinite nor NaN


def report(now: Standing, time: float) -> dict[str, Any]:
    """The same as plain JSON, at a moment."""
    score: dict[str, Any] | None = None
    if now.score:
        low, high = now.score.interval
        score = asdict(now.score) | {"low": low, "high": high}
    return {
        "stage": now.stage or None,
        "label": now.label or None,
        "done": now.done,
        "of": now.of,
        "eta_seconds": now.eta(time),
        "elapsed_seconds": None if now.began is None else max(0.0, time - now.began),
        "score": score,
        "best_prompt": asdict(now.best) if now.best else None,
        "losses": list(now.losses.values),
        "rewards": list(now.rewards.values),
        "val_scores": list(now.val_scores.values),
        "budget": {unit: {"used": now.spent.get(unit), "limit": limit} for unit, limit in now.limits.items()},
        "warnings": list(now.warnings),
    }
