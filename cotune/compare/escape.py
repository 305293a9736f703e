"""Text from rows, models and configs, made harmless for where it is shown.

Everything that cotune prints and did not write itself passes through here. Knows nothing of what the text means.
"""

from __future__ import annotations

import re

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "–": "--",
    "…": r"\ldots{}",
    "·": r"$\cdot$",
}


def clean(text: object, newlines: bool = False) -> str:
    """Printable text: control characters, bidirectional overrides, surrogates and the like become `\\x1b` escapes.

    A newline stays when `newlines` is set; else it is shown as `\\n`, like the other escapes, so that the result
    is one line.
    """
    text = str(text)
    if (text.replace("\n", "") if newlines else text).isprintable():  # nearly always, and a hundred times as fast
        return text
    out = []
    for char in text:
        if char.isprintable() or (newlines and char == "\n"):
            out.append(char)
        else:
            out.append(char.encode("unicode_escape").decode("ascii"))
    return "".join(out)


def short(text: object, width: int) -> str:
    """One clean line of at most `width` characters."""
    line = clean(text)
    return line if len(line) <= width else line[: width - 1] + "…"


def markdown(text: str) -> str:
    """One table cell: characters with a meaning in Markdown or HTML are escaped."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~])", r"\\\1", text)


def latex(text: str) -> str:
    """Special characters of LaTeX and the few signs that cotune's own tables use, as one table cell."""
    start = "{}" if text.startswith(("[", "*")) else ""  # which \\ at the end of the row before would take
    return start + "".join(_LATEX.get(char, char) for char in text)
