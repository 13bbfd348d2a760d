"""Tokenized pairs with each distinct sequence stored once: what is trained on, measured on and scored."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets


@dataclass(frozen=True)
class PairedSequences:
    """
    Pairs of tokenized sequences, each distinct sequence stored once, in an order that depends on the content alone.

    Args:
        sequences ([`~datasets.Dataset`]):
            Column `input_ids`: the distinct sequences, longest first.
        lengths (`np.ndarray` of shape `(num_sequences,)`, int64):
            Their lengths in tokens.
        digests (`list[bytes]` of length `num_sequences`):
            Their hashes.
        first (`np.ndarray` of shape `(num_pairs,)`, int64):
            Position in `sequences` of the first, or chosen, sequence of each pair.
        second (`np.ndarray` of shape `(num_pairs,)`, int64):
            Position in `sequences` of the second, or rejected, sequence of each pair.
    """

    sequences: Dataset
    lengths: np.ndarray
    digests: list[bytes]
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
        position_of: dict[bytes, int] = {}
        lengths = np.empty(len(stacked), dtype=np.int64)
        digest_of_row = []
        for position, ids in enumerate(_iterate_column(stacked, "input_ids")):
            digest = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()
            position_of.setdefault(digest, position)
            lengths[position] = len(ids)
            digest_of_row.append(digest)
        # Content decides the order, so batches, and with them the last bit of every score, are the same whichever
        # completion of a pair was labeled as chosen.
        digests = sorted(position_of, key=lambda digest: (-lengths[position_of[digest]], digest))
        rank = {digest: index for index, digest in enumerate(digests)}
        index = np.array([rank[digest] for digest in digest_of_row], dtype=np.int64)
        unique = np.array([position_of[digest] for digest in digests], dtype=np.int64)
        return cls(stacked.select(unique), lengths[unique], digests, *np.split(index, 2))

    @property
    def fingerprint(self) -> str:
        """`str`: hash of the pairs and their order."""
        pairs = hashlib.blake2b(digest_size=16)
        for digest in self.digests:
            pairs.update(digest)
        pairs.update(np.stack([self.first, self.second]).tobytes())
        return pairs.hexdigest()

    def pair_keys(self) -> list[tuple[bytes, bytes]]:
        """`list[tuple[bytes, bytes]]` of length `num_pairs`: what two pairs share if they hold the same sequences."""
        return [
            tuple(sorted((self.digests[first], self.digests[second])))
            for first, second in zip(self.first.tolist(), self.second.tolist(), strict=True)
        ]

    def take(self, pairs: np.ndarray) -> "PairedSequences":
        """Some of the pairs, without the sequences that only the others hold."""
        used, index = np.unique(np.concatenate([self.first[pairs], self.second[pairs]]), return_inverse=True)
        digests = [self.digests[position] for position in used]
        return PairedSequences(self.sequences.select(used), self.lengths[used], digests, *np.split(index, 2))


def _iterate_column(dataset: Dataset, column: str) -> Iterator[list[int]]:
    for batch in dataset.select_columns(column).iter(batch_size=1000):
        yield from batch[column]
