"""Group rows by prompt, so that one prompt is never on both sides of a split."""

import json
from collections.abc import Iterator

import numpy as np
from datasets import Dataset
from trl import maybe_extract_prompt

from .sequences import group_numbers, iterate_rows


def prompt_groups(dataset: Dataset) -> np.ndarray:
    """
    Number the distinct prompts of a dataset.

    Without a column `prompt`, the prompt of a row is the common start of its two completions, or of their tokens. Of
    two such starts, if one begins with the other, they count as the same prompt: answers that begin alike make the
    common start longer than the prompt.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference pairs, tokenized or not, or prompts with completions.

    Returns:
        `np.ndarray` of shape `(num_rows,)`, int64: number of the prompt of each row.
    """
    columns = dataset.column_names
    if "prompt" in columns:
        keys: Iterator[str] = (json.dumps(row["prompt"], sort_keys=True) for row in iterate_rows(dataset, ["prompt"]))
    elif "chosen" in columns:
        prompts = [maybe_extract_prompt(row)["prompt"] for row in iterate_rows(dataset, ["chosen", "rejected"])]
        keys = _merged([each if isinstance(each, str) else json.dumps(each, sort_keys=True)[:-1] for each in prompts])
    else:
        ids = iterate_rows(dataset, ["chosen_ids", "rejected_ids"])
        starts = [_common_start(row["chosen_ids"], row["rejected_ids"]) for row in ids]
        keys = _merged(["".join(f"{token}," for token in start) for start in starts])
    return group_numbers(keys)


def _common_start(one: list[int], other: list[int]) -> list[int]:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _merged(starts: list[str]) -> Iterator[str]:
    """The key of each row: the shortest start that the row's own start begins with."""
    root, root_of = "", {}
    for start in sorted(set(starts)):
        root = root if root and start.startswith(root) else start
        root_of[start] = root
    # An empty start is no prompt, so each such row is a group of its own.
    return (root_of[start] or f"row {row}" for row, start in enumerate(starts))
