"""Build a pool: from rows in an accepted format to tokenized pairs whose order says nothing about the label."""

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Features, IterableDataset, Value

from ..io.storage import BATCH_ROWS, mapping, write_rows
from .checks import (
    begin_with_prompt,
    check_is_dataset,
    check_not_empty,
    check_row,
    check_template_columns,
    report_repeated_prompts,
    unformatted,
)
from .formats import (
    TEMPLATE_COLUMNS,
    check_format,
    columns_of_pairs,
    completion_feature,
    completions_of,
    in_words,
    named_completions,
    report_dropped,
)
from .pool import Pool
from .sequences import PairedSequences, index_type, iterate_rows
from .ties import ties_of
from .tokenization import ROW_COLUMN


# Argument of the trainer that the rows come from, for messages.
_NAME = "unlabeled_dataset"


def build_pool(
    dataset: Dataset | IterableDataset,
    tokenize: Callable[[Dataset], Dataset],
    seed: int,
    max_length: int | None = None,
    max_samples: int | None = None,
    is_conversational: bool | None = None,
    with_gold: bool = False,
    known_pairs: dict[str, set] | None = None,
    by_pair: bool = False,
    stream_dir: Path | None = None,
) -> Pool:
    """
    Turn an unlabeled dataset into a [`Pool`]. A row with `n` completions gives `n * (n - 1) / 2` pairs.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt` and `completions` (two or more), with `prompt`, `completion_a` and `completion_b`, or
            with `chosen` and `rejected`, whose labels are hidden.
        tokenize (`Callable[[Dataset], Dataset]`):
            Adds `chosen_ids` and `rejected_ids` to a preference dataset and keeps its rows.
        seed (`int`):
            Decides, together with the row number and the tokens, which of the two completions is the first.
        max_length (`int`, *optional*):
            Longest sequence in tokens; pairs with a longer one are dropped.
        max_samples (`int`, *optional*):
            Number of rows to use. Required for an [`~datasets.IterableDataset`].
        is_conversational (`bool`, *optional*):
            Whether the labeled data is conversational; the pool has to be of the same kind. If `None`, the first row
            decides.
        with_gold (`bool`, *optional*, defaults to `False`):
            Whether to keep the gold labels, for metrics.
        known_pairs (`dict[str, set]`, *optional*):
            Pair keys of other datasets, by the name of each; these pairs are dropped.
        by_pair (`bool`, *optional*, defaults to `False`):
            Whether a sequence holds both completions of a pair, as for a pairwise model.
        stream_dir (`Path`, *optional*):
            Directory to write the rows of an [`~datasets.IterableDataset`] to, the same for all processes. Required
            for such a dataset. Rows of an earlier stream in it are deleted.

    Returns:
        [`Pool`]

    Raises:
        ValueError: If the dataset is not of an accepted format, if a row has no text or fewer than two completions, or
            if no pair is left.
    """
    dataset = _rows_to_use(dataset, max_samples, stream_dir)
    check_format(dataset, _NAME)
    if with_gold:
        _check_gold_labels(dataset)
    num_completions = _check_rows(dataset, is_conversational)
    tokenized = PairedSequences.from_tokenized(tokenize(_two_by_two(dataset, by_pair)))
    rows, positions, first, second = _all_pairs(tokenized, num_completions, by_pair)
    is_turned = _is_turned(seed, rows, first, second, tokenized.digests)
    first[is_turned], second[is_turned] = second[is_turned], first[is_turned]
    positions[is_turned] = positions[is_turned, ::-1]
    is_kept, dropped = _choose_pairs(tokenized, first, second, max_length, known_pairs or {})
    report_dropped(_NAME, dropped)
    if not is_kept.any():
        raise ValueError(
            f"No pair of `{_NAME}` is left ({in_words(dropped)}); add pairs that are in no other dataset, or raise `max_length`."
        )
    if not is_kept.all():
        # One after the other, since all four arrays twice are a lot of memory.
        rows = rows[is_kept]
        positions = positions[is_kept]
        first = first[is_kept]
        second = second[is_kept]
    return Pool(
        source=dataset,
        rows=rows,
        completions=positions,
        pairs=tokenized.pair_up(first, second, in_place=True),
        # The completions of a preference row are `chosen` and `rejected`, in that order.
        gold=_gold_labels(dataset, rows, positions) if with_gold else None,
        dropped=dropped,
    )


