"""What a strategy is: a function from one Tuned to another.

`tune(start, problem, bench) -> Tuned`. `Problem` has no test split and no way to get one. Strategies import neither
the run folder, nor the command line, nor each other (sequential gets its stages handed in).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

from cotune.bench import Bench
from cotune.config import InferenceConfig, RunConfig, VerifierConfig
from cotune.engines.base import Sampling
from cotune.errors import CotuneError
from cotune.metatuned import MetaTuned
from cotune.models.base import BaseModel
from cotune.models.lora import LoraFactors
from cotune.plans import loaded_plan, saved_plan
from cotune.rewrite import REWRITE_INSTRUCTION
from cotune.scorers import VERIFIER
from cotune.tasks.base import Task
from cotune.values import GREEDY, AnyPlan, Conditioning, Demonstration, Example, Prompt, Tuned, Verifier
from cotune.verifier import loaded_verifier


@dataclass(frozen=True)
class Problem:
    """The task's behaviour, what may be learned from, and the models. No test split.

    `base` answers and stays frozen. `generator` is MetaTuner's G, and the proposer model of `model:NAME`
    (equal to `base` when none was named). `sampling` is the decoding of every measurement.
    """

    task: Task
    train: tuple[Example, ...]
    val: tuple[Example, ...]
    base: BaseModel
    generator: BaseModel
    sampling: Sampling


@dataclass(frozen=True)
class Workload:
    """What decides the cost of tuning: numbers of examples and mean lengths in tokens.

    `question` is a rendered question under the seed prompt, `reference` a reference completion, `limit` the longest
    completion that decoding allows. `samples` is how many completions the inference plan takes to answer a question,
    `revising` what one of them reads of earlier attempts at most, on average, `verified` whether a verifier reads each.
    """

    train: int
    val: int
    question: int
    reference: int
    limit: int
    samples: int = 1
    revising: int = 0
    verified: bool = False

    def answers(self, what: str, questions: int, prompt: int) -> Work:
        """So many questions answered under the inference plan; at most, each sample reads its prompt."""
        work = Work.generation(what, questions * self.samples, prompt + self.revising, self.limit)
        return work.read_again() if self.verified else work

    def rewriting(self, questions: int, limit: int, what: str = "rewrite") -> Work:
        """A prompt of at most `limit` tokens written for each of so many questions."""
        return Work.generation(what, questions, self.query, limit)

    @property
    def query(self) -> int:
        """Tokens of a question as a generator of prompts reads it."""
        return self.question + len(REWRITE_INSTRUCTION) // 4  # about 4 characters a token

    def verifier(self, c: VerifierConfig, prompt: int) -> Work:
        """A verifier trained on completions of prompts of that length."""
        sampled = min(c.examples, self.train) * c.samples
        return Work.generation("completions for the verifier", sampled, prompt, self.limit).read_again()

    def pulling(self, c: InferenceConfig, verifier: VerifierConfig, prompt: int) -> list[Work]:
        """Arms pulled, and before them the verifier that they are ranked by if there is one."""
        pulls = Work.generation("pull arms", c.completions, prompt, self.limit)
        return [self.verifier(verifier, prompt), pulls.read_again()] if c.scorer == VERIFIER else [pulls]


@dataclass(frozen=True)
class Work:
    """The most that one piece of tuning can take: calls, tokens read and written by generation, tokens trained on."""

    what: str
    calls: int
    forward_tokens: int
    trained_tokens: int = 0

    @classmethod
    def generation(cls, what: str, calls: int, prompt: int, limit: int) -> Work:
        return cls(what, calls, calls * (prompt + limit))

    def read_again(self) -> Work:
        """With a verifier that reads every prompt and completion."""
        return replace(self, forward_tokens=2 * self.forward_tokens)


class Strategy(Protocol):
    @property
    def levers(self) -> frozenset[str]:
        """Those of "prompt", "weights" and "plan" that it turns."""

    @classmethod
    def from_config(cls, config: RunConfig) -> Self: ...

    def plan(self, load: Workload) -> list[Work]:
        """What `tune` will do at most, piece by piece. Tuned prompts are taken to be as long as the seed prompt."""

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        """A better `Tuned`, or `start` itself (the same object) if the budget allows nothing or training made it worse.

        Never mutates `start` nor the base model's weights. With an exhausted budget: the best fully evaluated
        candidate. Raises NoData when a weights stage has nothing to train on.
        """


class Explorer(Protocol):
    """What a strategy that tunes prompts offers to one that chooses among them by its own measure."""

    def exploring(self, load: Workload) -> list[Work]:
        """What `candidates` will do at most."""

    def longest(self, load: Workload) -> int:
        """Tokens of a question under the longest prompt that may come out."""

    def candidates(self, begin: Fixed, problem: Problem, bench: Bench) -> list[Tuned]:
        """All that was tried, best first by the search; what ran on fewer examples comes last.

        Nothing when the budget does not even score `begin`.
        """


@dataclass(frozen=True)
class Fixed(Tuned):
    """One prompt, at most one static adapter and one inference plan (with its verifier) for every example."""

    prompt: Prompt
    adapter: LoraFactors | None = None
    plan: AnyPlan = GREEDY
    verifier: Verifier | None = None

    def condition(self, examples: Sequence[Example], bench: Any) -> list[Conditioning]:
        return [Conditioning(self.prompt, self.adapter, self.plan, self.verifier)] * len(examples)

    def under(self, plan: AnyPlan, verifier: Verifier | None = None) -> Fixed:
        return replace(self, plan=plan, verifier=verifier)

    def save(self, folder: Path) -> None:
        """`tuned.json` with the prompt and a plan that is not greedy; an adapter in PEFT format in `adapter/`, a
        verifier in `verifier.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.verifier:
            self.verifier.save(folder)
        if self.adapter:
            self.adapter.save(folder / "adapter")
        content = {"kind": "fixed", "prompt": asdict(self.prompt), "adapter": self.adapter is not None}
        content |= saved_plan(self.plan)
        (folder / "tuned.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, content: Mapping[str, Any]) -> Fixed:
        demos = tuple(Demonstration(**d) for d in content["prompt"]["demonstrations"])
        prompt = Prompt(content["prompt"]["instruction"], demos)
        adapter, plan = LoraFactors.load(folder / "adapter") if content["adapter"] else None, loaded_plan(content)
        return cls(prompt, adapter, plan, loaded_verifier(folder, plan))


def one_adapter(start: Tuned, strategy: str) -> Fixed | MetaTuned:
    """`start` as at most one adapter for all examples; prompts may be written for each.

    Raises CotuneError when adapters are made per example.
    """
    if isinstance(start, Fixed) or (isinstance(start, MetaTuned) and start.branches.adapter == "off"):
        return start
    raise CotuneError(
        f"{strategy} goes on from at most one adapter, but the stage before it makes one for every example. "
        "Put it before that stage."
    )


def fixed(start: Tuned, strategy: str) -> Fixed:
    """`start` as one prompt and at most one adapter. Raises CotuneError when it is made per example."""
    if isinstance(start, Fixed):
        return start
    raise CotuneError(
        f"{strategy} goes on from one fixed prompt, but the stage before it makes a prompt for every example. "
        "Put it before that stage."
    )
