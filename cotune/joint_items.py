"""What joint training learns from: D1, and each of its pairs as the tokens that one step trains on.

Knows nothing of schedules or losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from cotune.bench import Bench
from cotune.config import JointConfig
from cotune.engines.base import Sampling
from cotune.metatuned import Branch, MetaTuned
from cotune.models.base import BaseModel
from cotune.models.metatuner.losses import JointItem
from cotune.models.metatuner.relaxation import Relaxed
from cotune.supervision import accepted, gold
from cotune.values import Conditioning, Example

Turn = Literal["both", "adapter", "prompt"]
_HERE = "(here-goes-the-prompt)"


@dataclass(frozen=True)
class Pair:
    """(x_i, y_i) of D1, y_i as M's tokens with the end of its turn."""

    example: Example
    completion: tuple[int, ...]


class Items:
    """`actor` is M. Remembers the tokens of every query and question that it was asked for."""

    def __init__(self, settings: JointConfig, tuned: MetaTuned, actor: BaseModel, bench: Bench) -> None:
        self._settings, self._tuned, self._actor, self._bench = settings, tuned, actor, bench
        self._question_ids = lru_cache(maxsize=None)(self._encode_question)
        self._query_ids = lru_cache(maxsize=None)(self._encode_query)

    def pairs(self, train: Sequence[Example], teacher: Sampling) -> tuple[list[Pair], dict[str, int]]:
        """D1: worked answers, or M's own completions under p~ that the grader accepts, or both; and how many of each.

        Queries without either are in neither D1 nor D2 (ours). `teacher` is how own completions are sampled.
        """
        task, actor, seed = self._tuned.task, self._actor, self._tuned.seed
        traces = gold(task, train) if self._settings.source != "self" else []
        counts = {"gold": len(traces), "sampled": 0, "accepted": 0}
        if self._settings.source != "gold":
            own, counts["sampled"] = accepted(task, train, [Conditioning(seed)] * len(train), teacher, self._bench)
            counts["accepted"] = len(own)
            traces += own
        pairs = [Pair(t.example, actor.encode_answer(t.completion)) for t in dict.fromkeys(traces)]
        fitting = [
            p
            for p in pairs
            if len(self._question_ids(p.example, seed.instruction)) + len(p.completion) <= actor.context_length
        ]
        counts |= {"over_context": len(pairs) - len(fitting), "kept": len(fitting)}
        self._bench.emit("traces", use="joint", source=self._settings.source, examples=len(train), **counts)
        return fitting, counts

    def item(
        self, pair: Pair, turn: Turn, round_number: int, targets: Mapping[str, str], prompts: Mapping[str, str]
    ) -> JointItem:
        """`targets` is D2 and `prompts` are those of term 1 in this round, by example id; without one it is p~."""
        s, example = self._settings, pair.example
        target = "" if turn == "adapter" else targets.get(example.id, "")
        query = self._query_ids(example, s.adapter_branch)
        prompt_query = self._query_ids(example, s.prompt_branch)
        prompt_query = prompt_query if prompt_query != query else ()
        if s.prompt_signal == "gumbel" and example.id in prompts:
            question, relaxed = self._relaxed(example, prompts[example.id], round_number)
            return JointItem(query, (), question, pair.completion, prompt_query, relaxed, example.id)
        return JointItem(
            query=query,
            target=self._tuned.generator.encode_answer(target) if target else (),
            question=self._question_ids(example, prompts.get(example.id, self._tuned.seed.instruction)),
            completion=() if turn == "prompt" or s.adapter_branch == "off" else pair.completion,
            prompt_query=prompt_query,
            example=example.id,
        )

    def _relaxed(self, example: Example, instruction: str, round_number: int) -> tuple[tuple[int, ...], Relaxed]:
        """M's question with the prompt as G's tokens in it, so that the two agree token by token."""
        actor, holed = self._actor, replace(self._tuned.seed, instruction=_HERE)
        before, _, behind = actor.render(self._tuned.task.messages(holed, example)).partition(_HERE)
        prompt, start = tuple(self._tuned.generator.encode(instruction)), actor.encode(before)
        seed = self._bench.seed_for("gumbel", round_number, example.id)
        relaxed = Relaxed(prompt, len(start), seed, self._settings.gumbel_temperature)
        return (*start, *prompt, *actor.encode(behind)), relaxed

    def _encode_query(self, example: Example, branch: Branch) -> tuple[int, ...]:
        return tuple(self._tuned.generator.encode(self._tuned.query(example, branch)))

    def _encode_question(self, example: Example, instruction: str) -> tuple[int, ...]:
        prompt = replace(self._tuned.seed, instruction=instruction)
        return tuple(self._actor.encode(self._actor.render(self._tuned.task.messages(prompt, example))))
