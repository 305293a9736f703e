"""The frozen values that flow through a run. No logic beyond digests, no torch.

RunConfig -> Dataset -> Engine / models -> Strategy -> Tuned -> Evaluation -> run folder -> Comparison
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol


def full_digest(value: Any) -> str:
    """The SHA-256 of `value` as canonical JSON, 64 hex digits: for what is looked up among millions."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def digest(value: Any) -> str:
    """Its first 16 hex digits: the content address everywhere else in cotune."""
    return full_digest(value)[:16]


@dataclass(frozen=True)
class Example:
    """One row of a task.

    `reference` is the answer that the grader compares with (CosmosQA: the letter). `rationale` is the worked
    solution in the row, empty where the benchmark has none. `choices` is empty except for CosmosQA.
    """

    id: str
    question: str
    reference: str
    context: str = ""
    rationale: str = ""
    choices: tuple[str, ...] = ()


class Outcome(StrEnum):
    CORRECT = "correct"
    WRONG = "wrong"
    TRUNCATED = "truncated"
    ERRORED = "errored"


@dataclass(frozen=True)
class Grade:
    """What the grader says of one completion.

    `prediction` is the extracted answer (None: nothing could be extracted). `score` in [0, 1] is the task's
    headline metric; `metrics` holds all of them by name (accuracy, or exact_match and token_f1).
    `note` says why a grade is ERRORED or TRUNCATED.
    """

    outcome: Outcome
    prediction: str | None
    score: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Completion:
    """One generated text. `token_ids` excludes the end-of-turn token; `truncated` means it hit the length limit.

    `logprobs[i]` is log p(token_ids[i]) under the sampling temperature 1 distribution, empty unless asked for.
    `counted` is the number of generated tokens where a server says it and names no ids.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    truncated: bool
    logprobs: tuple[float, ...] = ()
    counted: int | None = None

    @property
    def generated_tokens(self) -> int:
        return len(self.token_ids) if self.counted is None else self.counted


@dataclass(frozen=True)
class Demonstration:
    """A worked example shown to the model before the question: one user turn, one assistant turn."""

    question: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """The tunable text: the system instruction and optional demonstrations. The rest of the frame is fixed."""

    instruction: str
    demonstrations: tuple[Demonstration, ...] = ()

    @property
    def digest(self) -> str:
        return digest(asdict(self))


class Adapter(Protocol):
    """LoRA factors for one base model, static or generated for one example (see models/lora.py)."""

    @property
    def digest(self) -> str: ...


class Verifier(Protocol):
    """Says how likely a completion is right, without the reference; trained for one base model (see verifier.py)."""

    @property
    def digest(self) -> str: ...

    def score(self, prompt: str, completions: Sequence[Completion], bench: Any) -> list[float | None]:
        """A chance in [0, 1] for each completion of a rendered prompt, None where it cannot say. `bench` has the model
        that reads, and pays."""

    def save(self, folder: Path) -> None:
        """Write it into a folder that is there (safetensors and JSON only)."""


Aggregation = Literal["greedy", "majority", "best-of", "weighted-best-of"]


def of_n(aggregation: str, n: int) -> str:
    """As one says it: majority of 8, best-of-8."""
    return f"{aggregation}-{n}" if aggregation.endswith("of") else f"{aggregation} of {n}"


@dataclass(frozen=True)
class InferencePlan:
    """How an example is answered: `samples` completions, made into one answer by `aggregation` (plans.py).

    They are independent, or with `chain` above 1 chains of so many attempts, each made in sight of those before it.

    "greedy" is one completion, decoded as the run decodes (`decoding` in its config); the others draw at this
    `temperature` and `top_p`. `scorer` names what ranks completions, for best-of and weighted-best-of alone.
    """

    aggregation: Aggregation = "greedy"
    samples: int = 1
    scorer: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    chain: int = 1

    @property
    def scorers(self) -> frozenset[str | None]:
        return frozenset({self.scorer})


GREEDY = InferencePlan()


@dataclass(frozen=True)
class PlanByDifficulty:
    """A plan for each difficulty bin, which the first `probe` samples of a question tell without its reference.

    Ease (difficulty/probing.py) is their mean rating by `scorer`, or where that is None minus the entropy of their
    answers. `edges` fall: a question whose ease is below b of them is in bin b, 0 the easiest, and answered under
    `plans[b]`. The probe is the first part of every plan's samples: nothing is drawn twice.
    """

    probe: int
    scorer: str | None
    edges: tuple[float, ...]
    plans: tuple[InferencePlan, ...]

    @property
    def samples(self) -> int:
        """The most that a question can take."""
        return max(plan.samples for plan in self.plans)

    @property
    def scorers(self) -> frozenset[str | None]:
        return frozenset({self.scorer, *(plan.scorer for plan in self.plans)})


AnyPlan = InferencePlan | PlanByDifficulty


@dataclass(frozen=True)
class Conditioning:
    """Which prompt, which adapter and which inference plan answer one example.

    `verifier` is what the plan's scorer "verifier" ranks by; None under any other scorer.
    """

    prompt: Prompt
    adapter: Adapter | None = None
    plan: AnyPlan = GREEDY
    verifier: Verifier | None = None


class Tuned(ABC):
    """What a strategy hands over: for any examples, the conditioning of each.

    The seed prompt without an adapter is a `Tuned` too, so every strategy, and each stage of a sequence,
    has the one type `tune(start: Tuned, problem, bench) -> Tuned`.
    """

    @abstractmethod
    def condition(self, examples: Sequence[Example], bench: Any) -> list[Conditioning]:
        """One conditioning per example, in order. `bench` pays for whatever has to be generated."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write everything needed to load this again (safetensors and JSON only)."""

    @abstractmethod
    def under(self, plan: AnyPlan, verifier: Verifier | None = None) -> Tuned:
        """The same prompts and adapters under another inference plan, and the verifier that it ranks by if it does."""

    def sizes(self) -> Mapping[str, Mapping[str, int]]:
        """Parameters, `trained` and in `total`, of each part that generates per example; empty where none does."""
        return {}


