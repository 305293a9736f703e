"""The bundle: what one takes home of a run, in a folder that says what it belongs to and shows what was changed since.

    bundle.json   model, task, prompt, chat frame and inference plan: all that another tool needs beside the adapter
    tuned.json    adapter/     the prompt and the PEFT adapter (none where no weights were tuned)
    verifier.safetensors       what ranks samples, where the plan's scorer is a verifier
    generator/    of a joint run: what makes both for each query
    groups-N/     of a joint run, if asked for: a prompt and an adapter for each of N groups of queries
    README.md     SHA256SUMS

Knows the format and what to refuse. Knows nothing of how the content is made, and loads no weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from cotune.config import Positive, Section
from cotune.errors import UsageError
from cotune.models.base import TEMPLATE_ARGUMENTS, BaseModel
from cotune.tasks.base import Message, Task
from cotune.values import Example, Prompt

FORMAT: Final = 1
CONTENT, SUMS, GENERATOR = "bundle.json", "SHA256SUMS", "generator"
_SUM = re.compile(r"([0-9a-f]{64})  (\S.*)")
_PICKLED = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
_READ = {".json", ".safetensors"}  # what loading reads: must be as exported, and nothing may be added
_BEGIN, _END = "\ue000", "\ue001"  # around the name of a field while the frame is made: in no text of a task


class Model(Section):
    """A model and what shows that it is the same: a digest of its weights as loaded in `dtype`, one of its template.

    `revision` is the hub commit, None for a folder. Of a model behind a server digests and dtype are None.
    """

    name: str
    source: str
    revision: str | None
    digest: str | None
    dtype: str | None
    template_digest: str | None

    @classmethod
    def of(cls, base: BaseModel) -> Model:
        known = base.template_digest is not None
        return cls(
            name=base.name,
            source=base.source,
            revision=base.revision,
            digest=base.digest if known else None,
            dtype=str(base.model.dtype).removeprefix("torch.") if known else None,
            template_digest=base.template_digest,
        )

    @property
    def reference(self) -> str:
        """What `models.base.load` takes to get the same bytes."""
        return f"{self.source}@{self.revision}" if self.revision else self.name

    def check(self, base: BaseModel, what: str) -> None:
        """Raises UsageError when `base` is not this model."""
        if self.digest is None:
            return
        if base.digest != self.digest:
            raise UsageError(
                f"{what} was tuned for {self.name} (weights {self.digest} in {self.dtype}), but {base.name} has other "
                f"weights ({base.digest}). Give --model the one it was tuned for."
            )
        if base.template_digest != self.template_digest:
            raise UsageError(
                f"{what} was tuned with the chat template {self.template_digest} of {self.name}, and {base.name} has "
                f"{base.template_digest}. Give --model the same revision of it."
            )


class Chat(Section):
    """The frame of a question.

    `messages` are what `Task.messages` makes, as the model's template takes them; the last one is a `string.Template`
    with the placeholders `fields`. `arguments` are given to the tokenizer's `apply_chat_template`.
    """

    messages: tuple[Message, ...]
    fields: tuple[str, ...]
    arguments: dict[str, bool | str]


class Aggregate(Section):
    """Several completions, drawn at this temperature and top_p, made into one answer (docs/inference.md)."""

    aggregation: Literal["majority", "best-of", "weighted-best-of"]
    samples: Positive
    chain: Positive = Field(1, exclude_if=lambda chain: chain == 1)
    scorer: str | None
    temperature: float
    top_p: float


class ByDifficulty(Section):
    """The first `probe` completions tell a question's ease, by their mean rating by `scorer` or minus their entropy; it
    is answered as `plans[b]` says, where its ease is below b of the falling `edges` (docs/inference.md)."""

    probe: Positive
    scorer: str | None
    edges: tuple[float, ...]
    plans: tuple[Aggregate, ...]


class Plan(Section):
    """The inference plan. Temperature 0 is greedy. `stop_ids` are the tokens that end an answer, `stop` their text.

    `aggregate` is how several completions become one answer, `by_difficulty` that for each difficulty; without both an
    answer is one completion.
    """

    aggregate: Aggregate | None = Field(None, exclude_if=lambda value: value is None)
    by_difficulty: ByDifficulty | None = Field(None, exclude_if=lambda value: value is None)

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]


class Bundle(Section):
    """bundle.json. `rank` is the largest that an engine must serve; `base_url` the server of a model behind one."""

    format: Literal[1] = FORMAT
    run: str
    config_digest: str
    cotune: dict[str, str | None]
    strategy: str
    task: str
    model: Model
    generator: Model | None
    base_url: str | None
    rank: int
    prompt: dict[str, Any]
    chat: Chat
    plan: Plan


def chat_frame(base: BaseModel, task: Task, prompt: Prompt) -> Chat:
    """The messages of a question that is not known yet."""
    marked = {name: f"{_BEGIN}{name}{_END}" for name in ("question", "context")}
    choices = tuple(f"{_BEGIN}choice{i}{_END}" for i in range(task.choices))
    example = Example("", marked["question"], "", marked["context"], choices=choices)
    *before, last = base.turns(task.messages(prompt, example))
    found = re.findall(f"{_BEGIN}(.*?){_END}", last["content"])
    escaped = last["content"].replace("$", "$$").replace(_BEGIN, "${").replace(_END, "}")
    last = {**last, "content": escaped}
    return Chat(messages=(*before, last), fields=tuple(dict.fromkeys(found)), arguments=TEMPLATE_ARGUMENTS)


def write_sums(folder: Path) -> None:
    """SHA256SUMS over every file that is there, as `sha256sum -c` reads it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    lines = [f"{_sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_bundle(folder: Path) -> Bundle:
    """bundle.json, once every file that loading reads is the one that was exported (a card may be edited).

    Raises UsageError for such a file that is missing, was changed or added, for a pickled one, and for another format.
    """
    _check_files(folder)
    try:
        content = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise UsageError(
                f"{folder} has the bundle format {content['format']!r}, and this cotune reads {FORMAT}. Install the "
                f"cotune that wrote it ({content.get('cotune')}), or export the run again."
            )
        return Bundle.model_validate(content)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else f"{type(error).__name__}: {error}"
        raise UsageError(f"{folder / CONTENT} is not what cotune writes ({why}). Export the run again.") from None


def _check_files(folder: Path) -> None:
    again = "Copy the bundle again, or export the run again."
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{folder} is not a whole bundle: it has no readable {SUMS}. {again}") from None
    listed: dict[str, str] = {}
    for line in lines:
        found = _SUM.fullmatch(line)
        path = PurePosixPath(found[2]) if found else None
        if found is None or path is None or path.is_absolute() or ".." in path.parts:
            raise UsageError(f"{folder / SUMS} is damaged: {line[:80]!r} is not a line of it. {again}")
        listed[str(path)] = found[1]
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix in _PICKLED:
            raise UsageError(f"{folder} holds {name}: pickled files can run code, so none may be there. {again}")
        if file.suffix in _READ and name not in listed:
            raise UsageError(f"{folder} was changed since it was exported: {name} was added. {again}")
    for name, expected in listed.items():
        if PurePosixPath(name).suffix not in _READ:
            continue
        if not (folder / name).is_file():
            raise UsageError(f"{folder} is not a whole bundle: {name} is missing. {again}")
        if _sha256(folder / name) != expected:
            raise UsageError(f"{folder} was changed since it was exported: {name} is another file now. {again}")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
