"""An environment without noise, which logs how it is pulled."""

from __future__ import annotations

import numpy as np

from cotune.aggregation import Floats, Ints, blocks


class Known:
    """An environment without noise: every block of n completions of prompt p has utility `true[c, p, n - 1]`."""

    def __init__(self, true: Floats) -> None:
        self.true, self.queries = true, 2
        self.contexts, self.prompts, self.n_max = true.shape
        self.log: list[tuple[int, int, int]] = []

    def pull(self, prompt: int, n: int, count: int, random: np.random.Generator) -> tuple[Ints, Floats]:
        self.log.append((prompt, n, count))
        return np.arange(count) % 2, count * self.true[:, prompt, :n] * blocks(n).count

    def values(self, queries: Ints) -> Floats:
        return self.true


def known(contexts: int, prompts: int, n_max: int, seed: int = 0) -> Known:
    return Known(np.random.default_rng(seed).normal(size=(contexts, prompts, n_max)))
