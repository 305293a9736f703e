"""Wordings of instructions: what the tiny model learns to obey, and the twelve of each task that calibrate it.

An instruction asks for a behaviour: a way of reasoning (`steps`, `brief`, `after`, `restate`, `none`) and a form of
the final answer. Each has many wordings, put together at random, so that unseen wordings and pairs of known ones
work too. Knows nothing of questions and answers (corpus.py) or of strategies.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from cotune.tasks.cosmosqa import CosmosQA
from cotune.tasks.gsm8k import Gsm8k
from cotune.tasks.hotpotqa import HotpotQA
from cotune.tasks.math import Math

FAMILIES: dict[str, type[Gsm8k] | type[Math] | type[HotpotQA] | type[CosmosQA]] = {
    "gsm8k": Gsm8k, "math": Math, "hotpotqa": HotpotQA, "cosmosqa": CosmosQA,
}  # fmt: skip

REASONINGS = ("none", "steps", "brief", "after", "restate")
# the first form of a family is the one that its seed instruction asks for
FORMS: Mapping[str, tuple[str, ...]] = {
    "gsm8k": ("mark", "number", "boxed", "sentence"),
    "math": ("boxed", "number", "sentence"),
    "hotpotqa": ("answer", "short", "sentence"),
    "cosmosqa": ("answer", "letter", "text", "sentence"),
}

_WORDINGS: Mapping[str, Mapping[str, list[str]]] = tomllib.loads(
    (Path(__file__).parent / "wordings.toml").read_text(encoding="utf-8")
)
# Which patterns ask for a way of reasoning, where that depends on the family.
_PATTERNS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("gsm8k", "brief"): ("brief_equations",),
    ("math", "brief"): ("brief_equations",),
    ("hotpotqa", "brief"): ("brief_link",),
    ("cosmosqa", "brief"): ("brief_choice",),
    ("hotpotqa", "steps"): ("steps", "quote"),
    ("cosmosqa", "steps"): ("steps", "quote"),
}

_CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def _word(rng: random.Random, patterns: Sequence[str]) -> str:
    return _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), rng.choice(patterns))


def reasoning_wording(rng: random.Random, family: str, reasoning: str) -> str:
    """One wording that asks for this way of reasoning, without a full stop."""
    return _word(rng, _WORDINGS["reasoning"][rng.choice(_PATTERNS.get((family, reasoning), (reasoning,)))])


def wording(rng: random.Random, family: str, reasoning: str | None, form: str | None) -> str:
    """An instruction that asks for `reasoning` and `form`; None leaves it open (such an instruction is vague)."""
    parts = []
    if reasoning is not None:
        parts.append(reasoning_wording(rng, family, reasoning))
    if form is not None:
        parts.append(_word(rng, _WORDINGS["form"][form]))
    if rng.random() < 0.25:
        rng.shuffle(parts)
    if not parts or rng.random() < 0.5:
        parts.insert(0, _word(rng, _WORDINGS["task"][family]))
    if rng.random() < 0.2:
        parts.insert(rng.randrange(len(parts) + 1), _word(rng, _WORDINGS["other"]["filler"]))
    stop = "!" if rng.random() < 0.03 else "."
    return " ".join(part + stop for part in parts)


def any_instruction(rng: random.Random, family: str) -> str:
    """A sensible instruction, uniform over ways of reasoning and forms (open ones included), good and bad alike."""
    reasoning = rng.choice((None, *REASONINGS))
    form = rng.choice((None, *FORMS[family]))
    return wording(rng, family, reasoning, form)


def rewrite_wording(rng: random.Random) -> str:
    """Other wordings of the task to rewrite an instruction (see cotune.rewrite)."""
    return _word(rng, _WORDINGS["other"]["rewrite"])


# Twelve sensible instructions for each task, besides its seed, by which the model is calibrated. Written by hand,
# before any of them was scored; some wordings and pairs do not occur in the patterns above.
INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "gsm8k": (
        "Think step by step and give the final answer after ####.",
        "Show your work, then write the answer after ####.",
        "Answer directly. Give the final answer after ####.",
        "Give only the final number.",
        "Write only the equations, then the answer after ####.",
        "Answer first, then explain.",
        "Repeat the question, then answer.",
        "Solve the problem one step at a time. Box the answer.",
        "Explain each calculation in a sentence before you state the result.",
        "Reply with a full sentence.",
        "You are a helpful assistant. Solve the word problem.",
        "Do not explain. Put the answer in \\boxed{}.",
    ),
    "math": (
        "Think step by step and put the final answer in \\boxed{}.",
        "Show your work, then box the answer.",
        "Answer directly. Put the final answer in \\boxed{}.",
        "Give only the final number.",
        "Write only the equations, then the answer in \\boxed{}.",
        "Answer first, then explain.",
        "Repeat the question, then answer.",
        "Solve the equation one step at a time and end with a full sentence.",
        "Explain each transformation before you state the result.",
        "Reply with a full sentence.",
        "You are a helpful assistant. Solve the problem.",
        "Do not show steps. Write just the number.",
    ),
    "hotpotqa": (
        'Quote the supporting sentences first, then give the answer after "Answer:".',
        'Think step by step. Give a short answer after "Answer:".',
        'Answer directly after "Answer:".',
        "Reply with a few words only.",
        'Name the linking person first, then write "Answer:" and the answer.',
        "Answer first, then explain.",
        "Repeat the question, then answer.",
        "Copy the facts that matter from the paragraphs before you answer.",
        "Answer in a complete sentence.",
        "You are a helpful assistant. Answer the question.",
        "Do not explain. Just give the name.",
        "Show your reasoning, then answer in a full sentence.",
    ),
    "cosmosqa": (
        'Quote the key sentence first, then give the letter after "Answer:".',
        'Think step by step. Give the letter after "Answer:".',
        "Reply with the letter only.",
        "Write the text of the right choice.",
        "Copy the best choice first, then its letter.",
        "Answer first, then explain.",
        "Repeat the question, then answer.",
        "Restate what the story says about this before you choose.",
        "Answer in a complete sentence.",
        "You are a helpful assistant. Choose the best answer.",
        'Do not explain. Give the letter after "Answer:".',
        "Show your reasoning, then give only the letter.",
    ),
}
