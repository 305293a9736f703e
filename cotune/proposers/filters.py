"""What may not become a prompt: cut off, empty, unreadable, too long, a refusal, with tags, or copied from examples."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from cotune.search import Proposal
from cotune.values import Example, Prompt

COPIED_WORDS = 8  # a run of this many words of an example counts as copied (ours)

_UNREADABLE = {"Cc", "Cs", "Co", "Cn"}  # control characters, half characters, and what has no meaning
_WORD = re.compile(r"\w+")
# Slots and the frames of common chat templates; the model's own special tokens come on top.
_TAGS = re.compile(
    r"<\|.*?\|>|\[/?INST|\[INSTRUCTION\]|<</?SYS>>|</?instruction>|<(?:start|end)_of_turn>|(?<!\w)\{\w+\}"
)
# How a proposer says that it will not write one (ours).
_REFUSAL = re.compile(
    r"\W*(?:(?:i['’]m|i am|we['’]re|we are) (?:so |very )?sorry\b|sorry,|i apologi[sz]e|as an ai\b"
    r"|(?:i|we)(?: am|['’]m| are|['’]re)? ?(?:can['’]?t|cannot|can not|unable to|not able to|won['’]t) )",
    re.IGNORECASE,
)


class Filter:
    """`reject(proposal)` names the reason for which a proposal may not be tried, or None.

    `fits` says whether a prompt leaves room in the context. Text is checked only of instructions that are not in
    `trusted` (the starting one is the user's own) and have not passed before.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        *,
        trusted: str,
        max_characters: int,
        special_tokens: Sequence[str],
        fits: Callable[[Prompt], bool],
    ) -> None:
        # Hashes, not text: 8 bytes a word keep a large training set affordable. Two different runs of words with one
        # 64-bit hash are not to be expected in a lifetime.
        texts = (t for e in examples for t in (e.question, e.context, e.rationale, *e.choices))
        self._known = np.unique(np.fromiter((hash(r) for t in texts for r in word_runs(t)), dtype=np.int64))
        self._passed = {trusted}
        self._max_characters = max_characters
        self._special_tokens = tuple(special_tokens)
        self._fits = fits

    def reject(self, proposal: Proposal) -> str | None:
        text = proposal.prompt.instruction
        if text not in self._passed:
            reason = self._text_reason(text, proposal.truncated)
            if reason:
                return reason
        if not self._fits(proposal.prompt):
            return "over_context"
        self._passed.add(text)
        return None

    def _text_reason(self, text: str, truncated: bool) -> str | None:
        if truncated:
            return "truncated"
        if not text.strip():
            return "empty"
        if unreadable(text):
            return "unreadable"
        if len(text) > self._max_characters:
            return "too_long"
        if _REFUSAL.match(text):
            return "refusal"
        if _TAGS.search(text) or any(token in text for token in self._special_tokens):
            return "tags"
        if self._copies(text):
            return "copied"
        return None

    def _copies(self, text: str) -> bool:
        runs = np.fromiter((hash(r) for r in word_runs(text)), dtype=np.int64)
        return bool(np.isin(runs, self._known).any())


def unreadable(text: str) -> bool:
    """Whether a character of it is broken, or none at all."""
    return "\ufffd" in text or any(unicodedata.category(c) in _UNREADABLE for c in text if c not in "\n\t")


def word_runs(text: str) -> Iterator[tuple[str, ...]]:
    """Every run of COPIED_WORDS consecutive words, without case and punctuation."""
    words = _WORD.findall(text.lower())
    return zip(*(words[i:] for i in range(COPIED_WORDS)), strict=False)
