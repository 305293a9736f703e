"""What is read as the final answer of a completion, and the grade that follows. Pure except for MATH equality.

Every rule that decides a grade is here or in equality.py (when two MATH answers are equal), and GRADER_VERSION
names them all. Nothing here knows of rows, files or models; nothing read from a completion is evaluated.

A marker is what makes an answer explicit: `####`, a balanced `\\boxed{...}`, "answer:" or "the answer is". In a
truncated completion only an explicit answer counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from cotune.tasks.grader import GraderFailed, compare
from cotune.values import Grade, Outcome

# Recorded by every run; comparison refuses to mix versions. Bump when any grade could change.
GRADER_VERSION: str = "1"

LETTERS = ("A", "B", "C", "D")

_MARKER = re.compile(r"\banswer\b[*_]{0,3}\s?(?::|\bis\b(?:\s?:)?)[*_]{0,3}", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.])[-+\u2212]\s?)?(?:(?:\\?\$|[£€¥])\s?(?P<inner>[-\u2212])?)?"
    r"(?P<number>(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?P<over>/[1-9]\d{0,20}(?![\d/.]))?"
)
_LEAD_IN = re.compile(
    r"^\W*(?:the\s+)?(?:(?:best|correct|right|final)\s+)?(?:(?:answer|choice|option)\b\W*)?(?:is\b\W*)?", re.IGNORECASE
)
_MAX_NUMBER = 100  # characters; a longer run of digits is not an answer


@dataclass(frozen=True)
class Extracted:
    """The answer read from a completion; `explicit` when a marker names it as the final one."""

    text: str | None
    explicit: bool = False


def scrub(completion: str) -> str:
    """Lone surrogates become `?`, so that whatever is read can be written as UTF-8."""
    return completion.encode("utf-8", "replace").decode("utf-8")


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` or `\\fbox{...}` whose braces balance; None without one.

    `\\boxed 9` without braces is not a box (ours: two MATH train rows are unusable for it), and `\\{`, `\\}` do
    not count as braces. An unclosed box is passed over in favour of an earlier closed one.
    """
    opened: list[int] = []  # where the content of each open brace starts, negative unless the brace opens a box
    best: tuple[int, int] | None = None
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0] == "}":
            start = opened.pop() if opened else -1
            if start >= 0 and (best is None or start > best[0]):
                best = (start, token.start())
        elif token[0][-1] == "{" and token[0] != "\\{":
            opened.append(token.end() if len(token[0]) > 1 else -1)
    return text[best[0] : best[1]] if best else None


def marked(text: str) -> str | None:
    """What follows the last "answer:" or "answer is": the rest of that line, or the next line with text."""
    ends = [m.end() for m in _MARKER.finditer(text)]
    if not ends:
        return None
    rest = text[ends[-1] :].strip().strip("*_").strip()
    return rest.splitlines()[0].strip() if rest else None


# --- GSM8K -----------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[str]:
    """Every number in `text`, in order, as sign and digits: no commas, no currency. `7/2` is one number.

    A minus is a sign only where no operand stands before it, so `5-3` holds 5 and 3.
    """
    found = []
    for m in _NUMBER.finditer(text):
        if len(m[0]) <= _MAX_NUMBER:
            minus = "-" if (m["sign"] or m["inner"] or "").strip() in ("-", "\u2212") else ""
            found.append(f"{minus}{m['number'].replace(',', '')}{m['over'] or ''}")
    return found


def value(number: str) -> Fraction:
    """Exact value of a string from `numbers`."""
    top, _, bottom = number.partition("/")
    return Fraction(top) / Fraction(bottom or 1)


def _first_number(text: str) -> str | None:
    return next(iter(numbers(text)), None)


def marked_number(text: str) -> str | None:
    """The explicit final number: the first after the last `####`, else in the last box, else after "answer"."""
    _, mark, after = text.rpartition("####")
    boxed = last_boxed(text)
    if boxed is not None:
        fraction = re.fullmatch(r"\s*(-?)\s*\\[dt]?frac\{(\d{1,20})\}\{([1-9]\d{0,20})\}\s*", boxed)
        boxed = "{}{}/{}".format(*fraction.groups()) if fraction else re.sub(r"\\[!,]|[{}]", "", boxed)
    for candidate in (after if mark else None, boxed, marked(text)):
        number = _first_number(candidate) if candidate else None
        if number is not None:
            return number
    return None


def final_number(text: str) -> Extracted:
    """GSM8K's final answer: the marked number, else the last number of the text."""
    explicit = marked_number(text)
    if explicit is not None:
        return Extracted(explicit, explicit=True)
    return Extracted(next(reversed(numbers(text)), None))


def grade_number(reference: str, completion: str, truncated: bool) -> Grade:
    """GSM8K: equal as exact rational numbers (`18.00` is 18; units and percent signs do not count)."""
    expected = value(numbers(reference)[0])
    return _settle(
        lambda: final_number(scrub(completion)),
        lambda prediction: {"accuracy": float(value(prediction) == expected)},
        truncated,
    )


# --- MATH ------------------------------------------------------------------------------------------------------


def final_expression(text: str) -> Extracted:
    """MATH's final answer: the last box, else what is marked by `####` or "answer", else the last number."""
    boxed = last_boxed(text)
    if boxed is not None and boxed.strip():
        return Extracted(boxed.strip(), explicit=True)
    _, mark, after = text.rpartition("####")
    named = after.strip().splitlines()[0] if mark and after.strip() else marked(text)
    if named:
        return Extracted(named.strip(), explicit=True)
    return Extracted(next(reversed(numbers(text)), None))


