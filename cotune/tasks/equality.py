"""When two MATH answers are equal. Runs in the grader process; math-verify's parser and its `verify` do the algebra.

Nothing here reads completions: both arguments are bare answers. An answer is parsed into a small tree (list, tuple
or interval, union, matrix, single value) by our own rules; only single values reach math-verify, one whole value
at a time, so that it never falls back to a fragment. The conventions, all ours unless a row forces them:

- Same text after `canonical` (spacing, \\dfrac, delimiters, `10,\\!000`, unicode digits and signs): equal.
- Numbers are exact. 0.5 is 1/2 and 1e3 is 1000, but 0.33333333 is not 1/3 and 3.1415926 is not \\pi.
- Equal expressions are equal however they are written: factored, expanded, unrationalised.
- A unit, percent or degree sign may be missing on one side; stated on both it must be the same. 50\\% is 50, not 0.5.
- A number with a base subscript: same digits, and the base the same or missing on one side. No conversion.
- A bare list and a set are the same thing and have no order; repeated values count. `a \\pm b` is two values.
- (1,2), [1,2] and (1,2] are ordered, and their brackets matter: no list or set equals them. A union has no order.
- An inequality in one name is its interval: `x \\ge 2` is `[2,\\infty)`.
- pmatrix and bmatrix are the same; entries are compared one by one. A column vector is not a tuple.
- `name = value` is the value when the other side has no name or the same name (`x=5` is `5`, not `y=5`). A name is a
  letter, capitals, f(x) or \\text{}. Any other equation stands for itself: `x+y=5` is not `5`, `2x=10` is not `x=5`,
  `x=y=5` is not `5`. Equations in two or more letters are equal when they are proportional.
- An equation between numbers counts as its last side (`2+3=5` is 5), `a \\approx b` as `a`. In a reference, any side.
- Words are compared as words, in any case; a single letter and capitals (B, CD) as they are; (B) is B.
- `1,234` outside brackets is a number, or where that is not equal the list 1, 234; `(1,234)` is a pair.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cotune.tasks.notation import canonical, closing, number, split, squeeze, tidy
from cotune.tasks.units import FUNCTION, compatible, split_unit

_NAME = re.compile(
    r"(?:\\text\{[^{}=]*\}|(?:\\(?:angle|overline|triangle))?\s*\{?[A-Z]{1,4}\}?|[A-Za-z]|\\[a-z]+)(?:_\{?\w+\}?)?'*"
    r"(?:\([^()=]*\))?"
)
_FLIPS = {"<": ">", r"\le": r"\ge"}
_FLIPPED = {more: less for less, more in _FLIPS.items()}
_DIGITS = 60  # of evaluation; two closed expressions that agree to 50 digits are equal


@dataclass(frozen=True)
class Group:
    """Several values: `kind` is list, matrix, union, or the two brackets of a tuple or interval."""

    kind: str
    items: tuple[Tree, ...]


Tree = Group | str


def equal(reference: str, prediction: str) -> bool:
    """Whether the two answers are equal under the conventions above. May be slow or raise: run it in the grader."""
    left, right = canonical(reference), canonical(prediction)
    if squeeze(left) == squeeze(right):
        return bool(squeeze(left))
    if not left or not right:
        return False
    return any(_same(a, b) for a in _readings(left, any_side=True) for b in _readings(right, any_side=False))


def warm_up() -> None:
    """Import and exercise everything slow, so that the first comparison fits its time limit."""
    equal("x^2 - 1", "(x - 1)(x + 1)")
    equal(r"\sqrt{2}", r"\frac{2}{\sqrt{2}}")


def _readings(text: str, any_side: bool) -> list[Tree]:
    """The trees that an answer may stand for."""
    texts = [text]
    sides = [side.strip() for side in re.split(r"\\approx|=", text)]
    if len(sides) > 1 and all(sides[1:]) and ("\\approx" in text or all(map(_closed, sides))):
        if any_side:
            texts += filter(None, sides)
        else:
            texts = [sides[0] or sides[1]] if "\\approx" in text else [text, sides[-1]]
    joined = [_join_thousands(text) for text in texts]
    return [parse(text) for text in dict.fromkeys(joined + texts)]


def _join_thousands(text: str) -> str:
    """`1,234` -> `1234` outside all brackets; inside them a plain comma separates."""
    parts, start = [], 0
    for m in re.finditer(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", text):
        before = re.sub(r"\\left|\\right", "", text[: m.start()])
        if all(before.count(opened) == before.count(closed) for opened, closed in ("()", "[]", "{}")):
            parts += [text[start : m.start()], m[0].replace(",", "")]
            start = m.end()
    return "".join([*parts, text[start:]])


def _closed(text: str) -> bool:
    """No variable in it: only digits, operators, commands and units."""
    return not re.search(r"[A-Za-z]", re.sub(r"\\text\{[^{}]*\}|\\[a-z]+", "", split_unit(text)[0]))


def parse(text: str) -> Tree:
    """The tree of one canonical answer; a leaf is the text of a single value."""
    text = tidy(text)
    named = re.fullmatch(r"(?:[A-Za-z]|\\text\{[^{}]*\})\s*(?:\\in\b|=)([^=]*)", text)
    if named and isinstance(group := parse(named[1]), Group):  # x = 1, 2 or x \in [0, 1]
        return group
    whole_text = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    if whole_text:
        text = re.sub(r",?\s*\b(?:and|or)\b", ",", whole_text[1]) if "," in text or len(text) < 20 else text
    parts = split(text, ",;")
    if len(parts) > 1:
        return _flat("list", [parse(t) for part in parts for t in _signs(part)])
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return _flat("list", [parse(t) for part in split(text[2:-2], ",;") for t in _signs(part)])
    unions = [tidy(part) for part in re.split(r"\\cup\b", text)]
    if len(unions) > 1:
        return Group("union", tuple(map(parse, unions)))
    matrix = re.fullmatch(r"\\begin\{([pv]?matrix)\}(.*)\\end\{\1\}", text, re.DOTALL)
    if matrix and "\\begin" not in matrix[2]:
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if row.strip()]
        return Group(matrix[1], tuple(Group("row", tuple(map(parse, row.split("&")))) for row in rows))
    if text[:1] in ("(", "[") and closing(text, 0) == len(text) - 1:
        inner = split(text[1:-1], ",;")
        if len(inner) > 1:
            return Group(text[0] + text[-1], tuple(map(parse, inner)))
        if text[0] == "(" and re.fullmatch(r"(?:\\text\{)?\s*[A-Za-z]\s*\}?", text[1:-1]):
            return tidy(text[1:-1].removeprefix(r"\text"))
    return _interval(text) or _flat("list", _signs(text))


def _interval(text: str) -> Group | None:
    """The interval of an inequality in one name: `x \\ge 2`, `2 < x`, `0 < f(x) \\le 1`."""
    parts = [part.strip() for part in re.split(r"(<|>|\\[lg]e(?![A-Za-z]))", text)]
    if len(parts) == 5 and parts[1] in _FLIPPED and parts[3] in _FLIPPED:
        parts = [_FLIPPED.get(part, part) for part in parts[::-1]]
    elif len(parts) == 3 and _NAME.fullmatch(parts[2]):
        parts = [parts[2], _FLIPPED.get(parts[1]) or _FLIPS[parts[1]], parts[0]]
    if len(parts) == 5 and _NAME.fullmatch(parts[2]) and parts[1] in _FLIPS and parts[3] in _FLIPS:
        low, left, _, right, high = parts
    elif len(parts) == 3 and _NAME.fullmatch(parts[0]) and not _NAME.fullmatch(parts[2]):
        _, sign, value = parts
        low, left, right, high = (
            (r"-\infty", "<", sign, value) if sign in _FLIPS else (value, _FLIPPED[sign], "<", r"\infty")
        )
    else:
        return None
    return Group(("(" if left == "<" else "[") + (")" if right == "<" else "]"), (tidy(low), tidy(high)))


def _flat(kind: str, items: Sequence[Tree]) -> Tree:
    return items[0] if len(items) == 1 else Group(kind, tuple(items))


def _signs(text: str) -> tuple[str, ...]:
    """`a \\pm b` -> `a + b` and `a - b`; anything else alone."""
    if text.count(r"\pm") != 1 or text.startswith(("(", "[")):
        return (text,)
    return tidy(text.replace(r"\pm", "+")).removeprefix("+"), text.replace(r"\pm", "-")


def _same(left: Tree, right: Tree) -> bool:
    if isinstance(left, str) and isinstance(right, str):
        return _same_leaf(left, right)
    if isinstance(left, str) or isinstance(right, str):
        return False
    if left.kind != right.kind or len(left.items) != len(right.items):
        return False
    if left.kind in ("list", "union"):
        return _same_unordered(left.items, right.items)
    return all(map(_same, left.items, right.items))


def _same_unordered(left: Sequence[Tree], right: Sequence[Tree]) -> bool:
    rest = list(right)
    for item in left:
        match = next((i for i, other in enumerate(rest) if _same(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


# --- single values ---------------------------------------------------------------------------------------------


def _same_leaf(left: str, right: str) -> bool:
    if squeeze(left) == squeeze(right):
        return True
    if "=" in left or "=" in right:
        return _same_equation(left, right)
    (a, unit_a), (b, unit_b) = split_unit(left), split_unit(right)
    if not compatible(unit_a, unit_b):
        return False
    a, b = tidy(a), tidy(b)
    for read in (_by_text, _by_number, _by_base, _by_ratio, _by_word):
        decided = read(a, b)
        if decided is not None:
            return decided
    return _same_value(a, b)


def _by_text(a: str, b: str) -> bool | None:
    return True if squeeze(a) == squeeze(b) else None


def _by_number(a: str, b: str) -> bool | None:
    x, y = number(_plain(a)), number(_plain(b))
    return x == y if x is not None and y is not None else None


def _by_base(a: str, b: str) -> bool | None:
    (x, base_x), (y, base_y) = _base(a), _base(b)
    return x == y and compatible(base_x, base_y) if base_x or base_y else None


def _base(text: str) -> tuple[str, str]:
    """(digits, base or "") of `1011_2`, `\\text{A5}_{11}` and the like."""
    text = re.sub(r"\\text\{(\w+)\}", r"\1", squeeze(text))
    found = re.fullmatch(r"(-?[\dA-Z]+)_\{?(\d+)\}?", text)
    return (found[1], found[2]) if found else (text, "")


def _by_ratio(a: str, b: str) -> bool | None:
    if ":" not in a and ":" not in b:
        return None
    left, right = a.split(":"), b.split(":")
    return len(left) == len(right) and all(map(_same_leaf, left, right))


def _by_word(a: str, b: str) -> bool | None:
    x, y = _word(a), _word(b)
    if x is None or y is None:
        return None if len(x or y or "x") == 1 else False  # a lone letter may equal an expression, a word cannot
    return x == y


def _plain(text: str) -> str:
    """The content of an answer that is one \\text{...}."""
    whole = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return whole[1].strip() if whole else text


def _word(text: str) -> str | None:
    """The word that an answer is: what \\text{} holds, or letters without mathematics in them; else None."""
    plain = _plain(text)
    if plain == text and not re.fullmatch(r"[A-Z]{2,}|[A-Za-z][a-z]{2,}(?:[\s-][A-Za-z]+)*|[A-Za-z]", text):
        return None
    plain = " ".join(re.findall(r"\w+", plain))
    return plain if len(plain) < 2 or plain.isupper() else plain.casefold()


def _same_equation(left: str, right: str) -> bool:
    (name_a, a), (name_b, b) = _named(left), _named(right)
    named = (name_a and "=" not in right) or (name_b and "=" not in left) or (name_a and name_a == name_b)
    if named and _same(parse(a), parse(b)):
        return True
    if left.count("=") != 1 or right.count("=") != 1:
        return False
    letters = set(re.findall(r"(?<![\\A-Za-z])[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", left)))
    return len(letters) > 1 and _proportional(left, right)


def _named(text: str) -> tuple[str, str]:
    """(name, value) of `name = value` or `value = name`; ("", text) for anything else."""
    left, equals, right = (part.strip() for part in text.partition("="))
    if equals and "=" not in right:
        for name, value in ((left, right), (right, left)):
            if _NAME.fullmatch(name):
                return squeeze(name), value
    return "", text


def _proportional(left: str, right: str) -> bool:
    """lhs - rhs of the one is a non-zero constant times that of the other."""
    import sympy  # type: ignore[import-untyped]

    sides = [_expression(side) for side in (*left.split("="), *right.split("="))]
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return False
    a, b = sides[0] - sides[1], sides[2] - sides[3]
    if a.free_symbols != b.free_symbols:
        return False
    ratio = sympy.simplify(a.doit() / b.doit())
    return bool(ratio.is_number and ratio.is_finite and ratio.is_nonzero)


def _same_value(a: str, b: str) -> bool:
    """Mathematically equal expressions; False when one cannot be read as one whole expression."""
    import sympy
    from math_verify import verify

    x, y = _expression(a), _expression(b)
    if x is None or y is None:
        return False
    try:
        if isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr):
            if not x.free_symbols and not y.free_symbols:
                return _same_constant(x.doit(), y.doit())
            if x.is_Symbol or y.is_Symbol:  # verify compares a lone symbol by name only
                return bool(sympy.simplify(x.doit() - y.doit()) == 0)
        return bool(verify([x], [y], timeout_seconds=None, raise_on_error=True))
    except (TypeError, ValueError, AttributeError, NotImplementedError):  # sympy: no meaning, so not shown equal
        return False


def _same_constant(x: Any, y: Any) -> bool:
    import sympy

    if x.has(sympy.nan, sympy.zoo) or y.has(sympy.nan, sympy.zoo):  # a division by zero equals nothing
        return False
    if (x.is_Rational and y.is_Rational) or x.is_finite is False or y.is_finite is False:
        return bool(x == y)
    gap, size = abs((x - y).evalf(_DIGITS, maxn=400)), abs(x.evalf(_DIGITS))
    return bool(gap <= (size + 1) * 10 ** (10 - _DIGITS))


def _expression(text: str) -> Any:
    """math-verify's reading of one whole expression as a sympy object, or None.

    Decimals become fractions first, so that nothing is rounded. The parser adds numbers that stand side by side:
    mixed numbers are written as the sum they are, anything else of the kind is refused or multiplied.
    """
    import sympy
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    if re.search(r"\d\s+\d|\\text", text):
        return None
    if FUNCTION.search(text):
        text = re.sub(r"(\d+)\s*\^\\circ", r"(\\frac{\1\\pi}{180})", text)
    text = re.sub(r"(?<![\d.])(\d*)\.(\d+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
    text = re.sub(r"(?<![\w.}^])(\d+)\s*(\\frac\{\d+\}\{\d+\})", r"(\1+\2)", text)
    text = re.sub(r"(?<=[\d)])\s*(?=\()", r"\\cdot ", text)
    imaginary = re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", re.sub(r"\\[a-z]+", " ", text))
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    try:
        parsed = latex2sympy(text, is_real=True, normalization_config=None, conversion_config=config)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser raises bare Exception for whatever it cannot read
        return None
    return parsed.subs(sympy.Symbol("i", real=True), sympy.I) if imaginary else parsed
