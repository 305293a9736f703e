"""What stopping vLLM between generation and training returns, and what coming back costs.

    python benchmarks/engine_memory.py [--model tiny] [--cache-gib 1] [--json]

vLLM in a process of its own (`vllm.between = "stop"`): resident memory of this process and of all below it while the
engine is there, after `release()`, and after the next generation; seconds of the first start, of stopping, and of that
next generation, which starts vLLM again and loads the adapter anew. On a GPU add `--between sleep`; the memory is then
that of the device, as free memory tells it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

import torch
from lora_throughput import random_adapter

from cotune.engines.base import Request, Sampling
from cotune.engines.vllm_engine import VllmEngine
from cotune.models.base import load


def resident_bytes() -> int:
    """Of this process and all below it, shared pages counted once for each; on a GPU what is taken of the device."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    parents, sizes = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:  # it ended meanwhile
            continue
        found = dict(re.findall(r"^(PPid|VmRSS):\s+(\d+)", text, re.MULTILINE))
        pid = int(status.parent.name)
        parents[pid], sizes[pid] = int(found["PPid"]), 1024 * int(found.get("VmRSS", 0))
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(sizes[pid] for pid in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--cache-gib", type=float, default=1.0)
    parser.add_argument("--between", choices=["stop", "sleep"], default="stop")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    base = load(options.model)
    engine = VllmEngine(
        base,
        max_rank=8,
        sequences=16,
        adapters=4,
        cache_gib=options.cache_gib,
        own_process=True,
        between=options.between,
    )
    request = [Request("What is 3 + 4 ?", random_adapter(base, 0))]
    found: dict[str, float] = {"model_only_bytes": resident_bytes()}

    def step(name: str, work: object) -> None:
        began = time.perf_counter()
        work()  # type: ignore[operator]
        found[f"{name}_seconds"] = time.perf_counter() - began
        found[f"{name}_bytes"] = resident_bytes()

    step("started", lambda: engine.generate(request, Sampling(8)))
    step("released", engine.release)
    step("back", lambda: engine.generate(request, Sampling(8)))
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:20}{value / 2**20:10.0f} MiB" if name.endswith("bytes") else f"{name:20}{value:10.1f} s")


if __name__ == "__main__":
    main()
