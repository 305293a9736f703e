"""What choosing by difficulty shows on a run, as one JSON value and as tables. All of it is computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from cotune.compare.render import Sheet, estimate
from cotune.compare.stats import Finding, holm
from cotune.compare.words import p_value
from cotune.difficulty.allocation import (
    ONE_CHOICE,
    Curve,
    Match,
    Point,
    accuracy_by_bin,
    gain,
    generations_to_match,
)
from cotune.difficulty.bins import BINS
from cotune.difficulty.runs import OfRun

LEGEND = (
    "Brackets: 95% intervals over questions, each for its number alone, under the plans as they were chosen: other "
    "choices are not in them. *: p below 0.05 after Holm's correction over all gains here. Plans are judged on other "
    "samples than those that told the difficulty."
)


def _choices(of: OfRun) -> list[Curve]:
    """The policies that choose by difficulty."""
    return [of.found.curves[name] for name in of.found.bins]


def gains(of: OfRun) -> list[tuple[str, int, Finding]]:
    """Of each choice by difficulty over one choice for all, at equal N above 1; Holm's correction over all of them."""
    base = of.found.curves[ONE_CHOICE].points
    found = [
        (curve.name, ours.n, gain(ours, theirs))
        for curve in _choices(of)
        for ours, theirs in zip(curve.points, base, strict=True)
        if ours.n > 1
    ]
    corrected = holm([tested.p for _, _, tested in found])
    return [(name, n, replace(tested, p_holm=p)) for (name, n, tested), p in zip(found, corrected, strict=True)]


def matches(of: OfRun) -> Iterator[tuple[str, str, Point, Match, Match]]:
    """Policy, uniform policy to match, the point of that one, and generations without and with the difficulty's."""
    for curve in _choices(of):
        for name, reference in of.found.curves.items():
            if name not in of.found.bins:
                for point in reference.points:
                    if point.n > 1:
                        free, charged = (generations_to_match(curve, point, paid) for paid in (False, True))
                        yield curve.name, name, point, free, charged


def record(of: OfRun) -> dict[str, Any]:
    """Everything, in fractions; None where a bin is empty or a number of generations is beyond all measured ones."""
    found, largest = of.found, of.found.measured[-1]
    return {
        "run": of.run,
        "questions": of.samples.questions,
        "samples": of.samples.chains,
        "estimated": of.estimated,
        "few": of.few,
        "judged": of.judged,
        "rated": of.samples.ratings is not None,
        "bins": {name: np.bincount(bins, minlength=BINS).tolist() for name, bins in found.bins.items()},
        "agreements": {name: asdict(agreed) for name, agreed in found.agreements.items()},
        "by_bin": [
            {
                "difficulty": name,
                "plan": plan.name,
                "n": largest.n,
                "scores": [None if np.isnan(mean) else mean for mean in means.tolist()],
            }
            for name, bins in found.bins.items()
            for plan, means in zip(largest.plans, accuracy_by_bin(largest, bins), strict=True)
        ],
        "curves": [
            {
                "policy": curve.name,
                "estimation": curve.estimation,
                "points": [
                    {"n": p.n, "score": e.mean, "low": e.low, "high": e.high, "tokens": float(p.tokens.mean())}
                    for p in curve.points
                    if (e := p.estimate)
                ],
            }
            for curve in found.curves.values()
        ],
        "gains": [
            {
                "policy": name,
                "n": n,
                "gain": tested.estimate.mean,
                "low": tested.estimate.low,
                "high": tested.estimate.high,
                "p": tested.p,
                "p_holm": tested.p_holm,
                "significant": tested.significant,
            }
            for name, n, tested in gains(of)
        ],
        "to_match": [
            {"policy": ours, "reference": theirs, "n": p.n, "free": asdict(free), "charged": asdict(charged)}
            for ours, theirs, p, free, charged in matches(of)
        ],
    }


def sheets(of: OfRun) -> list[Sheet]:
    found, largest, title = of.found, of.found.measured[-1], of.run
    sizes = [at.n for at in found.measured]
    notes = [
        f"{of.samples.questions} questions with {of.samples.chains} samples each: {of.estimated} tell pass@1 (oracle), "
        f"the first {of.few} of these predict the difficulty, {of.judged} judge the plans. Bin 1 is the easiest."
    ]
    if of.samples.ratings is None:
        notes.append(
            "The samples are not rated, so the vote is the only plan and there is nothing to choose. For more plans "
            "run with --set plan.aggregation=best-of."
        )
    told = tuple(
        (name, *(str(count) for count in np.bincount(bins, minlength=BINS)), *_agreed(of, name))
        for name, bins in found.bins.items()
    )
    every = tuple(f"bin {b + 1}" for b in range(BINS))
    by_bin = tuple(
        (f"{plan.name} | {name}", *("" if np.isnan(mean) else f"{100 * mean:.1f}" for mean in means))
        for name, bins in found.bins.items()
        for plan, means in zip(largest.plans, accuracy_by_bin(largest, bins), strict=True)
    )
    curves = tuple(
        (name, *(estimate(p.estimate, "z.1f") for p in curve.points)) for name, curve in found.curves.items()
    )
    tokens = ", ".join(f"{p.tokens.mean():.1f}" for p in found.curves[ONE_CHOICE].points)
    gained = tuple(
        (name, str(n), estimate(t.estimate, "+z.1f") + "*" * t.significant, p_value(t.p), p_value(t.p_holm))
        for name, n, t in gains(of)
    )
    saved = tuple(
        (ours, theirs, f"{100 * p.accuracy:.1f}", _matched(free), _matched(charged))
        for ours, theirs, p, free, charged in matches(of)
        if p.n == largest.n
    )
    columns = tuple(f"N = {n}" for n in sizes)
    return [
        Sheet(f"{title} · difficulty", ("questions in", *every, *_AGREED), told, tuple(notes)),
        Sheet(f"{title} · score by bin at N = {largest.n}, %", ("plan | difficulty", *every), by_bin, (_LOOK,)),
        Sheet(f"{title} · score at equal generations, %", ("policy", *columns), curves, (_TOKENS.format(tokens),)),
        Sheet(f"{title} · gain over {ONE_CHOICE}, points", ("policy", "N", "gain", "p", "p, Holm"), gained, ()),
        Sheet(
            f"{title} · generations to match N = {largest.n}", _MATCHED, saved, (_CHARGED.format(of.estimated, of.few),)
        ),
    ]


_AGREED = ("same bin as oracle %", "at most one apart %", "Spearman")
_LOOK = "For looking at: the best number of a column is the best of several estimates, hence too high."
_TOKENS = "Generated tokens a question: {}. They are equal for all policies, whose plans are parallel samples."
_MATCHED = ("policy", "as good as", "score %", "generations", "with those of the difficulty")
_CHARGED = (
    "Fewest measured N that scores as much, with its interval; -: none does. The oracle's difficulty takes {} "
    "generations and reference answers besides, a predicted one {}."
)


def _agreed(of: OfRun, name: str) -> tuple[str, ...]:
    agreed = of.found.agreements.get(name)
    if agreed is None:
        return ("",) * len(_AGREED)
    correlation = "" if agreed.correlation is None else f"{agreed.correlation:z.2f}"
    return (f"{100 * agreed.same:.0f}", f"{100 * agreed.adjacent:.0f}", correlation)


def _matched(match: Match) -> str:
    best, low, high = ("-" if end is None else str(end) for end in (match.generations, match.low, match.high))
    return f"{best} [{low}, {high}]"
