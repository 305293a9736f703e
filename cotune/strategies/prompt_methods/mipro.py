"""MIPROv2 (Opsahl-Ong et al. 2024, arXiv 2406.11695): which instruction goes with which demonstrations.

Both are proposed once; then a Bayesian search (optuna's TPE) tries pairs on minibatches, and after each round the best
mean that is not known in full is run in full. After DSPy's implementation, with these deviations (ours): the
meta-prompt is OPRO's (exemplars ground it; no summaries of data and program, no tips); minibatches are the same
examples for every pair, and a pair that is drawn again goes on to the next ones; a round ends with the full evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from cotune.config import RunConfig
from cotune.proposers import Proposing
from cotune.search import PromptSearch, Proposal
from cotune.strategies.base import Work, Workload
from cotune.strategies.prompt_methods.base import Finalist, Ground, needs, proposing
from cotune.values import Demonstration, Prompt


@dataclass(frozen=True)
class Mipro:
    """`rounds` rounds of as many trials as there are candidate instructions."""

    rounds: int
    demonstrations: int
    sets: int
    minibatch: int | None  # None: a trial runs on everything
    proposing: Proposing

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        needs("optuna", "mipro")
        prompt = config.prompt
        minibatch = prompt.minibatch if prompt.racing else None
        return cls(
            prompt.rounds, prompt.demonstrations, prompt.demonstration_sets, minibatch, Proposing.from_config(config)
        )

    @property
    def teaches(self) -> bool:
        return self.demonstrations > 0 and self.sets > 0

    def plan(self, load: Workload, driving: int, teaching: int) -> list[Work]:
        shown = load.question + load.reference
        works = proposing(self.proposing, 1, load)
        if self.teaches:
            works.append(Work.generation("own demonstrations", teaching, load.question, load.limit))
        trial = min(self.minibatch or driving, driving)
        calls = self.rounds * (self.proposing.candidates * trial + driving)
        with_demos = load.question + self.demonstrations * shown
        return [*works, load.answers("score pairs", calls, with_demos)]

    def search(self, ground: Ground) -> list[Finalist]:
        search, bench = ground.search, ground.bench
        pairs = _Pairs(search, self._instructions(ground), self._demonstrations(ground), bench.seed_for("mipro"))
        for _ in range(self.rounds):
            for _ in range(self.proposing.candidates):
                pairs.trial()
            pairs.run_best_in_full()
            search.end_round()
        pairs.drop_the_rest()
        return ground.finalists()

    def _instructions(self, ground: Ground) -> list[str]:
        search = ground.search
        proposer = self.proposing.proposer(ground.task, search.board.examples, ground.generator, ground.bench)
        proposals = proposer.propose(search.number, search.history(), search.best, ground.bench)
        return [search.best.instruction, *(p.instruction for p in search.admit(proposals))]

    def _demonstrations(self, ground: Ground) -> list[tuple[Demonstration, ...]]:
        """Those of the best prompt, none, reference answers, and `sets` sets of accepted own answers."""
        search = ground.search
        known = [search.best.demonstrations]
        if self.teaches and ground.teaching:
            proposer = ground.demonstrations(self.demonstrations, self.sets)
            proposals = proposer.propose(search.number, search.history(), search.best, ground.bench)
            known += [p.prompt.demonstrations for p in proposals]
        return list(dict.fromkeys(known))


class _Pairs:
    """Pairs of an instruction and demonstrations, tried in the order in which TPE asks for them.

    Optuna's sampler is seeded and is told the same scores, so a resumed run asks for the same pairs.
    """

    def __init__(
        self, search: PromptSearch, instructions: list[str], demonstrations: list[tuple[Demonstration, ...]], seed: int
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._search = search
        self._choices: dict[str, list[Any]] = {"instruction": instructions, "demonstrations": demonstrations}
        self._distributions = {
            name: optuna.distributions.CategoricalDistribution(range(len(known)))
            for name, known in self._choices.items()
        }
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, multivariate=True)
        self._study = optuna.create_study(sampler=sampler, direction="maximize")
        self._params: dict[Prompt, dict[str, int]] = {}  # of every pair that was tried
        self._tell_full(search.best, dict.fromkeys(self._choices, 0))

    def trial(self) -> None:
        """Run the pair that TPE asks for on its next minibatch; its value is the mean of all it has run on."""
        trial = self._study.ask(self._distributions)
        prompt = Prompt(*(known[trial.params[name]] for name, known in self._choices.items()))
        if not (self._search.knows(prompt) or self._search.admit([Proposal(prompt, "mipro")])):
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return
        self._params[prompt] = dict(trial.params)
        self._study.tell(trial, self._run(prompt, len(self._search.board.scores(prompt)) + self._search.minibatch))

    def run_best_in_full(self) -> None:
        """Of the pairs that have not run on everything, the one with the best mean."""
        unfinished = [s for s in self._search.history() if s.n < len(self._search.board.examples)]
        if unfinished:
            prompt = unfinished[-1].prompt
            self._run(prompt, len(self._search.board.examples))
            self._tell_full(prompt, self._params[prompt])

    def drop_the_rest(self) -> None:
        for scored in self._search.history():
            if scored.n < len(self._search.board.examples):
                self._search.report(scored.prompt, dropped=True)

    def _run(self, prompt: Prompt, n: int) -> float:
        board, everything = self._search.board, len(self._search.board.examples)
        before = len(board.scores(prompt))
        board.run([prompt], min(n, everything))
        scores = board.scores(prompt)
        if before < len(scores) == everything:
            self._search.report(prompt, dropped=False)
        return sum(scores) / len(scores)

    def _tell_full(self, prompt: Prompt, params: dict[str, int]) -> None:
        value = self._run(prompt, 0)
        self._study.add_trial(
            self._optuna.trial.create_trial(params=params, distributions=self._distributions, value=value)
        )
