"""Lay sequences with a common start into one row, so that the start is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


# Sharing needs an attention mask of its own, so it is used only if it saves at least this part of the tokens.
LEAST_SAVED = 0.25
# In tokens. Attention is computed for all pairs of tokens in a row, so a row with several sequences has a limit.
LONGEST_SHARED_ROW = 4096


@dataclass(frozen=True)
class SharedRow:
    """
    Sequences in one row: their common start, then the rest of each.

    Args:
        sequences (`tuple[int, ...]`):
            Positions of the sequences in the batch.
        prefix (`int`):
            Number of tokens that they have in common at their start and that are computed once.
        length (`int`):
            Number of tokens of the row.
    """

    sequences: tuple[int, ...]
    prefix: int
    length: int


def shared_rows(sequences: Sequence[np.ndarray], longest: int = LONGEST_SHARED_ROW) -> list[SharedRow]:
    """
    Lay sequences into rows; sequences with a common start share a row if that saves enough.

    Args:
        sequences (`Sequence[np.ndarray]`):
            Token IDs of each, int64.
        longest (`int`, *optional*, defaults to `4096`):
            Largest number of tokens of a row with more than one sequence.

    Returns:
        `list[SharedRow]`: each sequence is in one of them.
    """
    return [row for group, prefix in _groups(sequences) for row in _rows_of(group, prefix, sequences, longest)]


def paired_rows(sequences: Sequence[np.ndarray]) -> list[SharedRow]:
    """
    Lay the two halves of a training batch into rows: a chosen and its rejected completion share a row.

    Args:
        sequences (`Sequence[np.ndarray]`):
            Token IDs of each, int64. The first half are the chosen, the second half the rejected completions.

    Returns:
        `list[SharedRow]`: each sequence is in one of them; empty if sharing would save too little in this batch.
    """
    half = len(sequences) // 2
    rows: list[SharedRow] = []
    for pair in ([first, half + first] for first in range(half)):
        prefix = common_prefix(*(sequences[position] for position in pair))
        rows += _rows_of(pair, prefix, sequences, LONGEST_SHARED_ROW)
    num_tokens = sum(map(len, sequences))
    return rows if sum(row.length for row in rows) <= (1 - LEAST_SAVED) * num_tokens else []


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """`int`: number of tokens in common at the start, at most one less than the shorter sequence has."""
    shortest = min(len(one), len(other)) - 1
    differs = one[:shortest] != other[:shortest]
    place = int(differs.argmax()) if shortest > 0 else 0
    return place if shortest > 0 and differs[place] else shortest


def _groups(sequences: Sequence[np.ndarray]) -> Iterator[tuple[list[int], int]]:
    """Positions of sequences with a common start, and its number of tokens; most groups have one sequence."""
    group: list[int] = []
    prefix = 0
    # Sorted by their tokens, so that sequences with the same start are neighbors.
    content = [ids.astype(">i8").tobytes() for ids in sequences]
    for position in sorted(range(len(sequences)), key=content.__getitem__):
        if group:
            first, own = sequences[group[0]], sequences[position]
            common = common_prefix(first, own)
            common = min(prefix, common) if len(group) > 1 else common
            is_much = common >= LEAST_SAVED * min(len(first), len(own))
            # A new member can shorten the common start; it must not save less in all.
            if is_much and common * len(group) >= prefix * (len(group) - 1):
                group.append(position)
                prefix = common
                continue
            yield group, prefix
        group, prefix = [position], 0
    yield group, prefix


def _rows_of(group: list[int], prefix: int, sequences: Sequence[np.ndarray], longest: int) -> list[SharedRow]:
    """A group as one row, as several if it is long, or as one for each of its sequences if it saves too little."""
    # Longest first: up to the end of its first sequence, a row needs no mask of its own.
    group = sorted(group, key=lambda position: -len(sequences[position]))
    lengths = [len(sequences[position]) for position in group]
    if len(group) < 2 or prefix * (len(group) - 1) < LEAST_SAVED * sum(lengths):
        return [SharedRow((position,), 0, length) for position, length in zip(group, lengths, strict=True)]
    rows: list[SharedRow] = []
    members: list[int] = []
    size = prefix
    for position, length in zip(group, lengths, strict=True):
        if members and size + length - prefix > longest:
            rows.append(SharedRow(tuple(members), prefix, size))
            members, size = [], prefix
        members.append(position)
        size += length - prefix
    return [*rows, SharedRow(tuple(members), prefix, size)]
