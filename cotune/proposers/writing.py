"""What a model that writes prompts is asked through, wherever it runs. Knows nothing of what it is asked to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from cotune.bench import Bench
from cotune.tasks.base import Message

SHORTEST_LIMIT = 256  # tokens that a reply may have at least (ours): 500 characters of English are about 120 tokens


@dataclass(frozen=True)
class Reply:
    """`truncated`: cut off at the limit."""

    text: str
    truncated: bool


class Writer(Protocol):
    """`name` is the origin of what it writes."""

    @property
    def name(self) -> str: ...

    def at(self, temperature: float) -> Self:
        """The same writer at another temperature."""

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether the messages leave room for a reply, as far as it is known."""

    def write(self, messages: Sequence[Message], count: int, bench: Bench, *names: object) -> list[Reply]:
        """`count` replies, booked on the bench's ledger and kept in its journal; `names` seed them.

        Raises BudgetExhausted, and CotuneError when the messages are refused.
        """


def reply_limit(max_characters: int) -> int:
    """Tokens that are enough for a text of so many characters, with a few words around it."""
    return max(SHORTEST_LIMIT, max_characters // 2)
