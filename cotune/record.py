"""The run folder: what a run leaves behind, and what lets an interrupted one go on.

    config.json  environment.json  data.json  events.jsonl  predictions.jsonl  crossed.jsonl  tuned/  summary.json
    work/        journal of generations, checkpoints, progress.json; removed when the run is done
    .lock        held while a process works here

and beside it, for all run folders of one place, measured.jsonl: which config has measured test (or val) how often.

`summary.json` is written last and atomically: without it a run is unfinished. Every other file is either appended to
line by line (a torn last line is dropped on reading) or replaced atomically. Knows nothing of models or strategies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from cotune.config import RunConfig, dump
from cotune.errors import CotuneError, RunLocked, UsageError
from cotune.values import Event, digest

if TYPE_CHECKING:
    import torch

TOUCHES = "measured.jsonl"  # beside the run folders
FINAL = ("done", "no-data")  # a run with another status may be run again


def read_json(path: Path) -> Any:
    """Raises UsageError naming the file when it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: {path.parent} is not a finished run folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged ({error}). Delete the run folder and run it again.") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON lines; a torn last line (the process was killed while writing it) is dropped.

    Raises UsageError naming file and line for damage anywhere else.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number == len(lines):  # no newline after it: torn
                break
            raise UsageError(
                f"{path}, line {number} is damaged ({error}). Delete the run folder and run it again."
            ) from None
    return rows


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside and rename, so that a reader or a kill sees the old file or the new one, never half."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")) + "\n"


class RunFolder:
    """One run folder, open for writing. Use `RunFolder.open`. Implements `bench.Store`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._work = path / "work"
        self._journal: dict[str, Any] = {}
        self._events: set[str] = set()

    @classmethod
    @contextmanager
    def open(cls, path: Path, config: RunConfig) -> Iterator[RunFolder]:
        """Create or continue a run folder, locked for this process.

        Raises RunLocked when another process works on it, UsageError when it holds a run with another config or
        cannot be written.
        """
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path / ".lock", timeout=0.5)  # `being_worked_on` may hold it for a moment
            lock.acquire()
        except Timeout:
            raise RunLocked(f"Another process is working on {path}. Wait for it, or choose another --name.") from None
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error.strerror}). Choose another --out.") from None
        try:
            folder._claim(config)
            yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CotuneError(
                f"The disk is full while writing {path}. Free some space and give the same command again: "
                "it continues from the last checkpoint."
            ) from error
        finally:
            lock.release()

    def _claim(self, config: RunConfig) -> None:
        saved = self.path / "config.json"
        if saved.exists() and saved.read_text(encoding="utf-8") != dump(config):
            raise UsageError(
                f"{self.path} holds a run with another config. Choose another --name, or delete that folder."
            )
        write_atomic(saved, dump(config))
        self._journal = {row["key"]: row["value"] for row in self._heal("work/journal.jsonl")}
        self._events = {_identity(row) for row in self._heal("events.jsonl")}

    def _heal(self, name: str) -> list[dict[str, Any]]:
        """Rows of an append-only file, cutting off a torn last line so that the next append starts clean."""
        path = self.path / name
        rows = read_rows(path)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            write_atomic(path, "".join(json_line(row) for row in rows))
        return rows

    def forget_if_untouched(self) -> None:
        """Remove the folder again if nothing has happened in it: no event, no result."""
        if not self._events and not (self.path / "summary.json").exists():
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of a run that needs no more work, else None."""
        path = self.path / "summary.json"
        if not path.exists():
            return None
        summary: dict[str, Any] = read_json(path)
        return summary if summary["status"] in FINAL else None

    def touched(self, split: str) -> int:
        """How often a split has been measured with this config in the folder that holds this run, this time included.

        Counted in a file beside the run folders, so that a run that is deleted and made again is counted. A run that
        goes on after an interruption is one.
        """
        mark, counted = self._work / f"{split}-touched", self.path.parent / TOUCHES
        config = digest([split, read_json(self.path / "config.json")])
        if not mark.exists():
            counted.parent.mkdir(parents=True, exist_ok=True)
            with counted.open("a", encoding="utf-8") as file:  # one short line: whole, whoever else appends
                file.write(json_line({"config": config, "split": split, "run": self.path.name}))
            mark.parent.mkdir(exist_ok=True)
            mark.touch()
        return sum(row["config"] == config for row in read_rows(counted))

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.path / name, value)

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        write_atomic(self.path / name, "".join(json_line(row) for row in rows))

    def event(self, event: Event) -> dict[str, Any] | None:
        """Append to events.jsonl; returns the row, None for a replayed event: what is there is not written twice."""
        row = {"kind": event.kind, **event.data}
        identity = _identity(row)
        if event.kind == "progress" or identity in self._events:
            return None
        self._events.add(identity)
        row = {"i": len(self._events) - 1, "time": round(time.time(), 3), **row}
        self._append("events.jsonl", row)
        return row

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json_line(row))

    def recall(self, key: str) -> Any | None:
        return self._journal.get(key)

    def remember(self, key: str, value: Any) -> None:
        self._append("work/journal.jsonl", {"key": key, "value": value})
        self._journal[key] = value

    def load_checkpoint(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        from safetensors import safe_open

        path = self._checkpoint(name)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a dict
            return tensors, json.loads(file.metadata()["meta"])

    def save_checkpoint(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        path = self._checkpoint(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        contiguous = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
        save_file(contiguous, part, metadata={"meta": json.dumps(meta)})
        part.replace(path)

    def _checkpoint(self, name: str) -> Path:
        return self._work / "checkpoints" / (digest(name) + ".safetensors")

    def keep_tuned(self, save: Any) -> None:
        """`save(folder)` into tuned/, whole or not at all."""
        part, final = self._work / "tuned", self.path / "tuned"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save(part)
        shutil.rmtree(final, ignore_errors=True)
        part.replace(final)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json; a final status also ends the need for journal and checkpoints."""
        self.write_json("summary.json", summary)
        if summary["status"] in FINAL:
            shutil.rmtree(self._work, ignore_errors=True)


def being_worked_on(path: Path) -> bool:
    """Whether a process holds the lock of this run folder. Writes nothing, so works in a read-only place too."""
    try:
        with (path / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file is closed, at once
    except BlockingIOError:
        return True
    except OSError:  # there is none, or locks do not work here: then nobody could have taken it
        return False
    return False


def _identity(row: Mapping[str, Any]) -> str:
    return digest({k: v for k, v in row.items() if k not in ("i", "time")})


def run_folders(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and one level below them, sorted by name. A run folder has a config.json.

    Raises UsageError for a path that does not exist or holds no run.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"There is no folder {str(path)!r}. Give run folders, or a folder that holds some.")
        inside = [path] if (path / "config.json").exists() else sorted(p.parent for p in path.glob("*/config.json"))
        if not inside:
            raise UsageError(f"{path} holds no run folder. Run something first: cotune run --help.")
        found += [p for p in inside if p not in found]
    return found


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, for environment.json."""
    import platform
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
    ).stdout.strip()
    packages = ("cotune", "torch", "transformers", "peft", "tokenizers", "safetensors", "math-verify", "vllm", "pandas")
    return {
        "packages": {name: installed(name) for name in packages},
        "python": platform.python_version(),
        "commit": commit or None,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
    }