def written_out(rows: Iterable[dict[str, Any]], directory: Path, features: Features | None = None) -> Dataset:
    """
    Write rows to disk, and read them from there instead of keeping them in memory.

    Args:
        rows (`Iterable[dict[str, Any]]`):
            The rows. Only the main process reads and writes them.
        directory (`Path`):
            Where to write them, the same for all processes. Rows that were written there earlier are deleted.
        features ([`~datasets.Features`], *optional*):
            Columns and types of the rows. If `None`, the first 1,000 rows decide them.

    Returns:
        [`~datasets.Dataset`]: the rows, memory-mapped, the same in every process.
    """
    path = write_rows(directory, rows, features) if PartialState().is_main_process else None
    return Dataset.from_file(str(broadcast_object_list([path])[0]))


def _rows_to_use(dataset: Dataset | IterableDataset, max_samples: int | None, stream_dir: Path | None) -> Dataset:
    """The first `max_samples` rows; those of a stream are written to disk."""
    check_is_dataset(dataset, _NAME)
    dataset = unformatted(dataset)
    if isinstance(dataset, IterableDataset):
        if max_samples is None:
            raise ValueError(f"`{_NAME}` is an `IterableDataset`; set `max_unlabeled_samples` to the rows to take.")
        assert stream_dir is not None
        dataset = written_out(dataset.take(max_samples), stream_dir, dataset.features)
    elif max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    check_not_empty(dataset, _NAME)
    return dataset


