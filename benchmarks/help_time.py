"""How long `cotune --help` takes against the smallest program with the same libraries: ratio of medians.

The other program imports typer and rich's console, has one command and typer's own (Rich) help; ours is plain. Runs
alternate, so that a busy machine slows both alike. Fails above a ratio of 2, which is about what one careless import
of pandas or pydantic costs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

BARE = "import typer, rich.console\napp = typer.Typer()\n@app.command()\ndef hello(name: str): ...\napp()"
REPEATS = 15
LIMIT = 2.0


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - began


def main() -> int:
    ours = [sys.executable, "-m", "cotune", "--help"]
    bare = [sys.executable, "-c", BARE, "--help"]
    seconds(ours), seconds(bare)  # byte code and file cache
    pairs = [(seconds(ours), seconds(bare)) for _ in range(REPEATS)]
    help_s, bare_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = help_s / bare_s
    print(
        json.dumps({"help_s": round(help_s, 3), "bare_s": round(bare_s, 3), "ratio": round(ratio, 2), "limit": LIMIT})
    )
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
