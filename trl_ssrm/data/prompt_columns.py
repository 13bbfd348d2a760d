"""Whether all datasets of a run have prompts, or none of them."""

import logging
import os
from typing import Any

from datasets import Dataset


logger = logging.getLogger(__name__)

# Columns that are read, and those of the labels that this package writes beside the text.
_READ = frozenset(
    ("prompt", "chosen", "rejected", "completions", "completion_a", "completion_b", "margin", "tools")
    + ("chat_template_kwargs", "probability", "confidence", "label", "labels", "subset", "tie")
)


def check_same_form(datasets: dict[str, Any]) -> None:
    """
    Refuse datasets of which some have prompts and others have none, such as labels with a column `question` in place of
    `prompt`. A prompt is a column, or what the two completions of a pair have in common at their start.

    Args:
        datasets (`dict[str, Any]`):
            The datasets, by the name of the argument that each was passed as. Streams and tokenized rows are left out.

    Raises:
        ValueError: If one has prompts, and another one has none but a further column of text. Without such a column,
            it is logged.
    """
    rows = {name: data for name, data in datasets.items() if isinstance(data, Dataset) and len(data)}
    known = {name: has for name, data in rows.items() if (has := _has_prompts(data)) is not None}
    with_prompts = next((name for name, has in known.items() if has), None)
    for name in (name for name, has in known.items() if not has and with_prompts is not None):
        words = f"`{name}` has no prompts, neither in a column `prompt` nor before its completions, but `{with_prompts}` has"
        unread = sorted(set(rows[name].column_names) - _READ)
        if columns := [column for column in unread if isinstance(rows[name].with_format(None)[0][column], str | list)]:
            raise ValueError(f"{words}; rename the column that holds them ({', '.join(columns)}) to `prompt`.")
        logger.warning(f"{words}. The model reads completions without their prompts there; add a column `prompt`.")
    for column in ("tools", "chat_template_kwargs"):
        own = [name for name, data in rows.items() if name in known and column in data.column_names]
        if own and (others := sorted(known.keys() - set(own))):
            logger.warning(
                f"`{own[0]}` has a column `{column}`, which `{others[0]}` does not have, so the chat template writes their texts "
                "in different ways; give the column to both or to none."
            )


def _has_prompts(dataset: Dataset) -> bool | None:
    """Whether most of the first rows have a prompt, in a column or before the completions; `None` if they are tokenized."""
    columns = set(dataset.column_names)
    if "prompt" in columns:
        return True
    if not {"chosen", "rejected"} <= columns:
        return None
    rows = dataset.select_columns(["chosen", "rejected"]).select(range(min(len(dataset), 100))).with_format(None)
    found = [_begins_with_prompt(row["chosen"], row["rejected"]) for row in rows]
    return 2 * sum(found) >= len(found)


def _begins_with_prompt(chosen: Any, rejected: Any) -> bool:
    if isinstance(chosen, list):
        return any(message["role"] != "assistant" for message in chosen)
    # A word in common is a prompt.
    same = os.path.commonprefix([chosen, rejected])
    return any(character.isspace() for character in same.strip() + same[-1:])
