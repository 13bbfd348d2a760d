"""The prompt of a row: split off where it is no column of its own, and compared between rows."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from .sequences import group_numbers, iterate_rows


def with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """
    Split the prompt off a pair that has none of its own: the common start of its two completions.

    As `maybe_extract_prompt` of TRL, but for two texts that differ from their first character on: there TRL 1.16 takes
    all of `chosen` but its last character as the prompt, if that is a space.

    Args:
        row (`dict[str, Any]`):
            A pair with `chosen` and `rejected`, as text or messages, and with or without `prompt`.

    Returns:
        `dict[str, Any]`: a row with `prompt` as it is; otherwise `prompt`, `chosen` and `rejected`. Neither completion is
        empty, unless it was. A space before the completions belongs to them.
    """
    if "prompt" in row:
        return row
    chosen, rejected = row["chosen"], row["rejected"]
    length = _common_length(chosen, rejected)
    if length and chosen[length - 1] == " " and chosen[length] != rejected[length]:
        length -= 1
    return {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def prompt_groups(dataset: Dataset) -> np.ndarray:
    """
    Number the distinct prompts of a dataset. Whether two rows have the same prompt depends on these two rows alone.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference pairs, tokenized or not, or prompts with completions. Without a column `prompt`, the prompt of a
            row is the common start of its two completions: whole messages, whole words, or tokens. Two rows with the
            same prompt are then told apart if the completions of one begin with the same words. Rows with an empty prompt,
            or whose completions have nothing in common, are told apart.

    Returns:
        `np.ndarray` of shape `(num_rows,)`, int64: number of the prompt of each row.
    """
    return group_numbers(key or f"row {number}" for number, key in enumerate(prompt_keys(dataset)))


def prompt_keys(dataset: Dataset) -> Iterator[str]:
    """
    Yield a key for the prompt of each row, the same for the same prompt; see [`prompt_groups`]. It is empty where a row has no
    prompt.
    """
    columns = dataset.column_names
    if "prompt" in columns:
        for row in iterate_rows(dataset, ["prompt"]):
            yield json.dumps(row["prompt"], sort_keys=True) if row["prompt"] else ""
        return
    names = ("chosen", "rejected") if "chosen" in columns else ("chosen_ids", "rejected_ids")
    for row in iterate_rows(dataset, list(names)):
        yield _start(*row.values())


def split_by_prompt(dataset: Dataset, sizes: Sequence[int]) -> list[Dataset]:
    """
    Split a dataset into parts that have no prompt in common, since a model does better on prompts that it was trained on.

    Args:
        dataset ([`~datasets.Dataset`]):
            As for [`prompt_groups`].
        sizes (`Sequence[int]`):
            Number of rows of each part. A part has more if its last prompt has, and less if there are no rows left.

    Returns:
        `list[Dataset]`: the parts, and the rows that are left over as the last one.
    """
    groups = prompt_groups(dataset)
    # Prompts are numbered in the order in which they occur, so rows with prompts of their own stay where they are.
    order, ends = np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))
    parts, start = [], 0
    for size in sizes:
        end = int(ends[min(int(np.searchsorted(ends, start + size)), len(ends) - 1)]) if size else start
        parts.append(dataset.select(order[start:end]))
        start = end
    return [*parts, dataset.select(order[start:])]


def _start(one: Any, other: Any) -> str:
    """What two completions have in common at their start, as a key; empty for nothing."""
    length = _common_length(one, other)
    if isinstance(one, str):
        # The start of a word that both completions begin with is not part of the prompt.
        while length and not one[length - 1].isspace():
            length -= 1
    return json.dumps(one[:length], sort_keys=True) if length else ""


def _common_length(one: Sequence, other: Sequence) -> int:
    """Number of characters, messages or tokens in common at the start, at most one less than the shorter one has."""
    shortest = max(0, min(len(one), len(other)) - 1)
    return next((place for place in range(shortest) if one[place] != other[place]), shortest)
