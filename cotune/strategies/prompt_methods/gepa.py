"""GEPA (sheet 10) by its authors' package: reflect on a few answers, keep what is best for at least one example.

Here is the adapter between the package and our engine, ledger and board. The package picks parents from the Pareto
front, accepts a mutation that does better on its minibatch, and then has it scored on all search examples (its Pareto
set); minibatches are of the teaching examples (its feedback set). Nothing of it is written to disk: a resumed run is
replayed from the journal. With the proposer `edits`, which asks no model, a mutation is one of its edits (ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from cotune.config import RunConfig
from cotune.proposers import Proposing
from cotune.proposers.edits import EditProposer
from cotune.proposers.instructions import no_room
from cotune.proposers.writing import Writer
from cotune.search import Proposal, Scored
from cotune.strategies.base import Work, Workload
from cotune.strategies.prompt_methods.base import Finalist, Ground, needs
from cotune.strategies.prompt_methods.told import answered, feedback
from cotune.values import Prompt

_PART = "instruction"  # the one text of a candidate


@dataclass(frozen=True)
class Gepa:
    """`rounds` rounds of `candidates` mutations each (ours; the package stops at a number of rollouts)."""

    demonstrations: ClassVar[int] = 0
    teaches: ClassVar[bool] = True

    rounds: int
    minibatch: int
    proposing: Proposing

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        needs("gepa", "gepa")
        return cls(config.prompt.rounds, config.prompt.reflection_minibatch, Proposing.from_config(config))

    @property
    def mutations(self) -> int:
        return self.rounds * self.proposing.candidates

    def plan(self, load: Workload, driving: int, teaching: int) -> list[Work]:
        calls = self.mutations * 2 * self.minibatch
        works = [
            load.answers("score mutations on minibatches", calls, load.question),
            load.answers("score mutations", self.mutations * driving, load.question),
        ]
        if self.proposing.asks:
            length = self.proposing.max_characters // 4  # about 4 characters a token
            read = length + self.minibatch * (load.question + load.limit)
            works.append(Work.generation("reflect", self.mutations, read, length))
        return works

    def search(self, ground: Ground) -> list[Finalist]:
        from gepa import optimize

        adapter = _Adapter(ground, self.proposing, self.mutations)
        optimize(
            seed_candidate={_PART: ground.search.best.instruction},
            trainset=list(ground.teaching or ground.search.board.examples),
            valset=list(range(len(ground.search.board.examples))),
            adapter=adapter,
            reflection_minibatch_size=self.minibatch,
            stop_callbacks=adapter.stops,
            callbacks=[adapter],
            logger=_Silent(),
            track_best_outputs=False,
            seed=ground.bench.seed_for("gepa"),
        )
        if adapter.failure:
            raise adapter.failure
        return ground.finalists()


class _Adapter:
    """What the package calls (its GEPAAdapter and GEPACallback): evaluation, feedback, new texts, when to stop.

    The package goes on after an error in making new texts, an exhausted budget included, so `failure` keeps it.
    """

    def __init__(self, ground: Ground, proposing: Proposing, mutations: int) -> None:
        self._ground = ground
        self._shown = ground.search.best.demonstrations
        self._writer = proposing.writer(ground.generator, ground.bench)
        self._edits = EditProposer(ground.task.learned, candidates=1)
        self._mutations = mutations
        self._child: tuple[Prompt, list[float]] | None = None
        self.failure: Exception | None = None

    def stops(self, state: Any) -> bool:
        """Asked before every turn, so it also ends the round of the turn before (which no exception cut short)."""
        if self.failure:
            return True
        turns = state.i + 1
        if turns:
            self._ground.search.end_round()
        return bool(turns >= self._mutations)

    def evaluate(self, batch: list[Any], candidate: Mapping[str, str], capture_traces: bool = False) -> Any:
        """Scores on search examples (given by their numbers) or, with traces, on teaching ones."""
        from gepa import EvaluationBatch

        prompt = Prompt(candidate[_PART], self._shown)
        search = self._ground.search
        if isinstance(batch[0], int):
            new = not search.board.scores(prompt)
            search.board.run([prompt], len(search.board.examples))
            if new:
                search.report(prompt, dropped=False)
            return EvaluationBatch(outputs=[None] * len(batch), scores=search.board.scores(prompt))
        told = answered(self._ground, prompt, batch)
        scores = [t.grade.score for t in told]
        if not search.board.scores(prompt):
            self._child = (prompt, scores)
        return EvaluationBatch(outputs=[None] * len(batch), scores=scores, trajectories=told)

    def make_reflective_dataset(
        self, candidate: Mapping[str, str], eval_batch: Any, components_to_update: Sequence[str]
    ) -> dict[str, list[dict[str, str]]]:
        records = [
            {
                "Inputs": self._ground.task.question_text(told.example),
                "Generated Outputs": told.completion.text,
                "Feedback": feedback(told.example, told.grade),
            }
            for told in eval_batch.trajectories
        ]
        return dict.fromkeys(components_to_update, records)

    def propose_new_texts(
        self,
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: Sequence[str],
    ) -> dict[str, str]:
        """A new instruction; none, which the package takes for a skipped turn, when it is junk or not new."""
        if self.failure:  # the package tries again after an error
            raise self.failure
        search, self._child = self._ground.search, None
        parent = Prompt(candidate[_PART], self._shown)
        try:
            if self._writer:
                proposals = [self._reflected(self._writer, parent, reflective_dataset[_PART])]
            else:
                # edits of the best of a history; the parent that the Pareto front gave counts as the best
                history = [*search.history(), Scored(parent, "parent", 1.0, 1)]
                proposals = self._edits.propose(search.number, history, parent, self._ground.bench)
            admitted = search.admit(proposals)
            return {_PART: admitted[0].instruction} if admitted else {}
        except Exception as error:
            self.failure = error
            raise

    def _reflected(self, writer: Writer, parent: Prompt, records: Sequence[Mapping[str, Any]]) -> Proposal:
        """By the package's own prompt and reader; with fewer answers where the writer has no room for all."""
        from gepa.strategies.instruction_proposal import InstructionProposalSignature as Reflection

        for most in range(len(records), 0, -1):
            told = {"current_instruction_doc": parent.instruction, "dataset_with_feedback": records[:most]}
            messages = [{"role": "user", "content": str(Reflection.prompt_renderer(told))}]
            if writer.fits(messages):
                break
        else:
            raise no_room(writer)
        [reply] = writer.write(messages, 1, self._ground.bench, "reflect", self._ground.search.number)
        text = Reflection.output_extractor(reply.text.strip())["new_instruction"]
        unfinished = reply.truncated and reply.text.count("```") < 2
        return Proposal(Prompt(text, self._shown), writer.name, unfinished)

    def on_candidate_rejected(self, event: Any) -> None:
        if self._child:
            prompt, scores = self._child
            self._ground.search.report(prompt, dropped=True, scores=scores)


class _Silent:
    """The package's log goes nowhere: what matters is in our events."""

    def log(self, message: str) -> None: ...
