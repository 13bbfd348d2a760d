"""Tokenize rows as TRL does, with special tokens in messages escaped, and name the row that fails."""

import logging
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..io.files import disk_error
from .checks import not_tokenized
from .markup import as_literal, holds_special_tokens, special_tokens_of
from .sequences import iterate_rows


logger = logging.getLogger(__name__)


# Columns of a conversation that hold text. `chat_template_kwargs` holds settings.
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "tools")


def with_literal_messages(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, name: str
) -> Dataset | IterableDataset:
    """
    Escape special tokens in messages; see [`~trl_ssrm.data.markup.as_literal`]. Rows of plain text stay as they are:
    in plain text, special tokens are the only way to mark turns.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference pairs, before they are tokenized.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        name (`str`):
            Name of the dataset for messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the same rows. The number of changed rows is logged,
        except for a stream.

    Raises:
        ValueError: If a field of the messages is named like a special token.
    """
    special_tokens = special_tokens_of(tokenizer)

    def needs_escaping(row: dict[str, Any]) -> bool:
        return isinstance(row.get("chosen"), list) and holds_special_tokens(list(row.values()), special_tokens)

    def make_literal(row: dict[str, Any]) -> dict[str, Any]:
        texts = {column: row[column] for column in _TEXT_COLUMNS if column in row}
        return as_literal(texts, special_tokens) if needs_escaping(texts) else {}

    if not isinstance(dataset, Dataset):
        return dataset.map(make_literal)
    columns = [column for column in _TEXT_COLUMNS if column in dataset.column_names]
    if special_tokens.search(str({column: dataset.features[column] for column in columns})):
        raise ValueError(f"A field in `{name}` is named like a special token of the tokenizer; rename it.")
    if "chosen" not in columns or not isinstance(dataset[0]["chosen"], list):
        return dataset
    changed = [number for number, row in enumerate(iterate_rows(dataset, columns)) if needs_escaping(row)]
    if not changed:
        return dataset
    logger.warning(
        f"Messages in {len(changed)} rows of `{name}`, row {changed[0]} being the first, contain special tokens of "
        "the tokenizer; they are read as plain characters, so that no message can open or end a turn."
    )
    with PartialState().main_process_first():
        return dataset.map(make_literal, features=dataset.features, desc=f"Reading messages of {name} as text")


def tokenized_or_refused(
    tokenize: Callable[[Any], Any], dataset: Dataset | IterableDataset, name: str
) -> Dataset | IterableDataset:
    """
    Tokenize a dataset; if that fails, find and name the row.

    Args:
        tokenize (`Callable`):
            Tokenizes a dataset row by row.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows.
        name (`str`):
            Name of the dataset for the message.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the tokenized dataset.

    Raises:
        ValueError: If a row can't be tokenized.
    """

    def fails(start: int, stop: int) -> bool:
        try:
            tokenize(dataset.select(range(start, stop)))
        except Exception:
            return True
        return False

    try:
        return tokenize(dataset)
    except Exception as error:
        if not isinstance(dataset, Dataset) or isinstance(error, OSError) or disk_error(error) is not None:
            raise
        start, stop = 0, len(dataset)
        while stop - start > 1:
            middle = (start + stop) // 2
            start, stop = (start, middle) if fails(start, middle) else (middle, stop)
        # The error may need several rows together, such as rows with different columns.
        is_row = fails(start, stop)
        raise not_tokenized(f"Row {start} of `{name}`" if is_row else f"`{name}`", error) from error
