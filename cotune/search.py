"""What every prompt search keeps: which prompts were proposed, what each scored on which examples, and the race.

It knows nothing of how prompts are proposed (prompt methods do), nor of the examples that choose the winner afterwards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cotune.bench import Bench
from cotune.engines.base import Sampling
from cotune.evaluate import evaluate
from cotune.tasks.base import Task
from cotune.values import GREEDY, Adapter, AnyPlan, Conditioning, Example, Prompt, Verifier

# A candidate is dropped when the mean of its paired differences to the best prompt is below 0 by this many standard
# errors (one-sided normal bound at 95%): ours. It only decides what is run further, never who wins.
DROP_Z = 1.645

Racing = Literal[True, False, "halving"]


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
    """Scores of prompts on the search examples under one adapter and one inference plan; nothing is run twice.

    Every prompt runs the examples in the same order, so what it has run is always a prefix, and any two prompts are
    compared on the same examples.
    """

    def __init__(
        self,
        task: Task,
        examples: Sequence[Example],
        adapter: Adapter | None,
        sampling: Sampling,
        bench: Bench,
        plan: AnyPlan = GREEDY,
        verifier: Verifier | None = None,
    ) -> None:
        self.examples = tuple(examples)
        self._task = task
        self._adapter = adapter
        self._plan = plan
        self._verifier = verifier
        self._sampling = sampling
        self._bench = bench
        self._scores: dict[str, list[float]] = {}

    def run(self, prompts: Sequence[Prompt], n: int) -> None:
        """Bring every prompt to at least `n` examples, all in one evaluation. Raises BudgetExhausted."""
        missing = [(p, e) for p in prompts for e in self.examples[len(self.scores(p)) : n]]
        if not missing:
            return
        conditionings = [Conditioning(p, self._adapter, self._plan, self._verifier) for p, _ in missing]
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
    """What was proposed from `start` on, and how it did on the search examples of `board`.

    A prompt method goes round by round: `admit` keeps what is new and no junk, the board scores it, `end_round` says
    how it went. `round` does all three for a proposer, by racing (or, without, by running everything in full).
    Emits "candidate" and "round" events.
    """

    def __init__(
        self,
        start: Prompt,
        board: Board,
        reject: Reject,
        bench: Bench,
        *,
        minibatch: int,
        racing: Racing = True,
    ) -> None:
        self.start = start
        self.board = board
        self.number = 1  # of the round that is going on
        self._reject = reject
        self._bench = bench
        self._minibatch = minibatch
        self._racing = racing
        self._tried = {start.digest: Proposal(start, "start")}
        self._proposed = 0
        self._rejected: Counter[str] = Counter()

    @property
    def best(self) -> Prompt:
        return self.ranking()[0].prompt

    @property
    def minibatch(self) -> int:
        """Examples that a candidate runs on at first: all of them without racing."""
        everything = len(self.board.examples)
        return min(self._minibatch, everything) if self._racing else everything

    def begin(self) -> None:
        """Score the start prompt in full. Raises BudgetExhausted, like everything that runs prompts."""
        self.board.run([self.start], len(self.board.examples))
        self.report(self.start, dropped=False, round=0)

    def round(self, proposer: Proposer) -> None:
        """One round: what `proposer` proposes, raced against the best so far."""
        self.race(self.admit(proposer.propose(self.number, self.history(), self.best, self._bench)))
        self.end_round()

    def admit(self, proposals: Sequence[Proposal]) -> list[Prompt]:
        """The prompts among `proposals` that are new and may be tried; the others are counted by reason."""
        admitted = []
        for proposal in proposals:
            digest = proposal.prompt.digest
            reason = "duplicate" if digest in self._tried else self._reject(proposal)
            if reason:
                self._rejected[reason] += 1
            else:
                self._tried[digest] = proposal
                admitted.append(proposal.prompt)
        self._proposed += len(proposals)
        return admitted

    def junk(self, proposal: Proposal) -> str | None:
        """Why it may not be tried, or None; counts nothing."""
        return self._reject(proposal)

    def knows(self, prompt: Prompt) -> bool:
        """Whether it was admitted before (or is the start)."""
        return prompt.digest in self._tried

    def race(self, prompts: Sequence[Prompt]) -> None:
        """Run prompts on a minibatch, then on twice as many examples, and so on up to all of them.

        Before each step those that are `hopeless` against the best prompt are dropped (ours, no paper races), so that
        a bad candidate costs one minibatch. "halving" is another race (docs/performance.md: what each spares, and how
        often the choice is another).
        """
        if self._racing == "halving":
            self._halve(prompts)
            return
        best, racing = self.board.scores(self.best), list(prompts)
        everything = len(self.board.examples)
        n = self.minibatch
        while racing:
            self.board.run(racing, n)
            going_on = []
            for prompt in racing:
                dropped = n < everything and hopeless(self.board.scores(prompt), best)
                if dropped or n == everything:
                    self.report(prompt, dropped)
                else:
                    going_on.append(prompt)
            racing, n = going_on, min(2 * n, everything)

    def _halve(self, prompts: Sequence[Prompt]) -> None:
        """Successive halving (Karnin, Koren and Somekh 2013), with stages that share their examples.

        All prompts run on a third of a minibatch, the better half of them on all of it, and half as many as these on
        all examples: of all rounds the best that have not yet (ours), so that one that just missed has another chance.
        """
        everything = len(self.board.examples)
        self.board.run(prompts, max(1, self.minibatch // 3))
        half = self._best(prompts, math.ceil(len(prompts) / 2))
        self.board.run(half, self.minibatch)
        tried = [p.prompt for p in self._tried.values()]
        waiting = [p for p in tried if self.minibatch <= len(self.board.scores(p)) < everything]
        promoted = self._best(waiting, math.ceil(len(half) / 2))
        self.board.run(promoted, everything)
        for prompt in tried:
            if prompt in promoted or prompt in prompts:
                self.report(prompt, dropped=len(self.board.scores(prompt)) < everything)

    def _best(self, prompts: Sequence[Prompt], n: int) -> list[Prompt]:
        """The best `n` on the examples that all of them ran; ties: the shorter, then the earlier."""
        shared = min((len(self.board.scores(p)) for p in prompts), default=0)
        return sorted(prompts, key=lambda p: (-sum(self.board.scores(p)[:shared]), size(p)))[:n]

    def end_round(self) -> None:
        self._bench.emit(
            "round",
            round=self.number,
            proposed=self._proposed,
            rejected=dict(sorted(self._rejected.items())),
            rejected_share=round(self._rejected.total() / self._proposed, 4) if self._proposed else 0.0,
            best=self.ranking()[0].score,
        )
        self.number += 1
        self._proposed, self._rejected = 0, Counter()

    def report(
        self, prompt: Prompt, dropped: bool, *, round: int | None = None, scores: Sequence[float] | None = None
    ) -> None:
        """Tell how a prompt did; by what the board has of it, or by `scores` on other examples."""
        scores = self.board.scores(prompt) if scores is None else scores
        self._bench.emit(
            "candidate",
            round=self.number if round is None else round,
            origin=self._tried[prompt.digest].origin,
            text=prompt.instruction,
            demonstrations=len(prompt.demonstrations),
            score=sum(scores) / len(scores),
            n=len(scores),
            dropped=dropped,
        )

    def ranking(self) -> list[Scored]:
        """Prompts that ran on all search examples, best first; ties: the shorter, then the earlier."""
        everything = len(self.board.examples)
        return sorted((s for s in self._scored() if s.n == everything), key=lambda s: (-s.score, size(s.prompt)))

    def history(self) -> list[Scored]:
        """Everything that ran at all, ascending by score (dropped candidates by the score they got so far: ours).

        With halving a score may be that of a few examples, so these come first: ascending by examples, then by score.
        """
        few = self._racing == "halving"
        return sorted(self._scored(), key=lambda s: (s.n if few else 0, s.score))

    def _scored(self) -> list[Scored]:
        everything = [(p, self.board.scores(p.prompt)) for p in self._tried.values()]
        return [Scored(p.prompt, p.origin, sum(s) / len(s), len(s)) for p, s in everything if s]
