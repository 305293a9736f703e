"""The inference plan chosen by difficulty on the real model: train questions drawn, what every plan is worth there.

Knows nothing of how bins are chosen (difficulty/choosing.py) nor of how a plan by difficulty is carried out (plans.py,
evaluate.py).

Ours: samples of a question are exchangeable, so one draw of N is read as several, each beginning another `probe`
samples later and going round: whatever comes first tells the difficulty, and the same samples answer, as they will when
the plan is used. The utility is that of pulls.py; tokens read are not in it, so neither is the prompt that is read a
second time.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from cotune.aggregation import expected_score
from cotune.bench import Bench
from cotune.config import DifficultyConfig, InferenceConfig
from cotune.difficulty.choosing import choose_by_difficulty
from cotune.difficulty.probing import ease_of
from cotune.errors import BudgetExhausted
from cotune.plans import check_bins, choose, recorded
from cotune.pulls import PER_TOKENS, Drawn, Pulls, plan_of
from cotune.scorers import SELF_CONSISTENCY
from cotune.values import AnyPlan, InferencePlan, PlanByDifficulty

_AT_ONCE = 64  # questions between two looks at the budget: enough to fill a batch


def offered_plans(c: InferenceConfig) -> list[InferencePlan]:
    """What a bin can choose from, fewest samples first, the vote before what reads ratings.

    With rated samples all three aggregations, and without the vote alone, as in difficulty/plans.py. One sample is one
    plan: there is nothing to aggregate.
    """
    vote = c.model_copy(update={"aggregation": "majority", "scorer": None})
    rated = [] if c.aggregation == "majority" or c.scorer == SELF_CONSISTENCY else ["best-of", "weighted-best-of"]
    kinds = [vote, *(c.model_copy(update={"aggregation": kind}) for kind in rated)]
    return [plan_of(kind, n) for n in range(1, c.samples + 1) for kind in (kinds if n > 1 else [vote])]


def plan_by_difficulty(pulls: Pulls, difficulty: DifficultyConfig, bench: Bench) -> AnyPlan | None:
    """The plan that is worth most on train: one for each bin, or one for all where bins gain nothing.

    Every pull is one of `inference.samples`, as many as `inference.completions` pays for. With an exhausted budget the
    choice is by what was drawn before, and None where that is nothing. Emits a "bin" for each bin and "policy".
    """
    c = pulls.settings
    plans = offered_plans(c)
    asked: list[int] = []
    drawn: list[Drawn] = []
    try:
        while left := min(_AT_ONCE, (c.completions - pulls.spent) // c.samples):
            for queries, found in pulls.draws(0, c.samples, left):
                asked += queries
                drawn += found
    except BudgetExhausted as stop:
        bench.emit("budget", where="pulls", message=str(stop))
    if not drawn:
        return None
    columns = [column for one in drawn for column in _columns(one, plans, c, difficulty)]
    each = len(columns) // len(drawn)
    utility, ease = np.array([column for column, _ in columns]).T, np.array([e for _, e in columns])
    random = np.random.default_rng(bench.seed_for("folds"))
    sizes = np.array([plan.samples for plan in plans])
    choice = choose_by_difficulty(
        utility, sizes, np.repeat(asked, each), ease, difficulty.probe, difficulty.bins, random
    )
    facts = {"queries": len({*asked}), "completions": pulls.spent, "gain": choice.gain, "error": _finite(choice.error)}
    for b, place in enumerate(choice.plans):
        inside = choice.bins == b
        means = {"utility": utility[place, inside].mean(), "utility_of_one": utility[choice.one, inside].mean()}
        about = {"share": inside.mean()} | means
        bench.emit("bin", bin=b, plan=recorded(plans[place]), **{name: float(mean) for name, mean in about.items()})
    if not choice.parts:
        bench.emit("policy", by_difficulty=False, samples=plans[choice.one].samples, **facts)
        return plans[choice.one]
    drawn_for = sizes[np.array(choice.plans)][choice.bins]
    bench.emit("policy", by_difficulty=True, samples=float(drawn_for.mean()), **facts)
    scorer = plan_of(c, c.samples).scorer if difficulty.told_by == "rating" else None
    return check_bins(
        PlanByDifficulty(difficulty.probe, scorer, choice.edges, tuple(plans[place] for place in choice.plans))
    )


def _columns(
    drawn: Drawn, plans: list[InferencePlan], c: InferenceConfig, difficulty: DifficultyConfig
) -> list[tuple[list[float], float]]:
    """Of each way round one draw: the utility of every plan, and the ease that its first samples tell."""
    samples, worth = drawn
    found = []
    for start in range(0, len(samples.votes), difficulty.probe):
        votes, scores, completions = (
            [*row[start:], *row[:start]] for row in (samples.votes, samples.scores, samples.completions)
        )
        tokens = list(accumulate(completion.generated_tokens for completion in completions))
        ratings = scores[: difficulty.probe] if difficulty.told_by == "rating" else None
        utility = [
            expected_score(choose(plan, votes[: plan.samples], scores[: plan.samples]), worth)
            - c.cost_weight / PER_TOKENS * tokens[plan.samples - 1]
            for plan in plans
        ]
        found.append((utility, ease_of(votes[: difficulty.probe], ratings)))
    return found


def _finite(error: float) -> float | None:
    return error if np.isfinite(error) else None
