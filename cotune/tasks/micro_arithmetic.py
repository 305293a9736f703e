"""Word problems and small equations by seed: what `micro-gsm8k` and `micro-math` are made of.

A generator returns the parts of a problem (question, worked lines, answer), so that the task can write them as an
official row and the tiny model's corpus can write them in other styles. Knows nothing of splits, rows or prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cotune.tasks.micro_names import ITEMS, PEOPLE, choose_kind

# Share of each kind by difficulty. 0 is the tiny model's pretraining mixture (some kinds common, some rare, some
# absent), 1 the benchmark, 2 a harder one. "bulk" and "product" (two-digit products) stay hard for a tiny model.
WORD_MIX: tuple[Mapping[str, float], ...] = (
    {"one": 0.24, "two": 0.32, "three": 0.32, "times": 0.08, "four": 0.04},
    {"one": 0.18, "two": 0.18, "three": 0.22, "four": 0.14, "times": 0.14, "share": 0.08, "bulk": 0.06},
    {"three": 0.15, "four": 0.30, "times": 0.20, "share": 0.20, "bulk": 0.15},
)
# Range of the first number by difficulty: small ones let a bare answer be right now and then.
WORD_START = ((3, 20), (3, 8), (3, 20))
EQUATION_MIX: tuple[Mapping[str, float], ...] = (
    {"linear": 0.26, "paren": 0.26, "both": 0.16, "compute": 0.24, "remainder": 0.04, "negative": 0.04},
    {
        "linear": 0.14, "paren": 0.18, "both": 0.14, "compute": 0.16, "remainder": 0.06, "negative": 0.06,
        "system": 0.10, "power": 0.08, "product": 0.08,
    },
    {
        "paren": 0.15, "both": 0.15, "compute": 0.10, "remainder": 0.10, "negative": 0.10, "system": 0.15,
        "power": 0.10, "product": 0.15,
    },
)  # fmt: skip


@dataclass(frozen=True)
class WordProblem:
    """`equations` are like "5+3=8", one for each of `lines` (sentences in which `{}` stands for the equation)."""

    kind: str
    question: str
    lines: tuple[str, ...]
    equations: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Equation:
    """`steps` are LaTeX without dollar signs; the last one ends with the answer."""

    kind: str
    problem: str
    steps: tuple[str, ...]
    answer: int
    subject: str


_GAIN = (
    "{He} buys {n} more.", "{He} finds {n} more.", "{other} gives {him} {n} more.", "{He} gets {n} more from {other}.",
    "{He} wins {n} more.",
)  # fmt: skip
_LOSS = (
    "{He} gives {n} to {other}.", "{He} loses {n}.", "{He} sells {n}.", "{He} throws away {n}.", "{other} takes {n}.",
)  # fmt: skip
_JOIN = ("", "Then ", "Next ", "Later ")


def word_problem(rng: random.Random, difficulty: int) -> WordProblem:
    """A story about one quantity, changed by one to four events."""
    kind = choose_kind(rng, WORD_MIX[difficulty])
    while True:
        problem = _story(rng, kind, WORD_START[difficulty])
        if problem is not None:
            return problem


def _story(rng: random.Random, kind: str, start_range: tuple[int, int]) -> WordProblem | None:
    """One attempt; None when the numbers do not come out whole and between 1 and 60 (bulk: 1 to 999)."""
    name, he, him = rng.choice(PEOPLE)
    other = rng.choice([p[0] for p in PEOPLE if p[0] != name])
    item = rng.choice(ITEMS)
    plan = ["plain"] * {"one": 1, "two": 2, "three": 3, "four": 4, "times": 2, "share": 2, "bulk": 1}[kind]
    if kind in ("times", "share", "bulk"):
        plan.insert(rng.randrange(len(plan) + 1), rng.choice(("bags", "multiply")) if kind == "times" else kind)
    start = have = rng.randint(*start_range)
    sentences = [f"{name} has {start} {item}."]
    lines: list[str] = []
    equations: list[str] = []

    def work(line: str, left: int, sign: str, right: int, result: int) -> int:
        lines.append(line)
        equations.append(f"{left}{sign}{right}={result}")
        return result

    for step in plan:
        now = f"{name} has {{}} {item}."
        number = rng.randint(2, 9)
        if step == "plain" and rng.random() < 0.5:
            text = rng.choice(_GAIN)
            have = work(now, have, "+", number, have + number)
        elif step == "plain":
            text = rng.choice(_LOSS)
            have = work(now, have, "-", number, have - number)
        elif step == "multiply":
            number = rng.choice((2, 3))
            text = "{His} number of {item} becomes {n} times as large."
            have = work(now, have, "*", number, have * number)
        elif step == "share":
            number = rng.choice((2, 3))
            text = "{He} splits them into {n} equal piles and keeps one pile."
            if have % number:
                return None
            have = work(now, have, "/", number, have // number)
        else:
            number, size = (rng.randint(2, 5), rng.randint(2, 5)) if step == "bags" else _two_digit_pair(rng)
            text = f"{{He}} buys {{n}} bags with {size} {item} each."
            bought = work(f"The bags have {{}} {item}.", number, "*", size, number * size)
            have = work(now, have, "+", bought, have + bought)
        his = "His" if he == "He" else "Her"
        text = text.format(He=he, him=him, His=his, other=other, n=number, item=item)
        join = rng.choice(_JOIN)
        sentences.append(join + (text[0].lower() + text[1:] if join and not text.startswith(other) else text))
        if not 1 <= have <= (999 if kind == "bulk" else 60):
            return None
    question = " ".join(sentences) + f" How many {item} does {name} have now?"
    return WordProblem(kind, question, tuple(lines), tuple(equations), have)


def _two_digit_pair(rng: random.Random) -> tuple[int, int]:
    return rng.randint(12, 29), rng.randint(12, 29)


def equation(rng: random.Random, difficulty: int) -> Equation:
    """A linear equation, a small computation, or one of the rarer kinds."""
    kind = choose_kind(rng, EQUATION_MIX[difficulty])
    return _EQUATIONS[kind](rng)


def _signed(number: int) -> str:
    return f"+ {number}" if number >= 0 else f"- {-number}"


def _solve(rng: random.Random, given: str, steps: list[str], answer: int, kind: str) -> Equation:
    frame = rng.choice(("Solve ${}$ for $x$.", "If ${}$, what is $x$?", "What value of $x$ satisfies ${}$?"))
    return Equation(kind, frame.format(given), tuple(steps), answer, "Algebra")


def _compute(rng: random.Random, given: str, steps: list[str], answer: int, kind: str) -> Equation:
    frame = rng.choice(("Compute ${}$.", "What is ${}$?", "Find the value of ${}$."))
    return Equation(kind, frame.format(given), tuple(steps), answer, "Prealgebra")


def _linear(rng: random.Random, sign: int = 1, kind: str = "linear") -> Equation:
    a, x, b = rng.randint(2, 9), sign * rng.randint(2, 9), rng.choice((-1, 1)) * rng.randint(1, 9)
    c = a * x + b
    steps = [f"{a}x = {c} {_signed(-b)} = {c - b}", f"x = {c - b} / {a} = {x}"]
    return _solve(rng, f"{a}x {_signed(b)} = {c}", steps, x, kind)


def _paren(rng: random.Random) -> Equation:
    a, x, b = rng.randint(2, 6), rng.randint(2, 9), rng.randint(1, 6)
    c = a * (x + b)
    steps = [f"x + {b} = {c} / {a} = {x + b}", f"x = {x + b} - {b} = {x}"]
    return _solve(rng, f"{a}(x + {b}) = {c}", steps, x, "paren")


def _both(rng: random.Random) -> Equation:
    a, x, b, c = rng.randint(4, 9), rng.randint(2, 9), rng.randint(1, 9), rng.randint(2, 3)
    d = (a - c) * x + b
    steps = [f"{a - c}x = {d} - {b} = {d - b}", f"x = {d - b} / {a - c} = {x}"]
    return _solve(rng, f"{a}x + {b} = {c}x + {d}", steps, x, "both")


def _computation(rng: random.Random) -> Equation:
    a, b, c, d = (rng.randint(2, 6) for _ in range(4))
    if rng.random() < 0.5:
        total = a * b + c * 2
        steps = [rf"{a} \cdot {b} = {a * b}", rf"{c} \cdot 2 = {c * 2}", f"{a * b} + {c * 2} = {total}"]
        return _compute(rng, rf"{a} \cdot {b} + {c} \cdot 2", steps, total, "compute")
    total = (a + b) * c - d
    steps = [f"{a} + {b} = {a + b}", rf"{a + b} \cdot {c} = {(a + b) * c}", f"{(a + b) * c} - {d} = {total}"]
    return _compute(rng, rf"({a} + {b}) \cdot {c} - {d}", steps, total, "compute")


def _remainder(rng: random.Random) -> Equation:
    d, q = rng.randint(3, 9), rng.randint(2, 12)
    r = rng.randint(1, d - 1)
    n = d * q + r
    problem = f"What is the remainder when {n} is divided by {d}?"
    steps = (rf"{d} \cdot {q} = {d * q}", f"{n} - {d * q} = {r}")
    return Equation("remainder", problem, steps, r, "Number Theory")


def _system(rng: random.Random) -> Equation:
    y = rng.randint(1, 20)
    x = y + rng.randint(1, 20)
    problem = f"If $x + y = {x + y}$ and $x - y = {x - y}$, what is $x$?"
    steps = (f"2x = {x + y} + {x - y} = {2 * x}", f"x = {2 * x} / 2 = {x}")
    return Equation("system", problem, steps, x, "Algebra")


def _power(rng: random.Random) -> Equation:
    x, a, b = rng.randint(2, 9), rng.randint(2, 9), rng.choice((-1, 1)) * rng.randint(1, 9)
    square, part = x * x, a * x
    steps = (
        rf"x^2 = {x} \cdot {x} = {square}",
        rf"{a}x = {a} \cdot {x} = {part}",
        f"{square} + {part} = {square + part}",
        f"{square + part} {_signed(b)} = {square + part + b}",
    )
    return Equation("power", f"If $x = {x}$, what is $x^2 + {a}x {_signed(b)}$?", steps, square + part + b, "Algebra")


def _product(rng: random.Random) -> Equation:
    a, b = rng.randint(12, 98), rng.randint(12, 98)
    return _compute(rng, rf"{a} \cdot {b}", [rf"{a} \cdot {b} = {a * b}"], a * b, "product")


_EQUATIONS: dict[str, Callable[[random.Random], Equation]] = {
    "linear": _linear,
    "paren": _paren,
    "both": _both,
    "compute": _computation,
    "remainder": _remainder,
    "negative": lambda rng: _linear(rng, -1, "negative"),
    "system": _system,
    "power": _power,
    "product": _product,
}
