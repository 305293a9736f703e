"""Proposals without any model: a bank of sentences and seeded edits of the best instructions so far (ours).

The offline default: small models cannot write instructions. An instruction is treated as a list of sentences.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from cotune.bench import Bench
from cotune.proposers.bank import phrases
from cotune.search import Proposal, Scored
from cotune.values import Prompt

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PARENTS = 4  # the best so many instructions are edited, better ones more often
_TRIES = 50  # per proposal, to find a text that was not there before
_KEEP_SLOT = 0.6  # chance that a fresh instruction has a sentence of each kind

Sentences = list[str]


def sentences(instruction: str) -> Sentences:
    return [s for s in _SENTENCE_END.split(instruction.strip()) if s]


class EditProposer:
    """`candidates` new texts a round: fresh combinations, and edits of the best (add, remove, swap, reorder, cross).

    The first round is mostly fresh combinations, because there is nothing yet to learn from.
    """

    def __init__(self, tasks: Sequence[str], candidates: int) -> None:
        self._bank = phrases(*tasks)
        self._candidates = candidates
        self._edits: dict[str, Callable[[list[Sentences], random.Random], Sentences]] = {
            "fresh": self._fresh,
            "add": self._add,
            "remove": self._remove,
            "swap": self._swap,
            "reorder": self._reorder,
            "cross": self._cross,
        }

    def propose(self, round: int, history: Sequence[Scored], best: Prompt, bench: Bench) -> list[Proposal]:
        rng = bench.rng("edits", round)
        known = {s.prompt.instruction for s in history}
        ranked = list(dict.fromkeys(s.prompt.instruction for s in reversed(history)))
        parents = [sentences(text) for text in ranked[:_PARENTS] if sentences(text)]
        proposals: list[Proposal] = []
        for _ in range(self._candidates * _TRIES):
            if len(proposals) == self._candidates:
                break
            fresh = not parents or (round == 1 and rng.random() < 0.5)
            operator = "fresh" if fresh else rng.choice(list(self._edits))
            text = " ".join(self._edits[operator](parents, rng))
            if text and text not in known:
                known.add(text)
                proposals.append(Proposal(Prompt(text, best.demonstrations), f"edits:{operator}"))
        return proposals

    def _parent(self, parents: list[Sentences], rng: random.Random) -> Sentences:
        weights = range(len(parents), 0, -1)
        return list(rng.choices(parents, weights)[0])

    def _phrase(self, rng: random.Random, without: Sentences) -> str:
        kind = rng.choice(self._bank.kinds)
        return rng.choice([p for p in kind if p not in without] or list(kind))

    def _fresh(self, parents: list[Sentences], rng: random.Random) -> Sentences:
        made = [rng.choice(kind) for kind in self._bank.kinds if rng.random() < _KEEP_SLOT]
        return made or [self._phrase(rng, [])]

    def _add(self, parents: list[Sentences], rng: random.Random) -> Sentences:
        parent = self._parent(parents, rng)
        parent.insert(rng.randint(0, len(parent)), self._phrase(rng, parent))
        return parent

    def _remove(self, parents: list[Sentences], rng: random.Random) -> Sentences:
        parent = self._parent(parents, rng)
        if len(parent) > 1:
            parent.pop(rng.randrange(len(parent)))
        return parent

    def _swap(self, parents: list[Sentences], rng: random.Random) -> Sentences:
        parent = self._parent(parents, rng)
        parent[rng.randrange(len(parent))] = self._phrase(rng, parent)
        return parent

    def _reorder(self, parents: list[Sentences], rng: random.Random) -> Sentences:
        parent = self._parent(parents, rng)
        rng.shuffle(parent)
        return parent

    def _cross(self, parents: list[Sentences], rng: random.Random) -> Sentences:
        one, other = self._parent(parents, rng), self._parent(parents, rng)
        head = one[: rng.randint(1, len(one))]
        tail = other[rng.randint(0, len(other) - 1) :]
        return head + [s for s in tail if s not in head]
