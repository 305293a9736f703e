"""What choosing the plan by difficulty gains in populations whose truth is known, and where it gains nothing.

    python -m cotune.difficulty.study --runs 50 --out results/difficulty-synthetic.md

Every run draws fresh questions, samples, ratings and chains of revisions, and does with them what a study of a real
policy would. All populations are ours: they show the machinery, not models. Same seed, same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cotune.aggregation import Floats, Ints
from cotune.compare.stats import Estimate, bootstrap_t, mean_of
from cotune.difficulty.allocation import (
    BY_ENTROPY,
    BY_RATING,
    ONE_CHOICE,
    ORACLE,
    accuracy_by_bin,
    by_difficulty,
    chosen,
    folds,
    gain,
    generations_to_match,
)
from cotune.difficulty.attempts import Attempts, attempts
from cotune.difficulty.bins import difficulty_bins, pass_at_1
from cotune.difficulty.plans import BEST, MAJORITY, WEIGHTED

TIERS = 5
OTHERS = 8  # wrong answers beside the leading one
SIZES = (1, 2, 4, 8, 16, 32, 64)
SHOWN = (4, 16, 64)
TIERED = 16  # the N of the table of plans by tier
ESTIMATED, FEW = 32, 8  # samples that tell pass@1, and of these the ones that predict difficulty
CHAINS = 16  # as many as attempts in each
KNOWN, LEAK = "the true tiers", "oracle from the judged samples (leaks)"
UNIFORM = (MAJORITY, BEST, WEIGHTED)
CHOICES = (KNOWN, ORACLE, BY_ENTROPY, BY_RATING, LEAK)
CHARGED = (ORACLE, BY_ENTROPY, BY_RATING)


@dataclass(frozen=True)
class Population:
    """Questions of five tiers, equally frequent; every field has one number for each, the easiest tier first.

    `right`: pass@1. `leading`: share of the wrong answers that are one and the same. `insight`: how many standard
    deviations a right attempt's rating lies above a wrong one's, before both are squeezed into (0, 1). `mended` and
    `spoiled`: chance that a revision makes a wrong attempt right and a right one wrong; a wrong attempt that is not
    mended is repeated.
    """

    says: str
    right: Sequence[float]
    leading: Sequence[float]
    insight: Sequence[float]
    mended: Sequence[float]
    spoiled: Sequence[float]

    def draw(self, questions: int, random: np.random.Generator) -> tuple[Ints, Attempts, Attempts]:
        """The tier of each question, its independent samples and its chains."""
        tier = np.arange(questions) % TIERS
        samples = self._attempts(tier, ESTIMATED + SIZES[-1], 1, random)
        return tier, samples, self._attempts(tier, CHAINS, CHAINS, random)

    def _attempts(self, tier: Ints, chains: int, length: int, random: np.random.Generator) -> Attempts:
        of = {name: np.asarray(getattr(self, name))[tier, None] for name in ("right", "leading", "mended", "spoiled")}
        shape = (len(tier), chains, length)
        chance, noise = random.random(shape), random.normal(size=shape)
        wrong = np.where(random.random(shape) < of["leading"][..., None], 1, 2 + random.integers(0, OTHERS, shape))
        answer = np.empty(shape, dtype=np.int64)  # 0 is right, 1 leads the wrong ones
        answer[..., 0] = np.where(chance[..., 0] < of["right"], 0, wrong[..., 0])
        for step in range(1, length):
            before = answer[..., step - 1]
            from_right = np.where(chance[..., step] < of["spoiled"], wrong[..., step], 0)
            from_wrong = np.where(chance[..., step] < of["mended"], 0, before)
            answer[..., step] = np.where(before == 0, from_right, from_wrong)
        rating = 1 / (1 + np.exp(-(noise + np.asarray(self.insight)[tier, None, None] * (answer == 0))))
        return attempts(answer.astype(str).tolist(), answer == 0, np.ones(shape), rating)


POPULATIONS: Mapping[str, Population] = {
    "Ranking turns": Population(
        "Easy questions: wrong attempts differ, so votes work, and ratings mislead. From the third tier on most wrong "
        "attempts make the same mistake, which votes amplify; there revisions mend it, and on hard questions they "
        "spoil more than they mend and ratings see through it.",
        right=(0.85, 0.7, 0.45, 0.3, 0.15),
        leading=(0.3, 0.3, 0.9, 0.8, 0.8),
        insight=(-0.5, -0.5, 0.0, 1.5, 1.5),
        mended=(0.5, 0.4, 0.4, 0.05, 0.02),
        spoiled=(0.05, 0.1, 0.1, 0.38, 0.38),
    ),
    "One plan wins": Population(
        "As many easy and hard questions, but ratings see through mistakes on all of them, and revisions spoil more "
        "than they mend.",
        right=(0.85, 0.7, 0.55, 0.3, 0.15),
        leading=(0.3, 0.3, 0.5, 0.8, 0.8),
        insight=(1.5, 1.5, 1.5, 1.5, 1.5),
        mended=(0.05, 0.05, 0.05, 0.05, 0.05),
        spoiled=(0.38, 0.38, 0.38, 0.38, 0.38),
    ),
    "All alike": Population(
        "Every question is like every other, ratings and revisions know nothing: there is nothing to gain.",
        right=(0.5,) * TIERS,
        leading=(1.0,) * TIERS,
        insight=(0.0,) * TIERS,
        mended=(0.5,) * TIERS,
        spoiled=(0.5,) * TIERS,
    ),
}


@dataclass(frozen=True)
class Run:
    """Accuracies by (policy, N), gains over one choice for all with their intervals, and generations to match."""

    accuracy: Mapping[tuple[str, int], float]
    gains: Mapping[tuple[str, int], Estimate]
    matched: Mapping[tuple[str, str, int, bool], int | None]  # policy, matched uniform policy, its N, charged
    agreements: Mapping[str, float]
    by_tier: Mapping[str, Floats]  # of each plan of `TIERED` generations, its accuracy in every tier


def run_once(population: Population, questions: int, random: np.random.Generator) -> Run:
    tier, samples, chains = population.draw(questions, random)
    found = by_difficulty(samples, chains, SIZES, ESTIMATED, FEW, random)
    curves = dict(found.curves)
    judged = samples.split(ESTIMATED)[1]
    for name, bins in ((KNOWN, tier), (LEAK, difficulty_bins(pass_at_1(judged)))):
        curves[name] = chosen(name, 0, found.measured, bins, folds(bins, random))
    points = {(name, p.n): p for name, curve in curves.items() for p in curve.points}
    matched = {
        (name, reference, n, charged): generations_to_match(curves[name], points[reference, n], charged).generations
        for name in CHARGED
        for reference in (WEIGHTED, ONE_CHOICE)
        for n in SHOWN[1:]
        for charged in (False, True)
    }
    return Run(
        {key: point.accuracy for key, point in points.items()},
        {(name, n): gain(points[name, n], points[ONE_CHOICE, n]).estimate for name in CHOICES for n in SHOWN},
        matched,
        {name: agreed.same for name, agreed in found.agreements.items()},
        {
            plan.name: row
            for at in found.measured
            if at.n == TIERED
            for plan, row in zip(at.plans, accuracy_by_bin(at, tier), strict=True)
        },
    )


# ---- the table ----


def markdown(runs: Mapping[str, Sequence[Run]], questions: int) -> str:
    count = len(next(iter(runs.values())))
    lines = [
        "# Compute by difficulty in synthetic populations",
        "",
        f"{count} runs of {questions} fresh questions each. Difficulty: pass@1 from {ESTIMATED} samples (oracle),",
        f"answer entropy or mean rating of the first {FEW} of them (predicted). Plans are judged on {SIZES[-1]} other",
        f"samples and on {CHAINS} chains of {CHAINS} attempts. Accuracy in %, mean over runs. Δ: points above one",
        "choice for all questions at the same N, with the 95% interval of its mean over runs (studentized",
        "bootstrap). Covered: runs whose own 95% interval of the gain holds the mean gain over all runs; where both",
        "chose alike for every question a run has no interval.",
    ]
    for name, of_population in runs.items():
        population = POPULATIONS[name]
        lines += ["", f"## {name}", "", population.says, "", "| | " + " | ".join(f"N = {n}" for n in SIZES) + " |"]
        lines.append("| --- |" + " ---: |" * len(SIZES))
        for policy in (*UNIFORM, ONE_CHOICE, *CHOICES):
            means = [100 * mean_of([run.accuracy[policy, n] for run in of_population]) for n in SIZES]
            lines.append(f"| {policy} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
        lines += ["", f"| N = {TIERED} | " + " | ".join(f"tier {t + 1}" for t in range(TIERS)) + " |"]
        lines.append("| --- |" + " ---: |" * TIERS)
        for plan in of_population[0].by_tier:
            means = [100 * mean_of([run.by_tier[plan][t] for run in of_population]) for t in range(TIERS)]
            lines.append(f"| {plan} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")
        lines += ["", "| Δ one choice for all | " + " | ".join(f"N = {n} | covered" for n in SHOWN) + " |"]
        lines.append("| --- |" + " ---: |" * (2 * len(SHOWN)))
        for policy in CHOICES:
            cells = [_gained([run.gains[policy, n] for run in of_population]) for n in SHOWN]
            lines.append(f"| {policy} | " + " | ".join(cells) + " |")
        lines += ["", "Share of questions whose predicted bin is the oracle's: "]
        shares = {p: mean_of([run.agreements[p] for run in of_population]) for p in (BY_ENTROPY, BY_RATING)}
        lines[-1] += ", ".join(f"{p} {100 * share:.0f}%" for p, share in shares.items()) + "."
        lines += [
            "",
            "Fewest measured N that is as accurate as a uniform policy: median over runs, without and with the",
            'generations that estimated the difficulty ("-": no measured N is).',
            "",
            "| | " + " | ".join(f"{r}, N = {n}" for r in (WEIGHTED, ONE_CHOICE) for n in SHOWN[1:]) + " |",
            "| --- |" + " ---: |" * (2 * len(SHOWN[1:])),
        ]
        for policy in CHARGED:
            row = [
                " / ".join(
                    _median([run.matched[policy, r, n, charged] for run in of_population]) for charged in (False, True)
                )
                for r in (WEIGHTED, ONE_CHOICE)
                for n in SHOWN[1:]
            ]
            lines.append(f"| {policy} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _gained(gains: Sequence[Estimate]) -> str:
    means = np.array([g.mean for g in gains])
    mean, ends = mean_of(means), bootstrap_t(means)
    spread = f" [{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]" if ends else ""
    sure = [g.low <= mean <= g.high if g.low is not None and g.high is not None else g.mean == mean for g in gains]
    return f"{100 * mean:+.1f}{spread} | {100 * sum(sure) / len(sure):.0f}%"


def _median(found: Sequence[int | None]) -> str:
    """The lower median; None counts as more than any number."""
    middle = sorted(found, key=lambda n: float("inf") if n is None else n)[(len(found) - 1) // 2]
    return "-" if middle is None else str(middle)


def run_all(names: Sequence[str], runs: int, questions: int, seed: int) -> dict[str, list[Run]]:
    places = {name: i for i, name in enumerate(POPULATIONS)}
    return {
        name: [
            run_once(POPULATIONS[name], questions, np.random.default_rng([seed, places[name], run]))
            for run in range(runs)
        ]
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--populations", nargs="+", choices=list(POPULATIONS), default=list(POPULATIONS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the table, as markdown")
    given = parser.parse_args()
    if given.runs < 2 or given.questions < 2 or given.seed < 0:
        parser.error("give at least 2 runs, 2 questions, and a seed of at least 0")
    runs = run_all(given.populations, given.runs, given.questions, given.seed)
    given.out.write_text(markdown(runs, given.questions), encoding="utf-8")


if __name__ == "__main__":
    main()
