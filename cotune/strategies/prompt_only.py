"""Tune the prompt alone: instructions by a proposer, then demonstrations, raced on train, chosen on val.

OPRO's loop (sheet 10) followed by BetterTogether's BootstrapFewShot with random search (sheet 01). An adapter that
`start` brings stays attached during the whole search (the stage p after w of a sequence).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from cotune.bench import Bench
from cotune.config import RunConfig
from cotune.errors import BudgetExhausted
from cotune.evaluate import evaluate
from cotune.proposers import make_proposer
from cotune.proposers.demonstrations import DemonstrationProposer
from cotune.proposers.filters import Filter
from cotune.search import Board, PromptSearch, Proposer, Scored, size
from cotune.strategies.base import Fixed, Problem, Work, Workload, fixed
from cotune.values import Example, Prompt, Tuned


@dataclass(frozen=True)
class PromptOnly:
    """The fields are those of PromptConfig, which has units and sources; `server` are those of a proposer's client."""

    levers: ClassVar[frozenset[str]] = frozenset({"prompt"})

    proposer: str
    rounds: int
    candidates: int
    history: int
    exemplars: int
    temperature: float
    max_characters: int
    demonstrations: int
    demonstration_sets: int
    search_examples: int
    choice_examples: int
    minibatch: int
    finalists: int
    server: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        return cls(**config.prompt.model_dump(), server=config.openai.client())

    def plan(self, load: Workload) -> list[Work]:
        driving, teaching = self._sizes(load.train)
        shown = load.question + load.reference
        works = [
            Work.generation("score instructions", (1 + self.rounds * self.candidates) * driving, shown, load.limit)
        ]
        if self.proposer != "edits":
            # the meta-prompt shows `history` instructions of at most `max_characters`, about 4 characters a token
            meta = self.history * self.max_characters // 4 + self.exemplars * shown
            works.append(Work.generation("propose", self.rounds * self.candidates, meta, self.max_characters // 4))
        if self._uses_demonstrations:
            with_demos = load.question + self.demonstrations * shown
            works.append(Work.generation("own demonstrations", teaching, load.question, load.limit))
            works.append(
                Work.generation("score demonstrations", (self.demonstration_sets + 2) * driving, with_demos, load.limit)
            )
            shown = with_demos
        chosen = min(self.choice_examples, load.val)
        return [*works, Work.generation("choose on val", (self.finalists + 1) * chosen, shown, load.limit)]

    def tune(self, start: Tuned, problem: Problem, bench: Bench) -> Tuned:
        """The prompt that is best on val among the finalists of the search; the starting one is always one of them.

        With an exhausted budget: the best on val of the finalists scored so far, or, before two were, the best that
        ran on all search examples, or `start` itself if not even its prompt was scored.
        """
        begin = fixed(start, "prompt-only")
        driving, teaching = self._split(problem, bench)
        choosing = problem.val[: self.choice_examples]
        board = Board(problem.task, driving, begin.adapter, problem.sampling, bench)
        banned = Filter(
            (*problem.train, *problem.val),
            trusted=begin.prompt.instruction,
            max_characters=self.max_characters,
            special_tokens=problem.base.special_tokens,
            fits=_fits(problem, [*driving, *teaching, *choosing], bench),
        )
        search = PromptSearch(begin.prompt, board, self.minibatch, banned.reject, bench)
        finished = search.run(self._rounds(problem, begin, driving, teaching, bench))
        ranking = search.ranking()
        chosen = self._choose(begin, ranking, choosing, problem, bench) if finished else _first(ranking)
        return start if chosen is None else replace(begin, prompt=chosen)

    def _split(self, problem: Problem, bench: Bench) -> tuple[Sequence[Example], Sequence[Example]]:
        """Train examples that score the search, and others that become demonstrations (at least a quarter: ours)."""
        order = list(problem.train)
        bench.rng("search-examples").shuffle(order)
        driving, teaching = self._sizes(len(order))
        return order[:driving], order[driving : driving + teaching]

    def _sizes(self, train: int) -> tuple[int, int]:
        driving = min(self.search_examples, train - train // 4 if self._uses_demonstrations else train)
        return driving, min(self.search_examples, train - driving)

    @property
    def _uses_demonstrations(self) -> bool:
        return self.demonstrations > 0 and self.demonstration_sets > 0

    def _rounds(
        self, problem: Problem, begin: Fixed, driving: Sequence[Example], teaching: Sequence[Example], bench: Bench
    ) -> list[Proposer]:
        proposer = make_proposer(
            self.proposer,
            task=problem.task,
            train=driving,
            generator=problem.generator,
            bench=bench,
            candidates=self.candidates,
            history=self.history,
            exemplars=self.exemplars,
            temperature=self.temperature,
            server=self.server,
        )
        rounds = [proposer] * self.rounds
        if not self._uses_demonstrations or not teaching:
            return rounds
        bootstrap = DemonstrationProposer(
            problem.task,
            teaching,
            begin.adapter,
            problem.sampling,
            most=self.demonstrations,
            sets=self.demonstration_sets,
        )
        return [*rounds, bootstrap]

    def _choose(
        self, begin: Fixed, ranking: Sequence[Scored], choosing: Sequence[Example], problem: Problem, bench: Bench
    ) -> Prompt:
        """Best on val; ties: the higher search score, then the starting prompt, then the shorter."""
        finalists = list(ranking[: self.finalists])
        if all(s.prompt != begin.prompt for s in finalists):
            finalists.append(next(s for s in ranking if s.prompt == begin.prompt))
        scored: list[tuple[Scored, float]] = []
        try:
            for candidate in finalists:
                conditionings = replace(begin, prompt=candidate.prompt).condition(choosing, bench)
                done = evaluate(problem.task, choosing, conditionings, problem.sampling, bench, label="choice")
                scored.append((candidate, done.score))
                bench.emit("finalist", **_facts(candidate), val_score=done.score, val_n=len(choosing))
        except BudgetExhausted as stop:
            bench.emit("budget", where="choice", message=str(stop))
        if len(scored) < min(2, len(finalists)):
            scored = [(finalists[0], finalists[0].score)]

        def rank(pair: tuple[Scored, float]) -> tuple[float, float, bool, int]:
            candidate, on_val = pair
            return -on_val, -candidate.score, candidate.prompt != begin.prompt, size(candidate.prompt)

        best, _ = min(scored, key=rank)
        bench.emit("chosen", **_facts(best))
        return best.prompt


def _facts(candidate: Scored) -> dict[str, object]:
    return {
        "origin": candidate.origin,
        "text": candidate.prompt.instruction,
        "demonstrations": len(candidate.prompt.demonstrations),
        "score": candidate.score,
    }


def _first(ranking: Sequence[Scored]) -> Prompt | None:
    return ranking[0].prompt if ranking else None


def _fits(problem: Problem, examples: Sequence[Example], bench: Bench) -> Callable[[Prompt], bool]:
    """Whether a prompt leaves room for the longest question at hand and its completion."""
    tokens = bench.engine.token_count
    longest = max(examples, key=lambda e: tokens(problem.task.question_text(e)))
    limit = problem.base.context_length - problem.sampling.max_new_tokens

    def fits(prompt: Prompt) -> bool:
        return tokens(problem.base.render(problem.task.messages(prompt, longest))) <= limit

    return fits
