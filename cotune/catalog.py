"""What there is to choose from, by name. Reads the tables and imports nothing that they stand for, so it is quick."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

from cotune.engines import ENGINES
from cotune.errors import UsageError
from cotune.models.registry import MODELS
from cotune.plugins import names, nearest
from cotune.strategies import STRATEGIES
from cotune.tasks import TASKS
from cotune.trackers import TRACKERS

TABLES = {"strategies": STRATEGIES, "tasks": TASKS, "engines": ENGINES, "trackers": TRACKERS}
AUTO = "auto"


def check_names(
    strategy: str | None = None, task: str | None = None, engine: str | None = None, tracker: str | None = None
) -> None:
    """Raises UsageError with the nearest names for one that is in no table. None is not looked up."""
    for kind, name in (("strategies", strategy), ("tasks", task), ("engines", engine), ("trackers", tracker)):
        known = set(names(kind, TABLES[kind])) | ({AUTO} if kind == "engines" else set())
        if name is not None and name not in known:
            word = "strategy" if kind == "strategies" else kind.removesuffix("s")
            raise UsageError(f"There is no {word} {name!r}{nearest(name, known)}")


def listing(kind: str) -> list[dict[str, str]]:
    """Rows with `name` and `about` (models also `location` and `revision`), in the order of the table."""
    if kind == "models":
        packaged = Path(__file__).parent
        return [
            {
                "name": name,
                "about": source.note,
                "location": source.location
                if source.revision
                else Path(source.location).relative_to(packaged).as_posix(),
                "revision": source.revision or "",
            }
            for name, source in MODELS.items()
        ]
    rows: list[dict[str, str]] = []
    if kind == "engines":
        rows.append({"name": AUTO, "about": "vllm where it is installed and there is a GPU, else transformers."})
    return rows + [{"name": name, "about": _about(target)} for name, target in names(kind, TABLES[kind]).items()]


def _about(target: str) -> str:
    """First line of the docstring of the module in `module:Class`, read from the source."""
    try:
        spec = find_spec(target.partition(":")[0])
        text = ast.get_docstring(ast.parse(Path(str(spec and spec.origin)).read_text(encoding="utf-8")))
    except (ImportError, OSError, SyntaxError, ValueError):
        return "(cannot be read)"
    return text.splitlines()[0] if text else ""
