"""The unit at the end of a MATH answer: found, named once, compared. No conversion between units.

A measure (cm, hours, dollars, degrees, percent) is a unit; any other word after a number ("ways", "units") only
says what is counted and does not matter. So `5` is `5 cm`, but `5 cm` is not `5 km`.
"""

from __future__ import annotations

import re

_SPELLINGS = {
    "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "m": "m meter metre",
    "km": "km kilometer kilometre", "in": "in inch inche inches", "ft": "ft foot feet", "yd": "yd yard",
    "mi": "mi mile", "acre": "acre", "g": "g gm gram", "kg": "kg kilogram", "lb": "lb lbs pound", "oz": "oz ounce",
    "ton": "ton", "ml": "ml milliliter millilitre", "l": "l liter litre", "gal": "gal gallon", "s": "s sec second",
    "min": "min minute", "h": "h hr hour", "day": "day", "week": "week", "month": "month", "year": "year yr",
    "am": "am", "pm": "pm", "cent": "cent", "dollar": "dollar usd", "euro": "euro", "degree": "degree deg",
    "radian": "radian rad", "percent": "percent %", "mi/h": "mph", "km/h": "kmh kph",
}  # fmt: skip
MEASURES = {word: name for name, words in _SPELLINGS.items() for word in words.split()}
_POWERS = {"square": "^2", "sq": "^2", "squared": "^2", "cubic": "^3", "cubed": "^3"}
# Outside \text{} a single letter is a variable, so only longer words are read as a unit there.
_WORD = "|".join(sorted((w for w in [*MEASURES, *_POWERS, "unit", "per"] if len(w) > 1 and w.isalpha()), key=len)[::-1])
_PLAIN = re.compile(
    rf"(?P<head>.*[\d}})])\s*(?P<unit>(?:(?:(?:{_WORD})(?:s|es)?\b|[ap]\.\s?m\b)[\s.]*)+(?:\^\{{?[23]\}}?)?)",
    re.IGNORECASE | re.DOTALL,
)
_TEXT = re.compile(
    r"(?P<head>.*[^\s{(\[,_^])\s*\\text\{(?P<unit>[^{}]*)\}\s*(?P<power>\^\s*\{?\s*[23]\s*\}?)?", re.DOTALL
)
_COUNTED = re.compile(r"(?P<head>-?[\d.]+)\s(?P<unit>[a-z]{3,}(?:\s[a-z]+)*)")  # 18 apples
FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")


def split_unit(text: str) -> tuple[str, str]:
    """(expression, name of its measure or "") of one canonical answer."""
    text = text.strip()
    if text.startswith(r"\$"):
        return text[2:].strip(), "dollar"
    if text.startswith(r"-\$"):
        return "-" + text[3:].strip(), "dollar"
    for end, name in ((r"\%", "percent"), ("%", "percent"), (r"^\circ", "degree"), (r"\$", "dollar")):
        if text.endswith(end) and not FUNCTION.search(text):  # in \\cos 15^\\circ the degrees are the argument's
            return text.removesuffix(end).strip(), name
    found = _TEXT.fullmatch(text)
    if found and found["head"].strip():
        head, outer = split_unit(found["head"])
        return head, measure(found["unit"] + (found["power"] or "")) or outer
    found = _PLAIN.fullmatch(text) or _COUNTED.fullmatch(text)
    return (found["head"].strip(), measure(found["unit"])) if found else (text, "")


def measure(words: str) -> str:
    """`square centimeters`, `cm^2` and `sq. cm` -> `cm^2`; "" when no word in it is a measure."""
    power = "".join(re.findall(r"\^\s*\{?\s*([23])", words))
    names: list[str] = []
    divide = False
    for word in re.findall(r"[a-z]+|%", re.sub(r"\b([ap])\.\s*m\b", r"\1m", re.sub(r"\^.*", "", words.lower()))):
        if word in _POWERS:
            power = _POWERS[word][1]
            continue
        known = MEASURES.get(word) or MEASURES.get(word.removesuffix("s")) or MEASURES.get(word.removesuffix("es"))
        if known:
            names.append(("/" if divide else " " if names else "") + known)
        divide = word == "per"
    return "".join(names) + (f"^{power}" if names and power else "")


def compatible(left: str, right: str) -> bool:
    """The same measure, or one of the two unstated."""
    return left == right or not left or not right
