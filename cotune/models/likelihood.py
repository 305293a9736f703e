"""How likely a model finds given completions, as a loss. Knows nothing of who learns from it.

Rows of different length are padded on the right. Attention is causal, so no token sees what stands behind it, and no
attention mask is needed: without one the attention kernels skip the upper triangle and build no [T, T] mask.

Axes: B rows, T tokens, P positions that predict a completion token in at least one row, C tokens of the longest
completion, D width of the model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Ids = Sequence[Sequence[int]]


def right_padded(rows: Ids, device: torch.device) -> Tensor:
    """ids_BT of token lists of different lengths."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def completion_nll(model: nn.Module, contexts: Ids, completions: Ids, embeddings_BTD: Tensor | None = None) -> Tensor:
    """nll_B: the mean of -log p(token | all tokens before it) over each row's completion; contexts carry no loss.

    Differentiable in whatever the model's forward is, and in `embeddings_BTD` where these are given in place of the
    tokens' own. No context and no completion may be empty.
    """
    nll_BP, _ = _token_nll(model, contexts, completions, embeddings_BTD)
    return nll_BP.sum(1) / torch.tensor([len(completion) for completion in completions], device=nll_BP.device)


def completion_log_probs(model: nn.Module, contexts: Ids, completions: Ids) -> Tensor:
    """log_probs_BC: log p(token | all tokens before it) of each completion's tokens, 0 behind its end.

    Differentiable like `completion_nll`.
    """
    nll_BP, first_B = _token_nll(model, contexts, completions)
    return -_aligned(nll_BP, first_B, completions)


def completion_states(model: nn.Module, contexts: Ids, completions: Ids) -> tuple[Tensor, Tensor]:
    """`completion_log_probs`, and states_BCD: what the output head reads where it predicts each of these tokens.

    States carry no gradient, and are 0 behind a completion's end.
    """
    with _read_by_the_head(model) as seen:
        nll_BP, first_B = _token_nll(model, contexts, completions)
    return -_aligned(nll_BP, first_B, completions), _aligned(seen[0], first_B, completions)


def end_states(model: nn.Module, rows: Ids) -> Tensor:
    """states_BD: what the output head reads behind each row's last token, float32 without gradient. No row is empty."""
    device = next(model.parameters()).device
    ends_B = [len(row) - 1 for row in rows]
    positions_P = sorted(set(ends_B))  # no logits for the rest
    with _read_by_the_head(model) as seen:
        keep = torch.tensor(positions_P, device=device)
        model(input_ids=right_padded(rows, device), use_cache=False, logits_to_keep=keep)
    return seen[0][range(len(rows)), [positions_P.index(end) for end in ends_B]]


@contextmanager
def _read_by_the_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the output head reads in each forward pass inside."""
    seen: list[Tensor] = []

    def note(_head: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().float())

    hook = model.get_output_embeddings().register_forward_pre_hook(note)  # type: ignore[operator]
    try:
        yield seen
    finally:
        hook.remove()


def _token_nll(
    model: nn.Module, contexts: Ids, completions: Ids, embeddings_BTD: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """nll_BP, 0 where a row has no completion token, and the column of each row's first one."""
    device = next(model.parameters()).device
    spans = [(len(context) - 1, len(completion)) for context, completion in zip(contexts, completions, strict=True)]
    positions_P = sorted({first + i for first, length in spans for i in range(length)})  # no logits for the rest
    labels_BP = torch.full((len(spans), len(positions_P)), -100)
    columns_B = [positions_P.index(first) for first, _ in spans]  # a row's positions are neighbours in positions_P too
    for row, (column, completion) in enumerate(zip(columns_B, completions, strict=True)):
        labels_BP[row, column : column + len(completion)] = torch.tensor(completion)
    read = {"inputs_embeds": embeddings_BTD}
    if embeddings_BTD is None:
        read = {"input_ids": right_padded([[*c, *y] for c, y in zip(contexts, completions, strict=True)], device)}
    logits_BPV = model(**read, use_cache=False, logits_to_keep=torch.tensor(positions_P, device=device)).logits
    # Flat: with the vocabulary in the middle the softmax takes several times as long, on a GPU even more.
    labels_N = labels_BP.flatten().to(device)
    nll_N = functional.cross_entropy(logits_BPV.float().flatten(0, 1), labels_N, reduction="none")
    return nll_N.view_as(labels_BP), columns_B


def _aligned(of_BP: Tensor, first_B: Sequence[int], completions: Ids) -> Tensor:
    """[B, P, ...] -> [B, C, ...]: each row from its first completion token on, 0 behind its last."""
    lengths = [len(completion) for completion in completions]
    return nn.utils.rnn.pad_sequence(
        [row[first : first + length] for row, first, length in zip(of_BP, first_B, lengths, strict=True)],
        batch_first=True,
    )
