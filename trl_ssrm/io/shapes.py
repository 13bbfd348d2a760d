"""The usual shapes of preference files, and columns with other names, turned into the columns that TRL reads."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Value


logger = logging.getLogger(__name__)

PROMPTS = ("prompt", "question", "instruction", "query")
PAIRS = tuple(
    (f"{name}_{first}", f"{name}_{second}")
    for name in ("completion", "response", "answer", "output")
    for first, second in (("a", "b"), ("1", "2"), ("0", "1"))
)
WINNERS = ("winner", "preferred", "preference", "label", "better")
SCORES = ("overall_score", "score", "rating")
_TURN = "\n\n"
TIES = ("tie", "tie (bothbad)", "both_bad", "both", "neither", "equal", "same")
NO_LABEL = ("none", "")
_TRUTH = {"true": True, "1": True, "false": False, "0": False, "": None}


def named_columns(args: Any) -> dict[str, str | None]:
    """`dict[str, str | None]`: the arguments `prompt_column`, `chosen_column` and `rejected_column` of a command."""
    return {name: getattr(args, f"{name}_column") for name in ("prompt", "chosen", "rejected")}


def with_known_columns(dataset: Dataset, name: str, is_pool: bool, columns: dict[str, str | None]) -> Dataset:
    """
    Give the columns of a dataset the names that TRL reads, and say so in the log.

    Three shapes are converted besides: two completions with a column that names the better one, a list of rated completions, and
    two dialogues of `Human:` and `Assistant:`, which become conversations. Of the first two, labeled rows become `chosen` and `rejected`, and rows of a pool lose their label. A tie of
    the first shape gets `tie`, which is true where neither completion is better. Text in a column of this name is read as true
    or false.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows as they were loaded.
        name (`str`):
            Name of the dataset in messages.
        is_pool (`bool`):
            Whether the rows are for a pool.
        columns (`dict[str, str | None]`):
            The column that stands for each of `prompt`, `chosen` and `rejected`; `None` where it has that name.

    Returns:
        [`~datasets.Dataset`]: the rows; the dataset itself if its columns have the right names.

    Raises:
        ValueError: If a column is not there, a value does not say which completion is better, or `tie` is neither true nor false.
    """
    renamed = {given: target for target, given in columns.items() if given is not None and given != target}
    for given, target in renamed.items():
        if given not in dataset.column_names:
            raise ValueError(
                f"{name} has no column `{given}` to take for `{target}`; its columns are {', '.join(dataset.column_names)}."
            )
        if target in dataset.column_names:
            raise ValueError(
                f"{name} has a column `{target}` already, so `{given}` can't stand for it; leave one out."
            )
    dataset = dataset.rename_columns(renamed) if renamed else dataset
    if not is_pool and dataset.features.get("tie") == Value("string"):
        dataset = dataset.remove_columns("tie").add_column("tie", _truth(dataset["tie"], name))
    if {"chosen", "rejected"} <= set(dataset.column_names) and _are_dialogues(dataset):
        _say(name, ["chosen", "rejected"], "conversations: they are dialogues of `Human:` and `Assistant:`")
        return dataset.map(_as_conversations, remove_columns=["chosen", "rejected"])
    if not {"chosen", "rejected"} & set(dataset.column_names):
        dataset = _converted(dataset, name, is_pool)
    return dataset


def _truth(values: Sequence[str | None], name: str) -> list[bool | None]:
    words = [(value or "").strip().lower() for value in values]
    if (odd := next((number for number, word in enumerate(words) if word not in _TRUTH), None)) is not None:
        raise ValueError(f"Row {odd} of {name} has {values[odd]!r:.50} in the column `tie`; write true or false.")
    return [_TRUTH[word] for word in words]


def _are_dialogues(dataset: Dataset) -> bool:
    """Whether both completions of the first row are dialogues as those of HH, which begin with a turn of a person."""
    row = dataset[0]
    texts = [row["chosen"], row["rejected"]]
    return all(isinstance(text, str) and text.startswith(f"{_TURN}Human:") for text in texts) and "prompt" not in row


def _as_conversations(row: dict[str, Any]) -> dict[str, Any]:
    """A row of HH with `prompt`, the messages in common, and the other messages of `chosen` and `rejected`."""
    chosen, rejected = (_messages(row[name]) for name in ("chosen", "rejected"))
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _messages(text: str) -> list[dict[str, str]]:
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = re.split(rf"{_TURN}(Human|Assistant):", text)[1:]
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def _converted(dataset: Dataset, name: str, is_pool: bool) -> Dataset:
    names = dataset.column_names
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    winner = next((column for column in WINNERS if column in names), None)
    is_rated = isinstance(dataset[0].get("completions"), list) and all(
        isinstance(each, dict) and "response" in each for each in dataset[0]["completions"]
    )
    if pair is None and not is_rated:
        return dataset
    read = []
    prompts = [column for column in PROMPTS if column in names]
    if "prompt" not in names and len(prompts) == 1:
        dataset, read = dataset.rename_column(prompts[0], "prompt"), [prompts[0]]
    if pair is None:
        return _from_ratings(dataset, name, is_pool, [*read, "completions"])
    if winner is None or is_pool:
        renamed = {given: target for given, target in zip(pair, PAIRS[0], strict=True) if given != target}
        dataset = dataset.rename_columns(renamed) if renamed else dataset
        if winner is not None:
            dataset = dataset.remove_columns(winner)
        if read or renamed:
            _say(name, [*read, *pair], "`prompt`, `completion_a` and `completion_b`")
        return dataset
    values = dataset[winner][:]
    if "tie" in names:
        values = ["tie" if is_tie else value for value, is_tie in zip(values, dataset["tie"], strict=True)]
        dataset = dataset.remove_columns("tie")
    words = _known_values(values, name, winner, pair)
    first_is_better = [_first_is_better(*each, pair) for each in words]
    if all(better is None for better in first_is_better):
        raise ValueError(f"No row of {name} has a better completion in its column `{winner}`, so no label is left.")
    kept = [number for number, (word, _) in enumerate(words) if word not in NO_LABEL]
    is_tie = [first_is_better[number] is None for number in kept]
    rows = dataset.select(kept)
    texts = [rows[column] for column in pair]
    chosen, rejected = (
        [texts[bool(first_is_better[number]) == is_second][place] for place, number in enumerate(kept)]
        for is_second in (False, True)
    )
    rows = rows.remove_columns([*pair, winner]).add_column("chosen", chosen).add_column("rejected", rejected)
    left_out = {"without a label": len(dataset) - len(kept)}
    _say(name, [*read, *pair, winner], "`prompt`, `chosen` and `rejected`", left_out, sum(is_tie))
    return rows.add_column("tie", is_tie) if any(is_tie) else rows


def _known_values(values: Sequence[Any], name: str, winner: str, pair: tuple[str, str]) -> list[tuple[str, bool]]:
    """Each value of the column that names the better completion, in lower case, and whether numbers count from 0."""
    # The classes of some arena data are `winner_model_a`, `winner_model_b` and `winner_tie`.
    words = ["" if value is None else str(value).strip().lower().removeprefix("winner_") for value in values]
    numbers = {word for word in words if word.isdigit()}
    if numbers == {"1"} and not pair[0].endswith(("0", "1")):
        raise ValueError(
            f"The column `{winner}` of {name} has no number but 1, which may be the first or the second completion; write "
            f"`{pair[0]}` or `{pair[1]}`."
        )
    from_zero = "0" in numbers or (numbers == {"1"} and pair[0].endswith("0"))
    known = {*TIES, *NO_LABEL, "a", "b", *pair, "model_a", "model_b", *(("0", "1") if from_zero else ("1", "2"))}
    for number, word in enumerate(words):
        if word not in known:
            raise ValueError(
                f"Row {number} of {name} has {values[number]!r} in the column `{winner}`, which names neither completion; write "
                f"`{pair[0]}`, `{pair[1]}` or `tie`."
            )
    return [(word, from_zero) for word in words]


def _first_is_better(word: str, from_zero: bool, pair: tuple[str, str]) -> bool | None:
    if word in TIES or word in NO_LABEL:
        return None
    return word in ("a", pair[0], "model_a", "0" if from_zero else "1")


def _from_ratings(dataset: Dataset, name: str, is_pool: bool, read: list[str]) -> Dataset:
    """Rows with a list of completions, each with a `response` and a score."""
    score = next((each for each in SCORES if each in dataset[0]["completions"][0]), None)
    if is_pool or score is None:
        responses = [[each["response"] for each in row] for row in dataset["completions"]]
        _say(name, read, "`prompt` and `completions`")
        return dataset.remove_columns("completions").add_column("completions", responses)
    kept, chosen, rejected = [], [], []
    for number, completions in enumerate(dataset["completions"]):
        try:
            ordered = sorted(completions, key=lambda each: float(each[score]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Row {number} of {name} has a completion without a number in `{score}`.") from error
        if ordered and float(ordered[0][score]) < float(ordered[-1][score]):
            kept.append(number)
            rejected.append(ordered[0]["response"])
            chosen.append(ordered[-1]["response"])
    if not kept:
        raise ValueError(f"No row of {name} has two completions with different values of `{score}`.")
    rows = dataset.select(kept).remove_columns("completions").add_column("chosen", chosen)
    _say(
        name,
        read,
        f"`prompt`, with the best and the worst by `{score}` as `chosen` and `rejected`",
        {"rated alike": len(dataset) - len(kept)},
    )
    return rows.add_column("rejected", rejected)


def _say(name: str, read: list[str], target: str, left_out: dict[str, int] | None = None, num_ties: int = 0) -> None:
    ties = f" {num_ties} ties have `tie`." if num_ties else ""
    ties += "".join(f" {count} rows {reason} are left out." for reason, count in (left_out or {}).items() if count)
    logger.warning(f"{name}: {', '.join(f'`{column}`' for column in read)} are read as {target}.{ties}")
