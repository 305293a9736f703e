"""Arms pulled on a model whose chances are known: what a pull says, which queries it draws, which arm is chosen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import Sums, bench, example, instruction_of, of_kind, question_of

from cotune.aggregation import majority_accuracy
from cotune.bandits.base import Arm
from cotune.bench import Bench
from cotune.config import DifficultyConfig, InferenceConfig, VerifierConfig, resolve
from cotune.engines.base import Request, Sampling, stream_seed
from cotune.engines.fake import FakeEngine
from cotune.errors import UsageError
from cotune.experiment import make_strategy
from cotune.models.base import BaseModel
from cotune.pulls import Pulls, learner, plan_of
from cotune.strategies.base import Fixed, Problem, Work, Workload
from cotune.strategies.inference_aware import InferenceAware
from cotune.strategies.plan_only import PlanOnly
from cotune.values import GREEDY, Completion, Conditioning, Event, Example, InferencePlan, Prompt, Tuned, Verifier

EXAMPLES = [example(i) for i in range(4)]
SAMPLING = Sampling(16)
STEEP, FLAT = Fixed(Prompt("steep")), Fixed(Prompt("flat"))


class Chancy(FakeEngine):
    """Each sample of a prompt is right with chance `of(instruction, question)`, from its own stream; else it says 0."""

    def __init__(self, of: Callable[[str, str], float]) -> None:
        super().__init__(lambda rendered, adapter, sample: "")
        self.of = of

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        self.calls += requests
        return [[self._draw(request, sampling, request.first + s) for s in range(sampling.n)] for request in requests]

    def _draw(self, request: Request, sampling: Sampling, s: int) -> Completion:
        chance = self.of(instruction_of(request.prompt), question_of(request.prompt))
        right = random.Random(stream_seed(sampling, request.prompt, s)).random() < chance
        a, b = [int(word) for word in question_of(request.prompt).split() if word.isdigit()]
        return Completion(str(a + b if right else 0), (1,) * 5, self.token_count(request.prompt), False)


def worked_example(instruction: str, question: str) -> float:
    """Like the paper's: `steep` is right always on half of the questions and seldom on the others, `flat` on 0.58.

    Alone steep is the better one (0.65), with many votes flat is (0.58 -> 0.75 at N = 15, steep -> 0.525).
    """
    if instruction != "steep":
        return 0.58
    return 1.0 if question in (EXAMPLES[0].question, EXAMPLES[1].question) else 0.3


def settings(**given: Any) -> InferenceConfig:
    return InferenceConfig(**{"samples": 15, "completions": 6000, "cost_weight": 0.0} | given)


def pulls(base: BaseModel, candidates: Sequence[Tuned], given: InferenceConfig, engine: FakeEngine) -> Pulls:
    return Pulls(candidates, given, Sums(), EXAMPLES, SAMPLING, bench(base, engine, tokens=None))


def test_a_pull_sums_utility_over_all_blocks_and_charges_every_sample(random_base: BaseModel) -> None:
    """Right answers 1, 1, 0 of three samples in all queries: votes and costs by hand."""
    engine = FakeEngine(lambda rendered, adapter, sample: f"{sum_of(rendered) if sample < 2 else 0}")
    env = pulls(random_base, [STEEP], settings(samples=3, cost_weight=100.0), engine)
    queries, sums = env.pull(0, 3, 2, np.random.default_rng(0))
    assert len(set(queries.tolist())) == 2
    # per query: n = 1: 2 of 3 blocks right, 3 tokens; n = 2: one block (right, right), 2 tokens; n = 3: majority right
    assert sums == pytest.approx(np.array([[2 * (2 - 0.3), 2 * (1 - 0.2), 2 * (1 - 0.3)]]))
    assert env.spent == 6
    assert env.best() == Arm(0, 2)
    assert env.means(0) == pytest.approx([(2 - 0.3) / 3, 0.8, 0.7])


def sum_of(rendered: str) -> int:
    return sum(int(word) for word in question_of(rendered).split() if word.isdigit())


def test_every_candidate_draws_the_same_queries_in_passes_and_each_pass_fresh_samples(random_base: BaseModel) -> None:
    engine = Chancy(lambda instruction, question: 0.5)
    env = pulls(random_base, [STEEP, FLAT], settings(samples=8, prompts=2), engine)
    random = np.random.default_rng(0)
    first = np.concatenate([env.pull(0, 8, count, random)[0] for count in (3, 3, 2)])
    second = env.pull(1, 2, 8, random)[0]
    assert first.tolist() == second.tolist()
    assert sorted(first[:4].tolist()) == sorted(first[4:].tolist()) == [0, 1, 2, 3]
    env = pulls(random_base, [STEEP], settings(samples=8), engine)
    one, two = (env.pull(0, 8, 4, random)[1] for _ in range(2))
    assert not np.array_equal(one, two)


def test_means_come_near_the_exact_values(random_base: BaseModel) -> None:
    env = pulls(random_base, [STEEP, FLAT], settings(samples=5, prompts=2), Chancy(worked_example))
    for prompt in (0, 1):
        env.pull(prompt, 5, 400, np.random.default_rng(0))
    exact = [majority_accuracy([p, 1 - p], 5) for p in (1.0, 0.3, 0.58)]
    assert env.means(0) == pytest.approx(((exact[0] + exact[1]) / 2).tolist(), abs=0.05)
    assert env.means(1) == pytest.approx(exact[2].tolist(), abs=0.05)


@dataclass
class Counting(Tuned):
    """A generator of prompts that says how often it was asked."""

    asked: list[str] = field(default_factory=list)

    def condition(self, examples: Sequence[Example], bench: Any) -> list[Conditioning]:
        self.asked += [e.id for e in examples]
        return [Conditioning(Prompt(f"for {e.id}")) for e in examples]

    def under(self, plan: InferencePlan, verifier: Verifier | None = None) -> Tuned:
        return self

    def save(self, folder: Path) -> None: ...


def test_what_makes_prompts_is_asked_once_for_each_query(random_base: BaseModel) -> None:
    maker = Counting()
    env = pulls(random_base, [maker], settings(samples=2), Chancy(lambda instruction, question: 0.5))
    env.pull(0, 2, 10, np.random.default_rng(0))
    assert sorted(maker.asked) == sorted(e.id for e in EXAMPLES)


@dataclass(frozen=True)
class Scripted:
    """Proposes what it is given."""

    given: tuple[Tuned, ...]

    def exploring(self, load: Workload) -> list[Work]:
        return [Work("explore", 1, 1)]

    def longest(self, load: Workload) -> int:
        return load.question

    def candidates(self, begin: Fixed, problem: Problem, bench: Bench) -> list[Tuned]:
        return list(self.given)


def tune(base: BaseModel, at: Bench, given: InferenceConfig, *candidates: Tuned) -> Tuned:
    problem = Problem(Sums(), tuple(EXAMPLES), (), base, base, SAMPLING)
    made = InferenceAware(Scripted(candidates), given, learner(given, given.prompts), VerifierConfig())
    return made.tune(STEEP, problem, at)


def test_the_best_prompt_changes_with_the_number_of_samples(random_base: BaseModel) -> None:
    """What prompt-first-then-N cannot see: with one sample steep is best, with fifteen flat is."""
    for samples, best in ((1, STEEP), (15, FLAT)):
        events: list[Event] = []
        at = bench(random_base, Chancy(worked_example), events=events)
        found = tune(random_base, at, settings(samples=samples, prompts=2), STEEP, FLAT)
        assert isinstance(found, Fixed)
        assert found.prompt == best.prompt
        (policy,) = of_kind(events, "policy")
        assert (policy["text"], policy["samples"]) == (best.prompt.instruction, found.plan.samples)
        assert policy["completions"] <= 6000
        assert policy["queries"] == 4
        arms = of_kind(events, "arm")
        assert [a["text"] for a in arms if a["chosen"]] == [best.prompt.instruction]
        assert [len(a["utility"]) for a in arms] == [samples, samples]
        assert samples == 1 or found.plan.samples > 8


def test_what_samples_cost_decides_how_many(random_base: BaseModel) -> None:
    problem = Problem(Sums(), tuple(EXAMPLES), (), random_base, random_base, SAMPLING)
    chosen = []
    for weight in (0.0, 40.0):  # 40 a thousand tokens is 0.2 for a completion of 5
        given = settings(cost_weight=weight, prompts=1, completions=3000)
        at = bench(random_base, Chancy(worked_example))
        found = PlanOnly(given, learner(given, 1), VerifierConfig(), DifficultyConfig()).tune(FLAT, problem, at)
        assert isinstance(found, Fixed)
        assert found.prompt == FLAT.prompt
        chosen.append(found.plan.samples)
    assert chosen[0] > 8
    assert chosen[1] == 1


@pytest.mark.parametrize("name", ["psst", "psst-screening", "uniform", "epsilon-greedy", "softmax", "ucb", "triple"])
def test_every_learner_chooses_within_the_budget(random_base: BaseModel, name: str) -> None:
    events: list[Event] = []
    given = settings(samples=3, prompts=3, completions=200, learner=name)
    bad = Fixed(Prompt("bad"))
    engine = Chancy(
        lambda instruction, question: 0.05 if instruction == "bad" else 0.9 if instruction == "flat" else 0.5
    )
    found = tune(random_base, bench(random_base, engine, events=events), given, bad, FLAT, STEEP)
    assert isinstance(found, Fixed)
    assert found.prompt == FLAT.prompt
    assert found.plan == plan_of(given, found.plan.samples)
    assert (found.plan.samples == 1) or name != "triple"
    (policy,) = of_kind(events, "policy")
    assert 0 < policy["completions"] <= 200


def test_the_start_is_always_an_arm_and_candidates_are_limited(random_base: BaseModel) -> None:
    events: list[Event] = []
    at = bench(random_base, Chancy(worked_example), events=events)
    others = [Fixed(Prompt(f"p{i}")) for i in range(5)]
    tune(random_base, at, settings(samples=2, prompts=3, completions=100), *others)
    assert [a["text"] for a in of_kind(events, "arm")] == ["p0", "p1", "steep"]


def test_an_exhausted_budget_gives_the_best_arm_pulled_so_far(random_base: BaseModel) -> None:
    given = settings(samples=3, prompts=2, completions=600)
    kinds = []
    for tokens in (0, 150, 2000):
        events: list[Event] = []
        at = bench(random_base, Chancy(worked_example), events=events, tokens=tokens)
        found = tune(random_base, at, given, FLAT, STEEP)
        assert isinstance(found, Fixed)
        assert at.ledger.tuning.tokens <= tokens
        assert len(of_kind(events, "budget")) == 1
        pulled = [a for a in of_kind(events, "arm") if a["chosen"]]
        kinds.append(found.plan != GREEDY)
        if pulled:  # the arm that was best among all seen
            means = [u for a in of_kind(events, "arm") for u in a["utility"] if u is not None]
            assert pulled[0]["utility"][found.plan.samples - 1] == max(means)
        else:
            assert found == FLAT  # the best of the search, under the plan it had
    assert kinds == [False, False, True]
    assert tune(random_base, bench(random_base, Chancy(worked_example)), given) == STEEP  # nothing was found


@pytest.mark.parametrize(
    ("strategy", "inference", "why"),
    [
        ("inference-aware", {"completions": 127}, "8 prompts with up to 16 samples take 128. Raise it"),
        ("plan-only", {"completions": 15}, "1 prompt with up to 16 samples take 16. Raise it, or lower inference.samp"),
        ("plan-only", {"aggregation": "best-of", "scorer": "best"}, "There is no scorer 'best'"),
        ("plan-only", {"temperature": 0}, "all samples are the same"),
        ("plan-only", {"scorer": "log-probability"}, "majority reads no scorer"),
        ("plan-only", {"samples": 0}, "inference.samples = 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(strategy: str, inference: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        make_strategy(resolve({"strategy": strategy, "model": "m", "task": "gsm8k", "inference": inference}))


def test_a_budget_of_one_pull_for_each_arm_is_enough(random_base: BaseModel) -> None:
    given = settings(samples=4, prompts=2, completions=8)
    assert isinstance(tune(random_base, bench(random_base, Chancy(worked_example)), given, STEEP, FLAT), Fixed)
    make_strategy(resolve({"strategy": "plan-only", "model": "m", "task": "gsm8k", "inference": {"completions": 16}}))
