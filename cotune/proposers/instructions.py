"""Proposals that a writer makes under the meta-prompt (OPRO: 8 a round at temperature 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotune.bench import Bench
from cotune.errors import CotuneError
from cotune.proposers.meta_prompt import MetaPrompt, read_reply
from cotune.proposers.writing import Writer
from cotune.search import Proposal, Scored
from cotune.tasks.base import Message
from cotune.values import Prompt


@dataclass(frozen=True)
class InstructionProposer:
    """`candidates` replies to one meta-prompt a round."""

    writer: Writer
    meta_prompt: MetaPrompt
    candidates: int

    def propose(self, round: int, history: Sequence[Scored], best: Prompt, bench: Bench) -> list[Proposal]:
        messages = self._fitting(round, history, bench)
        replies = self.writer.write(messages, self.candidates, bench, "propose", round)
        return [read_reply(r.text, r.truncated, self.writer.name, best) for r in replies]

    def _fitting(self, round: int, history: Sequence[Scored], bench: Bench) -> list[Message]:
        """The meta-prompt, with fewer exemplars and then fewer earlier instructions until the writer has room."""
        most_history, most_exemplars = self.meta_prompt.history, self.meta_prompt.exemplars
        while True:
            messages = self.meta_prompt.messages(
                history, bench.rng("exemplars", round), most_history=most_history, most_exemplars=most_exemplars
            )
            if self.writer.fits(messages):
                return messages
            if most_exemplars:
                most_exemplars -= 1
            elif most_history:
                most_history -= 1
            else:
                raise no_room(self.writer)


def no_room(writer: Writer) -> CotuneError:
    return CotuneError(
        f"The proposer {writer.name} cannot propose prompts: its context is too short for what it has to read. Choose "
        "another one, for example --set prompt.proposer=edits."
    )
