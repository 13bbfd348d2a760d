"""Checks of rows before any work is done. Each error is one sentence that names the place and one thing to do."""

import contextlib
import difflib
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from .conversations import begins_with, odd_part, template_arguments
from .markup import strings_of
from .prompt_columns import check_same_form


logger = logging.getLogger(__name__)

# Columns of tokenized pairs by their names in older versions of TRL.
OLD_NAMES = {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}

# The start of messages that were written into a cell as JSON or as Python.
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


def check_labeled_data(datasets: dict[str, Any]) -> bool | None:
    """
    Refuse labeled datasets that can't be used for training or measuring, and a mix of text and conversations. The rows
    of streams are not read.

    Args:
        datasets (`dict[str, Dataset | IterableDataset]`):
            The datasets, by the name of the argument that each was passed as.

    Returns:
        `bool` or `None`: whether they are conversational; `None` if all of them are tokenized.

    Raises:
        TypeError: If one of them is not a dataset.
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
    check_same_form(datasets)
    return expected


def check_preference_dataset(dataset: Dataset, name: str) -> bool | None:
    """
    Refuse preference data that can't be used for training or measuring.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `chosen` and `rejected`, optionally with `prompt`; or with `chosen_ids` and `rejected_ids`
            (`chosen_input_ids` and `rejected_input_ids` in older versions of TRL).
        name (`str`):
            Name of the argument that the dataset was passed as, for the message.

    Returns:
        `bool` or `None`: whether the dataset is conversational; `None` if it is tokenized.

    Raises:
        ValueError: If it is empty, lacks a column, or has a row without text, with values other than text or messages,
            or with a margin that is not finite.
    """
    check_not_empty(dataset, name)
    dataset = unformatted(dataset)
    columns = set(dataset.column_names)
    if "margin" in columns:
        _check_margins(dataset, name)
    for tokenized in (tuple(OLD_NAMES.values()), tuple(OLD_NAMES)):
        if columns.issuperset(tokenized):
            for column in tokenized:
                _check_tokens(dataset, column, name)
            return None
    check_columns(dataset, ("chosen", "rejected"), name)
    is_conversational, repeated = isinstance(dataset[0]["chosen"], list), 0
    for number, row in enumerate(dataset):
        texts = {column: row[column] for column in ("prompt", "chosen", "rejected") if column in row}
        check_row(texts, f"row {number} of `{name}`", is_conversational)
        check_template_columns(row, f"row {number} of `{name}`")
        repeated += begin_with_prompt(texts)
    report_repeated_prompts(name, repeated, len(dataset))
    return is_conversational


def check_prompts(
    dataset: Any, name: str, named_completions: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {}
) -> None:
    """
    Refuse a dataset without usable prompts, or with completions that can't be scored.

    Args:
        dataset (`Any`):
            Should be a [`~datasets.Dataset`] with the column `prompt`.
        name (`str`):
            Name of the argument that the dataset was passed as, for the message.
        named_completions (`Callable[[dict], dict]`, *optional*):
            Gives the completions of a row, by their names for the message. By default there are none.

    Raises:
        TypeError: If it is not a [`~datasets.Dataset`].
        ValueError: If it is empty, lacks `prompt`, or has a row without text.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`{name}` must be a `Dataset`, got `{type(dataset).__name__}`; make a `Dataset` of some of its rows."
        )
    check_columns(dataset, ("prompt",), name)
    check_not_empty(dataset, name)
    dataset = unformatted(dataset)
    is_conversational, repeated = isinstance(dataset[0]["prompt"], list), 0
    for number, row in enumerate(dataset):
        texts = {"prompt": row["prompt"], **named_completions(row)}
        check_row(texts, f"row {number} of `{name}`", is_conversational)
        check_template_columns(row, f"row {number} of `{name}`")
        repeated += begin_with_prompt(texts)
    report_repeated_prompts(name, repeated, len(dataset))


