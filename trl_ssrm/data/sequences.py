"""Tokenized pairs, with each distinct sequence stored once, and access to large datasets without Python objects."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable

from ..io.storage import BATCH_ROWS


@dataclass(frozen=True)
class PairedSequences:
    """
    Pairs of tokenized sequences. Each distinct sequence is stored once, in an order that depends on the content alone.

    The tokens stay where the dataset has them: on disk, if it was loaded from files. In memory are 28 bytes for each
    sequence and 8 for each pair.

    Args:
        sequences ([`~datasets.Dataset`]):
            Column `input_ids`: the distinct sequences, from long to short.
        lengths (`np.ndarray` of shape `(num_sequences,)`, int32):
            Their lengths in tokens.
        digests (`np.ndarray` of shape `(num_sequences, 16)`, uint8):
            Their hashes.
        first (`np.ndarray` of shape `(num_pairs,)`, int32, or int64 where the positions need it):
            Position in `sequences` of the first, or chosen, sequence of each pair.
        second (`np.ndarray` of shape `(num_pairs,)`, of the same type):
            Position in `sequences` of the second, or rejected, sequence of each pair.
    """

    sequences: Dataset
    lengths: np.ndarray
    digests: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def from_tokenized(cls, dataset: Dataset) -> "PairedSequences":
        """
        The pairs of a tokenized dataset.

        Args:
            dataset ([`~datasets.Dataset`]):
                Columns `chosen_ids` and `rejected_ids`.

        Returns:
            [`PairedSequences`]: the chosen sequence of each row as the first of a pair, the rejected one as the
            second.
        """
        columns = [
            dataset.select_columns(name).rename_column(name, "input_ids") for name in ("chosen_ids", "rejected_ids")
        ]
        # Both columns hold lists of integers, but rows tokenized elsewhere may use integers of other widths.
        if columns[0].features != columns[1].features:
            columns[1] = columns[1].cast(columns[0].features)
        stacked = concatenate_datasets(columns)
        lengths, halves = _lengths_and_digests(stacked)
        # Ordered by content, so that batches, and with them the last bit of every score, do not depend on which
        # completion is labeled as chosen.
        order, is_first = _sorted_and_distinct(*halves, -lengths)
        index = np.empty(len(stacked), dtype=index_type(len(stacked)))
        index[order] = _ranks(is_first)
        unique = order[is_first]
        del order, is_first
        # One half after the other: this is the moment at which a pool takes most memory.
        lengths = lengths[unique]
        digests = np.empty((len(unique), 2), dtype=">u8")
        for side in (1, 0):
            half = halves.pop()
            for start in range(0, len(unique), BATCH_ROWS):
                digests[start : start + BATCH_ROWS, side] = half[unique[start : start + BATCH_ROWS]]
        first, second = np.split(index, 2)
        return cls(select_rows(stacked, unique), lengths, digests.view(np.uint8), first, second)

    @functools.cached_property
    def fingerprint(self) -> str:
        """`str`: hash of the pairs and their order."""
        pairs = hashlib.blake2b(self.digests.data, digest_size=16)
        for positions in (self.first, self.second):
            pairs.update(positions.astype(np.int64).data)
        return pairs.hexdigest()

    def pair_keys(self) -> list[tuple[bytes, bytes]]:
        """
        `list[tuple[bytes, bytes]]` of length `num_pairs`: a key that is equal for two pairs with the same sequences in
        either order. Python objects, so for small datasets only.
        """
        digests = [digest.tobytes() for digest in self.digests]
        return [
            (digests[first], digests[second])
            if digests[first] <= digests[second]
            else (digests[second], digests[first])
            for first, second in zip(self.first.tolist(), self.second.tolist(), strict=True)
        ]

    def take(self, pairs: np.ndarray) -> "PairedSequences":
        """[`PairedSequences`]: some of the pairs, by their positions, without the sequences of the others."""
        return self if is_everything(pairs, len(self.first)) else self.pair_up(self.first[pairs], self.second[pairs])

    def pair_up(self, first: np.ndarray, second: np.ndarray, in_place: bool = False) -> "PairedSequences":
        """
        Form other pairs of the same sequences.

        Args:
            first, second (`np.ndarray` of shape `(num_pairs,)`, integer):
                Positions of the two sequences of each pair.
            in_place (`bool`, *optional*, defaults to `False`):
                Whether this object may be overwritten, so that a large one is not in memory twice.

        Returns:
            [`PairedSequences`]: the pairs, without the sequences that none of them has.
        """
        is_used = np.zeros(len(self.lengths), dtype=bool)
        is_used[first] = is_used[second] = True
        if is_used.all():
            return PairedSequences(self.sequences, self.lengths, self.digests, first, second)
        used = np.flatnonzero(is_used)
        lengths, digests = (_taken(each, used, in_place) for each in (self.lengths, self.digests))
        index = _ranks(is_used)
        return PairedSequences(select_rows(self.sequences, used), lengths, digests, index[first], index[second])


def index_type(length: int) -> type[np.integer]:
    """`type`: int32 if it can hold all positions below `length`, otherwise int64."""
    return np.int32 if length <= np.iinfo(np.int32).max else np.int64


def is_everything(positions: np.ndarray, length: int) -> bool:
    """`bool`: whether the positions are `0, 1, ..., length - 1`."""
    return len(positions) == length and bool((positions == np.arange(length, dtype=index_type(length))).all())


def select_rows(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """
    Rows of a dataset, as [`~datasets.Dataset.select`] gives them, but without a Python object for each position.

    Args:
        dataset ([`~datasets.Dataset`]):
            A dataset.
        rows (`np.ndarray` of shape `(n,)`, integer):
            Positions of the rows, 0 or greater.

    Returns:
        [`~datasets.Dataset`]: the rows. They are not copied; their positions take 8 bytes each.
    """
    if len(rows) == 0 or (int(rows[-1]) - int(rows[0]) == len(rows) - 1 and (np.diff(rows) == 1).all()):
        start = int(rows[0]) if len(rows) else 0
        return dataset.select(range(start, start + len(rows)))
    rows = np.ascontiguousarray(rows, dtype=np.int64)
    indices = pa.chunked_array([rows.view(np.uint64)])
    # `_indices` and `_fingerprint` are private in `Dataset`: the positions of a selection and a name for its content.
    if dataset._indices is not None:
        indices = dataset._indices.column(0).take(indices)
    fingerprint = hashlib.blake2b(dataset._fingerprint.encode(), digest_size=8)
    fingerprint.update(rows.data)
    return Dataset(
        dataset.data,
        info=dataset.info.copy(),
        split=dataset.split,
        indices_table=InMemoryTable.from_arrays([indices], names=["indices"]),
        fingerprint=fingerprint.hexdigest(),
    )


def in_memory(columns: dict[str, np.ndarray]) -> Dataset:
    """[`~datasets.Dataset`]: numeric columns, as `Dataset.from_dict` gives them, but without pickling to name them."""
    content = hashlib.blake2b(digest_size=8)
    for name, values in columns.items():
        content.update(f"{name} {values.dtype}".encode())
        content.update(np.ascontiguousarray(values).data)
    return Dataset(InMemoryTable.from_pydict(columns), fingerprint=content.hexdigest())


def iterate_rows(dataset: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset with some of its columns, read in batches of 1,000."""
    for batch in dataset.select_columns(columns).iter(batch_size=BATCH_ROWS):
        for values in zip(*(batch[name] for name in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def group_numbers(keys: Iterable[str]) -> np.ndarray:
    """
    Number the distinct keys in the order in which they first occur.

    Args:
        keys (`Iterable[str]`):
            Keys. Only their hashes are kept in memory.

    Returns:
        `np.ndarray` of shape `(num_keys,)`, int64: number of each key.
    """
    content = bytearray()
    for key in keys:
        content += _digest(key.encode())
    digests = np.frombuffer(content, dtype=np.uint64).reshape(-1, 2)
    order, is_first = _sorted_and_distinct(*digests.T)
    # The sort is stable: of equal keys, the first in `order` is the first that occurred.
    first_of_group = order[is_first]
    number = np.empty(len(first_of_group), dtype=np.int64)
    number[np.argsort(first_of_group)] = np.arange(len(first_of_group))
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = number[_ranks(is_first)]
    return groups


def _taken(values: np.ndarray, rows: np.ndarray, in_place: bool) -> np.ndarray:
    """Values at ascending positions; with `in_place` they are moved to the front of the same array."""
    if not in_place:
        return values[rows]
    for start in range(0, len(rows), BATCH_ROWS):
        # Values only move forward, so those that are overwritten were read before.
        part = values[rows[start : start + BATCH_ROWS]]
        values[start : start + len(part)] = part
    return values[: len(rows)]


def _ranks(is_first: np.ndarray) -> np.ndarray:
    """At each position of a mask, the number of set positions up to it, minus 1."""
    ranks = np.cumsum(is_first, dtype=index_type(len(is_first)))
    ranks -= 1
    return ranks


def _sorted_and_distinct(high: np.ndarray, low: np.ndarray, *before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Stable order by the arrays `before`, then by the two halves of a hash; and for each position in this order, whether
    its hash occurs there for the first time.
    """
    order = np.lexsort((low, high, *before))
    is_first = np.zeros(len(order), dtype=bool)
    is_first[:1] = True
    for half in (high, low):
        in_order = half[order]
        is_first[1:] |= in_order[1:] != in_order[:-1]
    return order, is_first


def _lengths_and_digests(dataset: Dataset) -> tuple[np.ndarray, list[np.ndarray]]:
    """Lengths of the sequences (int32), and the first and second half of their hashes (uint64, big-endian value)."""
    lengths = np.empty(len(dataset), dtype=np.int32)
    halves = [np.empty(len(dataset), dtype=np.uint64) for _ in range(2)]
    start = 0
    for batch in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        column = batch.column("input_ids")
        own = pc.list_value_length(column).to_numpy().astype(np.int64)
        tokens = memoryview(pc.list_flatten(column).to_numpy().astype(np.int64).tobytes())
        ends = np.cumsum(own) * np.dtype(np.int64).itemsize
        digests = b"".join(
            _digest(tokens[begin:end]) for begin, end in zip([0, *ends.tolist()], ends.tolist(), strict=False)
        )
        rows = slice(start, start + len(own))
        lengths[rows] = own
        for half, values in zip(halves, np.frombuffer(digests, dtype=">u8").reshape(-1, 2).T, strict=True):
            half[rows] = values
        start += len(own)
    return lengths, halves


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
