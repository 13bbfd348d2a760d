"""Make rows readable for `RewardTrainer`, tokenize them as it does, and name the row that fails."""

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value
from transformers import PreTrainedTokenizerBase

from ..io.files import disk_error
from .checks import OLD_NAMES, NotTokenizedError, unformatted
from .conversations import (
    ConversationReader,
    are_messages,
    takes_parts_alone,
    template_arguments,
    with_parts,
    with_text,
)
from .markup import as_literal, holds_special_tokens, special_tokens_of
from .sequences import iterate_rows


logger = logging.getLogger(__name__)


# Columns of a conversation that hold text, and the one that holds settings of the chat template.
_MESSAGES = ("prompt", "chosen", "rejected")
_TEXT = (*_MESSAGES, "tools")
_COLUMNS = (*_TEXT, "chat_template_kwargs")

# Column with the row that each pair comes from, where one row gives several pairs to tokenize.
ROW_COLUMN = "row_of_dataset"


def with_literal_messages(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, name: str
) -> Dataset | IterableDataset:
    """
    Make rows readable as they are meant:

    - Special tokens in messages are escaped; see [`~trl_ssrm.data.markup.as_literal`]. Rows of plain text stay as they
      are: in plain text, special tokens are the only way to mark turns.
    - Content that is given as text parts becomes text, and text becomes a part where the chat template reads only those.
    - Empty `tools`, and `chat_template_kwargs` that only some rows have, count as none.
    - Tensors and tables become Python objects, and token IDs under the names of older versions of TRL get today's.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference pairs, before they are tokenized.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        name (`str`):
            Name of the dataset for messages.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the same rows. The number of rows with special tokens is
        logged, except for a stream.

    Raises:
        ValueError: If a field of the messages is named like a special token, or the chat template leaves out the text of
            a message.
    """
    dataset = _renamed(unformatted(dataset))
    special_tokens = special_tokens_of(tokenizer)
    as_parts = tokenizer.chat_template is not None and takes_parts_alone(tokenizer)
    make_readable = functools.partial(_readable, special_tokens=special_tokens, as_parts=as_parts)
    reader = None if tokenizer.chat_template is None else ConversationReader(tokenizer)
    if not isinstance(dataset, Dataset):
        read = functools.partial(_read_row, make_readable=make_readable, reader=reader, name=name)
        return dataset.map(read, with_indices=True)
    columns = [column for column in _COLUMNS if column in dataset.column_names]
    if "chosen" not in columns or "chosen_ids" in dataset.column_names:
        return dataset
    if special_tokens.search(str({column: dataset.features[column] for column in columns if column in _TEXT})):
        raise ValueError(f"A field in `{name}` is named like a special token of the tokenizer; rename it.")
    is_changed, forged = _read_once(dataset, columns, make_readable, reader, special_tokens, name)
    if forged:
        logger.warning(
            f"Messages in {len(forged)} rows of `{name}`, row {forged[0]} being the first, contain special tokens of "
            "the tokenizer; they are read as plain characters, so that no message can open or end a turn."
        )
    if not is_changed:
        return dataset
    with PartialState().main_process_first():
        features = _readable_features(dataset, as_parts)
        return dataset.map(make_readable, features=features, desc=f"Reading messages of {name} as text")


def row_number(dataset: Dataset, place: int) -> int:
    """`int`: row of the dataset as it was given that a pair comes from."""
    return dataset[place][ROW_COLUMN] if ROW_COLUMN in dataset.column_names else place


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
        raise NotTokenizedError(
            f"Row {row_number(dataset, start)} of `{name}`" if is_row else f"`{name}`", error
        ) from error


def _renamed(dataset: Any) -> Any:
    columns = set(dataset.column_names or [])
    # As `RewardTrainer`: today's names come first.
    is_old = columns.issuperset(OLD_NAMES) and not columns.issuperset(OLD_NAMES.values())
    return dataset.rename_columns(OLD_NAMES) if is_old else dataset


def _read_once(
    dataset: Dataset,
    columns: list[str],
    make_readable: Callable[[dict[str, Any]], dict[str, Any]],
    reader: ConversationReader | None,
    special_tokens: re.Pattern[str],
    name: str,
) -> tuple[bool, list[int]]:
    """Whether any row has to change, and the rows with special tokens; refuse rows that can't be read."""
    is_changed, forged = False, []
    for place, row in enumerate(iterate_rows(dataset, columns)):
        try:
            changes = _read_row(row, place, make_readable, reader, name)
        except NotTokenizedError as error:
            raise NotTokenizedError(f"Row {row_number(dataset, place)} of `{name}`", error.reason) from error
        is_changed = is_changed or bool(changes)
        if isinstance(row["chosen"], list) and _holds_special_tokens(row, special_tokens):
            forged.append(row_number(dataset, place))
    return is_changed, forged


def _read_row(
    row: dict[str, Any],
    number: int,
    make_readable: Callable[[dict[str, Any]], dict[str, Any]],
    reader: ConversationReader | None,
    name: str,
) -> dict[str, Any]:
    """Those columns of a row that have to change; refuse a row that can't be read."""
    try:
        changes = make_readable(row)
        if reader is not None and isinstance(row.get("chosen"), list):
            _check_is_read(reader, {**row, **changes})
    except ValueError as error:
        raise NotTokenizedError(f"Row {number} of `{name}`", error) from error
    return changes


def _check_is_read(reader: ConversationReader, row: dict[str, Any]) -> None:
    arguments = template_arguments(row.get("tools"), row.get("chat_template_kwargs"))
    for side in ("chosen", "rejected"):
        reader.check_is_read((row.get("prompt") or []) + row[side], arguments)


def _holds_special_tokens(row: dict[str, Any], special_tokens: re.Pattern[str]) -> bool:
    return holds_special_tokens([row[column] for column in _TEXT if column in row], special_tokens)


def _readable(row: dict[str, Any], special_tokens: re.Pattern[str], as_parts: bool) -> dict[str, Any]:
    """Those columns of a row that have to change."""
    changes: dict[str, Any] = {}
    if isinstance(row.get("tools"), str) and not row["tools"].strip():
        changes["tools"] = None
    if "chat_template_kwargs" in row and row["chat_template_kwargs"] in (None, ""):
        changes["chat_template_kwargs"] = {}
    if not isinstance(row.get("chosen"), list):
        return changes
    # Without a need, no field is added: `RewardTrainer` reads the row as it is.
    in_form = with_parts if as_parts else with_text
    own = [column for column in _MESSAGES if are_messages(row.get(column), of_parts=not as_parts)]
    changes |= {column: in_form(row[column]) for column in own}
    texts = {column: value for column, value in {**row, **changes}.items() if column in _TEXT}
    return {**changes, **as_literal(texts, special_tokens)} if _holds_special_tokens(row, special_tokens) else changes


def _readable_features(dataset: Dataset, as_parts: bool) -> Features:
    """Types of the columns after [`_readable`]."""
    features = dict(dataset.features)
    for column in set(_MESSAGES) & features.keys():
        messages = features[column]
        fields = messages.feature if isinstance(messages, List | LargeList) else None
        # Content of several kinds is JSON already.
        if isinstance(fields, dict) and "content" in fields and not isinstance(fields["content"], Json):
            content = List({"type": Value("string"), "text": Value("string")}) if as_parts else Value("string")
            features[column] = List({**fields, "content": content})
    if "chat_template_kwargs" in features:
        # The type of a dictionary has all of its fields in every row.
        features["chat_template_kwargs"] = Json()
    return Features(features)