def check_row(texts: dict[str, Any], where: str, is_conversational: bool) -> None:
    """
    Refuse a row with missing or empty text, with text instead of messages or messages instead of text, or with
    completions that begin with the prompt's messages.

    Args:
        texts (`dict[str, Any]`):
            Values of the row that should be text or messages, by their names for the message.
        where (`str`):
            Place of the row for the message, such as "row 3 of `train_dataset`".
        is_conversational (`bool`):
            Whether the values should be messages.

    Raises:
        ValueError: Names the place and the value.
    """
    for name, value in texts.items():
        _check_not_missing(value, f"`{name}` of {where}")
        if not isinstance(value, str | list):
            raise ValueError(f"`{name}` of {where} is {value!r:.50}; give it text or messages.")
        if isinstance(value, list) != is_conversational:
            _check_prompt_beside_conversations(texts, where)
            kind, due = ("a conversation", "text") if isinstance(value, list) else ("text", "a conversation")
            raise ValueError(
                f"`{name}` of {where} is {kind}, but the data starts with {due}; make all of it one or the other."
            )
        if isinstance(value, list):
            _check_messages(value, f"`{name}` of {where}")
        check_characters(value, f"`{name}` of {where}")
    completions = {name: value for name, value in texts.items() if name != "prompt"} or texts
    if all(isinstance(value, str) and _MESSAGES_AS_TEXT.match(value) for value in completions.values()):
        raise ValueError(
            f"`{next(iter(completions))}` of {where} is a conversation that was written as text, as in a cell of a CSV file; "
            "write the rows as JSON lines, with each conversation as a list of messages."
        )
    for name, value in completions.items():
        if name != "prompt" and begins_with(value, texts.get("prompt")):
            raise ValueError(
                f"`{name}` of {where} begins with the messages of `prompt`, which would be read twice; drop the column "
                "`prompt`."
            )


def check_prompt_of_completion(prompt: Any, where: str) -> None:
    """
    Refuse a prompt that comes with a completion and can't be read. It may be empty. The completion is not checked: a policy
    may write anything, and each completion gets a reward.
    """
    if prompt is None or prompt:
        check_row({"prompt": prompt}, where, isinstance(prompt, list))


def check_template_columns(row: dict[str, Any], where: str) -> None:
    """Refuse a row whose `tools` or `chat_template_kwargs` no chat template can take."""
    try:
        template_arguments(row.get("tools"), row.get("chat_template_kwargs"))
    except ValueError as error:
        raise ValueError(f"In {where}, {error}.") from None


def begin_with_prompt(texts: dict[str, Any]) -> bool:
    """`bool`: whether a row is of text, and all of its completions begin with the whole prompt."""
    prompt, completions = texts.get("prompt"), [value for name, value in texts.items() if name != "prompt"]
    if not isinstance(prompt, str) or not completions or not all(isinstance(each, str) for each in completions):
        return False
    return all(each.lstrip().startswith(prompt.strip()) for each in completions)


def report_repeated_prompts(name: str, count: int, num_rows: int) -> None:
    """Log that the completions of all rows repeat their prompts. In a few rows they may do so on purpose."""
    if count == num_rows > 1:
        logger.warning(
            f"In every row of `{name}`, the completions begin with the text of `prompt`, so it is read twice; if that is not "
            "intended, drop the column `prompt`."
        )


def unformatted(dataset: Any) -> Any:
    """`Dataset` or `IterableDataset`: the same rows as Python objects, not as tensors or tables."""
    return dataset.with_format(None)


def check_characters(value: Any, where: str) -> None:
    """Refuse text that is not valid Unicode, which neither files nor tokenizers accept."""
    for text in strings_of(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} holds half of a surrogate pair ({text[error.start]!r}), which is not a valid character; fix "
                "its encoding or drop the row."
            ) from error


def check_columns(dataset: Any, columns: tuple[str, ...], name: str) -> None:
    """Refuse a dataset that lacks some of the columns."""
    if missing := [column for column in columns if column not in dataset.column_names]:
        nearest = difflib.get_close_matches(missing[0], dataset.column_names, 1, 0.75)
        question = f" Did you mean `{nearest[0]}`?" if nearest else ""
        raise ValueError(
            f"`{name}` has no column {' and no column '.join(f'`{column}`' for column in missing)}, only "
            f"{sorted(dataset.column_names)}; rename or add it.{question}"
        )


