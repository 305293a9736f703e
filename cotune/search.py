"""What every prompt search keeps: which prompts were proposed, what each scored on which examples, and the race.

It knows nothing of how prompts are proposed (prompt methods do), nor of the examples that choose the winner afterwards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from cotune import adaptive
from cotune.bench import Bench
from cotune.engines.base import Sampling
from cotune.evaluate import evaluate
from cotune.imputation import Scores
from cotune.tasks.base import Task
from cotune.values import GREEDY, Adapter, AnyPlan, Conditioning, Example, Prompt, Verifier

# A candidate is dropped when the mean of its paired differences to the best prompt is below 0 by this many standard
# errors (one-sided normal bound at 95%): ours. It only decides what is run further, never who wins.
DROP_Z = 1.645

Racing = Literal[True, False, "adaptive"]


@dataclass(frozen=True)
class Proposal:
    """A prompt to try; `origin` says where it came from, `truncated` that its text was cut off."""

    prompt: Prompt
    origin: str
    truncated: bool = False


@dataclass(frozen=True)
class Scored:
    """Mean score of a prompt on `n` search examples (in an adaptive race the others are estimated)."""

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

    But for the adaptive race every prompt runs the examples in the same order, so what it has run is a prefix, and any
    two prompts are compared on the same examples.
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
        self._scores: dict[str, dict[int, float]] = {}  # by prompt, then by the place of the example

    def run(self, prompts: Sequence[Prompt], n: int) -> None:
        """Bring every prompt to the first `n` examples, all in one evaluation. Raises BudgetExhausted."""
        self.ask([(prompt, range(n)) for prompt in prompts])

    def ask(self, asked: Sequence[tuple[Prompt, Iterable[int]]]) -> None:
        """Run prompts on examples (by their places), all in one evaluation. Raises BudgetExhausted."""
        missing: list[tuple[Prompt, int, dict[int, float]]] = []
        for prompt, places in asked:
            known = self._scores.setdefault(prompt.digest, {})
            missing += [(prompt, i, known) for i in places if i not in known]
        if not missing:
            return
        conditionings = [Conditioning(p, self._adapter, self._plan, self._verifier) for p, _, _ in missing]
        examples = [self.examples[i] for _, i, _ in missing]
        done = evaluate(self._task, examples, conditionings, self._sampling, self._bench, "search")
        for (_, i, known), grade in zip(missing, done.grades, strict=True):
            known[i] = grade.score

    def scores(self, prompt: Prompt) -> list[float]:
        """One score per example run so far, in the order of `examples`."""
        return [score for _, score in sorted(self._scores.get(prompt.digest, {}).items())]

    def table(self, prompts: Sequence[Prompt]) -> Scores:
        """The scores [prompts, examples], NaN where one has not run."""
        found = np.full((len(prompts), len(self.examples)), np.nan)
        for row, prompt in zip(found, prompts, strict=True):
            for place, score in self._scores.get(prompt.digest, {}).items():
                row[place] = score
        return found


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
    In an adaptive race scores are estimates (see `adaptive`), and it looks for the best `finalists`.
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
        finalists: int,
    ) -> None:
        self.start = start
        self.board = board
        self.number = 1  # of the round that is going on
        self._reject = reject
        self._bench = bench
        self._minibatch = minibatch
        self._racing = racing
        self._finalists = finalists
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
        """Score the start prompt, in full but for an adaptive race. Raises BudgetExhausted, like every run."""
        self.board.run([self.start], self._look if self._racing == "adaptive" else len(self.board.examples))
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
        a bad candidate costs one minibatch. "adaptive" is another race (docs/performance.md: what each spares, and how
        often the choice is another).
        """
        if self._racing == "adaptive":
            self._adapt(prompts)
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

    @property
    def _look(self) -> int:
        """Examples that a prompt of an adaptive race runs at a time: a quarter of a minibatch (ours)."""
        return min(max(1, self._minibatch // 4), len(self.board.examples))

    def _adapt(self, prompts: Sequence[Prompt]) -> None:
        """Run prompts where their scores are in doubt and the doubt matters, for SHARE of what running all would take.

        New prompts run first where the best so far differ most; then those that decide which are the best `finalists`.
        What a prompt scores elsewhere is told from the others, for which LEADERS of them run in full.
        """
        board, everything = self.board, len(self.board.examples)
        before = {s.prompt: s.n for s in self._scored()}
        first = adaptive.telling(board.table([*before]), [size(p) for p in before], self._look)
        board.ask([(prompt, first) for prompt in prompts])
        field = list(dict.fromkeys([*before, *prompts]))
        sizes = [size(p) for p in field]
        while (row := adaptive.leader(board.table(field), sizes)) is not None:
            board.run([field[row]], everything)
        allowed = int(adaptive.SHARE * everything * len(field))
        while (left := allowed - sum(len(board.scores(p)) for p in field)) > 0:
            asked = []
            for row, places in adaptive.doubtful(board.table(field), sizes, self._finalists, self._look):
                asked.append((field[row], places[:left]))
                left -= len(asked[-1][1])
            if not asked:
                break
            board.ask(asked)
        for rank, scored in enumerate(self.ranking()):
            if scored.n > before.get(scored.prompt, 0):
                self._tell(scored, dropped=scored.n < everything and rank >= self._finalists)

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
        origin = self._tried[prompt.digest].origin
        self._tell(Scored(prompt, origin, sum(scores) / len(scores), len(scores)), dropped, round)

    def _tell(self, scored: Scored, dropped: bool, round: int | None = None) -> None:
        self._bench.emit(
            "candidate",
            round=self.number if round is None else round,
            origin=scored.origin,
            text=scored.prompt.instruction,
            demonstrations=len(scored.prompt.demonstrations),
            score=scored.score,
            n=scored.n,
            dropped=dropped,
        )

    def ranking(self) -> list[Scored]:
        """Prompts that ran on all search examples, in an adaptive race on any, best first; ties: the shorter, then the
        earlier.
        """
        enough = 1 if self._racing == "adaptive" else len(self.board.examples)
        return sorted((s for s in self._scored() if s.n >= enough), key=lambda s: (-s.score, size(s.prompt)))

    def history(self) -> list[Scored]:
        """Everything that ran at all, ascending by score (dropped candidates by the score they got so far: ours)."""
        return sorted(self._scored(), key=lambda s: s.score)

    def _scored(self) -> list[Scored]:
        found = [(p, scores) for p in self._tried.values() if (scores := self.board.scores(p.prompt))]
        if self._racing == "adaptive":
            means = adaptive.estimates(self.board.table([p.prompt for p, _ in found]))
        else:
            means = [sum(scores) / len(scores) for _, scores in found]
        return [Scored(p.prompt, p.origin, m, len(scores)) for (p, scores), m in zip(found, means, strict=True)]
