"""How likely a model finds given completions, as a loss. Knows nothing of who learns from it.

Axes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids_BT, mask_BT) of token lists of different lengths. Padding is token 0: it is masked, so any would do."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids_BT, mask_BT


def completion_nll(model: nn.Module, contexts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
    """nll_B: the mean of -log p(token | all tokens before it) over each row's completion; contexts carry no loss.

    Differentiable in whatever the model's forward is. No context and no completion may be empty.
    """
    device = next(model.parameters()).device
    rows = [[*context, *completion] for context, completion in zip(contexts, completions, strict=True)]
    ids_BT, mask_BT = right_padded(rows, device)
    first = min(len(context) for context in contexts)  # no logits for what all rows merely read
    kept = ids_BT.shape[1] - first + 1
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=kept).logits
    labels_BT = ids_BT[:, first:].clone()
    for row, (context, completion) in enumerate(zip(contexts, completions, strict=True)):
        labels_BT[row, : len(context) - first] = -100
        labels_BT[row, len(context) - first + len(completion) :] = -100
    nll_BT = functional.cross_entropy(logits_BTV[:, :-1].float().transpose(1, 2), labels_BT, reduction="none")
    length_B = torch.tensor([len(completion) for completion in completions], device=device)
    return nll_BT.sum(1) / length_B