@dataclass(frozen=True)
class Told:
    """What a probe of `probe` samples says: the `ease` of the question and the `bin` that it is in."""

    probe: int
    ease: float
    bin: int


@dataclass(frozen=True)
class Samples:
    """The N completions behind one answer, in the order drawn (chain by chain), and what each answers.

    `votes` are spellings that equal answers share (`Task.vote`; None: nothing could be read), `scores` what the plan's
    scorer gives each completion (None where it cannot; empty without a scorer that reads them). `shares` is the chance
    of each vote to be the answer, `chosen` the completion that speaks for it: the first that gives one of the tied.
    `plan` is the one that was carried out; under a plan by difficulty that of the bin that was `told`.
    """

    completions: tuple[Completion, ...]
    votes: tuple[str | None, ...]
    scores: tuple[float | None, ...]
    shares: Mapping[str | None, float]
    chosen: int
    plan: InferencePlan
    told: Told | None = None

    @property
    def agreement(self) -> float:
        """The share of the completions that give the chosen answer."""
        return self.votes.count(self.votes[self.chosen]) / len(self.votes)


@dataclass(frozen=True)
class Evaluation:
    """Per-example results of one conditioning policy, in the order of `examples`.

    Under a plan of several samples the completion is the one that speaks for the answer, the grade's score and metrics
    are expected over tied answers, `samples` has all completions and `worth` the score of each vote. Both are None for
    a greedy example.
    """

    examples: tuple[Example, ...]
    conditionings: tuple[Conditioning, ...]
    rendered: tuple[str, ...]
    completions: tuple[Completion, ...]
    grades: tuple[Grade, ...]
    samples: tuple[Samples | None, ...]
    worth: tuple[Mapping[str | None, float] | None, ...]

    @property
    def score(self) -> float:
        return sum(g.score for g in self.grades) / len(self.grades)


@dataclass(frozen=True)
class Event:
    """Something worth a line in events.jsonl and in the progress display."""

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)
