"""Who may import whom, what the names at the top are, and that importing stays light (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cotune

PACKAGE = Path(cotune.__file__).parent

# A room may import from rooms of lower rank, and from itself. Rooms of equal rank do not know each other.
RANK = {
    "errors": 0,
    "values": 1,
    "plugins": 1,
    "cells": 1,
    "config": 2,
    "ledger": 2,
    "serving": 3,
    "rewrite": 2,
    "revision": 2,
    "aggregation": 2,
    "openai_client": 2,
    "diagnosis": 3,
    "imputation": 3,
    "adaptive": 4,
    "tasks": 3,
    "record": 3,
    "sparkline": 3,
    "compare": 4,
    "models": 4,
    "bandits": 5,
    "difficulty": 5,
    "scorers": 3,
    "plans": 6,
    "engines": 5,
    "standing": 5,
    "progress_file": 6,
    "bench": 6,
    "chains": 6.5,
    "evaluate": 7,
    "verifier": 7,
    "noise": 8,
    "canary": 8,
    "pulls": 8,
    "by_difficulty": 9,
    "training": 8,
    "search": 8,
    "metatuned": 8,
    "supervision": 8,
    "proposers": 9,
    "rollouts": 9,
    "methods": 9,
    "joint_items": 9,
    "checks": 10,
    "strategies": 10,
    "trackers": 4,
    "experiment": 11,
    "bundle": 5,
    "finished": 12,
    "planning": 12,
    "opened": 13,
    "card": 13,
    "export": 14,
    "predict": 14,
    "serve": 14,
    "panel": 12,
    "progress": 13,
    "output": 12,
    "wording": 12,
    "catalog": 12,
    "study": 14,
    "watch": 14,
    "show": 13,
    "doctor": 13,
    "matching": 15,
    "commands": 16,
    "cli": 17,
    "__main__": 18,
}
COMPARE_MAY_SEE = {"errors", "values", "cells", "config", "record", "compare"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Full names of the cotune modules that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "cotune" else {node.module}
    return {name for name in found if name.split(".")[0] == "cotune" and "." in name}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = room(path)
    for name in imports(path):
        other = name.split(".")[1]
        if other != own:
            assert RANK[other] < RANK[own], f"{path.relative_to(PACKAGE)} ({own}) imports {name}"
        if own == "compare":
            assert other in COMPARE_MAY_SEE, f"compare imports {name}"


@pytest.mark.parametrize("folder", ["engines", "strategies", "trackers"])
def test_concrete_files_do_not_know_each_other(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        if path.stem not in ("__init__", "base"):
            inside = {n.rsplit(".", 1)[1] for n in imports(path) if n.startswith(f"cotune.{folder}.")}
            # An engine of several files names them alike: vllm_engine, vllm_server, vllm_process.
            own = {name for name in inside if "_" in name and name.split("_")[0] == path.stem.split("_")[0]}
            assert inside - own <= {"base"}, f"{path.name} imports {inside}"


def test_every_package_lists_only_lazy_names() -> None:
    """`import cotune` alone must stay cheap: the tables name classes, they do not import them."""
    code = "import sys, cotune, cotune.tasks, cotune.engines, cotune.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_are_pinned() -> None:
    assert sorted(cotune.__all__) == [
        "Completion",
        "Conditioning",
        "CotuneError",
        "Demonstration",
        "Evaluation",
        "Example",
        "Grade",
        "Outcome",
        "Prompt",
        "RunConfig",
        "Tuned",
        "UsageError",
        "__version__",
        "resolve",
    ]
    for name in cotune.__all__:
        assert getattr(cotune, name) is not None
