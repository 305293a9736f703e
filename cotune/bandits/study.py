"""PSST against every baseline at equal budgets on synthetic environments, as a table with intervals.

    python -m cotune.bandits.study --runs 200 --out results/inference-synthetic.md

Every run is a fresh environment in which every learner spends each budget anew; its policy's average contextual return
(ACR) on the held-out queries is an exact sum, so nothing but environments and learners is random. With `--rows` the
figures of finished runs are kept in a file and not computed again. Same seed, same bytes, in whatever portions.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy.stats import wilcoxon

from cotune.aggregation import Floats
from cotune.bandits.base import Arm, Learner, average_return
from cotune.bandits.baselines import UCB, EpsilonGreedy, Softmax, Triple, Uniform
from cotune.bandits.environments import Outcomes, synth_bernoulli, synth_categorical
from cotune.bandits.psst import PSST
from cotune.compare.stats import ALPHA, bootstrap_t, holm, mean_of

ENVIRONMENTS: Mapping[str, Callable[[np.random.Generator], Outcomes]] = {
    "Synth-Bernoulli": synth_bernoulli,
    "Synth-Categorical": synth_categorical,
}
SCREENING, EPSILON, C = 0.2, 0.15, 0.1  # the paper's
TAU = 0.05  # the authors' code; the paper does not say
LEARNERS: tuple[Learner, ...] = (
    PSST(True, None, SCREENING),
    PSST(False, None, SCREENING),
    PSST(True, 1, SCREENING),
    PSST(True, 4, SCREENING),
    PSST(True, 8, SCREENING),
    Uniform(),
    EpsilonGreedy(EPSILON),
    Softmax(TAU),
    UCB(C),
    Triple(random_n=False),
    Triple(random_n=True),
)
REFERENCE = LEARNERS[0].name
CEILINGS = ("best possible", "best prompt at N = 1, its best N", "best prompt at N = 1, one completion")
FLIPS = "best prompt at N = 1 is not the best one"  # share of contexts

Key = tuple[str, int, int, str]  # environment, run, budget (0 for what needs none), row
Rows = dict[Key, tuple[float, int]]  # ACR, completions spent


def ceilings(values: Floats) -> Iterator[tuple[str, float]]:
    """What policies that know the held-out values [C, P, N] reach: both chosen together, prompt first, prompt only."""
    contexts, _, n_max = values.shape
    both = values.reshape(contexts, -1).argmax(1)
    first = values[:, :, 0].argmax(1)
    sizes = values[np.arange(contexts), first].argmax(1)
    policies = (
        [Arm(int(i) // n_max, int(i) % n_max + 1) for i in both],
        [Arm(int(p), int(n) + 1) for p, n in zip(first, sizes, strict=True)],
        [Arm(int(p), 1) for p in first],
    )
    for name, policy in zip(CEILINGS, policies, strict=True):
        yield name, average_return(values, tuple(policy))
    yield FLIPS, float((both // n_max != first).mean())


def run_once(
    name: str, run: int, budgets: list[int], seed: int, known: Rows
) -> Iterator[tuple[Key, tuple[float, int]]]:
    """All rows of one run that are not `known`. The environment depends on the seed and the run alone."""
    wanted = [(budget, i) for budget in budgets for i in range(len(LEARNERS))]
    wanted = [(budget, i) for budget, i in wanted if (name, run, budget, LEARNERS[i].name) not in known]
    if not wanted:
        return
    place = list(ENVIRONMENTS).index(name)
    environment = ENVIRONMENTS[name](np.random.default_rng([seed, place, run]))
    values = environment.values(environment.test)
    for row, value in ceilings(values):
        yield (name, run, 0, row), (value, 0)
    for budget, i in wanted:
        learned = LEARNERS[i].learn(environment, budget, np.random.default_rng([seed, place, run, budget, i]))
        yield (name, run, budget, LEARNERS[i].name), (average_return(values, learned.policy), learned.spent)


def run_all(names: list[str], runs: int, budgets: list[int], seed: int, file: Path | None) -> Rows:
    rows: Rows = {}
    if file and file.exists():
        with file.open(encoding="utf-8", newline="") as stream:
            for of_seed, name, of_run, budget, row, value, spent in csv.reader(stream):
                if int(of_seed) == seed:
                    rows[name, int(of_run), int(budget), row] = float(value), int(spent)
    for run in range(runs):
        fresh = [row for name in names for row in run_once(name, run, budgets, seed, rows)]
        rows.update(fresh)
        if file and fresh:
            with file.open("a", encoding="utf-8", newline="") as stream:
                csv.writer(stream).writerows((seed, *key, repr(value), spent) for key, (value, spent) in fresh)
    return rows


# ---- the table ----


def with_interval(values: Floats, signed: bool) -> str:
    ends = bootstrap_t(values)
    sign = "+" if signed else ""
    return f"{mean_of(values):{sign}.4f}" + (f" [{ends[0]:{sign}.4f}, {ends[1]:{sign}.4f}]" if ends else "")


def p_value(differences: Floats) -> float:
    """Wilcoxon's signed-rank test, paired by run, two-sided; 1 where no run differs."""
    return float(wilcoxon(differences).pvalue) if differences.any() else 1.0


