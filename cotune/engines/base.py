"""What an engine is: rendered prompts in, completions out, each request under its own adapter.

An engine knows nothing of tasks, strategies or budgets. The chat template is applied before it
(models/base.py), so every engine sees the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cotune.errors import UsageError
from cotune.values import Adapter, Completion

if TYPE_CHECKING:
    from cotune.models.base import BaseModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How to decode. `temperature` 0 is greedy; a sample draws from its own stream, named by (seed, prompt, index)."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    seed: int = 0
    logprobs: bool = False


@dataclass(frozen=True)
class Request:
    """One rendered prompt (chat template applied, ends where the assistant begins) and who answers it.

    Its samples have the numbers `first`, `first` + 1, ...: another `first` is the same prompt answered anew.
    """

    prompt: str
    adapter: Adapter | None = None
    first: int = 0


def exact(base: BaseModel) -> bool:
    """Whether its arithmetic repeats itself: float32 on a CPU. (16 bits, or a GPU, may decide near-ties anew.)"""
    return base.model.device.type == "cpu" and str(base.model.dtype) == "torch.float32"


def stream_seed(sampling: Sampling, prompt: str, sample: int) -> int:
    """The 63-bit seed of sample `sample` of a prompt: its random numbers depend on nothing else in the batch."""
    text = f"{sampling.seed}\n{sample}\n{prompt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def report_too_long(lengths: Sequence[int], sampling: Sampling, context: int, model: str) -> None:
    """Say how many prompts leave no room for a completion in the context; these count as truncated.

    Raises UsageError when that is all of them.
    """
    limit = context - sampling.max_new_tokens
    too_long = sum(length > limit for length in lengths)
    if not too_long:
        return
    message = (
        f"{too_long} of {len(lengths)} prompts are too long for {model}: the longest has {max(lengths)} tokens, and "
        f"with {sampling.max_new_tokens} new ones only {limit} fit its context of {context}. Shorten the prompt "
        "(fewer demonstrations), lower max_new_tokens, or choose a model with a longer context."
    )
    if too_long == len(lengths):
        raise UsageError(message)
    logger.warning("%s They count as truncated.", message)


class Engine(Protocol):
    """Generates with one base model. `context_length` is the most tokens of prompt and completion together.

    `rows_apart` says that each sample is a call of its own: its prompt is read for it alone, and no other row of the
    batch moves its last bits. Elsewhere a prompt is read once for all of its samples. `repeats` promises the same
    completions for the same batches again; where not, a run measures how far off it is (noise.py).
    """

    name: str
    rows_apart: bool
    repeats: bool

    @property
    def context_length(self) -> int: ...

    def identity(self) -> list[Any]:
        """What its completions depend on besides weights, prompt, adapter and decoding: versions, hardware, settings.

        Plain JSON.
        """

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """Split into batches (lists of indices into `requests`), deterministic in the requests alone.

        Every index occurs exactly once. The caller generates, books and journals batch by batch, so a
        resumed run sees the same batch compositions as an uninterrupted one.
        """

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions per request, in request order, as one batch."""

    def token_count(self, prompt: str) -> int:
        """Tokens of a rendered prompt, for budgets and plans; no fewer, where only a server can count them."""

    def release(self) -> None:
        """Weights are trained next: give back what memory can be had again with the next `generate`."""
