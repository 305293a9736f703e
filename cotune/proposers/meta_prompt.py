"""The text that asks a model for a better instruction, and how its reply is read (OPRO, sheet 10, item 2).

Knows nothing of who is asked. The wording is ours; the parts and their order are OPRO's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cotune.search import Proposal, Scored
from cotune.tasks.base import Message, Task
from cotune.values import Example, Prompt

_SLOT = "[INSTRUCTION]"
_OPEN, _CLOSE = "<instruction>", "</instruction>"
_REPLY = re.compile(re.escape(_OPEN) + r"(.*?)(" + re.escape(_CLOSE) + r"|$)", re.DOTALL)


@dataclass(frozen=True)
class MetaPrompt:
    """`history` best earlier instructions and `exemplars` questions with their answers are shown."""

    task: Task
    train: tuple[Example, ...]
    history: int
    exemplars: int

    def messages(
        self, scored: Sequence[Scored], rng: random.Random, *, most_history: int, most_exemplars: int
    ) -> list[Message]:
        """Task line, trajectory ascending by score (0-100), exemplars, output rule: one user turn.

        `scored` is ascending. Of prompts that share an instruction the best is shown. The `most_*` limits cut the
        worst instructions and the last exemplars when the proposer's context is short.
        """
        best: dict[str, float] = {}
        for s in scored:
            best.pop(s.prompt.instruction, None)  # ascending: the later score is the higher one
            best[s.prompt.instruction] = s.score
        trajectory = list(best.items())[max(0, len(best) - most_history) :]
        drawn = rng.sample(self.train, min(self.exemplars, len(self.train)))[:most_exemplars]
        parts = [
            "Write a new instruction for a language model. It is put before every question of a task, "
            "and a good one makes the model answer more questions correctly."
        ]
        if trajectory:
            shown = [f"{_OPEN}\n{text}\n{_CLOSE}\nscore: {round(100 * score)}" for text, score in trajectory]
            parts.append(
                "Earlier instructions with their scores from 0 to 100, the worst first:\n\n" + "\n\n".join(shown)
            )
        if drawn:
            shown = [f"{_SLOT}\n{self.task.question_text(e)}\nCorrect answer: {e.reference}" for e in drawn]
            parts.append(
                f"Questions of the task, each with the place of the instruction marked {_SLOT}:\n\n"
                + "\n\n".join(shown)
            )
        parts.append(
            "Write one instruction that differs from all of the above and should score higher. Keep it concise, let "
            f"it apply to every question of the task, and do not repeat the questions. {asks_for_tags()}"
        )
        return [{"role": "user", "content": "\n\n".join(parts)}]


def asks_for_tags() -> str:
    """The sentence that makes a reply readable for `read_reply`."""
    return f"Put it between {_OPEN} and {_CLOSE}."


def read_reply(text: str, truncated: bool, origin: str, best: Prompt) -> Proposal:
    """The instruction in the tags, or the whole reply where there are none (ours: small models forget tags).

    A reply cut off before the closing tag counts as truncated. Demonstrations stay those of `best`.
    """
    found = _REPLY.search(text)
    if found:
        instruction, closed = found[1], found[2] == _CLOSE
    else:
        instruction, closed = text, not truncated
    return Proposal(Prompt(instruction.strip(), best.demonstrations), origin, not closed)
