"""What is refused before any work is done: one sentence each, which names the place and the mend."""

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .collator import ConfidenceFilteredDataCollator
from .config import SSRMConfig
from .markup import strings_of
from .selection import wilson_lower_bound


if TYPE_CHECKING:
    from .data import RunData


def check_arguments(
    args: SSRMConfig,
    data_collator: Any,
    train_dataset: Any,
    optimizers: tuple[Any, Any],
    has_held_out: bool,
    has_calibration: bool,
) -> None:
    """Refuse arguments of the trainer that can't go with a pool, and an output directory that can't be written."""
    if not isinstance(train_dataset, Dataset):
        raise TypeError(
            f"`train_dataset` must be a `Dataset` beside `unlabeled_dataset`, got `{type(train_dataset).__name__}`; it "
            "is the small one."
        )
    if data_collator is not None and not isinstance(data_collator, ConfidenceFilteredDataCollator):
        raise TypeError(
            f"`data_collator` must be a `ConfidenceFilteredDataCollator`, got `{type(data_collator).__name__}`; leave "
            "it out for the default one."
        )
    if optimizers != (None, None):
        raise ValueError(
            "`optimizers` can't be started afresh each round; use `optimizer_cls_and_kwargs`, or `optim` in the config."
        )
    for name in ("keep_best_round", "round_patience"):
        if getattr(args, name) and not has_held_out and args.num_folds == 0:
            raise ValueError(
                f"`{name}` needs `calibration_dataset`, `num_folds` or `eval_dataset` to compare the rounds by."
            )
    if args.target_precision is not None and not has_calibration and args.num_folds == 0:
        raise ValueError("`target_precision` needs `calibration_dataset` or `num_folds` to find the threshold by.")
    try:
        os.makedirs(str(args.output_dir), exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` can't be written: {error}. Choose another one.") from error


def check_held_out(args: SSRMConfig, data: "RunData", num_folds: int) -> None:
    """Refuse what the held-out pairs can't answer, now that they are known."""
    if (args.keep_best_round or args.round_patience) and not (data.held_out or num_folds):
        raise ValueError(
            "`keep_best_round` and `round_patience` compare rounds on pairs that are there as a whole, but `eval_dataset` "
            "is a stream; give `calibration_dataset`, or set `num_folds`."
        )
    if args.target_precision is not None:
        if "calibration" not in data.held_out and not num_folds:
            raise ValueError(
                "`target_precision` needs `calibration_dataset`, since `num_folds` is 0 here; see there for the reasons."
            )
        best = highest_precision(data, num_folds)
        if best < args.target_precision:
            raise ValueError(
                f"`target_precision` is {args.target_precision}, but the held-out labels can vouch for {best:.3f} at "
                "most, were they all predicted right; lower it, or give more labels."
            )


def highest_precision(data: "RunData", num_folds: int) -> float:
    """`float`: precision that the held-out labels could vouch for if all were predicted right; 0 without any."""
    if "calibration" in data.held_out:
        num_pairs = len(data.held_out["calibration"].first)
    else:
        num_pairs = len(data.labeled) if num_folds else 0
    return float(wilson_lower_bound(np.array([num_pairs]), np.array([num_pairs]))[0])


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


def check_tokenizer(args: SSRMConfig, tokenizer: PreTrainedTokenizerBase, is_conversational: bool | None) -> None:
    """Refuse a tokenizer that lacks what [`~trl.RewardTrainer`] needs for this kind of data."""
    if is_conversational and tokenizer.chat_template is None and args.chat_template_path is None:
        raise ValueError(
            "The data is conversational, but the tokenizer has no chat template; set `chat_template_path`, or give the "
            "data as text."
        )
    eos_token = args.eos_token or tokenizer.eos_token
    if is_conversational is False and eos_token is None:
        raise ValueError(
            "The data is text, which ends with an end-of-sequence token, but the tokenizer has none; set `eos_token`, "
            "for a BERT-like model to '[SEP]'."
        )
    if args.pad_token is None and tokenizer.pad_token is None and eos_token is None:
        raise ValueError("The tokenizer has no padding token and none to fall back on; set its `pad_token`.")


def check_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with the end token if there is no other; refuse a tokenizer that has neither."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no padding token and none to fall back on; set its `pad_token`.")
        tokenizer.pad_token = tokenizer.eos_token


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
