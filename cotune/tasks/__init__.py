"""The table of tasks: name -> class, imported on demand."""

from cotune.plugins import resolve
from cotune.tasks.base import Task

TASKS = {
    "gsm8k": "cotune.tasks.gsm8k:Gsm8k",
    "math": "cotune.tasks.math:Math",
    "hotpotqa": "cotune.tasks.hotpotqa:HotpotQA",
    "cosmosqa": "cotune.tasks.cosmosqa:CosmosQA",
    "micro-gsm8k": "cotune.tasks.micro:MicroGsm8k",
    "micro-math": "cotune.tasks.micro:MicroMath",
    "micro-hotpotqa": "cotune.tasks.micro:MicroHotpotQA",
    "micro-cosmosqa": "cotune.tasks.micro:MicroCosmosQA",
}


def task(name: str) -> Task:
    """Raises UsageError with the nearest names for an unknown task."""
    made: Task = resolve("tasks", TASKS, name)()
    return made
