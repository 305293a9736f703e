"""The offline tasks: rows made by seed in the official row formats, parsed and graded by the four real tasks.

The rows of two splits never share a question: a content hash puts each problem in exactly one split, whatever the
seed. Difficulty 0 is the mixture that the tiny model is pretrained on, 1 the benchmark, 2 a harder one; only the
share of each kind of problem differs (tables in micro_arithmetic and micro_stories).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol, TypeVar

from cotune.errors import UsageError
from cotune.tasks.cosmosqa import CosmosQA
from cotune.tasks.gsm8k import Gsm8k
from cotune.tasks.hotpotqa import HotpotQA
from cotune.tasks.math import Math
from cotune.tasks.micro_arithmetic import Equation, WordProblem, equation, word_problem
from cotune.tasks.micro_stories import HopQuestion, Narrative, hop_question, narrative

Row = dict[str, Any]
Problem = TypeVar("Problem")

DIFFICULTIES = (0, 1, 2)
_SPLITS = {"test": (0, 1), "val": (2,), "train": (3, 4, 5, 6, 7)}  # which of eight hash buckets a split owns
_PATIENCE = 20_000  # draws in a row that give nothing new before the pool counts as empty


class MicroTask(Protocol):
    """What the data loader needs of an offline task."""

    def generate_rows(self, split: str, count: int, seed: int = 0, difficulty: int = 1) -> list[Row]: ...


def problems(
    make: Callable[[random.Random, int], Problem],
    text: Callable[[Problem], str],
    split: str,
    seed: int,
    difficulty: int,
    repeat: bool = False,
) -> Iterator[Problem]:
    """Endless problems of one split, different ones unless `repeat`; the first n are the same however many are taken.

    Raises UsageError for an unknown split or difficulty, or when there are no more different problems.
    """
    if split not in _SPLITS:
        raise UsageError(f"There is no split {split!r} in an offline task. Known: {', '.join(sorted(_SPLITS))}.")
    if difficulty not in DIFFICULTIES:
        raise UsageError(f"Difficulty is 0, 1 or 2, not {difficulty!r}.")
    rng = random.Random(f"{make.__name__}/{split}/{seed}/{difficulty}")
    seen: set[bytes] = set()
    missed = 0
    while missed < _PATIENCE:
        problem = make(rng, difficulty)
        key = hashlib.sha256(text(problem).encode()).digest()
        missed += 1
        if key[0] % 8 in _SPLITS[split] and (repeat or key not in seen):
            missed = 0
            if not repeat:
                seen.add(key)
            yield problem
    raise UsageError(f"There are only about {len(seen)} different {split} problems of this kind; ask for fewer.")


def _rows(found: Iterator[WordProblem | Equation | HopQuestion | Narrative], count: int) -> list[Row]:
    return [row_of(problem, index) for index, problem in zip(range(count), found, strict=False)]


def row_of(problem: WordProblem | Equation | HopQuestion | Narrative, index: int) -> Row:
    """The problem as an official row; `index` becomes its identifier where the format has one."""
    if isinstance(problem, WordProblem):
        return _word_row(problem)
    if isinstance(problem, Equation):
        return _equation_row(problem)
    return _hop_row(problem, index) if isinstance(problem, HopQuestion) else _narrative_row(problem, index)


class MicroGsm8k(Gsm8k):
    name: ClassVar[str] = "micro-gsm8k"
    max_new_tokens: ClassVar[int] = 128

    def generate_rows(self, split: str, count: int, seed: int = 0, difficulty: int = 1) -> list[Row]:
        return _rows(word_problems(split, seed, difficulty), count)


class MicroMath(Math):
    name: ClassVar[str] = "micro-math"
    max_new_tokens: ClassVar[int] = 128

    def generate_rows(self, split: str, count: int, seed: int = 0, difficulty: int = 1) -> list[Row]:
        return _rows(equations(split, seed, difficulty), count)


class MicroHotpotQA(HotpotQA):
    name: ClassVar[str] = "micro-hotpotqa"
    max_new_tokens: ClassVar[int] = 96

    def generate_rows(self, split: str, count: int, seed: int = 0, difficulty: int = 1) -> list[Row]:
        return _rows(hop_questions(split, seed, difficulty), count)


class MicroCosmosQA(CosmosQA):
    name: ClassVar[str] = "micro-cosmosqa"
    max_new_tokens: ClassVar[int] = 96

    def generate_rows(self, split: str, count: int, seed: int = 0, difficulty: int = 1) -> list[Row]:
        return _rows(narratives(split, seed, difficulty), count)


def word_problems(split: str, seed: int, difficulty: int, repeat: bool = False) -> Iterator[WordProblem]:
    return problems(word_problem, lambda p: p.question, split, seed, difficulty, repeat)


def equations(split: str, seed: int, difficulty: int, repeat: bool = False) -> Iterator[Equation]:
    return problems(equation, lambda p: p.problem, split, seed, difficulty, repeat)


def hop_questions(split: str, seed: int, difficulty: int, repeat: bool = False) -> Iterator[HopQuestion]:
    return problems(hop_question, lambda p: f"{p.question} {p.paragraphs}", split, seed, difficulty, repeat)


def narratives(split: str, seed: int, difficulty: int, repeat: bool = False) -> Iterator[Narrative]:
    return problems(narrative, lambda p: f"{p.question} {p.context} {p.choices}", split, seed, difficulty, repeat)


def _word_row(problem: WordProblem) -> Row:
    """Worked lines with the calculator marks of the official rows: `5+3=<<5+3=8>>8`."""
    lines = []
    for line, worked in zip(problem.lines, problem.equations, strict=True):
        left, result = worked.split("=")
        lines.append(line.format(f"{left}=<<{worked}>>{result}"))
    return {"question": problem.question, "answer": "\n".join([*lines, f"#### {problem.answer}"])}


def _equation_row(problem: Equation) -> Row:
    solution = ", then ".join(f"${step}$" for step in problem.steps)
    return {
        "problem": problem.problem,
        "level": f"Level {len(problem.steps)}",
        "type": problem.subject,
        "solution": f"{solution}. The answer is $\\boxed{{{problem.answer}}}$.",
    }


def _hop_row(problem: HopQuestion, index: int) -> Row:
    return {
        "_id": f"micro-{index}",
        "question": problem.question,
        "answer": problem.answer,
        "supporting_facts": [[title, place] for title, place in problem.supporting],
        "context": [[title, list(sentences)] for title, sentences in problem.paragraphs],
        "type": "bridge" if problem.kind == "bridge" else "comparison",
        "level": "easy",
    }


def _narrative_row(problem: Narrative, index: int) -> Row:
    right = problem.choices[problem.label]
    row: Row = {"id": f"micro-{index}", "context": problem.context, "question": problem.question}
    row |= {f"answer{i}": choice for i, choice in enumerate(problem.choices)}
    return row | {"label": str(problem.label), "rationale": f"{problem.key} Choice: {right}".strip()}