def markdown(rows: Rows, names: list[str], runs: int, budgets: list[int]) -> str:
    def column(name: str, budget: int, row: str, place: int = 0) -> Floats:
        return np.array([rows[name, run, budget, row][place] for run in range(runs)])

    others = [learner.name for learner in LEARNERS[1:]]
    cells = [(name, budget, other) for name in names for budget in budgets for other in others]
    differences = {key: column(*key) - column(key[0], key[1], REFERENCE) for key in cells}
    ps = [p_value(differences[key]) for key in cells]
    corrected = {key: p for key, p in zip(cells, holm(ps), strict=True) if p is not None}
    lines = [
        "# Bandits on synthetic environments",
        "",
        f"{runs} runs, each a fresh environment. ACR: average contextual return on held-out queries, mean over runs",
        f"with its 95% interval (studentized bootstrap). Δ: paired difference to {REFERENCE}, below 0 where that wins.",
        f"p: Wilcoxon's signed-rank test, two-sided, after Holm's correction over all {len(cells)} differences here.",
        "T: budget in completions; spent: completions, mean over runs.",
    ]
    for name in names:
        lines += ["", f"## {name}", "", "| no budget | ACR |", "| --- | ---: |"]
        lines += [f"| {row} | {with_interval(column(name, 0, row), False)} |" for row in CEILINGS]
        lines += ["", f"The {FLIPS} in {100 * column(name, 0, FLIPS).mean():.0f}% of all contexts of all runs."]
        for budget in budgets:
            lines += [
                "",
                f"| T = {budget:,} | ACR | Δ {REFERENCE} | p | spent |",
                "| --- | ---: | ---: | ---: | ---: |",
            ]
            for row in (REFERENCE, *others):
                key = (name, budget, row)
                delta = with_interval(differences[key], True) if key in differences else ""
                p = f"{corrected[key]:.2g}" if key in differences else ""
                spent = column(*key, 1).mean()
                lines.append(f"| {row} | {with_interval(column(*key), False)} | {delta} | {p} | {spent:,.0f} |")
            better = [
                o for o in others if corrected[name, budget, o] < ALPHA and differences[name, budget, o].mean() > 0
            ]
            level = [o for o in others if corrected[name, budget, o] >= ALPHA]
            lines += ["", f"Better than {REFERENCE}: {listed(better)}. Not told apart from it: {listed(level)}."]
    return "\n".join(lines) + "\n"


def listed(names: list[str]) -> str:
    return "; ".join(names) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--budgets", type=int, nargs="+", default=[2_500, 5_000, 10_000, 20_000])
    parser.add_argument("--environments", nargs="+", choices=list(ENVIRONMENTS), default=list(ENVIRONMENTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="CSV of all figures, read first and added to")
    parser.add_argument("--out", type=Path, required=True, help="the table, as markdown")
    given = parser.parse_args()
    if given.runs < 2 or min(given.budgets) < 1 or given.seed < 0:
        parser.error("give at least 2 runs, budgets of at least 1 completion, and a seed of at least 0")
    rows = run_all(given.environments, given.runs, given.budgets, given.seed, given.rows)
    given.out.write_text(markdown(rows, given.environments, given.runs, given.budgets), encoding="utf-8")


if __name__ == "__main__":
    main()
