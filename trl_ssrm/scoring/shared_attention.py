"""Attention over rows that hold several sequences with a common start: its masks, and a faster way to apply them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .rows import SharedRow


# Attention by branch copies keys and values, so it has to save this part of the work.
WORTH_BRANCHING = 0.7
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


@dataclass(frozen=True)
class Branches:
    """
    The sequences of shared rows other than the first of each row, as a padded batch: each sees the common start of its row
    and itself, and nothing of the other sequences in the row.

    Args:
        queries (`torch.Tensor` of shape `(branches, own)`, int64):
            Places of their own tokens in the flattened rows.
        keys (`torch.Tensor` of shape `(branches, start + own)`, int64):
            Places of the tokens of the common start, and of their own tokens.
        mask (`torch.Tensor` of shape `(branches, 1, own, start + own)`, bool):
            Which of these each of their own tokens sees.
        is_token (`torch.Tensor` of shape `(branches, own)`, bool):
            Which of `queries` are tokens and not padding.
        end_of_first (`int`):
            Largest place behind the first sequence of a row.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor
    is_token: torch.Tensor
    end_of_first: int


def branches_of(rows: list[SharedRow], lengths: np.ndarray, device: torch.device) -> Branches | None:
    """
    Find the branches of shared rows, if attention by branch is cheaper than attention over the whole rows.

    Args:
        rows (`list[SharedRow]`):
            The rows of a batch.
        lengths (`np.ndarray` of shape `(num_sequences,)`, int64):
            Lengths of the sequences of the batch in tokens.
        device (`torch.device`):
            Where the model is.

    Returns:
        [`Branches`] or `None`: `None` if a mask over the whole rows is cheaper.
    """
    length = max(row.length for row in rows)
    ends = [int(lengths[row.sequences[0]]) for row in rows]
    begins: list[int] = []
    prefixes: list[tuple[int, int]] = []
    owns: list[int] = []
    for number, row in enumerate(rows):
        begin = number * length + int(lengths[row.sequences[0]])
        for position in row.sequences[1:]:
            begins.append(begin)
            prefixes.append((number * length, row.prefix))
            owns.append(int(lengths[position]) - row.prefix)
            begin += owns[-1]
    longest_start, longest_own = max(prefix for _, prefix in prefixes), max(owns)
    in_rows = len(rows) * (length - min(ends)) * length
    if len(owns) * longest_own * (longest_start + longest_own) > WORTH_BRANCHING * in_rows:
        return None
    start, own = np.arange(longest_start), np.arange(longest_own)
    rows_begin, prefix = np.array(prefixes).T
    is_start, is_own = start < prefix[:, None], own < np.array(owns)[:, None]
    queries = np.where(is_own, np.array(begins)[:, None] + own, 0)
    keys = np.concatenate([np.where(is_start, rows_begin[:, None] + start, 0), queries], axis=1)
    sees_start = np.broadcast_to(is_start[:, None], (len(owns), longest_own, longest_start))
    sees_own = np.broadcast_to(own[:, None] >= own, (len(owns), longest_own, longest_own))
    # Padding sees its own place, since a softmax over nothing is NaN.
    mask = np.concatenate([sees_start, sees_own], axis=2)[:, None]

    def on_device(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return Branches(on_device(queries), on_device(keys), on_device(mask), on_device(is_own), max(ends))


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    branches: Branches | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Scaled dot product attention over shared rows. The first sequence of each row sees all earlier tokens, for which the
    kernels need no mask and compute half as much. The others are computed by branch, or else with a mask for the last
    tokens of each row.
    """
    if branches is not None:
        return _attention_by_branch(module, query, key, value, branches, **kwargs), None
    start = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if start == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    first, _ = sdpa_attention_forward(
        module, query[:, :, :start], key[:, :, :start], value[:, :, :start], None, **kwargs
    )
    rest, _ = sdpa_attention_forward(module, query[:, :, start:], key, value, attention_mask, **kwargs)
    return torch.cat([first, rest], dim=1), None


def _attention_by_branch(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    branches: Branches,
    **kwargs: Any,
) -> torch.Tensor:
    end = branches.end_of_first
    first, _ = sdpa_attention_forward(module, query[:, :, :end], key[:, :, :end], value[:, :, :end], None, **kwargs)
    # Of shape (rows * length, heads, size), so that tokens are taken by their place.
    tokens = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    places = (branches.queries, branches.keys, branches.keys)
    queries, keys, values = (each[place].transpose(1, 2) for each, place in zip(tokens, places, strict=True))
    rest, _ = sdpa_attention_forward(module, queries, keys, values, branches.mask, **kwargs)
    rows, _, length, _ = query.shape
    output = nn.functional.pad(first, (0, 0, 0, 0, 0, length - end)).flatten(0, 1)
    output = output.index_copy(0, branches.queries[branches.is_token], rest[branches.is_token])
    return output.unflatten(0, (rows, length))


AttentionInterface.register(SHARED_ROWS_ATTENTION, _attention)
