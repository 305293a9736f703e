"""The chats that the tiny model is pretrained on, by seed: an endless mixture in which instructions change behaviour.

Problems come from the micro tasks' train split at difficulty 0, so no test question is seen and the kinds that the
benchmark adds are absent. Knows nothing of tensors or training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cotune.models.tiny.instructions import FAMILIES, FORMS, any_instruction, rewrite_wording, wording
from cotune.rewrite import REWRITE_INSTRUCTION, rewrite_messages
from cotune.tasks import micro
from cotune.tasks.micro_arithmetic import Equation, WordProblem
from cotune.tasks.micro_names import INSTRUMENTS, ITEMS, JOBS, PEOPLE, PLACES, THINGS, TITLES
from cotune.tasks.micro_stories import HopQuestion, Narrative
from cotune.values import Example

Chat = list[dict[str, str]]
Problem = WordProblem | Equation | HopQuestion | Narrative

MIXTURE = {"gsm8k": 0.20, "math": 0.15, "hotpotqa": 0.18, "cosmosqa": 0.18, "rewrite": 0.07, "recall": 0.22}
# How often each way of reasoning is asked for; "vague" instructions ask for none in particular.
ASKED = {"none": 0.10, "steps": 0.34, "brief": 0.20, "after": 0.08, "restate": 0.06, "vague": 0.22}
# What a vague instruction gets: mostly the bare answer, so that a better prompt has something to win.
VAGUE = {"none": 0.90, "steps": 0.04, "brief": 0.03, "after": 0.02, "restate": 0.01}
DEMONSTRATIONS = 0.06  # share of chats that show worked examples before the question


@dataclass(frozen=True)
class Item:
    """One problem with everything that a completion about it may say."""

    family: str
    example: Example
    steps: str
    brief: str


def _draw(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def items(family: str, seed: int) -> Iterator[Item]:
    """Problems of one family from the train split, at difficulty 0."""
    sources: dict[str, Callable[..., Iterator[Problem]]] = {
        "gsm8k": micro.word_problems, "math": micro.equations,
        "hotpotqa": micro.hop_questions, "cosmosqa": micro.narratives,
    }  # fmt: skip
    task = FAMILIES[family]()
    for problem in sources[family]("train", seed, 0, repeat=True):
        example = task.parse(micro.row_of(problem, 0), "0")
        yield Item(family, example, example.rationale, _brief(problem))


def _brief(problem: Problem) -> str:
    """The shortest reasoning that still helps: equations, the linking names, the right choice."""
    if isinstance(problem, WordProblem):
        return "\n".join(problem.equations)
    if isinstance(problem, Equation):
        return "\n".join(f"${step}$" for step in problem.steps)
    if isinstance(problem, HopQuestion):
        return f"{problem.link}."
    return f"Choice: {problem.choices[problem.label]}"


def final(item: Item, form: str) -> str:
    """The final answer in one of the forms of instructions.FORMS."""
    answer = item.example.reference
    if item.family == "cosmosqa" and form == "text":
        return item.example.choices["ABCD".index(answer)]
    return {
        "mark": f"#### {answer}",
        "boxed": f"The answer is $\\boxed{{{answer}}}$." if item.family == "math" else f"\\boxed{{{answer}}}",
        "sentence": f"The answer is {answer}.",
        "answer": f"Answer: {answer}",
    }.get(form, answer)


def completion(item: Item, reasoning: str, form: str) -> str:
    last = final(item, form)
    steps = item.steps
    if item.family == "math":  # the row's solution ends with the boxed answer; the form decides here
        steps = steps.partition(" The answer is")[0]
    match reasoning:
        case "none":
            return last
        case "steps":
            return f"{steps}{' ' if item.family == 'math' and form == 'boxed' else chr(10)}{last}"
        case "brief":
            return f"{item.brief}\n{last}"
        case "after":
            return f"{last}\n{steps}"
        case _:
            return f"{item.example.question}\n{last}"


def answered(rng: random.Random, family: str, source: Iterator[Item]) -> Chat:
    """Instruction, perhaps demonstrations, question, and the completion that the instruction asks for."""
    asked = _draw(rng, ASKED)
    default = FORMS[family][0]
    form = default if rng.random() < 0.5 else rng.choice(FORMS[family])
    says_form = form != default or rng.random() < 0.5
    shots = rng.randint(1, 3 if family in ("gsm8k", "math") else 1) if rng.random() < DEMONSTRATIONS else 0
    if asked == "vague":
        # demonstrations settle what a vague instruction leaves open
        reasoning = rng.choice(list(VAGUE)) if shots else _draw(rng, VAGUE)
        says_form = says_form and not (shots and rng.random() < 0.5)
        instruction = wording(rng, family, None, form if says_form else None)
        if form == default and rng.random() < 0.5:
            instruction = FAMILIES[family].seed_instruction
    else:
        reasoning = asked
        instruction = wording(rng, family, reasoning, form if says_form else None)
    task = FAMILIES[family]()
    chat = [{"role": "system", "content": instruction}]
    for _ in range(shots + 1):
        item = next(source)
        chat.append({"role": "user", "content": task.question_text(item.example)})
        chat.append({"role": "assistant", "content": completion(item, reasoning, form)})
    return chat


def rewritten(rng: random.Random, family: str, source: Iterator[Item]) -> Chat:
    """An instruction rewritten for a question: any sensible one, so that sampling gives diverse ones."""
    seed = FAMILIES[family].seed_instruction
    old = seed if rng.random() < 0.5 else any_instruction(rng, family)
    ask = REWRITE_INSTRUCTION if rng.random() < 0.6 else rewrite_wording(rng)
    text = FAMILIES[family]().question_text(next(source).example)
    return [*rewrite_messages(old, text, ask), {"role": "assistant", "content": any_instruction(rng, family)}]


_LOOK_UP = (
    "Look up what is asked.",
    "Find what is asked in the text.",
    "Say what the text says.",
    "Copy from the text.",
)
_LOOKUPS = 8  # at most, per chat


def recalled(rng: random.Random, family: str, source: Iterator[HopQuestion | Narrative]) -> Chat:
    """Several short look-ups in one text: without so many, a small model does not learn to read what it is given."""
    problem = next(source)
    task = FAMILIES[family]()
    text = task.question_text(task.parse(micro.row_of(problem, 0), "0"))
    pairs = lookups(problem)
    chat = [{"role": "system", "content": rng.choice(_LOOK_UP)}]
    for number, (ask, answer) in enumerate(rng.sample(pairs, min(_LOOKUPS, len(pairs)))):
        chat.append({"role": "user", "content": ask if number else f"{text}\n\n{ask}"})
        chat.append({"role": "assistant", "content": answer})
    return chat


def lookups(problem: HopQuestion | Narrative) -> list[tuple[str, str]]:
    """(what is asked, what the text says): all about a title or a person, how a sentence ends, letters of choices."""
    pairs: list[tuple[str, str]] = []
    if isinstance(problem, HopQuestion):
        parts = {title: " ".join(sentences) for title, sentences in problem.paragraphs}
        sentences = [s for _, inside in problem.paragraphs for s in inside]
    else:
        sentences = [f"{s.strip('.')}." for s in problem.context.split(". ")]
        firsts = [s.split()[0] for s in sentences]
        parts = {first: s for first, s in zip(firsts, sentences, strict=True) if firsts.count(first) == 1}
        for letter, choice in zip("ABCD", problem.choices, strict=True):
            pairs += [(f"Letter: {choice}", letter), (f"Choice: {letter}", choice)]
    pairs += [(f"Quote: {key}", text) for key, text in parts.items()]
    for sentence in sentences:
        beginning, _, end = sentence.rpartition(" ")
        if sum(s.startswith(beginning) for s in sentences) == 1:
            pairs.append((f"Complete: {beginning}", end))
    return pairs


def chats(seed: int) -> Iterator[Chat]:
    """The endless pretraining mixture; each chat ends with an assistant turn."""
    rng = random.Random(f"corpus/{seed}")
    sources = {family: items(family, seed) for family in FAMILIES}
    texts: dict[str, Iterator[Any]] = {
        "hotpotqa": micro.hop_questions("train", seed + 1, 0, repeat=True),
        "cosmosqa": micro.narratives("train", seed + 1, 0, repeat=True),
    }
    while True:
        family = _draw(rng, MIXTURE)
        if family == "rewrite":
            family = rng.choice(list(FAMILIES))
            yield rewritten(rng, family, sources[family])
        elif family == "recall":
            family = rng.choice(list(texts))
            yield recalled(rng, family, texts[family])
        else:
            yield answered(rng, family, sources[family])


_WORDS = (*ITEMS, *JOBS, *INSTRUMENTS, *TITLES, *PLACES, *THINGS, *(name for name, _, _ in PEOPLE))


def copies(seed: int) -> Iterator[Chat]:
    """Random words to be repeated: dense practice in finding where one is in a text and what comes next."""
    rng = random.Random(f"copies/{seed}")
    while True:
        text = " " + " ".join(rng.choice(_WORDS) for _ in range(rng.randint(10, 40)))
        yield [
            {"role": "system", "content": "Repeat the text."},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
        ]


CHATS: dict[str, Callable[[int], Iterator[Chat]]] = {"mixture": chats, "copies": copies}
