"""The one prompt-search loop: propose, reject, race on minibatches, keep.

It knows nothing of how prompts are proposed, nor of the examples that choose the winner afterwards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cotune.bench import Bench
from cotune.engines.base import Sampling
from cotune.errors import BudgetExhausted
from cotune.evaluate import evaluate
from cotune.tasks.base import Task
from cotune.values import Adapter, Conditioning, Example, Prompt

# A candidate is dropped when the mean of its paired differences to the best prompt is below 0 by this many standard
# errors (one-sided normal bound at 95%): ours. It only decides what is run further, never who wins.
DROP_Z = 1.645


@dataclass(frozen=True)
class Proposal:
    """A prompt to try; `origin` says where it came from, `truncated` that its text was cut off."""

    prompt: Prompt
    origin: str
    truncated: bool = False


@dataclass(frozen=True)
class Scored:
    """Mean score of a prompt on the first `n` search examples."""

    prompt: Prompt
    origin: str
    score: float
    n: int


class Proposer(Protocol):
    def propose(self, round: int, history: Sequence[Scored], best: Prompt, bench: Bench) -> list[Proposal]:
        """Prompts for this round. `history` is everything scored so far, ascending; `best` the best in full."""


Reject = Callable[[Proposal], str | None]
"""Why a proposal may not be tried, or None."""


def size(prompt: Prompt) -> int:
    """Characters of a prompt: between equals the shorter one wins."""
    return len(prompt.instruction) + sum(len(d.question) + len(d.answer) for d in prompt.demonstrations)


class Board:
    """Scores of prompts on the search examples under one adapter; nothing is run twice.

    Every prompt runs the examples in the same order, so what it has run is always a prefix, and any two prompts are
    compared on the same examples.
    """

    def __init__(
        self, task: Task, examples: Sequence[Example], adapter: Adapter | None, sampling: Sampling, bench: Bench
    ) -> None:
        self.examples = tuple(examples)
        self._task = task
        self._adapter = adapter
        self._sampling = sampling
        self._bench = bench
        self._scores: dict[str, list[float]] = {}

    def run(self, prompts: Sequence[Prompt], n: int) -> None:
        """Bring every prompt to at least `n` examples, all in one evaluation. Raises BudgetExhausted."""
        missing = [(p, e) for p in prompts for e in self.examples[len(self.scores(p)) : n]]
        if not missing:
            return
        conditionings = [Conditioning(p, self._adapter) for p, _ in missing]
        done = evaluate(self._task, [e for _, e in missing], conditionings, self._sampling, self._bench, "search")
        for (prompt, _), grade in zip(missing, done.grades, strict=True):
            self._scores.setdefault(prompt.digest, []).append(grade.score)

    def scores(self, prompt: Prompt) -> list[float]:
        """One score per example run so far, in the order of `examples`."""
        return self._scores.get(prompt.digest, [])


def hopeless(scores: Sequence[float], best: Sequence[float]) -> bool:
    """Whether paired scores rule out (one-sided, DROP_Z standard errors) being as good as the best prompt."""
    differences = [s - b for s, b in zip(scores, best, strict=False)]
    n = len(differences)
    if n < 2:
        return False
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    return mean + DROP_Z * deviation / math.sqrt(n) < 0


class PromptSearch:
    """Races proposals against the best prompt so far; `run` does it all.

    Each round's candidates run on `minibatch` examples, then on twice as many, and so on up to all of them; before
    each step those that are `hopeless` against the best prompt are dropped (racing, ours), so a bad candidate costs
    one minibatch. Emits "candidate" and "round" events.
    """

    def __init__(self, start: Prompt, board: Board, minibatch: int, reject: Reject, bench: Bench) -> None:
        self._board = board
        self._minibatch = minibatch
        self._reject = reject
        self._bench = bench
        self._tried = {start.digest: Proposal(start, "start")}

    def run(self, rounds: Sequence[Proposer]) -> bool:
        """Score the start prompt, then one round per proposer. False when the budget ran out on the way."""
        try:
            start = next(iter(self._tried.values()))
            self._board.run([start.prompt], len(self._board.examples))
            self._report(0, start, dropped=False)
            for i, proposer in enumerate(rounds, 1):
                best = self.ranking()[0].prompt
                self._round(i, proposer.propose(i, self.history(), best, self._bench), best)
        except BudgetExhausted as stop:
            self._bench.emit("budget", where="search", message=str(stop))
            return False
        return True

    def ranking(self) -> list[Scored]:
        """Prompts that ran on all search examples, best first; ties: the shorter, then the earlier."""
        full = [s for s in self._scored() if s.n == len(self._board.examples)]
        return sorted(full, key=lambda s: (-s.score, size(s.prompt)))

    def history(self) -> list[Scored]:
        """Everything that ran at all, ascending by score (dropped candidates by the score they got so far: ours)."""
        return sorted(self._scored(), key=lambda s: s.score)

    def _scored(self) -> list[Scored]:
        everything = [(p, self._board.scores(p.prompt)) for p in self._tried.values()]
        return [Scored(p.prompt, p.origin, sum(s) / len(s), len(s)) for p, s in everything if s]

    def _round(self, number: int, proposals: Sequence[Proposal], best: Prompt) -> None:
        rejected: Counter[str] = Counter()
        racing: list[Proposal] = []
        for proposal in proposals:
            reason = "duplicate" if proposal.prompt.digest in self._tried else self._reject(proposal)
            if reason:
                rejected[reason] += 1
            else:
                self._tried[proposal.prompt.digest] = proposal
                racing.append(proposal)
        everything = len(self._board.examples)
        n = min(self._minibatch, everything)
        while racing:
            self._board.run([p.prompt for p in racing], n)
            if n == everything:
                for proposal in racing:
                    self._report(number, proposal, dropped=False)
                break
            going_on = []
            for proposal in racing:
                if hopeless(self._board.scores(proposal.prompt), self._board.scores(best)):
                    self._report(number, proposal, dropped=True)
                else:
                    going_on.append(proposal)
            racing, n = going_on, min(2 * n, everything)
        self._bench.emit(
            "round",
            round=number,
            proposed=len(proposals),
            rejected=dict(sorted(rejected.items())),
            rejected_share=round(rejected.total() / len(proposals), 4) if proposals else 0.0,
            best=self.ranking()[0].score,
        )

    def _report(self, number: int, proposal: Proposal, dropped: bool) -> None:
        scores = self._board.scores(proposal.prompt)
        self._bench.emit(
            "candidate",
            round=number,
            origin=proposal.origin,
            text=proposal.prompt.instruction,
            demonstrations=len(proposal.prompt.demonstrations),
            score=sum(scores) / len(scores),
            n=len(scores),
            dropped=dropped,
        )
