"""Completions of a chat drawn in parallel or in chains of revisions, by whatever engine the bench has.

Source: Snell et al. (arXiv 2408.03314; sheet 03): N generations as N / L chains of L attempts each. Knows nothing of
how completions become an answer (plans.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cotune.bench import Bench, Each
from cotune.engines.base import Request, Sampling
from cotune.revision import KEPT, revision_messages
from cotune.values import Completion, digest

logger = logging.getLogger(__name__)

Chat = Sequence[Mapping[str, str]]


def draw(
    bench: Bench,
    chats: Sequence[Chat],
    requests: Sequence[Request],
    sampling: Sampling,
    length: int,
    *,
    version: str = "",
    label: str = "",
    each: Each | None = None,
) -> list[list[Completion]]:
    """`sampling.n` completions of each chat, of which `requests` are the rendered ones; n is a multiple of `length`.

    With `length` 1 they are independent, and this is `Bench.generate`. Else they are n / `length` chains, one after
    another: attempt t of a chain answers `revision_messages` with the attempts before it. All chains of all chats make
    their attempt t together; `each` sees them when all are finished.

    Attempt t of chain c draws from the stream of (seed, t, its prompt, c): chains that have said the same go on apart,
    and neither the batch, nor the number of chains, nor their length matters. None of these streams is a parallel
    sample's, so samples can tell how hard the questions are that chains are judged on (ours).
    Raises BudgetExhausted like Bench.generate.
    """
    if length == 1:
        return bench.generate(requests, sampling, version=version, label=label, each=each)
    made: list[list[list[Completion]]] = [[[] for _ in range(sampling.n // length)] for _ in requests]
    for place in range(length):
        at = replace(sampling, n=1, seed=int(digest([sampling.seed, "attempt", place]), 16) >> 1)
        told = f"{label}, attempt {place + 1} of {length}" if label else ""
        if place == 0:  # the same prompt for all chains of a chat, read once
            at = replace(at, n=sampling.n // length)
            revised = list(requests)
        else:
            revised = _revisions(bench, chats, requests, made, sampling)
        new = [c for row in bench.generate(revised, at, version=version, label=told) for c in row]
        for chain, completion in zip((chain for chains in made for chain in chains), new, strict=True):
            chain.append(completion)
    rows = [[completion for chain in chains for completion in chain] for chains in made]
    so_far = each(range(len(rows)), rows) if each else {}
    if label:
        bench.progress(label, len(rows), len(rows), **so_far)
    return rows


def _revisions(
    bench: Bench,
    chats: Sequence[Chat],
    requests: Sequence[Request],
    made: Sequence[Sequence[Sequence[Completion]]],
    sampling: Sampling,
) -> list[Request]:
    """The next request of every chain. What does not fit the context is left out whole, the oldest attempt first; where
    not even the latest fits, the chat is answered anew, without any (ours)."""
    room = bench.engine.context_length - sampling.max_new_tokens
    revised, fewer, none = [], 0, 0
    for chat, request, chains in zip(chats, requests, made, strict=True):
        for number, chain in enumerate(chains):
            attempts = [completion.text for completion in chain]
            most = min(KEPT, len(attempts))
            for kept in range(most, 0, -1):
                prompt = bench.base.render(revision_messages(chat, attempts, kept))
                if bench.engine.token_count(prompt) <= room:
                    break
            else:
                prompt, kept = request.prompt, 0
            fewer, none = fewer + (kept < most), none + (kept == 0)
            revised.append(Request(prompt, request.adapter, number))
    if fewer:
        logger.warning(
            "%d of %d revisions see fewer earlier attempts than %d, %d of these none: with %d new tokens they do not "
            "fit the context of %d. Lower max_new_tokens, shorten the prompt, or choose a model with a longer context.",
            *(fewer, len(revised), most, none, sampling.max_new_tokens, bench.engine.context_length),
        )
    return revised
