"""What a run has spent, tuning apart from measuring, and the budget that tuning may not exceed.

One unit for every strategy: tokens (prompt + generated + trained) or FLOPs, by one formula. Knows nothing of
engines or strategies; whoever spends, books.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Literal

from cotune.errors import BudgetExhausted

Part = Literal["prompts", "adapters", "answers"]
"""What generation makes: prompts and adapters for each question (joint tuning; prompts: bpo), and everything else."""


def forward_flops(parameters: int, tokens: int) -> float:
    """2 N per token: one multiply and one add per weight (Kaplan et al. 2020, without the attention term)."""
    return 2.0 * parameters * tokens


def training_flops(frozen: int, trained: int, tokens: int) -> float:
    """Forward 2 N, gradient to the activations 2 N, and 2 more for each weight that is itself trained.

    With everything trained this is the usual 6 N per token; with LoRA about 4 N, because frozen weights get
    no gradient of their own.
    """
    return (4.0 * frozen + 6.0 * trained) * tokens


@dataclass
class Spent:
    """Running totals. `seconds` is wall time of the work itself; replayed work counts what it took first.

    `encoded_tokens` are those that MetaTuner's encoder reads for an adapter. They are not in `tokens`, because prompt
    generation reads the same ones; what they cost is in `flops`. `cached_calls` and `cached_tokens` are the share of
    `calls` and `tokens` that came from the cache of earlier runs; they count as spent like any other, so a budget ends
    at the same point with and without a cache.
    """

    calls: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    encoded_tokens: int = 0
    trained_tokens: int = 0
    cached_calls: int = 0
    cached_tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.generated_tokens + self.trained_tokens

    def add(self, other: Spent) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


class Ledger:
    """Books spending. `tokens`, `flops` and `seconds` limit the tuning account; None is no limit."""

    def __init__(self, tokens: int | None = None, flops: float | None = None, seconds: float | None = None) -> None:
        self.tuning = Spent()
        self.measuring_account = Spent()
        self._limit_tokens = tokens
        self._limit_flops = flops
        self._limit_seconds = seconds
        self._account = self.tuning
        self._parts: dict[Part, Spent] = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Book what happens inside on the measuring account, which has no limit."""
        before, self._account = self._account, self.measuring_account
        try:
            yield
        finally:
            self._account = before

    def allow(self, tokens: int, flops: float) -> None:
        """Ask before working. Raises BudgetExhausted if this much more tuning could exceed the budget.

        Nobody knows beforehand how many seconds work takes, so their limit can be passed by one piece of work.
        """
        if self._account is not self.tuning:
            return
        if self._limit_tokens is not None and self.tuning.tokens + tokens > self._limit_tokens:
            raise BudgetExhausted(f"The budget of {self._limit_tokens:,} tuning tokens is used up.")
        if self._limit_flops is not None and self.tuning.flops + flops > self._limit_flops:
            raise BudgetExhausted(f"The budget of {self._limit_flops:.3g} tuning FLOPs is used up.")
        if self._limit_seconds is not None and self.tuning.seconds >= self._limit_seconds:
            raise BudgetExhausted(f"The budget of {self._limit_seconds:,g} seconds of tuning is used up.")

    @contextmanager
    def parts(self) -> Iterator[dict[Part, Spent]]:
        """What is booked inside, by part. A part that costs nothing is missing."""
        before, self._parts = self._parts, {}
        try:
            yield self._parts
        finally:
            self._parts = before

    def book(self, spent: Spent, part: Part = "answers") -> None:
        self._account.add(spent)
        self._parts.setdefault(part, Spent()).add(spent)

    def restore(self, tuning: Spent) -> None:
        """Set the tuning account to an earlier snapshot (a resumed run)."""
        for f in fields(tuning):
            setattr(self.tuning, f.name, getattr(tuning, f.name))

    def report(self) -> dict[str, dict[str, float]]:
        """Both accounts as plain numbers, with their token totals."""
        return {
            name: asdict(account) | {"tokens": account.tokens}
            for name, account in (("tuning", self.tuning), ("measuring", self.measuring_account))
        }
