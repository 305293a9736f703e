"""Tune the prompt alone: a prompt method searches on train, val chooses.

What is alike for every method is here: the split of the train examples, what may not become a prompt, the start prompt
as a finalist, and the choice. An adapter that `start` brings stays attached during the whole search (the stage p after
w of a sequence).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from cotune.bench import Bench
from cotune.config import RunConfig
from cotune.errors import BudgetExhausted
from cotune.evaluate import evaluate
from cotune.plugins import resolve
from cotune.proposers.filters import Filter
from cotune.search import Board, PromptSearch, Racing
from cotune.strategies.base import Fixed, Problem, Work, Workload, fixed
from cotune.strategies.prompt_methods import METHODS
from cotune.strategies.prompt_methods.base import Finalist, Ground, PromptMethod
from cotune.values import Example, Prompt, Tuned


@dataclass(frozen=True)
class PromptOnly:
    """The fields are those of PromptConfig, which has units and sources."""

    levers: ClassVar[frozenset[str]] = frozenset({"prompt"})

    method: PromptMethod
    max_characters: int
    search_examples: int
    choice_examples: int
    minibatch: int
    racing: Racing
    finalists: int

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        prompt = config.prompt
        return cls(
            resolve("prompt_methods", METHODS, prompt.method).from_config(config),
            prompt.longest,
            prompt.search_examples,
            prompt.choice_examples,
            prompt.minibatch,
            prompt.racing,
            prompt.finalists,
        )

    def plan(self, load: Workload) -> list[Work]:
        chosen = (self.finalists + 1) * min(self.choice_examples, load.val)
        return [*self.exploring(load), load.answers("choose on val", chosen, self.longest(load))]

    def exploring(self, load: Workload) -> list[Work]:
        driving, teaching = self._sizes(load.train)
        return [
            load.answers("score the start prompt", driving, load.question),
            *self.method.plan(load, driving, teaching),
        ]

    def longest(self, load: Workload) -> int:
        return load.question + self.method.demonstrations * (load.question + load.reference)

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        """What is best on val among the finalists of the search; `start` is always one of them.

        With an exhausted budget: the best on val of the finalists scored so far, or, before two were, the best of
        the search's ranking, or `start` itself if not even its prompt was scored.
        """
        begin = fixed(start, "prompt-only")
        ground = self._ground(begin, problem, bench)
        found, whole = self._search(ground)
        if not whole:
            return found[0].tuned if found else start
        return self._choose(begin, found, ground, problem.val[: self.choice_examples])

    def candidates(self, begin: Fixed, problem: Problem, bench: Bench) -> list[Tuned]:
        ground = self._ground(begin, problem, bench)
        found, _ = self._search(ground)
        dropped = [replace(begin, prompt=s.prompt) for s in reversed(ground.search.history())]
        kept = [f.tuned for f in found]
        return [*kept, *(other for other in dropped if other not in kept)] if kept else []

    def _ground(self, begin: Fixed, problem: Problem, bench: Bench) -> Ground:
        driving, teaching = self._split(problem, bench)
        choosing = problem.val[: self.choice_examples]
        banned = Filter(
            (*problem.train, *problem.val),
            trusted=begin.prompt.instruction,
            max_characters=self.max_characters,
            special_tokens=problem.base.special_tokens,
            fits=_fits(problem, [*driving, *teaching, *choosing], bench),
        )
        board = Board(problem.task, driving, begin.adapter, problem.sampling, bench, begin.plan, begin.verifier)
        search = PromptSearch(
            begin.prompt,
            board,
            banned.reject,
            bench,
            minibatch=self.minibatch,
            racing=self.racing,
            finalists=self.finalists,
        )
        return Ground(search, problem.task, tuple(teaching), begin, problem.sampling, problem.generator, bench)

    def _search(self, ground: Ground) -> tuple[Sequence[Finalist], bool]:
        """The finalists, best first, and whether the search came to its end; else the ranking until then."""
        try:
            ground.search.begin()
            return self.method.search(ground), True
        except BudgetExhausted as stop:
            ground.bench.emit("budget", where="search", message=str(stop))
            return ground.finalists(), False

    def _split(self, problem: Problem, bench: Bench) -> tuple[Sequence[Example], Sequence[Example]]:
        """Train examples that score the search, and others that teach (at least a quarter: ours)."""
        order = list(problem.train)
        bench.rng("search-examples").shuffle(order)
        driving, teaching = self._sizes(len(order))
        return order[:driving], order[driving : driving + teaching]

    def _sizes(self, train: int) -> tuple[int, int]:
        driving = min(self.search_examples, train - train // 4 if self.method.teaches else train)
        return driving, min(self.search_examples, train - driving)

    def _choose(self, begin: Fixed, found: Sequence[Finalist], ground: Ground, choosing: Sequence[Example]) -> Tuned:
        """Best on val; ties: the higher search score, then the starting prompt, then the shorter."""
        bench = ground.bench
        finalists = list(found[: self.finalists])
        if all(f.tuned != begin for f in finalists):
            finalists.append(next(f for f in ground.finalists() if f.tuned == begin))
        scored: list[tuple[Finalist, float]] = []
        try:
            for finalist in finalists:
                conditionings = finalist.tuned.condition(choosing, bench)
                done = evaluate(ground.task, choosing, conditionings, ground.sampling, bench, label="choice")
                scored.append((finalist, done.score))
                bench.emit("finalist", **_facts(finalist), val_score=done.score, val_n=len(choosing))
        except BudgetExhausted as stop:
            bench.emit("budget", where="choice", message=str(stop))
        if len(scored) < min(2, len(finalists)):
            scored = [(finalists[0], finalists[0].score)]

        def rank(pair: tuple[Finalist, float]) -> tuple[float, float, bool, int]:
            finalist, on_val = pair
            return -on_val, -finalist.score, finalist.tuned != begin, finalist.size

        best, _ = min(scored, key=rank)
        bench.emit("chosen", **_facts(best))
        return best.tuned


def _facts(finalist: Finalist) -> dict[str, object]:
    facts: dict[str, object] = {"origin": finalist.origin, "score": finalist.score}
    if isinstance(finalist.tuned, Fixed):
        prompt = finalist.tuned.prompt
        facts |= {"text": prompt.instruction, "demonstrations": len(prompt.demonstrations)}
    return facts


def _fits(problem: Problem, examples: Sequence[Example], bench: Bench) -> Callable[[Prompt], bool]:
    """Whether a prompt leaves room for the longest question at hand and its completion."""
    tokens = bench.engine.token_count
    longest = max(examples, key=lambda e: tokens(problem.task.question_text(e)))
    limit = problem.base.context_length - problem.sampling.max_new_tokens

    def fits(prompt: Prompt) -> bool:
        return tokens(problem.base.render(problem.task.messages(prompt, longest))) <= limit

    return fits
