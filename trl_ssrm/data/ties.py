"""Labeled pairs that people called a tie: the column `tie`."""

import logging
from typing import Any

import numpy as np
from datasets import IterableDataset

from .checks import unformatted


logger = logging.getLogger(__name__)

# Column that is true where neither completion is better.
TIE = "tie"


def ties_of(dataset: Any, name: str) -> np.ndarray:
    """
    Read which pairs are ties.

    Args:
        dataset ([`~datasets.Dataset`]):
            Labeled pairs. `tie` is true where neither completion is better. Without this column no pair is a tie.
        name (`str`):
            Name of the argument that the dataset was passed as, for the message.

    Returns:
        `np.ndarray` of shape `(num_pairs,)`, bool: the ties.

    Raises:
        ValueError: If a value is neither true, false nor missing, a tie has a margin, or a stream has the column.
    """
    if isinstance(dataset, IterableDataset):
        if TIE in (dataset.column_names or next(iter(dataset), {})):
            raise ValueError(
                f"`{name}` is a stream, whose `{TIE}` is not read; make it a `Dataset`, or drop the column."
            )
        return np.zeros(0, dtype=bool)
    if TIE not in dataset.column_names:
        return np.zeros(len(dataset), dtype=bool)
    columns = unformatted(dataset)
    margins = columns["margin"] if "margin" in dataset.column_names else [0.0] * len(dataset)
    for number, (value, margin) in enumerate(zip(columns[TIE], margins, strict=True)):
        if not isinstance(value, bool | None):
            raise ValueError(f"`{TIE}` of row {number} of `{name}` is {value!r:.50}; make it true, false or missing.")
        if value and margin:
            raise ValueError(f"`margin` of row {number} of `{name}` is {margin!r}, but the pair is a tie; make it 0.")
    return np.array(columns[TIE][:], dtype=bool)


def with_ties_settled(dataset: Any, name: str, is_trained_on: bool) -> Any:
    """
    Keep ties in pairs to train on, and leave them out of held-out pairs, whose figures are of pairs with a better completion.
    The log has their number.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Labeled pairs.
        name (`str`):
            Name of the argument that they were passed as.
        is_trained_on (`bool`):
            Whether they are for training.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the pairs, with the column `tie` only if there is one.

    Raises:
        ValueError: As [`ties_of`], or if every pair is a tie.
    """
    is_tie = ties_of(dataset, name)
    if is_tie.any():
        if is_tie.all():
            raise ValueError(f"Every pair of `{name}` is a tie; add pairs of which one completion is better.")
        use = "trained on as even, and left out of held-out figures" if is_trained_on else "left out of its figures"
        logger.warning(f"{is_tie.sum()} of the {len(is_tie)} pairs of `{name}` are ties. They are {use}.")
        if is_trained_on:
            return dataset
        dataset = dataset.select(np.flatnonzero(~is_tie))
    return dataset.remove_columns(TIE) if TIE in (dataset.column_names or []) else dataset
