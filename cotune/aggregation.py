"""Several completions of one query made into one answer: majority vote, best-of-N, and what they are worth exactly.

Sources: IAPO/PSST (arXiv 2508.10030) for the vote with shared ties, best-of-N and the reuse of one draw in blocks;
Snell et al. (arXiv 2408.03314) for weighted best-of-N. Knows nothing of prompts, engines or budgets. An answer is the
prediction that was read out of a completion. None, a completion without one, votes like any other answer and is never
right (ours): dropping it would let a model that mostly fails to answer win by its rare answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cotune.errors import UsageError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Answer = str | None
Shares = Mapping[Answer, float]  # the chance of each answer to be the one that is given


# ---- one query ----


def majority_vote(predictions: Sequence[Answer]) -> Shares:
    """The answers with the most votes, each with share 1/t when t are tied (IAPO's MV). UsageError for none."""
    return _winners(predictions, [1.0] * len(predictions), math.fsum)


def best_of_n(predictions: Sequence[Answer], scores: Sequence[float]) -> Shares:
    """The answer of the completion with the highest score; answers that share it are tied, 1/t each (ours)."""
    return _winners(predictions, scores, max)


def weighted_best_of_n(predictions: Sequence[Answer], scores: Sequence[float]) -> Shares:
    """The answer with the largest sum of scores over its completions (Snell et al.); ties 1/t each (ours)."""
    return _winners(predictions, scores, math.fsum)


def hierarchical(chains: Sequence[Sequence[Answer]], scores: Sequence[Sequence[float]]) -> Shares:
    """Weighted best-of-N inside each chain, then across what the chains chose (Snell et al.).

    Ours, because the paper does not say: a chain's answer goes on with the highest score that it got in the chain, and
    t tied answers of a chain go on with 1/t of it each. For chains of one attempt it is weighted best-of-N.
    """
    finalists: list[Answer] = []
    strengths: list[float] = []
    for chain, own in zip(chains, scores, strict=True):
        for answer, share in weighted_best_of_n(chain, own).items():
            finalists.append(answer)
            strengths.append(share * max(s for a, s in zip(chain, own, strict=True) if a == answer))
    return weighted_best_of_n(finalists, strengths)


def self_consistency(predictions: Sequence[Answer]) -> list[float]:
    """The share of the completions that give each one's answer. Best-of-N by it, weighted or not, is the majority."""
    return [predictions.count(answer) / len(predictions) for answer in predictions]


def _winners(
    predictions: Sequence[Answer], scores: Sequence[float], of_group: Callable[[Iterable[float]], float]
) -> Shares:
    if not predictions:
        raise UsageError("An answer cannot be chosen from 0 completions; draw at least 1.")
    if len(predictions) != len(scores):
        raise UsageError(f"{len(predictions)} completions need as many scores, not {len(scores)}.")
    if not all(map(math.isfinite, scores)):
        raise UsageError("A score is not a finite number; score every completion before choosing among them.")
    groups: dict[Answer, list[float]] = {}
    for prediction, score in zip(predictions, scores, strict=True):
        groups.setdefault(prediction, []).append(score)
    strength = {answer: of_group(group) for answer, group in groups.items()}
    top = max(strength.values())
    tied = [answer for answer in strength if strength[answer] == top]
    return {answer: 1 / len(tied) for answer in tied}


def expected_score(shares: Shares, worth: Mapping[Answer, float]) -> float:
    """Expected score of the answer that is given: with worth 1 for the gold answer, IAPO's credit 1[n_g = n*] / t.

    `worth` is the grader's score of each answer; None is worth 0 whatever it says.
    """
    return math.fsum(share * worth[answer] for answer, share in shares.items() if answer is not None)


# ---- what N completions are worth, exactly ----


def majority_accuracy(probabilities: ArrayLike, n_max: int) -> Floats:
    """Probability that a vote of N independent completions gives the answer in column 0, for N = 1..n_max.

    `probabilities` [..., S] of the S answers; returns [..., n_max]. Ties count 1/t. The gold answer has m votes and j
    others have m too, the rest fewer: the sum over m and j of C(N, m) p_0^m f_m(j, N - m) / (1 + j), where f_m(j, n) is
    the sum of multinomial(n; counts) prod p^count over the other answers' counts, built answer by answer. Only
    positive terms below 1 are added, so it is exact to rounding. For two answers N = 2m equals 2m - 1.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    check_n(n_max)
    if p.ndim < 1 or not p.shape[-1] or (p < 0).any() or not np.allclose(p.sum(-1), 1):
        raise UsageError("Answer probabilities must be at least 0 and sum to 1 over the last axis.")
    shape, p = p.shape[:-1], p.reshape(-1, p.shape[-1])
    accuracy = np.zeros((len(p), n_max + 1))
    for m in range(1, n_max + 1):
        others = _others(p[:, 1:], m, n_max - m)
        credit = np.einsum("jbn,j->bn", others, 1 / (1 + np.arange(len(others))))
        ways = np.array([math.comb(n, m) for n in range(m, n_max + 1)], dtype=np.float64)
        accuracy[:, m:] += ways * p[:, :1] ** m * credit
    return accuracy[:, 1:].reshape(*shape, n_max)


def _others(p: Floats, m: int, most: int) -> Floats:
    """f_m(j, n) of `majority_accuracy`, [J, B, most + 1]: j answers have m votes, the others fewer, n votes in all."""
    ties = min(p.shape[1], most // m)
    f = np.zeros((ties + 1, len(p), most + 1))
    f[0, :, 0] = 1
    for answer in range(p.shape[1]):
        before, f = f, np.zeros_like(f)
        reach = min(most, answer * m)  # votes that the answers so far can have
        for k in range(min(m, most) + 1):
            stop = min(reach, most - k) + 1
            ways = np.array([math.comb(n + k, k) for n in range(stop)], dtype=np.float64)
            added = before[:, :, :stop] * (ways * p[:, answer, None] ** k)
            if k < m:
                f[:, :, k : k + stop] += added
            else:
                f[1:, :, k : k + stop] += added[:-1]
    return f


def best_of_n_value(values: ArrayLike, probabilities: ArrayLike, n_max: int) -> Floats:
    """Expected largest of N independent values, for N = 1..n_max: the objectives' part of IAPO's BON.

    `values` and `probabilities` [..., M] of the M outcomes; returns [..., n_max]. With the values in order, v_1 <= ...,
    and F_j the chance of at most v_j: sum over j of v_j (F_j^N - F_(j-1)^N).
    """
    check_n(n_max)
    values, probabilities = np.broadcast_arrays(np.asarray(values, float), np.asarray(probabilities, float))
    order = np.argsort(values, axis=-1)
    ordered = np.take_along_axis(values, order, -1)
    below = np.cumsum(np.take_along_axis(probabilities, order, -1), -1)
    steps = -np.diff(ordered, axis=-1)  # summed by parts: v_M - sum over j < M of (v_(j+1) - v_j) F_j^N
    out, power = np.empty((*values.shape[:-1], n_max)), np.ones_like(below[..., :-1])
    for n in range(n_max):
        power *= below[..., :-1]
        out[..., n] = ordered[..., -1] + (steps * power).sum(-1)
    return out


# ---- one draw of N completions, used for every smaller N ----


@dataclass(frozen=True)
class Blocks:
    """How a draw of N completions is cut: for each n = 1..N, floor(N / n) disjoint blocks of n neighbours.

    The H blocks are listed by n; `of_size[n - 1]` is the first of n and `count[n - 1]` how many. `inside` [H, N] is 1
    where a completion is in a block, `covered` [N, N] where completion i is in any block of n. `members` lists the
    completions of all blocks one after another, each block's from `start[h]` on. Blocks of one draw share their query:
    they are independent given the query only, so for a mean over queries the sample size is the number of draws.
    """

    of_size: Ints
    count: Ints
    inside: Floats
    covered: Floats
    members: Ints
    start: Ints


@lru_cache(maxsize=256)
def blocks(n: int) -> Blocks:
    check_n(n)
    sizes = np.arange(1, n + 1)
    count = n // sizes
    first = np.concatenate([k * np.arange(n // k) for k in sizes])
    stop = first + np.repeat(sizes, count)
    place = np.arange(n)
    inside = (place >= first[:, None]) & (place < stop[:, None])
    return Blocks(
        of_size=np.cumsum(count) - count,
        count=count,
        inside=inside.astype(np.float64),
        covered=(place[:, None] < count * sizes).astype(np.float64),
        members=np.nonzero(inside)[1],
        start=np.cumsum(stop - first) - (stop - first),
    )


def majority_block_sums(answers: Ints, worth: Floats) -> Floats:
    """Sum of the votes' expected scores over all blocks of n completions of all draws, for n = 1..N, [N].

    `answers` [B, N] numbers of answers, one draw a row; `worth` [B, S] what each answer would score.
    """
    cut = blocks(answers.shape[1])
    votes = cut.inside @ (answers[:, :, None] == np.arange(worth.shape[1]))  # [B, H, S], whole numbers
    tied = votes == votes.max(-1, keepdims=True)
    credit = (tied @ worth[:, :, None])[..., 0] / tied.sum(-1)
    return np.add.reduceat(credit.sum(0), cut.of_size)


def best_block_sums(values: Floats) -> Floats:
    """Sum of the largest value over all blocks of n completions of all draws, for n = 1..N: [..., B, N] -> [..., N]."""
    cut = blocks(values.shape[-1])
    best = np.maximum.reduceat(values[..., cut.members], cut.start, axis=-1)
    return np.add.reduceat(best.sum(-2), cut.of_size, axis=-1)


def total_block_sums(values: Floats) -> Floats:
    """Sum of the values over all blocks of n completions of all draws, for n = 1..N: [B, N] -> [N]."""
    sums: Floats = values.sum(0) @ blocks(values.shape[1]).covered
    return sums


def check_n(n: int) -> None:
    if n < 1:
        raise UsageError(f"A number of completions of {n} answers nothing; choose at least 1.")
