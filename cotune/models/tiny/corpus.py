"""The chats that the tiny model is pretrained on, by seed: an endless mixture in which instructions change behaviour.

Problems come from the micro tasks' train split at difficulty 0, so no test question is seen and the kinds that the
benchmark adds are absent. Knows nothing of tensors or training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cotune.models.tiny.instructions import FAMILIES, FORMS, any_instruction, rewrite_wording, wording
from cotune.rewrite import REWRITE_INSTRUCTION, rewrite_messages
from cotune.tasks import micro
from cotune.tasks.micro_arithmetic import Equation, WordProblem
from cotune.tasks.micro_names import INSTRUMENTS, ITEMS, JOBS, PEOPLE, PLACES, THINGS, TITLES, TOWNS
from cotune.tasks.micro_stories import HopQuestion, Narrative
from cotune.values import Example

Chat = list[dict[str, str]]
Problem = WordProblem | Equation | HopQuestion | Narrative

# What is read, by name: shares of kinds of chats. Copies and drills come first and never stop: alone, each is forgotten
# within a few hundred steps of something else, and is of no use to what comes after it.
MIXTURES: Mapping[str, dict[str, float]] = {
    "reading": {"copy": 0.30, "drill": 0.30, "gsm8k": 0.12, "math": 0.08, "hotpotqa": 0.10, "cosmosqa": 0.10},
    "mixture": {
        "copy": 0.04, "drill": 0.10, "rewrite": 0.07,
        "gsm8k": 0.22, "math": 0.16, "hotpotqa": 0.20, "cosmosqa": 0.21,
    },
    "finish": {
        "letter": 0.25, "copy": 0.02, "drill": 0.05, "rewrite": 0.06,
        "gsm8k": 0.18, "math": 0.12, "hotpotqa": 0.14, "cosmosqa": 0.18,
    },
}  # fmt: skip
# How often each way of reasoning is asked for; "vague" instructions ask for none in particular.
ASKED = {"none": 0.12, "steps": 0.32, "brief": 0.20, "after": 0.07, "restate": 0.05, "vague": 0.24}
# What a vague instruction gets: mostly the bare answer, so that a better prompt has something to win.
VAGUE = {"none": 0.90, "steps": 0.04, "brief": 0.03, "after": 0.02, "restate": 0.01}
DEMONSTRATIONS = 0.06  # share of chats that show worked examples before the question
DIRECT = 0.5  # the same for bare answers to arithmetic: few tokens each, so they need many to be practised at all


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
    if form == "mark":
        return f"#### {answer}"
    if form == "boxed":
        return f"The answer is $\\boxed{{{answer}}}$." if item.family == "math" else f"\\boxed{{{answer}}}"
    return plain(answer, form)


def plain(answer: str, form: str) -> str:
    """An answer in one of the forms that all families share."""
    return {"sentence": f"The answer is {answer}.", "answer": f"Answer: {answer}"}.get(form, answer)


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
    arithmetic = family in ("gsm8k", "math")
    shots = rng.randint(1, 3 if arithmetic else 1) if rng.random() < DEMONSTRATIONS else 0
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
    if reasoning == "none" and arithmetic and rng.random() < DIRECT:
        shots = rng.randint(2, 5)
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
_WORDS = (*ITEMS, *JOBS, *INSTRUMENTS, *TITLES, *PLACES, *THINGS, *(name for name, _, _ in PEOPLE))
_NAMES = tuple(name for name, _, _ in PEOPLE)
# Sentences alike but for who and what: (pattern, whos, whats). In some the two are neighbours: from these, looking up
# across more words is learned.
_FACTS = (
    ("{} {}.", _NAMES, (*TOWNS, *JOBS, *THINGS)),
    ("{}: {}.", _NAMES, (*TOWNS, *JOBS, *THINGS)),
    ("{} has {}.", _NAMES, ITEMS),
    ("{} lives in {}.", _NAMES, TOWNS),
    ("{} is from {}.", _NAMES, TOWNS),
    ("{} works as a {}.", _NAMES, JOBS),
    ("{} plays the {}.", _NAMES, INSTRUMENTS),
    ("{} is {}.", TITLES, _NAMES),
    ("The director of {} is {}.", TITLES, _NAMES),
    ("The {} is in the {}.", THINGS, PLACES),
)  # fmt: skip
_LISTED = ("{}. {}", "{}. {}", "{}: {}", "{} {}")
Table = Mapping[str, str]


def looked_up(rng: random.Random, text: str, tables: Mapping[str, Table]) -> Chat:
    """Look-ups in one text, several at a time: without so many, a small model does not learn to read."""
    chat = [{"role": "system", "content": rng.choice(_LOOK_UP)}]
    for number in range(rng.randint(1, 3)):
        kind = rng.choice(list(tables))
        table = tables[kind]
        keys = rng.sample(list(table), rng.randint(1, len(table)))
        ask = f"{kind}: {', '.join(keys)}"
        chat.append({"role": "user", "content": ask if number else f"{text}\n\n{ask}"})
        chat.append({"role": "assistant", "content": "\n".join(table[key] for key in keys)})
    return chat


def drills(seed: int) -> Iterator[Chat]:
    """Look-ups in lettered lists of random words, in like sentences, in the texts of two-hop questions and stories."""
    rng = random.Random(f"drills/{seed}")
    hops = micro.hop_questions("train", seed, 0, repeat=True)
    stories = micro.narratives("train", seed, 0, repeat=True)
    while True:
        kind = rng.choice(("list", "facts", "facts", "hops", "story"))
        if kind == "list":
            words = rng.sample(_WORDS, rng.randint(3, 6))
            listed = rng.choice(_LISTED)
            text = "\n".join(listed.format(letter, word) for letter, word in zip("ABCDEF", words, strict=False))
            yield looked_up(rng, text, choice_tables(words))
        elif kind == "facts":
            pattern, whos, whats = rng.choice(_FACTS)
            count = rng.randint(3, 8)
            facts = {
                who: pattern.format(who, what)
                for who, what in zip(rng.sample(whos, count), rng.sample(whats, count), strict=True)
            }
            yield looked_up(rng, " ".join(facts.values()), {"Quote": facts})
        elif kind == "hops":
            hop = next(hops)
            text = _question_text("hotpotqa", hop)
            yield looked_up(rng, text, {"Quote": {title: " ".join(inside) for title, inside in hop.paragraphs}})
        else:
            story = next(stories)
            sentences = [f"{s.strip('.')}." for s in story.context.split(". ")]
            firsts = [s.split()[0] for s in sentences]
            quotes = {first: s for first, s in zip(firsts, sentences, strict=True) if firsts.count(first) == 1}
            tables = choice_tables(story.choices) | ({"Quote": quotes} if quotes else {})
            yield looked_up(rng, _question_text("cosmosqa", story), tables)


def _question_text(family: str, problem: HopQuestion | Narrative) -> str:
    task = FAMILIES[family]()
    return task.question_text(task.parse(micro.row_of(problem, 0), "0"))


def choice_tables(choices: Sequence[str]) -> dict[str, Table]:
    """From the words of a choice to its letter and back; what was asked for is said again."""
    pairs = list(zip("ABCDEF", choices, strict=False))
    return {
        "Letter": {choice: f"{choice}: {letter}" for letter, choice in pairs},
        "Choice": {letter: f"{letter}: {choice}" for letter, choice in pairs},
    }


def letters(seed: int) -> Iterator[Chat]:
    """From the words of a choice to its letter, as the completions of cosmosqa write it."""
    rng = random.Random(f"letters/{seed}")
    while True:
        form = rng.choice(("answer", "letter", "sentence"))
        words = rng.sample(_WORDS, 4)
        text = "\n".join(f"{letter}. {word}" for letter, word in zip("ABCD", words, strict=True))
        chat = [{"role": "system", "content": wording(rng, "cosmosqa", "brief", form)}]
        for number, word in enumerate(rng.sample(words, 4)):
            ask = f"Choice: {word}"
            answer = plain("ABCD"[words.index(word)], form)
            chat.append({"role": "user", "content": ask if number else f"{text}\n\n{ask}"})
            chat.append({"role": "assistant", "content": f"{ask}\n{answer}"})
        yield chat


def copies(seed: int) -> Iterator[Chat]:
    """Random words to be repeated: dense practice in finding where one is in a text and what comes next.

    Where the words are few, the one before does not tell which comes next.
    """
    rng = random.Random(f"copies/{seed}")
    while True:
        words = rng.sample(_WORDS, rng.choice((8, 30, len(_WORDS), len(_WORDS))))
        text = " " + " ".join(rng.choice(words) for _ in range(rng.randint(10, 40)))
        yield [
            {"role": "system", "content": "Repeat the text."},
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
        ]


def chats(name: str, seed: int) -> Iterator[Chat]:
    """The endless mixture of that name; each chat ends with an assistant turn."""
    rng = random.Random(f"corpus/{name}/{seed}")
    sources = {family: items(family, seed) for family in FAMILIES}
    others = {"copy": copies(seed), "drill": drills(seed), "letter": letters(seed)}
    while True:
        kind = _draw(rng, MIXTURES[name])
        if kind in others:
            yield next(others[kind])
        elif kind == "rewrite":
            family = rng.choice(list(FAMILIES))
            yield rewritten(rng, family, sources[family])
        else:
            yield answered(rng, kind, sources[kind])
