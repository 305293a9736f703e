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

TABLES = {"strategies": STRATEGIES, "tasks": TASKS, "engines": ENGINES}
AUTO = "auto"


def check_names(strategy: str | None = None, task: str | None = None, engine: str | None = None) -> None:
    """Raises UsageError with the nearest names for one that is in no table. None is not looked up."""
    for kind, name in (("strategies", strategy), ("tasks", task), ("engines", engine)):
        known = set(names(kind, TABLES[kind])) | ({AUTO} if kind == "engines" else set())
        if name is not None and name not in known:
            word = {"strategies": "strategy", "tasks": "task", "engines": "engine"}[kind]
            raise UsageError(f"There is no {word} {name!r}{nearest(name, known)}")


def listing(kind: str) -> list[dict[str, str | None]]:
    """Rows with `name` and `about` (models also `location` and `revision`), in the order of the table."""
    if kind == "models":
        packaged = Path(__file__).parent
        return [
            {
                "name": name,
                "about": source.note,
                "location": source.location if source.revision else Path(source.location).relative_to(packaged).as_posix(),
                "revision": source.revision,
            }
            for name, source in MODELS.items()
        ]
    rows: list[dict[str, str | None]] = []
    if kind == "engines":
        rows.append({"name": AUTO, "about": "The engine for this machine; today always transformers."})
    return rows + [{"name": name, "about": _about(target)} for name, target in names(kind, TABLES[kind]).items()]


def _about(target: str) -> str:
    """First line of the docstring of `module:Class`, else of the module, read from the source."""
    module, _, attribute = target.partition(":")
    try:
        spec = find_spec(module)
        tree = ast.parse(Path(str(spec and spec.origin)).read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError, ValueError):
        return "(cannot be read)"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == attribute]
    found = [ast.get_docstring(node) for node in (*classes, tree)]
    return next((text.splitlines()[0] for text in found if text), "")
