"""How results reach stdout: plain text or JSON, without tracebacks when the reader goes away.

Results go to stdout, everything else to stderr. Knows nothing of what is printed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from io import StringIO
from typing import TYPE_CHECKING, Any

from cotune.compare.escape import clean

if TYPE_CHECKING:
    from rich.console import Console


def emit(text: str) -> bool:
    """Print one result on stdout. False when nobody reads it any more (`cotune ... | head`)."""
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # What is written from here on, and the flush when Python ends, goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def emit_json(value: Any, indent: int | None = 2) -> bool:
    """One JSON object; `indent=None` makes it one line of JSON lines. A number that is not finite is an error."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return emit(json.dumps(value, ensure_ascii=not unicode, allow_nan=False, indent=indent))


def note(text: str) -> None:
    """One line on stderr: progress, warnings, errors."""
    print(clean(text), file=sys.stderr, flush=True)


def drawn(draw: Callable[[Console], None], terminal: bool) -> str:
    """What `draw` prints, as one string. Colour (not with NO_COLOR) and the line width are for a terminal only."""
    from rich.console import Console

    buffer = StringIO()
    console = Console(
        file=buffer,
        force_terminal=terminal and os.environ.get("TERM") != "dumb",
        no_color=True if not terminal or os.environ.get("NO_COLOR") else None,
        width=None if terminal else 10_000,
        highlight=False,
        emoji=False,
    )
    draw(console)
    # Columns of the last cell are padded; a pipe does not want the blanks.
    return "".join(line.rstrip() + "\n" for line in buffer.getvalue().splitlines())
