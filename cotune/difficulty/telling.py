"""What choosing by difficulty shows on a run, as one JSON value and as tables. All of it is computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cotune.compare.render import Sheet, estimate
from cotune.compare.stats import Estimate, Finding, compare_paired, holm, mean_score
from cotune.compare.words import p_value
from cotune.difficulty.allocation import (
    ONE_CHOICE,
    OWN_N,
    Curve,
    Match,
    Point,
    accuracy_by_bin,
    gain,
    generations_to_match,
)
from cotune.difficulty.bins import BINS
from cotune.difficulty.plans import Measured, Plan
from cotune.difficulty.runs import OfRun

LEGEND = (
    "Brackets: 95% intervals over questions, each for its number alone, under the plans as they were chosen: other "
    "choices are not in them. *: p below 0.05 after Holm's correction over all gains of its table. Plans are judged on "
    "other samples than those that told the difficulty."
)


def _choices(of: OfRun) -> list[Curve]:
    """The policies that choose by difficulty."""
    return [of.found.curves[name] for name in of.found.choices]


def gains(of: OfRun) -> list[tuple[str, int, Finding]]:
    """Of each choice by difficulty over one choice for all, at equal N above 1; Holm's correction over all of them.

    Choices of an own N are compared with one that may take fewer than N too.
    """
    own, same = of.found.curves[ONE_CHOICE + OWN_N].points, of.found.curves[ONE_CHOICE].points
    found = [
        (curve.name, ours.n, gain(ours, theirs))
        for curve in _choices(of)
        for ours, theirs in zip(curve.points, own if curve.name.endswith(OWN_N) else same, strict=True)
        if ours.n > 1
    ]
    corrected = holm([tested.p for _, _, tested in found])
    return [(name, n, replace(tested, p_holm=p)) for (name, n, tested), p in zip(found, corrected, strict=True)]


def matches(of: OfRun) -> Iterator[tuple[str, str, Point, Match, Match]]:
    """Policy, uniform policy to match, the point of that one, and generations without and with the difficulty's."""
    for curve in _choices(of):
        for name, reference in of.found.curves.items():
            if name not in of.found.choices:
                for point in reference.points:
                    if point.n > 1:
                        free, charged = (generations_to_match(curve, point, paid) for paid in (False, True))
                        yield curve.name, name, point, free, charged


@dataclass(frozen=True)
class Arranged:
    """A plan for all questions: its score, the tokens of one answer that it generates and reads, and, of one with
    revisions, its gain over the same aggregation of as many parallel samples."""

    n: int
    plan: Plan
    score: Estimate
    generated: float
    read: float
    gain: Finding | None


def arranged(of: OfRun) -> list[Arranged]:
    """Sequential against parallel at equal generations: every plan there is, paired by question, Holm's correction over
    all gains. Empty without chains. A question is read once for all parallel attempts; each revision reads its chat."""
    if of.prompts is None:
        return []
    asked, told = of.prompts[:, 0, 0].mean(), []
    for at in of.found.measured:
        for plan, scores, tokens in zip(at.plans, at.scores, at.tokens, strict=True):
            again = of.prompts[:, :, 1 : plan.length].sum(-1).mean() * at.n / plan.length
            parallel = at.scores[at.plans.index(replace(plan, length=1))] if plan.length > 1 else None
            tested = None if parallel is None else compare_paired(scores, parallel)
            told.append(Arranged(at.n, plan, mean_score(scores), float(tokens.mean()), float(asked + again), tested))
    corrected = iter(holm([a.gain.p for a in told if a.gain]))
    return [replace(a, gain=replace(a.gain, p_holm=next(corrected))) if a.gain else a for a in told]


def _shown(of: OfRun) -> Measured:
    """The largest N that has plans in a row, where any has; else the largest."""
    in_a_row = [at for at in of.found.measured if any(plan.length > 1 for plan in at.plans)]
    return (in_a_row or of.found.measured)[-1]


def choices(of: OfRun) -> Iterator[tuple[str, int, list[list[str]]]]:
    """Difficulty, N above 1, and of each bin the plans that its two folds got, one name where they are the same."""
    for name, bins in of.found.bins.items():
        for point in of.found.curves[name].points:
            if point.n > 1:
                own = [
                    dict.fromkeys(p.name for p, b in zip(point.plans, bins, strict=True) if b == at)
                    for at in range(BINS)
                ]
                yield name, point.n, [list(names) for names in own]


