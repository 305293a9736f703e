"""What a task is: how a row becomes an example, an example a user turn, and a completion a grade.

A task knows nothing of models, strategies or run folders. The chat frame is fixed here, once, for every
strategy: the tunable instruction is the system turn, each demonstration is one user and one assistant turn,
and `question_text` is the last user turn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from cotune.values import Example, Grade, Prompt

Message = dict[str, str]


class UnusableRow(Exception):
    """A row that parses but cannot be used; the message says why. The loader counts and names these."""


@dataclass(frozen=True)
class HubSource:
    """Where the hub keeps a benchmark: a dataset repository at a pinned commit, and the parquet files of each split."""

    repo: str
    revision: str
    files: Mapping[str, tuple[str, ...]]


class Task(ABC):
    """One benchmark.

    `seed_instruction` is the hand-written starting prompt (ours: the papers do not give theirs).
    `headline` names the metric in `Grade.metrics` that `Grade.score` repeats.
    `max_new_tokens` is the default completion limit; `columns` are the fields a row must have. `unanswered` stands in
    for the answer fields of a row whose answer is not known (`cotune predict`). `choices` is how many a question has.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    unanswered: ClassVar[Mapping[str, Any]]
    choices: ClassVar[int] = 0
    seed_instruction: ClassVar[str]
    headline: ClassVar[str] = "accuracy"
    max_new_tokens: ClassVar[int]
    hub: ClassVar[HubSource | None] = None

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the tasks that train and val examples come from."""
        return (self.name,)

    @abstractmethod
    def parse(self, row: Mapping[str, Any], row_id: str) -> Example:
        """Official row -> example. `row_id` is used where the row has no identifier of its own.

        Raises UnusableRow with the reason.
        """

    @abstractmethod
    def question_text(self, example: Example) -> str:
        """The user turn."""

    @abstractmethod
    def reference_completion(self, example: Example) -> str:
        """A completion that states the reference: the worked solution where the row has one. Grades correct."""

    @abstractmethod
    def grade(self, example: Example, completion: str, truncated: bool = False) -> Grade:
        """Grade one completion. Never raises: what cannot be graded is Outcome.ERRORED with a note.

        In a truncated completion only an explicitly marked final answer counts; else Outcome.TRUNCATED.
        """

    def vote(self, example: Example, completion: str, truncated: bool = False) -> str | None:
        """What the completion answers, in one spelling for answers that mean the same; None: nothing could be read.

        What samples are aggregated by, so the task's own read no reference. This fallback does, through `grade`.
        """
        return self.grade(example, completion, truncated).prediction

    def read_reference(self, text: str, choices: tuple[str, ...] = ()) -> str:
        """The reference in a bare answer or in the whole official answer (`cotune grade`). Raises UnusableRow."""
        return text.strip()

    def messages(self, prompt: Prompt, example: Example) -> list[Message]:
        """The chat that every strategy sends: system, demonstrations, question."""
        turns = [{"role": "system", "content": prompt.instruction}]
        for demo in prompt.demonstrations:
            turns.append({"role": "user", "content": demo.question})
            turns.append({"role": "assistant", "content": demo.answer})
        turns.append({"role": "user", "content": self.question_text(example)})
        return turns
