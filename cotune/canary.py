"""Whether adapters do anything in the engine that answered: the first measured examples are continued with and without.

An engine that drops an adapter reports the base model under the strategy's name, and an adapter whose factors are zero
is no tuning. The engines test each adapter when they load it and stop the run (models/lora.py, vllm_server.py); this
looks at the requests that were measured, through the same door, and leaves a number behind.
"""

from __future__ import annotations

from dataclasses import replace

from cotune.bench import Bench
from cotune.engines.base import Request, Sampling
from cotune.values import Completion, Evaluation

EXAMPLES = 16
TOKENS = 16
LEAST = 1e-4  # nats (ours): rows of one engine differ by about 1e-6 with the batch that they are in


def measure(first: Evaluation, sampling: Sampling, bench: Bench) -> dict[str, int] | None:
    """How many `examples` were continued greedily for `TOKENS` tokens under their adapters and without, and on how many
    that was `without_effect`: the same tokens, each with the same log-probability up to `LEAST`.

    Of the first `EXAMPLES` that have an adapter; None when none has one.
    """
    asked = [
        Request(rendered, c.adapter)
        for rendered, c in zip(first.rendered, first.conditionings, strict=True)
        if c.adapter is not None
    ][:EXAMPLES]
    if not asked:
        return None
    greedy = replace(sampling, temperature=0.0, max_new_tokens=min(TOKENS, sampling.max_new_tokens), logprobs=True)
    # With and without side by side, so that what batches do to rows is done to both.
    pairs = [request for own in asked for request in (own, Request(own.prompt))]
    answered = [row[0] for row in bench.generate(pairs, greedy, label="canary")]
    return {
        "examples": len(asked),
        "without_effect": sum(map(_same, answered[::2], answered[1::2])),
    }


def _same(one: Completion, other: Completion) -> bool:
    return one.token_ids == other.token_ids and all(
        abs(a - b) <= LEAST for a, b in zip(one.logprobs, other.logprobs, strict=True)
    )
