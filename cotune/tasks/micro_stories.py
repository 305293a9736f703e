"""Two-hop questions and short narratives by seed: what `micro-hotpotqa` and `micro-cosmosqa` are made of.

A generator returns the parts of a question, so that the task can write them as an official row and the tiny model's
corpus can write them in other styles. Knows nothing of splits, rows or prompts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cotune.tasks.micro_names import (
    INSTRUMENTS,
    JOBS,
    PEOPLE,
    PLACES,
    THINGS,
    TITLES,
    TOWNS,
    choose_kind,
)

# Share of each kind by difficulty: 0 the tiny model's pretraining, 1 the benchmark, 2 harder.
HOP_MIX: tuple[Mapping[str, float], ...] = (
    {"bridge": 0.86, "older": 0.14},
    {"bridge": 0.62, "older": 0.12, "same": 0.16, "gap": 0.10},
    {"bridge": 0.40, "older": 0.15, "same": 0.20, "gap": 0.25},
)
STORY_MIX: tuple[Mapping[str, float], ...] = (
    {"place": 0.46, "holder": 0.38, "why": 0.12, "none": 0.04},
    {"place": 0.32, "holder": 0.24, "why": 0.12, "none": 0.08, "next": 0.14, "count": 0.10},
    {"place": 0.25, "holder": 0.20, "none": 0.10, "next": 0.20, "count": 0.25},
)
NONE_OF_THESE = "None of the above choices."


@dataclass(frozen=True)
class HopQuestion:
    """`paragraphs` are (title, sentences); `supporting` are (title, sentence index) in the order of reasoning."""

    kind: str
    question: str
    paragraphs: tuple[tuple[str, tuple[str, ...]], ...]
    supporting: tuple[tuple[str, int], ...]
    answer: str
    link: str  # what leads from one supporting sentence to the other


@dataclass(frozen=True)
class Narrative:
    """`key` is the sentence of the context that decides (empty: there is none); `choices[label]` is right."""

    kind: str
    context: str
    question: str
    choices: tuple[str, ...]
    label: int
    key: str


# what a work is, who made it (role), and the sentence that says so
_WORKS = (("film", "director"), ("book", "author"), ("song", "singer"))
_ATTRIBUTES: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("Which town is the {} of {} from?", "{} is from {}.", TOWNS),
    ("In which town does the {} of {} live?", "{} lives in {}.", TOWNS),
    ("What is the job of the {} of {}?", "{} works as a {}.", JOBS),
    ("Which instrument does the {} of {} play?", "{} plays the {}.", INSTRUMENTS),
)
_FILLER = ("{} is famous.", "{} is not famous.", "{} is tall.", "{} is short.")
_WORK_FILLER = ("{} is a long {}.", "{} is a short {}.", "{} is an old {}.", "{} is a new {}.")


def hop_question(rng: random.Random, difficulty: int) -> HopQuestion:
    """A question over five short paragraphs, some of which are distractors."""
    kind = choose_kind(rng, HOP_MIX[difficulty])
    return _bridge(rng) if kind == "bridge" else _comparison(rng, kind)


def _names(rng: random.Random, count: int) -> list[str]:
    return rng.sample([p[0] for p in PEOPLE], count)


def _about(rng: random.Random, title: str, filler: str, fact: str) -> tuple[tuple[str, tuple[str, ...]], int]:
    """A paragraph with the fact first, second or alone, and the place of the fact."""
    if rng.random() < 0.4:
        return (title, (fact,)), 0
    index = rng.randrange(2)
    return (title, (fact, filler) if index == 0 else (filler, fact)), index


def _bridge(rng: random.Random) -> HopQuestion:
    """Work -> its maker -> an attribute of the maker; another work with its maker and a third person distract."""
    noun, role = rng.choice(_WORKS)
    ask, says, pool = rng.choice(_ATTRIBUTES)
    people = _names(rng, 3)
    values = rng.sample(pool, 3)
    works = rng.sample(TITLES, 2)
    paragraphs, where = [], {}
    for person, value in zip(people, values, strict=True):
        paragraph, where[person] = _about(rng, person, rng.choice(_FILLER).format(person), says.format(person, value))
        paragraphs.append(paragraph)
    for work, person in zip(works, people, strict=False):
        filler = rng.choice(_WORK_FILLER).format(work, noun)
        paragraph, where[work] = _about(rng, work, filler, f"The {role} of {work} is {person}.")
        paragraphs.append(paragraph)
    rng.shuffle(paragraphs)
    supporting = ((works[0], where[works[0]]), (people[0], where[people[0]]))
    return HopQuestion("bridge", ask.format(role, works[0]), tuple(paragraphs), supporting, values[0], people[0])


def _comparison(rng: random.Random, kind: str) -> HopQuestion:
    """Two of four people compared: who is older, the same town or not, how many years between them."""
    people = _names(rng, 4)
    if kind == "same":
        towns = rng.sample(TOWNS, 4)
        if rng.random() < 0.5:
            towns[1] = towns[0]
        facts = [f"{p} lives in {t}." for p, t in zip(people, towns, strict=True)]
        question = f"Do {people[0]} and {people[1]} live in the same town?"
        answer = "yes" if towns[0] == towns[1] else "no"
        link = f"{towns[0]}, {towns[1]}"
    else:
        ages = rng.sample(range(20, 80), 4)
        facts = [f"{p} is {a} years old." for p, a in zip(people, ages, strict=True)]
        older, younger = (0, 1) if ages[0] > ages[1] else (1, 0)
        question = f"Who is older, {people[0]} or {people[1]}?"
        answer = people[older]
        link = f"{ages[0]}, {ages[1]}"
        if kind == "gap":
            question = f"How many years older is {people[older]} than {people[younger]}?"
            answer = str(ages[older] - ages[younger])
    paragraphs, where = [], {}
    for person, fact in zip(people, facts, strict=True):
        paragraph, where[person] = _about(rng, person, rng.choice(_FILLER).format(person), fact)
        paragraphs.append(paragraph)
    rng.shuffle(paragraphs)
    supporting = ((people[0], where[people[0]]), (people[1], where[people[1]]))
    return HopQuestion(kind, question, tuple(paragraphs), supporting, answer, link)


_STATES = (
    ("was very hungry", "eat a meal"), ("was very tired", "go to sleep"), ("was very cold", "put on a coat"),
    ("was very thirsty", "drink some water"), ("was very ill", "see a doctor"), ("was very wet", "get a towel"),
    ("was very late", "start to run"), ("was very dirty", "take a bath"),
)  # fmt: skip
_CAUSES = ("lost the {}", "broke the {}", "found the {}", "won the {}", "sold the {}", "forgot the {}")
_MOODS = ("sad", "happy", "angry", "proud", "upset", "calm")
_MOVES = ("{} put the {} in the {}.", "{} moved the {} to the {}.", "{} left the {} in the {}.")


def narrative(rng: random.Random, difficulty: int) -> Narrative:
    """A story of three to five sentences with one question and four choices."""
    kind = choose_kind(rng, STORY_MIX[difficulty])
    people = rng.sample([p[0] for p in PEOPLE], 4)
    if kind in ("place", "none"):
        context, question, right, wrong, key = _places(rng, people, kind == "none")
    else:
        context, question, right, wrong, key = _TELLERS[kind](rng, people)
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Narrative(kind, context, question, tuple(choices), choices.index(right), key)


_Told = tuple[str, str, str, list[str], str]


def _places(rng: random.Random, people: list[str], unknown: bool) -> _Told:
    """Two things are put somewhere and moved; where is one of them (or, if `unknown`, a third) at the end?"""
    thing, other, third = rng.sample(THINGS, 3)
    places = rng.sample(PLACES, 5)
    moves = [(thing, places[0]), (thing, places[1]), (other, places[2])]
    rng.shuffle(moves)
    told = [rng.choice(_MOVES).format(p, t, w) for p, (t, w) in zip(people, moves, strict=False)]
    last = max(i for i, (t, _) in enumerate(moves) if t == thing)
    question = "Where is the {} at the end?"
    choices = places
    if unknown:
        return " ".join(told), question.format(third), NONE_OF_THESE, choices[:3], ""
    right = moves[last][1]
    wrong = [c for c in choices[:4] if c != right]
    return " ".join(told), question.format(thing), right, wrong, told[last]


def _holder(rng: random.Random, people: list[str]) -> _Told:
    """A thing is handed on twice while another thing changes hands."""
    thing, other = rng.sample(THINGS, 2)
    a, b, c, d = people
    chain = [f"{a} gave the {thing} to {b}.", f"{b} gave the {thing} to {c}."]
    aside = f"{rng.choice((a, c))} gave the {other} to {d}."
    told = list(chain)
    told.insert(rng.randrange(3), aside)
    return " ".join(told), f"Who has the {thing} at the end?", c, [a, b, d], chain[1]


def _why(rng: random.Random, people: list[str]) -> _Told:
    """Three people feel something, each for a reason of their own."""
    causes = [c.format(t) for c, t in zip(rng.sample(_CAUSES, 4), rng.sample(THINGS, 4), strict=True)]
    moods = rng.sample(_MOODS, 3)
    told = [f"{p} {c} and was {m}." for p, c, m in zip(people, causes, moods, strict=False)]
    asked = rng.randrange(3)
    right = causes[asked]
    wrong = [c for c in causes if c != right]
    return " ".join(told), f"Why was {people[asked]} {moods[asked]}?", right, wrong, told[asked]


def _next(rng: random.Random, people: list[str]) -> _Told:
    """A state suggests what comes next; two other people are in other states."""
    states = rng.sample(_STATES, 4)
    told = [f"{p} {s}." for p, (s, _) in zip(people, states[:3], strict=False)]
    asked = rng.randrange(3)
    wrong = [action for i, (_, action) in enumerate(states) if i != asked]
    question = f"What may {people[asked]} do next?"
    return " ".join(told), question, states[asked][1], wrong, told[asked]


def _count(rng: random.Random, people: list[str]) -> _Told:
    """People come and go; how many are there at the end?"""
    place = rng.choice(PLACES)
    inside = rng.randint(3, 9)
    told, here = [f"There were {inside} people in the {place}."], inside
    for _ in range(2):
        number = rng.randint(2, 6)
        coming = rng.random() < 0.5 or number >= here
        here += number if coming else -number
        told.append(f"{number} people {'came in' if coming else 'went out'}.")
    near = [n for n in range(1, 22) if n != here and abs(n - here) <= 3]
    wrong = [str(n) for n in rng.sample(near, 3)]
    return " ".join(told), "How many people are there at the end?", str(here), wrong, told[-1]


_TELLERS = {"holder": _holder, "why": _why, "next": _next, "count": _count}
