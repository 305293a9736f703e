"""Weights & Biases: offline in wandb/ beside the run folders, unless WANDB_MODE and WANDB_DIR say otherwise."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping

from cotune.trackers.base import Tracked


class WandbTracker:
    """Raises what wandb raises.

    An offline run cannot be resumed: each process leaves a folder of its own with the same id. Since rows of earlier
    processes come again, the last folder holds everything.
    Of the machine nothing is logged: no command line, git state, code, console, host or statistics.
    """

    def __init__(self, run: Tracked) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.id = run.known or uuid.uuid4().hex[:12]
        mode = os.environ.get("WANDB_MODE", "offline")
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="",
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cotune"),
            id=self.id,
            name=run.folder.name,
            dir=os.environ.get("WANDB_DIR", str(run.folder.parent)),
            mode=mode,
            resume=None if mode == "offline" else "allow",
            config=dict(run.settings),
            settings=settings,
        )
        self._run.define_metric("*", step_metric="tuning_tokens")

    def log(self, numbers: Mapping[str, float], i: int, tokens: int, time: float) -> None:
        self._run.log({**numbers, "tuning_tokens": tokens}, step=i)

    def end(self, status: str, results: Mapping[str, float]) -> None:
        self._run.summary.update({**results, "status": status})
        self._run.finish(exit_code=0 if status in ("done", "no-data") else 1)
