"""TensorBoard: event files in tensorboard/RUN beside the run folders, written by tensorboardX."""

from __future__ import annotations

import time
from collections.abc import Mapping

from cotune.trackers.base import Tracked


class TensorboardTracker:
    """Raises OSError. Settings are a text; the file's name holds that of the machine, as TensorBoard wants it."""

    def __init__(self, run: Tracked) -> None:
        from tensorboardX import SummaryWriter

        self.id = run.folder.name
        # From step 0 on, readers then forget what files of earlier processes hold: their rows come again.
        self._writer = SummaryWriter(
            str(run.folder.parent / "tensorboard" / self.id),
            purge_step=0,
            flush_secs=10,
            filename_suffix=f".{time.time_ns()}",
        )
        table = "\n".join(f"    {name} = {value}" for name, value in run.settings.items())
        self._writer.add_text("config", table, 0)
        self._tokens = 0

    def log(self, numbers: Mapping[str, float], i: int, tokens: int, time: float) -> None:
        self._tokens = tokens
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, tokens, time)

    def end(self, status: str, results: Mapping[str, float]) -> None:
        for name, value in results.items():
            self._writer.add_scalar(name, value, self._tokens)
        self._writer.add_text("status", status, self._tokens)
        self._writer.close()
