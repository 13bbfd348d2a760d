"""Attention over rows that hold several sequences with a common start: its masks, and a faster way to apply them."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


# Name under which transformers finds `_attention` below.
SHARED_ROWS_ATTENTION = "sdpa_shared_rows"


def attention_masks(
    branch: torch.Tensor,
    positions: torch.Tensor,
    start: int,
    windows: dict[str, int | None],
    attention: str,
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    Masks for rows of several sequences: a token sees the tokens before it in its own sequence, within the window.

    Args:
        branch (`torch.Tensor` of shape `(rows, length)`, int32):
            0 for the common start of a row, then 1, 2, ... for its sequences, -1 for padding.
        positions (`torch.Tensor` of shape `(rows, length)`, int64):
            Position of each token in its sequence.
        start (`int`):
            First place in the row that gets a mask.
        windows (`dict[str, int | None]`):
            Attention window by kind of layer.
        attention (`str`):
            Attention implementation: `"sdpa"` or `"eager"`.
        dtype (`torch.dtype`):
            Type of the mask for `"eager"`, which adds it to the attention scores.

    Returns:
        `torch.Tensor` of shape `(rows, 1, length - start, length)`, or a dictionary with one for each kind of layer if
        the model has layers with a window.
    """
    length = branch.shape[1]
    before = torch.ones(length - start, length, dtype=torch.bool, device=branch.device).tril(start)
    own = branch[:, start:, None] == branch[:, None, :]
    own |= (branch[:, None, :] == 0) & (branch[:, start:, None] >= 0)

    def mask(window: int | None) -> torch.Tensor:
        seen = before & own
        if window is not None:
            # As int32, to save half of the memory of a large matrix.
            seen &= positions[:, start:, None].int() - positions[:, None, :].int() < window
        seen = seen[:, None]
        if attention != "eager":
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=branch.device).masked_fill_(~seen, torch.finfo(dtype).min)

    masks = {window: mask(window) for window in set(windows.values())}
    of_kind = {kind: masks[window] for kind, window in windows.items()}
    return of_kind if "sliding_attention" in of_kind else of_kind["full_attention"]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Scaled dot product attention with a mask for the last tokens of each row only. The tokens before see all earlier
    tokens; for them, the kernels need no mask and compute half as much.
    """
    start = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if start == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    first, _ = sdpa_attention_forward(
        module, query[:, :, :start], key[:, :, :start], value[:, :, :start], None, **kwargs
    )
    rest, _ = sdpa_attention_forward(module, query[:, :, start:], key, value, attention_mask, **kwargs)
    return torch.cat([first, rest], dim=1), None


AttentionInterface.register(SHARED_ROWS_ATTENTION, _attention)