def _gold_labels(dataset: Dataset, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    gold = (positions[:, 0] == 0).astype(np.float32)
    gold[ties_of(dataset, _NAME)[rows]] = np.nan
    return gold


def _check_gold_labels(dataset: Dataset) -> None:
    columns = set(dataset.column_names)
    if "completions" in columns or "chosen" not in columns:
        raise ValueError(
            f"`track_pseudo_label_accuracy` needs gold labels, but `{_NAME}` has no `chosen` and `rejected`; turn it "
            "off."
        )


def _check_rows(dataset: Dataset, is_conversational: bool | None) -> np.ndarray:
    """Refuse rows without text or with fewer than two completions; return the number of completions of each row."""
    has_prompt = "prompt" in dataset.column_names
    num_completions, repeated = array("i"), 0
    columns = [*columns_of_pairs(dataset), *(name for name in TEMPLATE_COLUMNS if name in dataset.column_names)]
    for number, row in enumerate(iterate_rows(dataset, columns)):
        completions = completions_of(row)
        if is_conversational is None:
            is_conversational = isinstance(next(iter(completions), None), list)
        texts = ({"prompt": row["prompt"]} if has_prompt else {}) | named_completions(row)
        check_row(texts, f"row {number} of `{_NAME}`", is_conversational)
        check_template_columns(row, f"row {number} of `{_NAME}`")
        repeated += begin_with_prompt(texts)
        if len(completions) < 2:
            raise ValueError(f"Row {number} of `{_NAME}` has {len(completions)} completions; give it two or more.")
        num_completions.append(len(completions))
    report_repeated_prompts(_NAME, repeated, len(dataset))
    return np.frombuffer(num_completions, dtype=np.int32)


def _two_by_two(dataset: Dataset, by_pair: bool) -> Dataset:
    """Put all completions, or all pairs of them, into a preference dataset, which `RewardTrainer` can tokenize."""
    shared = [column for column in ("prompt", *TEMPLATE_COLUMNS) if column in dataset.column_names]
    feature = completion_feature(dataset)

    def split(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        split_rows: dict[str, list] = {name: [] for name in (*shared, "chosen", "rejected", ROW_COLUMN)}
        for number, row in zip(numbers, rows, strict=True):
            completions = completions_of(row)
            for first, second in _pairs_to_tokenize(len(completions), by_pair):
                for name in shared:
                    split_rows[name].append(row[name])
                split_rows["chosen"].append(completions[first])
                split_rows["rejected"].append(completions[second])
                split_rows[ROW_COLUMN].append(number)
        return split_rows

    features = {**{name: dataset.features[name] for name in shared}, "chosen": feature, "rejected": feature}
    with mapping(dataset):
        return dataset.map(
            split,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=Features({**features, ROW_COLUMN: Value("int64")}),
            desc="Splitting the unlabeled dataset into completions",
        )


def _pairs_to_tokenize(num_completions: int, by_pair: bool) -> list[tuple[int, int]]:
    """Positions of the completions in each row to tokenize: two new ones a row, an odd last one with itself."""
    if by_pair:
        return list(itertools.combinations(range(num_completions), 2))
    return [(start, min(start + 1, num_completions - 1)) for start in range(0, num_completions, 2)]


def _all_pairs(
    tokenized: PairedSequences, num_completions: np.ndarray, by_pair: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each pair of completions: its row, the positions of both in the row, and the positions of their sequences."""
    num_pairs = num_completions * (num_completions - 1) // 2
    rows = np.repeat(np.arange(len(num_completions), dtype=index_type(len(num_completions))), num_pairs)
    positions_of = {
        number: np.array(list(itertools.combinations(range(number), 2)), dtype=np.int64)
        for number in np.unique(num_completions).tolist()
    }
    positions = np.empty((len(rows), 2), dtype=np.min_scalar_type(max(positions_of)))
    sequences = np.empty((2, len(rows)), dtype=tokenized.first.dtype)
    start = start_tokenized = 0
    for begin in range(0, len(num_completions), BATCH_ROWS):
        numbers = num_completions[begin : begin + BATCH_ROWS]
        own = np.concatenate([positions_of[number] for number in numbers.tolist()])
        pairs = slice(start, start := start + len(own))
        positions[pairs] = own
        if by_pair:
            continue
        both = slice(start_tokenized, start_tokenized := start_tokenized + int(((numbers + 1) // 2).sum()))
        of_completion = np.stack([tokenized.first[both], tokenized.second[both]], axis=1).ravel()
        # An odd last completion was tokenized twice; its second copy goes.
        of_completion = np.delete(of_completion, np.cumsum(numbers + numbers % 2)[numbers % 2 == 1] - 1)
        starts = np.repeat(np.cumsum(numbers) - numbers, num_pairs[begin : begin + BATCH_ROWS])
        sequences[:, pairs] = of_completion[starts + own.T]
    if by_pair:
        sequences[0], sequences[1] = tokenized.first, tokenized.second
    return rows, positions, sequences[0], sequences[1]


def _is_turned(seed: int, rows: np.ndarray, first: np.ndarray, second: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """
    Whether the two completions of a pair change places. Drawn from the seed, the row number and the tokens, never from
    the order in the input, which may be the label.
    """
    is_turned = np.empty(len(rows), dtype=bool)
    for start in range(0, len(rows), BATCH_ROWS):
        batch = slice(start, start + BATCH_ROWS)
        own = [digests[sequences[batch]].tobytes() for sequences in (first, second)]
        for number, row in enumerate(rows[batch].tolist()):
            one, other = (_draw(seed, row, each[16 * number : 16 * number + 16]) for each in own)
            is_turned[start + number] = other < one
    return is_turned


def _draw(seed: int, row: int, digest: bytes) -> bytes:
    return hashlib.blake2b(json.dumps([seed, row]).encode() + digest, digest_size=8).digest()


def _choose_pairs(
    tokenized: PairedSequences,
    first: np.ndarray,
    second: np.ndarray,
    max_length: int | None,
    known_pairs: dict[str, set],
) -> tuple[np.ndarray, dict[str, int]]:
    """Mask of the pairs to keep, and the number of dropped pairs by reason; the first reason of a pair counts."""
    is_kept = np.ones(len(first), dtype=bool)
    dropped: dict[str, int] = {}
    for reason, applies in _reasons(tokenized, first, second, max_length, known_pairs):
        applies &= is_kept
        is_kept &= ~applies
        if applies.any():
            dropped[reason] = int(applies.sum())
    return is_kept, dropped


def _reasons(
    tokenized: PairedSequences,
    first: np.ndarray,
    second: np.ndarray,
    max_length: int | None,
    known_pairs: dict[str, set],
) -> Iterator[tuple[str, np.ndarray]]:
    """Reasons to drop a pair, and a mask of the pairs that each applies to."""
    yield "identical completions", first == second
    if max_length is not None:
        # Longest first: the smaller position has the longer sequence.
        yield f"longer than max_length={max_length}", tokenized.lengths[np.minimum(first, second)] > max_length
    # One number for each pair, equal for two pairs with the same sequences.
    keys = np.minimum(first, second).astype(np.int64)
    keys *= len(tokenized.lengths)
    keys += np.maximum(first, second)
    position_of = _positions_of(
        tokenized, {digest for known in known_pairs.values() for key in known for digest in key}
    )
    for name, known in known_pairs.items():
        found = [(position_of[one], position_of[other]) for one, other in known if {one, other} <= position_of.keys()]
        known_keys = [min(pair) * len(tokenized.lengths) + max(pair) for pair in found]
        yield f"overlap with {name}", np.isin(keys, np.array(known_keys, dtype=np.int64))
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    is_duplicate = np.zeros(len(keys), dtype=bool)
    is_duplicate[order[1:][keys[1:] == keys[:-1]]] = True
    yield "duplicate", is_duplicate


def _positions_of(tokenized: PairedSequences, digests: set[bytes]) -> dict[bytes, int]:
    """Positions of the sequences that have one of these hashes, by hash."""
    return {
        digest: position
        for position, digest in enumerate(map(np.ndarray.tobytes, tokenized.digests))
        if digest in digests
    }
