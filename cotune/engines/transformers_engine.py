"""Generation with Hugging Face transformers: each row of a batch under its own adapter.

Its own decoding loop around `model.forward` and a `DynamicCache`: prompts are processed once however many
samples are drawn, finished rows leave the batch, and every row draws from its own random stream, so its tokens
do not depend on its neighbours. (In floating point the batch still moves log-probabilities by about 1e-6, which
can decide a near-tie.) Knows nothing of tasks, strategies or budgets.

Axes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from cotune.config import RunConfig
from cotune.engines.base import Request, Sampling, exact, report_too_long, stream_seed
from cotune.errors import CotuneError
from cotune.models.base import BaseModel
from cotune.models.lora import LoraFactors, as_factors, attached, canary, stack
from cotune.values import Completion

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

# Below this size more threads cost more than they bring (1M: +11% with two threads on an idle machine, a tenth
# of the speed on a busy one; 105M: +48%).
_ONE_THREAD_BELOW = 50_000_000
_CANARY_TOKENS = 32


@dataclass
class _Row:
    """One completion in the making: sample `sample` of request `request`."""

    request: int
    sample: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False


class TransformersEngine:
    """`batch_size` limits the rows (requests times samples) decoded at once, `max_batch_tokens` their tokens with
    padding and the completions at full length. `threads` are those of torch in this whole process; None takes one
    for a small model on a CPU and else leaves torch's own choice.
    """

    name = "transformers"
    rows_apart = False

    def __init__(
        self, base: BaseModel, *, batch_size: int = 32, max_batch_tokens: int = 32768, threads: int | None = None
    ) -> None:
        self.base = base
        self.repeats = exact(base)
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self._alive: set[str] = set()  # digests of adapters that the canary has passed
        if threads is None and base.model.device.type == "cpu" and base.parameters_count < _ONE_THREAD_BELOW:
            threads = 1
        if threads is not None:
            torch.set_num_threads(threads)

    @classmethod
    def from_config(cls, base: BaseModel, config: RunConfig) -> TransformersEngine:
        settings = config.runner
        return cls(
            base, batch_size=settings.batch_size, max_batch_tokens=settings.max_batch_tokens, threads=settings.threads
        )

    @property
    def context_length(self) -> int:
        return self.base.context_length

    def identity(self) -> list[Any]:
        return [self.name, torch.__version__, transformers.__version__, *self.base.hardware, torch.get_num_threads()]

    def token_count(self, prompt: str) -> int:
        """Tokens of a rendered prompt."""
        return len(self.base.encode(prompt))

    def release(self) -> None:
        """It holds nothing between calls: the weights are the ones that are trained under, caches end with a batch."""

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """Batches of requests of similar length, the longest first, so that memory runs out early or not at all.

        A prompt that leaves no room for its completion in the context is answered by `generate` with a truncated
        empty completion; this says so. Raises UsageError when that is all of them.
        """
        lengths = [self.token_count(request.prompt) for request in requests]
        report_too_long(lengths, sampling, self.context_length, self.base.name)
        batches: list[list[int]] = []
        room = 0
        for i in sorted(range(len(requests)), key=lambda i: (-lengths[i], i)):
            if room == 0:
                batches.append([])
                tokens = sampling.n * (lengths[i] + sampling.max_new_tokens)
                room = max(1, min(self.batch_size // sampling.n, self.max_batch_tokens // tokens))
            batches[-1].append(i)
            room -= 1
        return batches

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`sampling.n` completions per request, in request order, as one batch (halved when memory runs out).

        Sample s of a prompt draws from a stream seeded by (sampling.seed, prompt, s): the same prompt twice in a
        batch gives the same completions; ask for n, or for other numbers (`first`). Greedy samples are decoded once
        and repeated.
        Raises CotuneError when a single row does not fit the memory or an adapter changes nothing (`canary`).
        """
        prompts = [self.base.encode(request.prompt) for request in requests]
        room = self.context_length - sampling.max_new_tokens
        adapters = [as_factors(request.adapter) for request in requests]
        self._check_adapters(prompts, adapters)
        greedy = sampling.temperature == 0
        samples = range(1 if greedy else sampling.n)
        fitting = [r for r, ids in enumerate(prompts) if len(ids) <= room]
        rows = [_Row(r, requests[r].first + s) for r in fitting for s in samples]

        def decode(chosen: Sequence[_Row]) -> list[_Row]:
            draws = None if greedy else _draws(chosen, requests, sampling, self.base.model.device)
            return self._decode(chosen, prompts, adapters, sampling, draws)

        done = _halving_when_memory_runs_out(decode, rows)
        completions: list[list[Completion]] = [[] for _ in requests]
        for row in done:
            completion = Completion(
                text=self.base.decode(row.token_ids),
                token_ids=tuple(row.token_ids),
                prompt_tokens=len(prompts[row.request]),
                truncated=not row.ended,
                logprobs=tuple(row.logprobs),
            )
            completions[row.request] += [completion] * (sampling.n if greedy else 1)
        for ids, own in zip(prompts, completions, strict=True):
            if len(ids) > room:
                own += [Completion("", (), len(ids), truncated=True)] * sampling.n
        return completions

    def score(self, requests: Sequence[Request], continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p of each token of the given continuations (token ids) after their prompts, at temperature 1.

        Prompt and continuation together must fit the context.
        """
        prompts = [self.base.encode(request.prompt) for request in requests]
        adapters = [as_factors(request.adapter) for request in requests]
        longest_first = sorted(range(len(requests)), key=lambda i: -len(prompts[i]) - len(continuations[i]))

        def scores(chosen: Sequence[int]) -> list[list[float]]:
            ids, mask, positions = self._pad([prompts[i] + list(continuations[i]) for i in chosen])
            keep = max(len(continuations[i]) for i in chosen) + 1
            with torch.inference_mode(), attached(self.base.model, *stack([adapters[i] for i in chosen])):
                logits_BTV = self.base.model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep
                ).logits
            logprobs_BT = _logprobs(logits_BTV[:, :-1], ids[:, -keep + 1 :]) if keep > 1 else ids[:, :0]
            return [
                row[len(row) - len(continuations[i]) :] for i, row in zip(chosen, logprobs_BT.tolist(), strict=True)
            ]

        results: list[list[float]] = [[] for _ in requests]
        for start in range(0, len(requests), self.batch_size):
            batch = longest_first[start : start + self.batch_size]
            for i, row in zip(batch, _halving_when_memory_runs_out(scores, batch), strict=True):
                results[i] = row
        return results

    def _check_adapters(self, prompts: list[list[int]], adapters: list[LoraFactors | None]) -> None:
        """The canary: every static adapter once, and one of the generated adapters of each batch."""
        first = next(((ids, a) for ids, a in zip(prompts, adapters, strict=True) if a is not None), None)
        if first is not None and first[1].digest not in self._alive:
            canary(self.base, first[1], first[0][:_CANARY_TOKENS])
            self._alive.add(first[1].digest)

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Left-padded (ids, mask, positions), each [B, T], so that all rows end at the same column."""
        width = max(len(row) for row in rows)
        device = self.base.model.device
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)

    @torch.inference_mode()
    def _decode(
        self,
        chosen: Sequence[_Row],
        prompts: list[list[int]],
        adapters: list[LoraFactors | None],
        sampling: Sampling,
        draws_BT: Tensor | None,
    ) -> list[_Row]:
        """Fresh rows filled with tokens. `draws_BT` are uniform numbers in [0, 1), None is greedy."""
        model, ends = self.base.model, frozenset(self.base.end_of_turn_ids)
        rows = [_Row(row.request, row.sample) for row in chosen]  # an attempt that runs out of memory leaves no trace
        used = list(dict.fromkeys(row.request for row in rows))
        ids, mask, positions = self._pad([prompts[i] for i in used])
        cache = DynamicCache(config=model.config)
        live = rows
        with attached(model, *stack([adapters[i] for i in used])) as select_adapters:
            logits_BV = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            ).logits[:, -1]
            position_B = positions[:, -1]
            where = {request: line for line, request in enumerate(used)}
            keep = [where[row.request] for row in rows]
            if keep != list(range(len(used))):
                lines = torch.tensor(keep, device=ids.device)
                logits_BV, position_B, mask = logits_BV[lines], position_B[lines], mask[lines]
                cache.batch_select_indices(lines)
                select_adapters(lines)
            for step in range(sampling.max_new_tokens):
                token_B = _choose(logits_BV, sampling, None if draws_BT is None else draws_BT[:, step])
                logprob_B = _logprobs(logits_BV, token_B).tolist() if sampling.logprobs else []
                for line, token in enumerate(token_B.tolist()):
                    row = live[line]
                    row.ended = row.ended or token in ends
                    if not row.ended:
                        row.token_ids.append(token)
                        row.logprobs += logprob_B[line : line + 1]
                keep = [line for line, row in enumerate(live) if not row.ended]
                if not keep or step + 1 == sampling.max_new_tokens:
                    break
                if len(live) - len(keep) >= max(1, len(live) // 8):  # dropping copies the cache: not for every row
                    lines = torch.tensor(keep, device=ids.device)
                    live = [live[line] for line in keep]
                    token_B, position_B, mask = token_B[lines], position_B[lines], mask[lines]
                    draws_BT = None if draws_BT is None else draws_BT[lines]
                    cache.batch_select_indices(lines)
                    select_adapters(lines)
                position_B = position_B + 1
                mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
                logits_BV = model(
                    input_ids=token_B[:, None],
                    attention_mask=mask,
                    position_ids=position_B[:, None],
                    past_key_values=cache,
                    logits_to_keep=1,
                ).logits[:, -1]
        return rows


def _choose(logits_BV: Tensor, sampling: Sampling, draw_B: Tensor | None) -> Tensor:
    """The next token of each row: the most likely one, or by inverse transform of one uniform number a row.

    Top-p keeps the smallest set of most likely tokens with mass >= top_p (ties with the last one included).
    In float64, so that rounding moves a boundary between tokens by no more than the logits themselves.
    """
    if draw_B is None:
        return logits_BV.argmax(-1)
    probs_BV = (logits_BV.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ranked_BV = probs_BV.sort(descending=True).values
        before_BV = ranked_BV.cumsum(-1) - ranked_BV
        least_B = ranked_BV.masked_fill(before_BV >= sampling.top_p, torch.inf).min(-1, keepdim=True).values
        probs_BV = probs_BV.where(probs_BV >= least_B, 0.0)
    cumulative_BV = probs_BV.cumsum(-1)
    target_B = draw_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p of each token under softmax(logits): [..., V] and [...] -> [...]."""
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def _draws(rows: Sequence[_Row], requests: Sequence[Request], sampling: Sampling, device: torch.device) -> Tensor:
    """Uniform numbers [B, max_new_tokens], row by row from its own stream; drawn on the CPU, so the same everywhere."""
    draws = []
    for row in rows:
        stream = torch.Generator().manual_seed(stream_seed(sampling, requests[row.request].prompt, row.sample))
        draws.append(torch.rand(sampling.max_new_tokens, generator=stream, dtype=torch.float64))
    return torch.stack(draws).to(device)


def _halving_when_memory_runs_out(
    work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]
) -> list[Result]:
    """`work(items)`; where memory runs out, that of the first half and then of the second half.

    Raises CotuneError when one item alone is too much.
    """
    if not items:
        return []
    try:
        return work(items)
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        if len(items) == 1:
            raise CotuneError(
                "The memory does not suffice for one row alone. Choose a smaller model, a shorter prompt or "
                "a lower max_new_tokens."
            ) from error
    # Only here, behind the except block, is the failed attempt's memory free again.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning(
        "Out of memory with %d rows in a batch: going on with halves. A lower runner.batch_size avoids the retry.",
        len(items),
    )
    half = len(items) // 2
    return _halving_when_memory_runs_out(work, items[:half]) + _halving_when_memory_runs_out(work, items[half:])
