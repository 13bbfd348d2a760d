"""What is refused before any work is done: one sentence each, which names the place and the mend."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset

from .markup import strings_of


if TYPE_CHECKING:
    pass


def check_labeled_data(datasets: dict[str, Any]) -> bool | None:
    """
    Refuse labeled datasets that can't be trained or measured on, or that are not of one kind. Streams are not read.

    Args:
        datasets (`dict[str, Dataset | IterableDataset]`):
            The datasets by the argument that each was given as.

    Returns:
        `bool` or `None`: whether they are conversational; `None` if all of them are tokenized.

    Raises:
        TypeError: If one of them is no dataset.
        ValueError: As [`check_preference_dataset`], or if some are text and others conversations.
    """
    for name, data in datasets.items():
        check_is_dataset(data, name)
    kinds = {
        name: check_preference_dataset(data, name) for name, data in datasets.items() if isinstance(data, Dataset)
    }
    known = {name: kind for name, kind in kinds.items() if kind is not None}
    if not known:
        return None
    first, expected = next(iter(known.items()))
    for name, kind in known.items():
        if kind != expected:
            raise ValueError(
                f"`{first}` holds {_kind(expected)} and `{name}` {_kind(kind)}; make all of it one or the other."
            )
    return expected


def check_preference_dataset(dataset: Dataset, name: str) -> bool | None:
    """
    Refuse preference data that can't be trained or measured on.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `chosen` and `rejected`, and with `prompt` where it is explicit, or with `chosen_ids` and
            `rejected_ids`.
        name (`str`):
            Argument that the dataset was given as, for the message.

    Returns:
        `bool` or `None`: whether the dataset is conversational; `None` if it is tokenized.

    Raises:
        ValueError: If it is empty, lacks a column, or has a row without text, with something else than text or
            messages, or with a margin that is not finite.
    """
    check_not_empty(dataset, name)
    columns = set(dataset.column_names)
    if "margin" in columns:
        for number, margin in enumerate(dataset["margin"]):
            if not isinstance(margin, int | float) or not math.isfinite(margin):
                raise ValueError(
                    f"`margin` of row {number} of `{name}` is {margin!r}; give it a finite number or drop the row."
                )
    if {"chosen_ids", "rejected_ids"} <= columns:
        for column in ("chosen_ids", "rejected_ids"):
            for number, ids in enumerate(dataset[column]):
                if not _are_tokens(ids):
                    raise ValueError(
                        f"`{column}` of row {number} of `{name}` is no list of token IDs with one at least; mend or drop "
                        "the row."
                    )
        return None
    check_columns(dataset, ("chosen", "rejected"), name)
    is_conversational = isinstance(dataset[0]["chosen"], list)
    for number, row in enumerate(dataset):
        where = f"row {number} of `{name}`"
        texts = {column: row[column] for column in ("prompt", "chosen", "rejected") if column in row}
        check_row(texts, where, is_conversational)
    return is_conversational


def check_row(texts: dict[str, Any], where: str, is_conversational: bool) -> None:
    """Refuse a row with missing or empty text, or with text where messages are due, or the other way round."""
    for name, value in texts.items():
        if (
            value is None
            or (isinstance(value, str | list) and not value)
            or (isinstance(value, str) and not value.strip())
        ):
            raise ValueError(
                f"`{name}` of {where} is {'missing' if value is None else 'empty'}; fill it in or drop the row."
            )
        if not isinstance(value, str | list):
            raise ValueError(f"`{name}` of {where} is {value!r:.50}; give it text or messages.")
        if isinstance(value, list) != is_conversational:
            kind, due = ("a conversation", "text") if isinstance(value, list) else ("text", "a conversation")
            raise ValueError(
                f"`{name}` of {where} is {kind}, but the data starts with {due}; make all of it one or the other."
            )
        if isinstance(value, list):
            _check_messages(value, f"`{name}` of {where}")
        check_characters(value, f"`{name}` of {where}")


def _check_messages(messages: list, where: str) -> None:
    for message in messages:
        if not isinstance(message, dict) or not message.get("role"):
            raise ValueError(f"{where} has a message without a `role`; each message needs `role` and `content`.")
        if not message.get("content") and not message.get("tool_calls"):
            raise ValueError(f"{where} has a message without `content`; fill it in or drop the row.")
        role, content = message["role"], message.get("content")
        # A template may write a special token around it.
        if not isinstance(role, str) or not re.fullmatch(r"[\w -]+", role):
            raise ValueError(f"{where} has a message with the role {role!r:.50}; make it a word, such as 'user'.")
        are_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not (are_parts or isinstance(content, str | None)):
            raise ValueError(
                f"{where} has a message with the content {content!r:.50}; give it text, or a list of parts that say their type."
            )


def check_characters(value: Any, where: str) -> None:
    """Refuse text that no file and no tokenizer takes."""
    for text in strings_of(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} holds half of a surrogate pair ({text[error.start]!r}), which is no character; mend its encoding "
                "or drop the row."
            ) from error


@contextlib.contextmanager
def tokenizing(where: str) -> Iterator[None]:
    """
    Name what can't be tokenized, whatever the error is: chat templates are programs of their own, and rows may set their
    arguments.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise not_tokenized(where, error) from error


def not_tokenized(where: str, error: Exception) -> ValueError:
    """`ValueError`: that something can't be tokenized, and why, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{where} can't be tokenized ({reason:.300}); mend it, or drop it.")


def _are_tokens(ids: Any) -> bool:
    return isinstance(ids, list) and bool(ids) and all(isinstance(each, int) and each >= 0 for each in ids)


def check_prompts(
    dataset: Any, name: str, named_completions: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {}
) -> None:
    """Refuse a dataset whose prompts can't be completed, or whose completions can't be scored."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`{name}` must be a `Dataset`, got `{type(dataset).__name__}`; of a stream, take some rows.")
    check_columns(dataset, ("prompt",), name)
    check_not_empty(dataset, name)
    is_conversational = isinstance(dataset[0]["prompt"], list)
    for number, row in enumerate(dataset):
        texts = {"prompt": row["prompt"], **named_completions(row)}
        check_row(texts, f"row {number} of `{name}`", is_conversational)


def check_columns(dataset: Any, columns: tuple[str, ...], name: str) -> None:
    """Refuse a dataset without some columns."""
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(
            f"`{name}` has no column {' and no column '.join(f'`{column}`' for column in missing)}, only "
            f"{sorted(dataset.column_names)}; rename or add it."
        )


def check_is_dataset(dataset: Any, name: str) -> None:
    """Refuse what is no dataset, such as a list of rows or a dictionary of splits."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`{name}` must be a `Dataset`, got `{type(dataset).__name__}`; make it one.")


def check_not_empty(dataset: Dataset, name: str) -> None:
    """Refuse a dataset without rows."""
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty; give it at least one row.")


def _kind(is_conversational: bool) -> str:
    return "conversations" if is_conversational else "text"