def record(of: OfRun) -> dict[str, Any]:
    """Everything, in fractions; None where a bin is empty or a number of generations is beyond all measured ones."""
    found, largest = of.found, _shown(of)
    return {
        "run": of.run,
        "chains": of.chains and {"run": of.chains_run, "chains": of.chains.chains, "length": of.chains.length},
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
        "choices": [{"difficulty": name, "n": n, "plans": plans} for name, n, plans in choices(of)],
        "plans": [
            {
                "n": a.n,
                "aggregation": a.plan.aggregation,
                "length": a.plan.length,
                "score": a.score.mean,
                "low": a.score.low,
                "high": a.score.high,
                "generated": a.generated,
                "read": a.read,
                "over_parallel": a.gain and _tested(a.gain),
            }
            for a in arranged(of)
        ],
        "curves": [
            {
                "policy": curve.name,
                "estimation": curve.estimation,
                "points": [
                    {"n": p.n, "score": e.mean, "low": e.low, "high": e.high}
                    | {"tokens": float(p.tokens.mean()), "generations": p.generations}
                    for p in curve.points
                    if (e := p.estimate)
                ],
            }
            for curve in found.curves.values()
        ],
        "gains": [{"policy": name, "n": n, **_tested(tested)} for name, n, tested in gains(of)],
        "to_match": [
            {"policy": ours, "reference": theirs, "n": p.n, "free": asdict(free), "charged": asdict(charged)}
            for ours, theirs, p, free, charged in matches(of)
        ],
    }


def _tested(tested: Finding) -> dict[str, Any]:
    return {
        "gain": tested.estimate.mean,
        "low": tested.estimate.low,
        "high": tested.estimate.high,
        "p": tested.p,
        "p_holm": tested.p_holm,
        "significant": tested.significant,
    }


def sheets(of: OfRun) -> list[Sheet]:
    found, largest, title = of.found, _shown(of), of.run
    sizes = [at.n for at in found.measured]
    notes = [
        f"{of.samples.questions} questions with {of.samples.chains} samples each: {of.estimated} tell pass@1 (oracle), "
        f"the first {of.few} of these predict the difficulty, {of.judged} judge the plans. Bin 1 is the easiest."
    ]
    if of.samples.ratings is None:
        notes.append(
            "The samples are not rated, so the vote is the only plan, and only its N can be chosen. For more plans "
            "run with --set plan.aggregation=best-of."
        )
    if of.chains is not None:
        notes.append(
            f"{of.chains_run} answered the same questions in {of.chains.chains} chains of {of.chains.length} attempts, "
            "all of which judge."
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
    gained = tuple((name, str(n), *_gained(t)) for name, n, t in gains(of))
    chose = tuple((f"N = {n} | {name}", *(" / ".join(plans) for plans in of_bins)) for name, n, of_bins in choices(of))
    rows = tuple(
        (
            str(a.n),
            a.plan.name,
            estimate(a.score, "z.1f"),
            f"{a.generated:.1f}",
            f"{a.read:.1f}",
            *(_gained(a.gain) if a.gain else ("",) * 3),
        )
        for a in arranged(of)
    )
    tokens = ", ".join(f"{p.tokens.mean():.1f}" for p in found.curves[ONE_CHOICE].points)
    generated = (_REVISED if rows else _TOKENS).format(tokens)
    best = found.measured[-1].n
    saved = tuple(
        (ours, theirs, f"{100 * p.accuracy:.1f}", _matched(free), _matched(charged))
        for ours, theirs, p, free, charged in matches(of)
        if p.n == best
    )
    columns = tuple(f"N = {n}" for n in sizes)
    return [
        Sheet(f"{title} · difficulty", ("questions in", *every, *_AGREED), told, tuple(notes)),
        Sheet(f"{title} · score by bin at N = {largest.n}, %", ("plan | difficulty", *every), by_bin, (_LOOK,)),
        *(
            [Sheet(f"{title} · in a row and in parallel at equal generations", _ARRANGED, rows, (_READ,))]
            if rows
            else []
        ),
        Sheet(f"{title} · plans chosen", ("N | difficulty", *every), chose, (_FOLDS,)),
        Sheet(f"{title} · score at equal generations, %", ("policy", *columns), curves, (generated,)),
        Sheet(f"{title} · gain over {ONE_CHOICE}, points", ("policy", "N", "gain", "p", "p, Holm"), gained, ()),
        Sheet(f"{title} · generations to match N = {best}", _MATCHED, saved, (_CHARGED.format(of.estimated, of.few),)),
    ]


def _gained(tested: Finding) -> tuple[str, str, str]:
    return estimate(tested.estimate, "+z.1f") + "*" * tested.significant, p_value(tested.p), p_value(tested.p_holm)


_AGREED = ("same bin as oracle %", "at most one apart %", "Spearman")
_LOOK = "For looking at: the best number of a column is the best of several estimates, hence too high."
_TOKENS = (
    "Generated tokens a question: {}. They are equal for all policies that have N for every question, whose plans are "
    "parallel samples. Own N: each bin has its own number, and a question at most N on average."
)
_REVISED = "Generated tokens a question, of one choice for all: {}. Tokens read are not in them, and are not equal."
_ARRANGED = ("N", "plan", "score %", "generated tokens", "tokens read", "over parallel", "p", "p, Holm")
_READ = (
    "N generations in parallel, or as N / l chains of l attempts (l in a row), under the same aggregation. Tokens are "
    "those of one answer: the question is read once, and each revision reads it again with up to four attempts."
)
_FOLDS = "Of each bin the plans that are best on its halves, each for the other half."
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
