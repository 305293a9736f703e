"""One spelling for what MATH answers write in many: characters, LaTeX commands, numbers and units.

Pure string work, no mathematics: equality.py decides what is equal. Every function takes and returns text.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_CHARACTERS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "√": r"\sqrt", "∞": r"\infty ", "°": r"^\circ ", "×": r"\times ", "·": r"\cdot ", "÷": "/", "±": r"\pm ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∈": r"\in ", "⟨": "(", "⟩": ")",
    "ℝ": "(-\\infty,\\infty)",
}  # fmt: skip
_TEXT = r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|hbox|math(?:rm|bf|it|sf|tt)|boldsymbol|operatorname|emph)"
# Applied in order. Left out on purpose: anything that would need to know what an expression means.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!\\)\\[()\[\]]", " "),  # math delimiters
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|rm|bf|it)(?![A-Za-z])", ""),
        (r"\\phantom\s*\{[^{}]*\}", ""),
        (r"\\(?:ldots|dots|cdots)(?![A-Za-z])", "..."),
        (_TEXT + r"\s*\{", r"\\text{"),
        (r"\\text\{\s*(,?)\s*(?:and|or)\s*\}", r" \1,"),
        (r"\\text\{\s*,?\s*\}", ","),
        (r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", ","),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"(\d)(?:\s*\\[!,;: ]\s*|~)*(?:\{,\}|,\s*\\!)\s*(?=\d{3}(?!\d))", r"\1"),  # 10,\!000 and 10{,}000
        (r"\{,\}", ","),
        (r"(?<=[c}])\{(\d{1,3}),(\d{3})\}", r"{\1\2}"),  # \frac{1}{5,525}
        (r"(?<=[c}])\{(\d{1,3}),(\d{3}),(\d{3})\}", r"{\1\2\3}"),
        (r"(?<!\\)\\(?:[!,;:>/ ]|q?quad(?![A-Za-z]))|~", " "),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}|∅", r"\\emptyset"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\(?:mathbb|Bbb)\s*\{?R\}?|\\(?:R|reals)(?![A-Za-z])", r"(-\\infty,\\infty)"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:leq|leqslant)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geq|geqslant)(?![A-Za-z])|>=", r"\\ge "),
        (r"\^?\{?\\(?:circ|degree)(?![A-Za-z])\s*\}?", r"^\\circ "),
        (r"\^\s*\{\s*\^\\circ\s*\}", r"^\\circ "),
        (r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])", "|"),
        (r"\\begin\{array\}\s*\{[^{}]*\}", r"\\begin{matrix}"),
        (r"\\end\{array\}", r"\\end{matrix}"),
        (r"[\[(]\s*\\begin\{matrix\}", r"\\begin{pmatrix}"),
        (r"\\end\{matrix\}\s*[\])]", r"\\end{pmatrix}"),
        (r"\{bmatrix\}|\{Bmatrix\}|\{smallmatrix\}", "{pmatrix}"),
        (r"\*\*", "^"),
        (r"(?<![A-Za-z\\])(sqrt|pi|infinity|infty|sin|cos|tan|cot|sec|csc|log|ln)(?![A-Za-z])", r"\\\1 "),
        (r"\\infinity(?![A-Za-z])", r"\\infty"),
        (r"\+\s*\\infty", r"\\infty"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*([A-Za-z\d])", r"\\sqrt{\1}"),
        (r"\\frac\s*([A-Za-z\d])", r"\\frac{\1}"),
        (r"\\frac\s*(\\[a-z]+)\s*", r"\\frac{\1}"),
        (r"(\\frac\s*\{(?:[^{}]|\{[^{}]*\})*\})\s*([A-Za-z\d])", r"\1{\2}"),
        (r"(\\frac\s*\{(?:[^{}]|\{[^{}]*\})*\})\s*(\\[a-z]+)\s*(?!\s*\{)", r"\1{\2}"),
        (r"\^\s*(-?\d{2,})", r"^{\1}"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"([_^])\s*(\d)(?=\s+\d)", r"\1{\2}"),  # \log_2 8
        (r"(?<![\w.}])(-?\d+)\s+(\d+)/(\d+)(?![\w.])", r"\1\\frac{\2}{\3}"),  # 3 4/5, the mixed number
        (r"\s+", " "),
    ]
]
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def _character(c: str) -> str:
    if c.isascii():
        return c
    if c in _CHARACTERS:
        return _CHARACTERS[c]
    decomposed = unicodedata.normalize("NFKC", c)
    if "\u2044" in decomposed:  # one half and its like
        top, _, bottom = decomposed.partition("\u2044")
        return rf"\frac{{{top}}}{{{bottom}}}"
    if unicodedata.decomposition(c).startswith("<super>"):
        return f"^{{{decomposed}}}"
    if c.isdecimal():
        return str(unicodedata.decimal(c))
    return decomposed if decomposed.isascii() else c


def canonical(text: str) -> str:
    """The answer in one spelling; still LaTeX. Dollar amounts keep `\\$`, all other dollar signs go."""
    text = "".join(map(_character, text.replace("\x00", "")))
    text = re.sub(r"(?<!\\)\$", "", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return tidy(text)


def tidy(text: str) -> str:
    """Without outer spaces, final punctuation and braces around the whole."""
    text = text.strip().rstrip(".,;:").strip()
    while text.startswith("{") and text.endswith("}") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start` (any kind closes any: `[0,1)`); -1 without one."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return -1


def split(text: str, separators: str) -> list[str]:
    """Parts of `text` between separators outside all brackets; empty parts are left out."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and c in separators:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part for part in map(tidy, parts) if part]


def squeeze(text: str) -> str:
    """Without spaces, but `1 2` is not 12: two canonical answers equal after this are the same text."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def number(text: str) -> Fraction | None:
    """Exact value of a plain number: integer, decimal, `a/b`, `\\frac{a}{b}`, mixed, `1.2e3`, repeating decimal."""
    text = squeeze(text)
    if len(text) > 400:
        return None
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,2})?", text):
        return Fraction(text)
    ratio = re.fullmatch(r"([-+]?)(\d*)(?:\\frac\{(-?\d+)\}\{(-?\d+)\}|(?<!\d)(-?\d+)/(-?\d+))", text) or re.fullmatch(
        r"([-+]?)()(?:()()(\d+)/(-?\d+))", text
    )
    if ratio:
        sign, whole, a, b, c, d = ratio.groups()
        top, bottom = int(a or c), int(b or d)
        if bottom == 0 or (whole and (top < 0 or bottom < 0)):
            return None
        return (int(whole or 0) + Fraction(top, bottom)) * (-1 if sign == "-" else 1)
    repeating = re.fullmatch(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar)\{?(\d+)\}?", text)
    if repeating:
        sign, whole, fixed, cycle = repeating.groups()
        tail = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
        magnitude = Fraction(f"{whole or 0}.{fixed or 0}") + tail
        return -magnitude if sign == "-" else magnitude
    return Fraction(_WORDS.index(text.lower())) if text.lower() in _WORDS else None