def check_is_dataset(dataset: Any, name: str) -> None:
    """Refuse other types than datasets, such as a list of rows or a dictionary of splits."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"`{name}` must be a `Dataset`, got `{type(dataset).__name__}`; make it one.")


def check_not_empty(dataset: Dataset, name: str) -> None:
    """Refuse a dataset without rows."""
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty; give it at least one row.")


class NotTokenizedError(ValueError):
    """
    A text or conversation can't be tokenized.

    Args:
        where (`str`):
            Place of it for the message, such as "Row 3 of `dataset`".
        reason (`Exception`):
            What the tokenizer or the chat template raised.
        position (`int`, *optional*, defaults to `0`):
            Its position among those that were given together.
    """

    def __init__(self, where: str, reason: Exception, position: int = 0):
        words = " ".join(str(reason).split()).rstrip(".") or type(reason).__name__
        super().__init__(f"{where} can't be tokenized ({words:.300}); correct or drop it.")
        self.reason, self.position = reason, position


@contextlib.contextmanager
def tokenizing(where: str, position: int = 0) -> Iterator[None]:
    """
    Turn an exception of the tokenizer into a [`NotTokenizedError`] that names the place. It can be of any type: a chat
    template is a program, and rows may set its arguments.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise NotTokenizedError(where, error, position) from error


def _check_prompt_beside_conversations(texts: dict[str, Any], where: str) -> None:
    """Refuse a prompt as text beside conversations, with the advice that fits: they may hold the prompt already."""
    prompt, name = texts.get("prompt"), next((name for name in texts if name != "prompt"), None)
    if name is None or not isinstance(prompt, str) or not isinstance(texts[name], list):
        return
    _check_messages(texts[name], f"`{name}` of {where}")
    words = f"`prompt` of {where} is text, but `{name}` is a conversation"
    if texts[name][0]["role"] != "assistant":
        raise ValueError(f"{words} that has the prompt in it; drop the column `prompt`.")
    raise ValueError(f"{words}; make it one too, such as [{{'role': 'user', 'content': ...}}].")


def _check_margins(dataset: Dataset, name: str) -> None:
    for number, margin in enumerate(dataset["margin"]):
        if not isinstance(margin, int | float) or not math.isfinite(margin):
            raise ValueError(
                f"`margin` of row {number} of `{name}` is {margin!r}; give it a finite number or drop the row."
            )


def _check_tokens(dataset: Dataset, column: str, name: str) -> None:
    for number, ids in enumerate(dataset[column]):
        are_tokens = isinstance(ids, list) and bool(ids) and all(isinstance(each, int) and each >= 0 for each in ids)
        if not are_tokens:
            raise ValueError(
                f"`{column}` of row {number} of `{name}` is not a list of token IDs; give it one or more, or drop the "
                "row."
            )


def _check_not_missing(value: Any, where: str) -> None:
    is_empty = isinstance(value, str | list) and not value
    is_blank = isinstance(value, str) and not value.strip()
    if value is None or is_empty or is_blank:
        raise ValueError(f"{where} is {'missing' if value is None else 'empty'}; fill it in or drop the row.")


def _check_messages(messages: list, where: str) -> None:
    for message in messages:
        if not isinstance(message, dict) or not message.get("role"):
            raise ValueError(f"{where} has a message without a `role`; each message needs `role` and `content`.")
        role, content = message["role"], message.get("content")
        # A chat template may put the role inside a special token, such as "<|user|>".
        if not isinstance(role, str) or not re.fullmatch(r"[\w -]+", role):
            raise ValueError(f"{where} has a message with the role {role!r:.50}; make it a word, such as 'user'.")
        are_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not (are_parts or isinstance(content, str | None)):
            raise ValueError(
                f"{where} has a message with the content {content!r:.50}; give it text, or a list of parts that each "
                "have a type."
            )
        if (part := odd_part(content)) is not None:
            raise ValueError(
                f"{where} has a message with the part {part!r:.50}, but a tokenizer reads only parts with a `text`; drop the "
                "row."
            )
        text = "".join(part["text"] for part in content) if isinstance(content, list) else content
        if not text and not message.get("tool_calls"):
            raise ValueError(f"{where} has a message without `content`; fill it in or drop the row.")


def _kind(is_conversational: bool) -> str:
    return "conversations" if is_conversational else "text"
