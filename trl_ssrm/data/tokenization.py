"""Rows are tokenized as TRL does it; messages that spell special tokens out are read as text."""

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


# What is text, where it is a conversation. `chat_template_kwargs` are settings.
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "tools")


def with_literal_messages(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, name: str
) -> Dataset | IterableDataset:
    """
    Messages that spell special tokens out, made such that the tokenizer reads the characters; see
    [`~trl_ssrm.data.markup.as_literal`]. Text that is no conversation is left alone: it has no turns but what it spells.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference pairs, before they are tokenized.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        name (`str`):
            What the dataset is called in a warning.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the same rows. The rows that were changed are counted in
        the log, but for those of a stream.
    """
    special_tokens = special_tokens_of(tokenizer)

    def is_concerned(row: dict[str, Any]) -> bool:
        return isinstance(row.get("chosen"), list) and holds_special_tokens(list(row.values()), special_tokens)

    def make_literal(row: dict[str, Any]) -> dict[str, Any]:
        texts = {column: row[column] for column in _TEXT_COLUMNS if column in row}
        return as_literal(texts, special_tokens) if is_concerned(texts) else {}

    if not isinstance(dataset, Dataset):
        return dataset.map(make_literal)
    columns = [column for column in _TEXT_COLUMNS if column in dataset.column_names]
    if special_tokens.search(str({column: dataset.features[column] for column in columns})):
        raise ValueError(f"A field in `{name}` is named like a special token of the tokenizer; rename it.")
    if "chosen" not in columns or not isinstance(dataset[0]["chosen"], list):
        return dataset
    concerned = [number for number, row in enumerate(iterate_rows(dataset, columns)) if is_concerned(row)]
    if not concerned:
        return dataset
    logger.warning(
        f"Messages in {len(concerned)} rows of `{name}`, row {concerned[0]} being the first, spell special tokens of the "
        "tokenizer out; they are read as the characters that they are, so that none of them opens or ends a turn."
    )
    with PartialState().main_process_first():
        return dataset.map(make_literal, features=dataset.features, desc=f"Reading messages of {name} as text")


def tokenized_or_refused(
    tokenize: Callable[[Any], Any], dataset: Dataset | IterableDataset, name: str
) -> Dataset | IterableDataset:
    """
    Tokenize a dataset, and name the row that can't be.

    Args:
        tokenize (`Callable`):
            Tokenizes a dataset, each row for itself.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows.
        name (`str`):
            What the dataset is called in the error.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: what `tokenize` makes of it.

    Raises:
        ValueError: If there is a row that can't be tokenized.
    """

    def is_refused(start: int, stop: int) -> bool:
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
            start, stop = (start, middle) if is_refused(start, middle) else (middle, stop)
        # Each row alone may be one that can be.
        is_row = is_refused(start, stop)
        raise not_tokenized(f"Row {start} of `{name}`" if is_row else f"`{name}`", error) from error
