"""The accepted formats of unlabeled rows, and how completions are read from each."""

import logging
from typing import Any

from datasets import Dataset

from .checks import check_is_dataset


logger = logging.getLogger(__name__)


# Columns that the chat template of a conversation reads besides the text, as in `RewardTrainer`.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")

POOL_FORMATS = (
    "`prompt` with `completions`, `prompt` with `completion_a` and `completion_b`, or the `chosen` and `rejected` of "
    "a preference dataset"
)


def check_format(dataset: Dataset, name: str) -> None:
    """Refuse a dataset that is not of an accepted format."""
    check_is_dataset(dataset, name)
    columns = set(dataset.column_names)
    if not ({"chosen", "rejected"} <= columns or {"prompt", "completions"} <= columns) and not (
        {"prompt", "completion_a", "completion_b"} <= columns
    ):
        raise ValueError(f"`{name}` has the columns {sorted(columns)}; it needs {POOL_FORMATS}. Rename or add them.")
    if "completions" in columns:
        if not hasattr(dataset.features["completions"], "feature"):
            raise ValueError(
                f"`completions` of `{name}` are of the type {dataset.features['completions']}; make it a list with "
                "one entry for each completion."
            )
    else:
        one, other = named_completions(dataset.features).items()
        if one[1] != other[1]:
            raise ValueError(
                f"`{one[0]}` and `{other[0]}` of `{name}` have different fields or types ({one[1]} and {other[1]}), "
                "so some fields would be lost; cast them to the same features."
            )


def completions_of(row: dict[str, Any]) -> list:
    """`list`: the completions of a row in any accepted format."""
    return list(named_completions(row).values())


def named_completions(row: dict[str, Any]) -> dict[str, Any]:
    """`dict[str, Any]`: the completions of a row by their names in messages, such as `completions[0]` or `chosen`."""
    if "completions" in row:
        return {f"completions[{position}]": value for position, value in enumerate(row["completions"] or [])}
    names = ("chosen", "rejected") if "chosen" in row else ("completion_a", "completion_b")
    return {name: row[name] for name in names}


def columns_of_pairs(dataset: Dataset) -> list[str]:
    """`list[str]`: the columns that hold the text of the pairs."""
    names = named_completions(dataset.features) if "completions" not in dataset.column_names else ["completions"]
    return [*(name for name in ("prompt",) if name in dataset.column_names), *names]


def completion_feature(dataset: Dataset) -> Any:
    """`Any`: the feature type of one completion."""
    if "completions" in dataset.features:
        return dataset.features["completions"].feature
    return completions_of(dataset.features)[0]


def argument_name(name: str) -> str:
    """`str`: the argument that a dataset was given as, by its short name: `train_dataset`, or `eval_dataset["x"]` for `"eval_x"`."""
    kind, _, key = name.partition("_")
    return f'{kind}_dataset["{key}"]' if key else f"{kind}_dataset"


def report_dropped(name: str, dropped: dict[str, int]) -> None:
    """Log how many rows or pairs of a dataset were left out, by reason."""
    if any(dropped.values()):
        logger.warning(f"Left out of `{name}`: {in_words(dropped)}.")


def in_words(dropped: dict[str, int]) -> str:
    """`str`: counts by reason, such as "2 (duplicate), 1 (identical completions)"."""
    return ", ".join(f"{count} ({reason})" for reason, count in sorted(dropped.items())) or "none was given"
