"""The unlabeled pool: tokenized pairs without labels, and their text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features

from ..io.storage import BATCH_ROWS, storable
from .formats import columns_of_pairs, completion_feature, completions_of
from .prompts import with_prompt
from .sequences import PairedSequences, is_everything


@dataclass(frozen=True)
class Pool:
    """
    Unlabeled pairs, tokenized. Which completion of a pair is the first does not depend on the labels.

    Args:
        source ([`~datasets.Dataset`]):
            The rows that the pairs come from.
        rows (`np.ndarray` of shape `(num_pairs,)`, int32, or int64 where the positions need it):
            Row of `source` that each pair comes from, ascending.
        completions (`np.ndarray` of shape `(num_pairs, 2)`, of the smallest unsigned type that holds them):
            Positions of the first and the second completion among those of the row.
        pairs ([`PairedSequences`]):
            Token IDs of the pairs, in the same order.
        gold (`np.ndarray` of shape `(num_pairs,)`, float32, *optional*):
            1 if the first completion is the preferred one, 0 if the second one is, NaN for a tie. `None` if gold labels are not
            tracked.
        dropped (`dict[str, int]`):
            Number of pairs that were left out, by reason.
    """

    source: Dataset
    rows: np.ndarray
    completions: np.ndarray
    pairs: PairedSequences
    gold: np.ndarray | None
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, pairs: np.ndarray) -> "Pool":
        """[`Pool`]: the pairs at some positions (`(n,)`, int64)."""
        if is_everything(pairs, len(self)):
            return self
        gold = None if self.gold is None else self.gold[pairs]
        return Pool(self.source, self.rows[pairs], self.completions[pairs], self.pairs.take(pairs), gold, self.dropped)

    def texts(self, pair: int, first_is_chosen: bool) -> dict[str, Any]:
        """`dict[str, Any]`: the text or messages of a pair, under `prompt`, `chosen` and `rejected`."""
        (texts,) = next(self.iterate_texts(np.array([pair]), np.array([first_is_chosen])))
        return texts

    def iterate_texts(self, pairs: np.ndarray, first_is_chosen: np.ndarray) -> Iterator[list[dict[str, Any]]]:
        """
        Read the text or messages of some pairs in batches; one batch is in memory at a time.

        Args:
            pairs (`np.ndarray` of shape `(n,)`, int64):
                Positions of the pairs.
            first_is_chosen (`np.ndarray` of shape `(n,)`, bool):
                Whether the first completion of each pair is the preferred one.

        Yields:
            `list[dict[str, Any]]` of at most 1,000 pairs, each with the keys `prompt`, `chosen` and `rejected`.
        """
        source = self.source.select_columns(columns_of_pairs(self.source))
        for start in range(0, len(pairs), BATCH_ROWS):
            batch = pairs[start : start + BATCH_ROWS]
            rows, place = np.unique(self.rows[batch], return_inverse=True)
            columns = source[rows.tolist()]
            texts = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield [
                _oriented(texts[row], *(positions if is_first else reversed(positions)))
                for row, positions, is_first in zip(
                    place.tolist(),
                    self.completions[batch].tolist(),
                    first_is_chosen[start : start + BATCH_ROWS].tolist(),
                    strict=True,
                )
            ]

    @property
    def text_features(self) -> Features:
        """[`~datasets.Features`]: types of the columns that [`Pool.iterate_texts`] yields."""
        completion = completion_feature(self.source)
        prompt = self.source.features.get("prompt", completion)
        features = {"prompt": prompt, "chosen": completion, "rejected": completion}
        return Features({name: storable(feature) for name, feature in features.items()})


def _oriented(row: dict[str, Any], chosen: int, rejected: int) -> dict[str, Any]:
    completions = completions_of(row)
    prompt = {"prompt": row["prompt"]} if row.get("prompt") is not None else {}
    return with_prompt({**prompt, "chosen": completions[chosen], "rejected": completions[rejected]})
