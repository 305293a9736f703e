"""CFPO (sheet 10): content and format of an instruction, changed in turn.

Odd rounds change what it says: parts of the best prompts are rewritten, half of the time after a diagnosis of right and
wrong answers, else with their meaning kept. Even rounds change how it looks (formats.py): the first tries every format,
later ones those with the highest UCT value.

Deviations (ours): the pool of formats is closed and has none for questions (formats.py); a diagnosed candidate takes
all its suggestions at once; examples are worked answers to teaching examples, added, taken out or exchanged at random
and never edited, so that none becomes wrong; candidates are raced, and a dropped one counts in UCT with the mean it
got. With the proposer `edits`, which asks no model, there is no diagnosis, and a part is rewritten from the bank.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from cotune.config import RunConfig
from cotune.proposers import Proposing
from cotune.proposers.bank import phrases
from cotune.proposers.edits import sentences
from cotune.proposers.instructions import no_room
from cotune.proposers.meta_prompt import asks_for_tags, read_reply
from cotune.proposers.writing import Writer
from cotune.search import Proposal
from cotune.strategies.base import Work, Workload
from cotune.strategies.prompt_methods.base import Finalist, Ground
from cotune.strategies.prompt_methods.formats import PLAIN, POOL, Format, uct
from cotune.strategies.prompt_methods.told import Told, answered, feedback
from cotune.supervision import demonstration, gold
from cotune.tasks.base import Message
from cotune.values import Demonstration, Outcome, Prompt

TITLES = {"task": "Task", "details": "Details", "output": "Output format"}
_EXAMPLES = "examples"
_SUGGESTION = re.compile(rf"^\W*({'|'.join([*TITLES, _EXAMPLES])})\b[^:\n]*:\s*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_CHANGES = (4, 4, 3, 3, 2, 2, 1)  # the paper's c at round // 2, then 1
_COOLER = 0.3  # temperature falls by this share until the last round (paper: 1.0 to 0.7)


@dataclass(frozen=True)
class Draft:
    """What a prompt says, in parts, apart from how it looks."""

    task: str
    details: str = ""
    output: str = ""
    demonstrations: tuple[Demonstration, ...] = ()

    def text(self, part: str) -> str:
        return str(getattr(self, part))

    def having(self, part: str, text: str) -> Draft:
        changed: dict[str, Any] = {part: text}
        return replace(self, **changed)

    def prompt(self, format: Format) -> Prompt:
        parts = [(title, self.text(part)) for part, title in TITLES.items() if self.text(part)]
        return Prompt(format.render(parts), self.demonstrations)


@dataclass(frozen=True)
class Candidate:
    draft: Draft
    format: Format
    origin: str


@dataclass(frozen=True)
class Cfpo:
    """`rounds` rounds in all. The best `beam` prompts are rewritten; a diagnosis reads `cases` answers."""

    teaches: ClassVar[bool] = True

    rounds: int
    beam: int
    cases: int
    demonstrations: int
    proposing: Proposing

    @classmethod
    def from_config(cls, config: RunConfig) -> Self:
        prompt = config.prompt
        return cls(
            prompt.rounds,
            prompt.beam,
            prompt.reflection_minibatch,
            prompt.demonstrations,
            Proposing.from_config(config),
        )

    def plan(self, load: Workload, driving: int, teaching: int) -> list[Work]:
        contents, formats = -(-self.rounds // 2), self.rounds // 2
        candidates = self.proposing.candidates
        tried = contents * candidates + (len(POOL) + (formats - 1) * candidates if formats else 0)
        shown = load.question + self.demonstrations * (load.question + load.reference)
        works = [load.answers("score candidates", tried * driving, shown)]
        if self.proposing.asks:
            length = self.proposing.max_characters // 4  # about 4 characters a token
            diagnosed = contents * -(-candidates // 2)
            read = length + self.cases * (load.question + load.limit)
            works += [
                load.answers("answer cases", diagnosed * self.cases, shown),
                Work.generation("diagnose", diagnosed, read, length),
                Work.generation("rewrite parts", contents * candidates * _CHANGES[0], 2 * length, length),
            ]
        return [work for work in works if work.calls]

    def search(self, ground: Ground) -> list[Finalist]:
        search = _Search(self, ground)
        for _ in range(self.rounds):
            search.content_round() if ground.search.number % 2 else search.format_round()
        return ground.finalists()


class _Search:
    """Remembers what each prompt was made of."""

    def __init__(self, settings: Cfpo, ground: Ground) -> None:
        self._settings = settings
        self._ground = ground
        self._writer = settings.proposing.writer(ground.generator, ground.bench)
        self._bank = dict(zip(TITLES, phrases(*ground.task.learned).kinds, strict=True))
        start = ground.search.start
        draft = Draft(start.instruction, demonstrations=start.demonstrations)
        self._made = {start: Candidate(draft, PLAIN, "start")}

    def content_round(self) -> None:
        """Candidates take turns: a diagnosis, a rewriting; of the best prompt, the second best, and so on."""
        number, beam = self._ground.search.number, self._beam()
        most = _CHANGES[min(number // 2, len(_CHANGES) - 1)]
        writer = self._writer and self._writer.at(self._temperature(number))
        found: list[Candidate | Proposal] = []
        for i in range(self._settings.proposing.candidates):
            rng = self._ground.bench.rng("cfpo", number, i)
            parent = beam[i // 2 % len(beam)]
            if writer is None:
                found.append(self._edited(parent, most, rng))
            elif i % 2 == 0:
                found.append(self._diagnosed(parent, most, _Asking(writer, self._ground, (number, i)), rng))
            else:
                found.append(self._rewritten(parent, most, _Asking(writer, self._ground, (number, i)), rng))
        self._try(found)

    def format_round(self) -> None:
        """Every format of the best content (round 2), else as many as there are candidates, the highest UCT value
        first, each with the best content that has not had it yet.
        """
        search, beam = self._ground.search, self._beam()
        formats, contents, most = list(POOL), [beam[0].draft], len(POOL)
        if search.number > 2:
            scores: dict[Format, list[float]] = {format: [] for format in POOL}
            for scored in search.history():
                scores[self._made[scored.prompt].format].append(scored.score)
            total = sum(map(len, scores.values()))
            formats.sort(key=lambda format: -uct(scores[format], total))
            contents = list(dict.fromkeys(c.draft for c in beam))
            most = self._settings.proposing.candidates
        found: dict[Prompt, Candidate] = {}
        for format in formats:
            for draft in contents if len(found) < most else ():
                prompt = draft.prompt(format)
                if prompt not in found and not search.knows(prompt):
                    found[prompt] = Candidate(draft, format, f"format:{format}")
                    break
        self._try(list(found.values()))

    def _beam(self) -> list[Candidate]:
        return [self._made[scored.prompt] for scored in self._ground.search.ranking()[: self._settings.beam]]

    def _temperature(self, number: int) -> float:
        done = (number - 1) / max(1, self._settings.rounds - 1)
        return self._settings.proposing.temperature * (1 - _COOLER * done)

    def _try(self, found: Sequence[Candidate | Proposal]) -> None:
        """What is a Proposal already is junk, to be counted."""
        search = self._ground.search
        proposals = []
        for candidate in found:
            if isinstance(candidate, Candidate):
                prompt = candidate.draft.prompt(candidate.format)
                self._made.setdefault(prompt, candidate)
                proposals.append(Proposal(prompt, candidate.origin))
            else:
                proposals.append(candidate)
        search.race(search.admit(proposals))
        search.end_round()

    def _diagnosed(self, parent: Candidate, most: int, asking: _Asking, rng: random.Random) -> Candidate | Proposal:
        """At most `most` parts rewritten as a diagnosis of a few answers suggests."""
        examples = self._ground.teaching or self._ground.search.board.examples
        cases = rng.sample(examples, min(self._settings.cases, len(examples)))
        told = answered(self._ground, parent.draft.prompt(parent.format), cases)
        suggestions = asking.suggestions(parent.draft, told, most)
        if isinstance(suggestions, Proposal):
            return suggestions
        draft = parent.draft
        for part, suggestion in suggestions:
            changed = self._changed(draft, part, suggestion, asking, rng)
            if isinstance(changed, Proposal):
                return changed
            draft = changed
        return Candidate(draft, parent.format, f"{asking.writer.name}:diagnosed")

    def _rewritten(self, parent: Candidate, most: int, asking: _Asking, rng: random.Random) -> Candidate | Proposal:
        """1 to `most` parts in other words (Monte-Carlo sampling)."""
        draft = parent.draft
        for part in self._drawn([part for part in TITLES if draft.text(part)], most, rng):
            changed = self._changed(draft, part, "", asking, rng)
            if isinstance(changed, Proposal):
                return changed
            draft = changed
        return Candidate(draft, parent.format, f"{asking.writer.name}:rewritten")

    def _edited(self, parent: Candidate, most: int, rng: random.Random) -> Candidate:
        """1 to `most` parts with another sentence of the bank, or without one."""
        draft = parent.draft
        for part in self._drawn(list(TITLES), most, rng):
            if part == _EXAMPLES:
                draft = self._other_examples(draft, rng)
                continue
            own = [s for s in sentences(draft.text(part)) if s not in self._bank[part]]
            had = [s for s in sentences(draft.text(part)) if s in self._bank[part]]
            choices = ["", *self._bank[part]] if own or part != "task" else list(self._bank[part])
            new = rng.choice([s for s in choices if [s] != had and (s or had)])
            draft = draft.having(part, " ".join(s for s in [*own, new] if s))
        return Candidate(draft, parent.format, "edits:part")

    def _drawn(self, parts: list[str], most: int, rng: random.Random) -> list[str]:
        if self._settings.demonstrations and self._ground.teaching:
            parts = [*parts, _EXAMPLES]
        return rng.sample(parts, min(rng.randint(1, most), len(parts)))

    def _changed(
        self, draft: Draft, part: str, suggestion: str, asking: _Asking, rng: random.Random
    ) -> Draft | Proposal:
        if part == _EXAMPLES:
            return self._other_examples(draft, rng)
        text = asking.part(draft, part, suggestion)
        return text if isinstance(text, Proposal) else draft.having(part, text)

    def _other_examples(self, draft: Draft, rng: random.Random) -> Draft:
        """One worked example more, less, or another one in the place of one."""
        task, shown, most = self._ground.task, list(draft.demonstrations), self._settings.demonstrations
        if not most:
            return draft
        known = [demonstration(task, trace) for trace in gold(task, self._ground.teaching)]
        others = [d for d in known if d not in shown]
        ways = ["add"] * (bool(others) and len(shown) < most) + ["drop"] * bool(shown)
        ways += ["exchange"] * bool(others and shown)
        way = rng.choice(ways) if ways else ""
        if way in ("drop", "exchange"):
            shown.pop(rng.randrange(len(shown)))
        if way in ("add", "exchange"):
            shown.append(rng.choice(others))
        return replace(draft, demonstrations=tuple(shown))


@dataclass(frozen=True)
class _Asking:
    """The calls that make one candidate; `names` seed them. The wording is ours."""

    writer: Writer
    ground: Ground
    names: tuple[int, int]

    def suggestions(self, draft: Draft, told: Sequence[Told], most: int) -> list[tuple[str, str]] | Proposal:
        """(part, what to change), at most `most`; or the reply, as junk, when there is none in it."""
        # wrong answers first; fewer answers where the writer has no room for all
        cases = sorted(told, key=lambda t: t.grade.outcome is Outcome.CORRECT)
        for shown in range(len(cases), -1, -1):
            messages = self._diagnosis(draft, cases[:shown], most)
            if self.writer.fits(messages):
                break
        else:
            raise no_room(self.writer)
        [reply] = self.writer.write(messages, 1, self.ground.bench, "diagnose", *self.names)
        found = [(part.lower(), said.strip()) for part, said in _SUGGESTION.findall(reply.text)]
        if not found:
            said = Proposal(Prompt(reply.text.strip()), self.writer.name, reply.truncated)
            return said if self.ground.search.junk(said) else Proposal(Prompt(""), self.writer.name)
        return found[:most]

    def part(self, draft: Draft, part: str, suggestion: str) -> str | Proposal:
        """Its new text; or what was said instead, when that is junk."""
        messages = self._rewriting(draft, part, suggestion)
        if not self.writer.fits(messages):
            raise no_room(self.writer)
        [reply] = self.writer.write(messages, 1, self.ground.bench, "rewrite", *self.names, part, suggestion)
        said = read_reply(reply.text, reply.truncated, self.writer.name, Prompt(""))
        return said if self.ground.search.junk(said) else said.prompt.instruction

    def _diagnosis(self, draft: Draft, cases: Sequence[Told], most: int) -> list[Message]:
        task = self.ground.task
        shown = [
            f"Question: {task.question_text(t.example)}\nAnswer: {t.completion.text.strip()}\n"
            f"{feedback(t.example, t.grade)}"
            for t in cases
        ]
        parts = [
            f"A prompt that is put before every question of a task has these parts:\n\n{self._parts(draft)}",
            *(["This is how a language model answered under it:\n\n" + "\n\n".join(shown)] if shown else []),
            f"Suggest at most {most} changes that would make more answers right and keep the right ones right. Write "
            f"each on its own line as PART: CHANGE, where PART is one of {', '.join(TITLES)} and {_EXAMPLES}.",
        ]
        return [{"role": "user", "content": "\n\n".join(parts)}]

    def _rewriting(self, draft: Draft, part: str, suggestion: str) -> list[Message]:
        wish = f"with this change: {suggestion}" if suggestion else "in other words, without changing what it means."
        parts = [
            f"A prompt that is put before every question of a task has these parts:\n\n{self._parts(draft)}",
            f"Rewrite its part {part} {wish}",
            f"Reply with the new text of this part alone. {asks_for_tags()}",
        ]
        return [{"role": "user", "content": "\n\n".join(parts)}]

    def _parts(self, draft: Draft) -> str:
        return "\n".join(f"{part}: {draft.text(part) or '(empty)'}" for part in TITLES)
