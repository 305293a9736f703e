"""A toy task of sums and a bench over FakeEngine, for tests of what is built on evaluation."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cotune.bench import Bench, MemoryStore
from cotune.engines.base import Engine, Request, Sampling
from cotune.engines.fake import FakeEngine
from cotune.ledger import Ledger
from cotune.models.base import BaseModel
from cotune.strategies.base import Problem
from cotune.tasks.base import Task
from cotune.values import Completion, Event, Example, Grade, Outcome

_NUMBER = re.compile(r"-?\d+")


class Sums(Task):
    """`What is a + b?`; the last number of the completion counts."""

    name: ClassVar[str] = "micro-gsm8k"  # so that the offline proposer has its family's sentences
    columns: ClassVar[tuple[str, ...]] = ()
    seed_instruction: ClassVar[str] = "Add the numbers."
    max_new_tokens: ClassVar[int] = 16

    def parse(self, row: Mapping[str, Any], row_id: str) -> Example:
        raise NotImplementedError

    def question_text(self, example: Example) -> str:
        return example.question

    def reference_completion(self, example: Example) -> str:
        return example.rationale

    def grade(self, example: Example, completion: str, truncated: bool = False) -> Grade:
        numbers = _NUMBER.findall(completion)
        if truncated:
            return Grade(Outcome.TRUNCATED, None, 0.0)
        right = bool(numbers) and numbers[-1] == example.reference
        return Grade(Outcome.CORRECT if right else Outcome.WRONG, numbers[-1] if numbers else None, float(right))


@dataclass
class Wrapped:
    """The real engine, for tests that watch what reaches it."""

    inner: Engine
    name: str = field(default="transformers", kw_only=True)

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        return self.inner.plan(requests, sampling)

    rows_apart = False

    @property
    def repeats(self) -> bool:
        return self.inner.repeats

    @property
    def context_length(self) -> int:
        return self.inner.context_length

    def identity(self) -> list[Any]:
        return self.inner.identity()

    def release(self) -> None:
        self.inner.release()

    def token_count(self, prompt: str) -> int:
        return self.inner.token_count(prompt)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        return self.inner.generate(requests, sampling)


def example(i: int) -> Example:
    a, b = 3 + i, 2 * i + 1
    return Example(f"toy-{i}", f"What is {a} + {b} ?", str(a + b), rationale=f"{a} + {b} = {a + b}")


def instruction_of(rendered: str) -> str:
    return rendered.split("<|im_start|>system\n", 1)[1].split("<|im_end|>", 1)[0]


def question_of(rendered: str) -> str:
    return rendered.rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>", 1)[0]


def right_answer(rendered: str) -> str:
    a, b = map(int, _NUMBER.findall(question_of(rendered))[-2:])
    return f"{a} + {b} = {a + b}"


def answering(share: Callable[[str, str | None], float]) -> Callable[[str, str | None, int], str]:
    """An answer function that is right on `share(rendered prompt, adapter digest)` of the questions, the same easy
    ones first, whatever the prompt."""

    def answer(rendered: str, adapter: str | None, sample: int) -> str:
        hardness = zlib.crc32(question_of(rendered).encode()) % 1000 / 1000
        return right_answer(rendered) if hardness < share(rendered, adapter) else "I do not know"

    return answer


def bench(
    base: BaseModel,
    engine: Engine,
    *,
    tokens: int | None = None,
    store: MemoryStore | None = None,
    events: list[Event] | None = None,
    seed: int = 0,
) -> Bench:
    listen = (events if events is not None else []).append
    return Bench(base, engine, lambda _: engine, Ledger(tokens), store or MemoryStore(), seed, listen)


def problem(base: BaseModel, train: int = 40, val: int = 20, max_new_tokens: int = 16) -> Problem:
    rows = [example(i) for i in range(train + val)]
    return Problem(Sums(), tuple(rows[:train]), tuple(rows[train:]), base, base, Sampling(max_new_tokens))


def of_kind(events: list[Event], kind: str) -> list[Mapping[str, Any]]:
    return [e.data for e in events if e.kind == kind]


def fake(share: Callable[[str, str | None], float]) -> FakeEngine:
    return FakeEngine(answering(share), batch_size=8)
