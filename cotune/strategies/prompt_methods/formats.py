"""How the parts of an instruction may look, and which look to try next (CFPO, sheet 10).

A format is a renderer (the layout of all parts) and a style (the layout of the sentences in each). The pool is closed
and hand-written: in the paper the model also writes new formats as code, and nothing that a model writes is run here.
The style stands in for the paper's query format (ours): how questions look is the task's matter, for every strategy
alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from cotune.proposers.edits import sentences

Parts = Sequence[tuple[str, str]]
"""(title, text) of each part that is not empty."""


def _plain(parts: Parts) -> str:
    texts = [text for _, text in parts]
    return ("\n" if any("\n" in text for text in texts) else " ").join(texts)


def _each(form: Callable[[str, str], str], between: str = "\n\n") -> Callable[[Parts], str]:
    return lambda parts: between.join(form(title, text) for title, text in parts)


def _tag(title: str) -> str:
    return title.lower().replace(" ", "_")


# Texts are put in as they are: a model reads the result, nothing parses it.
RENDERERS: dict[str, Callable[[Parts], str]] = {
    "plain": _plain,
    "paragraphs": _each(lambda _, text: text),
    "titles": _each(lambda title, text: f"{title}: {text}", "\n"),
    "markdown": _each(lambda title, text: f"## {title}\n{text}"),
    "xml": _each(lambda title, text: f"<{_tag(title)}>\n{text}\n</{_tag(title)}>", "\n"),
    "html": _each(lambda title, text: f"<h2>{title}</h2>\n<p>{text}</p>", "\n"),
    "json": lambda parts: json.dumps({_tag(title): text for title, text in parts}, indent=2, ensure_ascii=False),
    "latex": _each(lambda title, text: f"\\section{{{title}}}\n{text}"),
}


def _listed(mark: Callable[[int], str]) -> Callable[[str], str]:
    """One line a sentence; a single sentence stays as it is."""

    def listed(text: str) -> str:
        found = sentences(text)
        return "\n".join(f"{mark(i)} {s}" for i, s in enumerate(found, 1)) if len(found) > 1 else text

    return listed


STYLES: dict[str, Callable[[str], str]] = {
    "prose": lambda text: text,
    "bullets": _listed(lambda _: "-"),
    "numbers": _listed(lambda i: f"{i}."),
}


@dataclass(frozen=True)
class Format:
    renderer: str
    style: str

    def __str__(self) -> str:
        return f"{self.renderer}/{self.style}"

    def render(self, parts: Parts) -> str:
        """One plain part of prose comes out as it is."""
        return RENDERERS[self.renderer]([(title, STYLES[self.style](text)) for title, text in parts])


POOL = tuple(Format(*pair) for pair in product(RENDERERS, STYLES))
PLAIN = POOL[0]


def uct(scores: Sequence[float], total: int) -> float:
    """How promising a format is (CFPO, sheet 10, item 8): S_f / (1 + n_f) + 0.001 sqrt(ln(sum n) / (1 + n_f)).

    `scores` are those of the prompts that used it, in [0, 1]; `total`, at least 1, counts the scores of all formats.
    """
    return sum(scores) / (1 + len(scores)) + 0.001 * math.sqrt(math.log(total) / (1 + len(scores)))
