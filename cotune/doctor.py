"""What this installation and machine can do, what would fail, and the fix. Changes nothing, downloads nothing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cotune.models.registry import MODELS
from cotune.tasks import TASKS

GIB = 1024**3
# Packages that only one thing needs, and which.
OPTIONAL = {
    "vllm": "--engine vllm: docs/engines.md",
    "uvicorn": "cotune serve: the extra serve",
    "optuna": "prompt.method = mipro: the extra mipro",
    "gepa": "prompt.method = gepa: the extra gepa",
    "resvg_py": "compare --plots-format png: the extra png",
    "mlflow": "--tracker mlflow: the extra mlflow",
    "wandb": "--tracker wandb: the extra wandb",
    "tensorboardX": "--tracker tensorboard: the extra tensorboard",
}
_ROWS = (".jsonl", ".jsonl.gz", ".csv", ".parquet")


@dataclass(frozen=True)
class Check:
    """`status` is ok, warn (something optional or slow) or fail (runs will fail); `fix` is empty when ok."""

    name: str
    status: str
    found: str
    fix: str = ""


def examine(data: str | None, out: Path) -> list[Check]:
    """All checks, in the order they are shown. Imports torch and transformers, to see that they really import."""
    checks = [Check("python", "ok", platform.python_version())]
    checks += [_imports(name) for name in ("torch", "transformers", "peft", "math_verify", "pyarrow")]
    checks += [_optional(name, what) for name, what in OPTIONAL.items()]
    checks += [*_device(), *_machine(out), *_models(), *_data(data)]
    return checks


def summary(checks: list[Check]) -> dict[str, Any]:
    return {"ok": all(c.status != "fail" for c in checks), "checks": [asdict(c) for c in checks]}


def _version(module: str) -> str:
    """Of the distribution that holds it, which may have another name."""
    try:
        return version(_distributions().get(module, [module])[0])
    except PackageNotFoundError:
        return "unknown version"


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


def _imports(name: str) -> Check:
    # peft takes seconds to import; that it is there is enough.
    try:
        if name == "peft" and find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        if name != "peft":
            import_module(name)
    except Exception as error:  # a broken installation raises anything, OSError for a missing shared library
        return Check(name, "fail", f"{type(error).__name__}: {error}", "Install again: make setup.")
    return Check(name, "ok", _version(name))


def _optional(name: str, what: str) -> Check:
    if find_spec(name) is None:
        return Check(name, "ok", f"not installed ({what})")
    return Check(name, "ok", _version(name))


def _device() -> Iterator[Check]:
    try:
        import torch
    except Exception:
        return
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        yield Check("device", "ok", f"cuda: {properties.name}, {properties.total_memory / GIB:.0f} GiB")
        yield Check("dtype", "ok", "bfloat16 by default (--set runner.dtype=...)")
    else:
        fix = "Fine for the tiny models. For a real one use a machine with a GPU and a CUDA build of torch."
        yield Check("device", "warn", "cpu (torch sees no GPU)", fix)
        yield Check("dtype", "ok", "float32 by default (--set runner.dtype=...)")
    found = (
        f"torch takes {torch.get_num_threads()} of {_cores()} usable cores, small models one (--set runner.threads=N)"
    )
    yield Check("threads", "ok", found)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine(out: Path) -> Iterator[Check]:
    memory = _memory()
    if memory:
        status = "ok" if memory >= 4 * GIB else "warn"
        yield Check(
            "memory", status, f"{memory / GIB:.1f} GiB", "" if status == "ok" else "Use --limit-* and tiny models."
        )
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK) and existing.is_dir()
    if not writable:
        yield Check("results folder", "fail", f"{out} cannot be written", "Choose another folder with --out.")
    elif free < GIB:
        yield Check(
            "results folder", "warn", f"{out}: {free / GIB:.1f} GiB free", "Free some space: a run may need 1 GiB."
        )
    else:
        yield Check("results folder", "ok", f"{out}: {free / GIB:.0f} GiB free")


def _memory() -> int | None:
    """Bytes this process may use: physical memory, or the container's limit where that is lower."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def _models() -> Iterator[Check]:
    for name, source in MODELS.items():
        if source.revision is None:
            there = any(Path(source.location).glob("*.safetensors"))
            fix = "" if there else "Make it: make tiny-model."
            yield Check(f"model {name}", "ok" if there else "fail", "packaged" if there else "not in this package", fix)
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0") not in ("", "0")
    ]
    if offline:
        fix = f"Unset {' and '.join(offline)} to download models and benchmark rows."
        yield Check("hub", "warn", f"offline ({', '.join(offline)} is set): only what is cached can be used", fix)
    else:
        yield Check("hub", "ok", "online as far as the environment says (not tried)")


def _data(data: str | None) -> Iterator[Check]:
    folder = data or os.environ.get("COTUNE_DATA")
    names = [name for name in TASKS if not name.startswith("micro-")]
    if not folder:
        fix = "Give --data DIR or set COTUNE_DATA to read local rows; without it they come from the hub."
        yield Check("data", "warn", "no data folder given", fix)
        return
    root = Path(folder)
    if not root.is_dir():
        yield Check("data", "fail", f"{folder} is not a folder", "Give --data the folder that holds gsm8k/, math/ ...")
        return
    for name in names:
        files = sorted(p.name for p in (root / name).glob("*") if p.name.endswith(_ROWS))
        fix = "" if files else f"Put {name} rows (.jsonl, .jsonl.gz, .csv, .parquet) into {root / name}."
        yield Check(f"data {name}", "ok" if files else "warn", ", ".join(files) or "no files", fix)
