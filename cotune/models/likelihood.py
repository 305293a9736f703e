"""How likely a model finds given completions, as a loss. Knows nothing of who learns from it.

Rows of different length are padded on the right. Attention is causal, so no token sees what stands behind it, and no
attention mask is needed: without one the attention kernels skip the upper triangle and build no [T, T] mask.

Axes: B rows, T tokens, P positions that predict a completion token in at least one row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """ids_BT of token lists of different lengths."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def completion_nll(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    embeddings_BTD: Tensor | None = None,
) -> Tensor:
    """nll_B: the mean of -log p(token | all tokens before it) over each row's completion; contexts carry no loss.

    Differentiable in whatever the model's forward is, and in `embeddings_BTD` where these are given in place of the
    tokens' own. No context and no completion may be empty.
    """
    device = next(model.parameters()).device
    spans = [(len(context) - 1, len(completion)) for context, completion in zip(contexts, completions, strict=True)]
    positions_P = sorted({first + i for first, length in spans for i in range(length)})  # no logits for the rest
    labels_BP = torch.full((len(spans), len(positions_P)), -100)
    for row, ((first, length), completion) in enumerate(zip(spans, completions, strict=True)):
        column = positions_P.index(first)  # a row's positions are neighbours in positions_P too
        labels_BP[row, column : column + length] = torch.tensor(completion)
    read = {"inputs_embeds": embeddings_BTD}
    if embeddings_BTD is None:
        read = {"input_ids": right_padded([[*c, *y] for c, y in zip(contexts, completions, strict=True)], device)}
    logits_BPV = model(**read, use_cache=False, logits_to_keep=torch.tensor(positions_P, device=device)).logits
    nll_BP = functional.cross_entropy(logits_BPV.float().transpose(1, 2), labels_BP.to(device), reduction="none")
    return nll_BP.sum(1) / torch.tensor([length for _, length in spans], device=device)