def grade_math(reference: str, completion: str, truncated: bool) -> Grade:
    """MATH: equal under the conventions of equality.py; a comparison that dies or takes too long is ERRORED."""
    return _settle(
        lambda: final_expression(scrub(completion)),
        lambda prediction: {"accuracy": float(compare(reference, prediction))},
        truncated,
    )


# --- HotpotQA --------------------------------------------------------------------------------------------------


def normalise_span(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: `normalize_answer` of hotpot_evaluate_v1.py."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(prediction: str, reference: str) -> float:
    """Token F1 of hotpot_evaluate_v1.py: yes, no and noanswer score only when both sides are the same."""
    ours, theirs = normalise_span(prediction), normalise_span(reference)
    if ours != theirs and {ours, theirs} & {"yes", "no", "noanswer"}:
        return 0.0
    common = sum((Counter(ours.split()) & Counter(theirs.split())).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(ours.split()), common / len(theirs.split())
    return 2 * precision * recall / (precision + recall)


def final_span(text: str) -> Extracted:
    """HotpotQA's final answer: what is marked by "answer", else the whole completion."""
    named = marked(text)
    return Extracted(named, explicit=True) if named else Extracted(text.strip() or None)


def grade_span(reference: str, completion: str, truncated: bool) -> Grade:
    """HotpotQA: `exact_match` (headline) and `token_f1`, normalised as in the official evaluation."""

    def score(prediction: str) -> dict[str, float]:
        exact = float(normalise_span(prediction) == normalise_span(reference))
        return {"exact_match": exact, "token_f1": token_f1(prediction, reference)}

    return _settle(lambda: final_span(scrub(completion)), score, truncated, ("exact_match", "token_f1"))


# --- CosmosQA --------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]|_", " ", text.lower()).split())


def read_choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The letter that a short answer means: a letter first, then the text of a choice, then an index from 0.

    `B`, `(B)`, `B. went home`, `went home` and `1` all mean B when the second choice is "went home".
    """
    start = _LEAD_IN.sub("", text[:200])
    letter = re.match(r"([A-D])(?:\W*$|[).:*,;]|\s*[-\u2013\u2014]\s|\s+(?:because|since)\b)", start, re.IGNORECASE)
    if letter:
        return letter[1].upper()
    plain = _plain(text)
    for name, choice in zip(LETTERS, choices, strict=False):
        if plain and plain == _plain(choice):
            return name
    index = re.match(r"([0-3])(?:\W*$|[).:])", start) if len(text) < 200 else None
    return LETTERS[int(index[1])] if index else None


def final_choice(text: str, choices: tuple[str, ...]) -> Extracted:
    """CosmosQA's final answer: the last box or what is marked by "answer", else the whole completion or its last
    line, else the one choice whose text occurs in the completion."""
    for candidate in (last_boxed(text), marked(text)):
        letter = read_choice(candidate, choices) if candidate else None
        if letter:
            return Extracted(letter, explicit=True)
    lines = text.strip().splitlines() or [""]
    for candidate in (text.strip(), lines[-1]):
        letter = read_choice(candidate, choices)
        if letter:
            return Extracted(letter)
    said = f" {_plain(text)} "
    named = [name for name, c in zip(LETTERS, choices, strict=False) if _plain(c) and f" {_plain(c)} " in said]
    return Extracted(named[0] if len(named) == 1 else None)


def grade_choice(reference: str, choices: tuple[str, ...], completion: str, truncated: bool) -> Grade:
    """CosmosQA: the letter that was read is the reference letter."""
    return _settle(
        lambda: final_choice(scrub(completion), choices),
        lambda prediction: {"accuracy": float(prediction == reference)},
        truncated,
    )


# --- all -------------------------------------------------------------------------------------------------------


def read(extract: Callable[[str], Extracted], completion: str, truncated: bool) -> str | None:
    """The prediction that a grade of this completion has, without a reference. Never raises."""
    try:
        found = extract(scrub(completion))
    except Exception:  # a completion can be anything
        return None
    return None if truncated and not found.explicit else found.text


def _settle(
    extract: Callable[[], Extracted],
    score: Callable[[str], Mapping[str, float]],
    truncated: bool,
    metrics: tuple[str, ...] = ("accuracy",),
) -> Grade:
    """Extract, then score; the first of `metrics` is the headline. Never raises: a failure is ERRORED."""
    nothing = dict.fromkeys(metrics, 0.0)
    prediction = None
    try:
        found = extract()
        if truncated and not found.explicit:
            return Grade(Outcome.TRUNCATED, None, 0.0, nothing, "cut at the length limit before a final answer")
        prediction = found.text
        if prediction is None:
            return Grade(Outcome.WRONG, None, 0.0, nothing)
        scores = score(prediction)
    except GraderFailed as failure:
        return Grade(Outcome.ERRORED, prediction, 0.0, nothing, str(failure))
    except Exception as failure:  # a completion can be anything; one grade must not cost the run
        return Grade(Outcome.ERRORED, prediction, 0.0, nothing, f"{type(failure).__name__}: {failure}")
    headline = scores[metrics[0]]
    return Grade(Outcome.CORRECT if headline == 1 else Outcome.WRONG, prediction, headline, scores)
