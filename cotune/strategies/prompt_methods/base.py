"""What a prompt method is: a search for better prompts, given what it may learn from and a board that scores them.

Prompt-only splits the examples, rejects junk and makes the final choice, alike for every method. A method knows neither
the val examples nor the other methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Protocol, Self

from cotune.bench import Bench
from cotune.config import RunConfig
from cotune.engines.base import Sampling
from cotune.errors import UsageError
from cotune.models.base import BaseModel
from cotune.proposers import Proposing
from cotune.proposers.demonstrations import DemonstrationProposer
from cotune.search import PromptSearch, size
from cotune.strategies.base import Fixed, Work, Workload
from cotune.tasks.base import Task
from cotune.values import Example, Tuned


@dataclass(frozen=True)
class Finalist:
    """What a search offers for the choice on val, with its mean score on the search examples.

    Usually one prompt for every example, but any Tuned will do. Between equals the smaller `size` (characters) wins.
    """

    tuned: Tuned
    origin: str
    score: float
    size: int = 0


@dataclass(frozen=True)
class Ground:
    """What one search works with. `search` has the start prompt, the examples that score, and the junk filter.

    `teaching` are train examples apart from those (where a method needs some and there are enough), `start` has
    the adapter that answers and the plan that is scored under, `generator` is the model of the proposer `model:NAME`.
    """

    search: PromptSearch
    task: Task
    teaching: tuple[Example, ...]
    start: Fixed
    sampling: Sampling
    generator: BaseModel
    bench: Bench

    def demonstrations(self, most: int, sets: int) -> DemonstrationProposer:
        """Proposes `sets` sets of at most `most` accepted answers to the teaching examples."""
        return DemonstrationProposer(self.task, self.teaching, self.start.adapter, self.sampling, most=most, sets=sets)

    def finalists(self) -> list[Finalist]:
        """The prompts of PromptSearch.ranking, best first, the start among them.

        That one too is a new object: `start` itself, given back, would say that nothing was chosen.
        """
        return [
            Finalist(replace(self.start, prompt=s.prompt), s.origin, s.score, size(s.prompt))
            for s in self.search.ranking()
        ]


class PromptMethod(Protocol):
    """`teaches`: whether it needs examples apart from those that score; `demonstrations`: at most so many a prompt."""

    @property
    def teaches(self) -> bool: ...

    @property
    def demonstrations(self) -> int: ...

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        """Raises UsageError when a package that it needs is missing, or a model that it can train."""

    def plan(self, load: Workload, driving: int, teaching: int) -> list[Work]:
        """What `search` will do at most with so many examples that score and that teach."""

    def search(self, ground: Ground) -> Sequence[Finalist]:
        """Go on from what `ground.search` knows already, for `prompt.rounds` rounds; the finalists, best first.

        Raises BudgetExhausted; what ran in full until then is in `ground.finalists()`.
        """


def needs(package: str, method: str) -> None:
    """Raises UsageError, with the way to install it, when the package of an optional method is missing."""
    if find_spec(package) is None:
        raise UsageError(
            f"prompt.method = {method!r} needs the package {package}: pip install 'cotune[{method}]', or choose "
            "another method."
        )


def needs_model_here(config: RunConfig, method: str) -> None:
    """Raises UsageError when no model runs here, for a method that trains what writes its prompts."""
    if config.engine == "openai" and not config.second_model:
        raise UsageError(
            f"prompt.method = {method!r} trains what writes its prompts, and {config.model} is a black box behind a "
            "server. Name a model that runs here with --generator, or take another method, for example --set "
            "prompt.method=cfpo."
        )


def proposing(how: Proposing, rounds: int, load: Workload) -> list[Work]:
    """The most that so many rounds of asking a proposer cost; nothing for one that asks no model."""
    if not how.asks:
        return []
    # the meta-prompt shows `history` instructions of at most `max_characters`, about 4 characters a token
    meta = how.history * how.max_characters // 4 + how.exemplars * (load.question + load.reference)
    return [Work.generation("propose", rounds * how.candidates, meta, how.max_characters // 4)]
