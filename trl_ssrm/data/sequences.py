"""Tokenized pairs with each distinct sequence stored once: what is trained on, measured on and scored."""

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
    Pairs of tokenized sequences, each distinct sequence stored once, in an order that depends on the content alone.

    The tokens stay where the dataset has them, which is on disk for one that was loaded from files. In memory are 28
    bytes for each sequence and 8 for each pair.

    Args:
        sequences ([`~datasets.Dataset`]):
            Column `input_ids`: the distinct sequences, longest first.
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
        """Pair up a dataset with the columns `chosen_ids` and `rejected_ids`."""
        columns = [
            dataset.select_columns(name).rename_column(name, "input_ids") for name in ("chosen_ids", "rejected_ids")
        ]
        # Both columns hold lists of integers, but those that were tokenized elsewhere may differ in width.
        if columns[0].features != columns[1].features:
            columns[1] = columns[1].cast(columns[0].features)
        stacked = concatenate_datasets(columns)
        lengths, halves = _lengths_and_digests(stacked)
        # Content decides the order, so batches, and with them the last bit of every score, are the same whichever
        # completion of a pair was labeled as chosen.
        order, is_first = _sorted_and_distinct(*halves, -lengths)
        index = np.empty(len(stacked), dtype=index_type(len(stacked)))
        index[order] = _ranks(is_first)
        unique = order[is_first]
        del order, is_first
        # One after the other, since together these arrays are the most that a pool takes at any time.
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
        `list[tuple[bytes, bytes]]` of length `num_pairs`: what two pairs share if they hold the same sequences. For a
        small dataset: these are objects.
        """
        digests = [digest.tobytes() for digest in self.digests]
        return [
            (digests[first], digests[second])
            if digests[first] <= digests[second]
            else (digests[second], digests[first])
            for first, second in zip(self.first.tolist(), self.second.tolist(), strict=True)
        ]

    def take(self, pairs: np.ndarray) -> "PairedSequences":
        """Some of the pairs, without the sequences that only the others hold."""
        return self if is_everything(pairs, len(self.first)) else self.pair_up(self.first[pairs], self.second[pairs])

    def pair_up(self, first: np.ndarray, second: np.ndarray, in_place: bool = False) -> "PairedSequences":
        """
        Other pairs of the same sequences, without the sequences that none of them holds.

        Args:
            first, second (`np.ndarray` of shape `(num_pairs,)`, integer):
                Positions of their sequences.
            in_place (`bool`, *optional*, defaults to `False`):
                Whether this object may be overwritten, so that a large one is not in memory twice.

        Returns:
            [`PairedSequences`]
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
    """The smaller of int32 and int64 that holds positions in something of a length."""
    return np.int32 if length <= np.iinfo(np.int32).max else np.int64


def is_everything(positions: np.ndarray, length: int) -> bool:
    """`bool`: whether positions are all those in something of a length, in their order."""
    return len(positions) == length and bool((positions == np.arange(length, dtype=index_type(length))).all())


def select_rows(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """
    Rows of a dataset, as [`~datasets.Dataset.select`] gives them, which makes a Python object of each position.

    Args:
        dataset ([`~datasets.Dataset`]):
            A dataset.
        rows (`np.ndarray` of shape `(n,)`, integer):
            Positions, none of them negative.

    Returns:
        [`~datasets.Dataset`]: the rows, which stay where they are; in memory are 8 bytes for each.
    """
    if len(rows) == 0 or (int(rows[-1]) - int(rows[0]) == len(rows) - 1 and (np.diff(rows) == 1).all()):
        start = int(rows[0]) if len(rows) else 0
        return dataset.select(range(start, start + len(rows)))
    rows = np.ascontiguousarray(rows, dtype=np.int64)
    indices = pa.chunked_array([rows.view(np.uint64)])
    # Private in `Dataset`: where the rows of a selection lie, and what names its content.
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
    """Columns of numbers as a dataset, as [`~datasets.Dataset.from_dict`] gives it, which makes pickles to name it."""
    content = hashlib.blake2b(digest_size=8)
    for name, values in columns.items():
        content.update(f"{name} {values.dtype}".encode())
        content.update(np.ascontiguousarray(values).data)
    return Dataset(InMemoryTable.from_pydict(columns), fingerprint=content.hexdigest())


def column_of(dataset: Dataset, name: str) -> np.ndarray:
    """`np.ndarray` of shape `(num_rows,)`: a column of numbers, of which no Python objects are made."""
    return dataset.select_columns(name).with_format("arrow")[:].column(name).to_numpy()


def iterate_rows(dataset: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a dataset with some of its columns, read in batches."""
    for batch in dataset.select_columns(columns).iter(batch_size=BATCH_ROWS):
        for values in zip(*(batch[name] for name in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def group_numbers(keys: Iterable[str]) -> np.ndarray:
    """
    Number the distinct among some keys in the order in which they come.

    Args:
        keys (`Iterable[str]`):
            Keys, of which none is kept.

    Returns:
        `np.ndarray` of shape `(num_keys,)`, int64: number of each key.
    """
    content = bytearray()
    for key in keys:
        content += _digest(key.encode())
    digests = np.frombuffer(content, dtype=np.uint64).reshape(-1, 2)
    order, is_first = _sorted_and_distinct(*digests.T)
    # Sorting keeps the order of equal keys.
    first_of_group = order[is_first]
    number = np.empty(len(first_of_group), dtype=np.int64)
    number[np.argsort(first_of_group)] = np.arange(len(first_of_group))
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = number[_ranks(is_first)]
    return groups


def _taken(values: np.ndarray, rows: np.ndarray, in_place: bool) -> np.ndarray:
    """Ascending rows of an array, which may be overwritten."""
    if not in_place:
        return values[rows]
    for start in range(0, len(rows), BATCH_ROWS):
        # None of them is moved to behind its place, so what is overwritten was read.
        part = values[rows[start : start + BATCH_ROWS]]
        values[start : start + len(part)] = part
    return values[: len(rows)]


def _ranks(is_first: np.ndarray) -> np.ndarray:
    """How many of a mask are set before and at each position, from 0 on."""
    ranks = np.cumsum(is_first, dtype=index_type(len(is_first)))
    ranks -= 1
    return ranks


def _sorted_and_distinct(high: np.ndarray, low: np.ndarray, *before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Stable order by the arrays `before` and then by hashes of two halves, and whether a position in it is the first one
    of its hash.
    """
    order = np.lexsort((low, high, *before))
    is_first = np.zeros(len(order), dtype=bool)
    is_first[:1] = True
    for half in (high, low):
        in_order = half[order]
        is_first[1:] |= in_order[1:] != in_order[:-1]
    return order, is_first


def _lengths_and_digests(dataset: Dataset) -> tuple[np.ndarray, list[np.ndarray]]:
    """Lengths of the sequences, int32, and both halves of their hashes, uint64, in the order of their bytes."""
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
