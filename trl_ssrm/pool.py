"""The unlabeled pool: accepted formats -> tokenized pairs without labels."""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset
from trl import maybe_extract_prompt

from .checks import check_not_empty, check_row
from .sequences import PairedSequences


logger = logging.getLogger(__name__)

# Columns besides the text that decide how a row is tokenized, as in `RewardTrainer`.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
POOL_FORMATS = (
    "`prompt` with `completions`, `prompt` with `completion_a` and `completion_b`, or the `chosen` and `rejected` of a "
    "preference dataset"
)


@dataclass(frozen=True)
class Pool:
    """
    Unlabeled pairs: tokenized, free of labels, in an order that the labels did not decide.

    Args:
        source ([`~datasets.Dataset`]):
            The rows that the pairs come from.
        rows (`np.ndarray` of shape `(num_pairs,)`, int64):
            Row of `source` that each pair comes from.
        completions (`np.ndarray` of shape `(num_pairs, 2)`, int64):
            Positions of the first and the second completion among those of the row.
        pairs ([`PairedSequences`]):
            Their token IDs, in the same order.
        gold (`np.ndarray` of shape `(num_pairs,)`, bool, *optional*):
            Whether the first completion is the preferred one, where that is tracked.
        dropped (`dict[str, int]`):
            Number of pairs that were left out, by reason.
    """

    source: Dataset
    rows: np.ndarray
    completions: np.ndarray
    pairs: PairedSequences
    gold: np.ndarray | None
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, pairs: np.ndarray) -> "Pool":
        """Some of the pairs."""
        gold = None if self.gold is None else self.gold[pairs]
        return Pool(self.source, self.rows[pairs], self.completions[pairs], self.pairs.take(pairs), gold, self.dropped)

    def texts(self, pair: int, first_is_chosen: bool) -> dict[str, Any]:
        """`dict` with the keys `prompt`, `chosen` and `rejected`: the text or messages of a pair, oriented."""
        row = self.source[int(self.rows[pair])]
        first, second = (completions_of(row)[position] for position in self.completions[pair].tolist())
        chosen, rejected = (first, second) if first_is_chosen else (second, first)
        prompt = {"prompt": row["prompt"]} if row.get("prompt") is not None else {}
        return maybe_extract_prompt({**prompt, "chosen": chosen, "rejected": rejected})


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
            Decides, with the row and the tokens of the two completions, which of them is the first.
        max_length (`int`, *optional*):
            Longest sequence in tokens; pairs with a longer one are dropped.
        max_samples (`int`, *optional*):
            Number of rows to take. Required for an [`~datasets.IterableDataset`].
        is_conversational (`bool`, *optional*):
            Whether the labeled data is conversational; the pool has to be so too. If `None`, the first row decides.
        with_gold (`bool`, *optional*, defaults to `False`):
            Whether to keep the gold labels, for metrics.
        known_pairs (`dict[str, set]`, *optional*):
            Pair keys of other datasets by the name of each; pairs among them are dropped.
        by_pair (`bool`, *optional*, defaults to `False`):
            Whether a sequence depends on both completions of a pair, as those of a pairwise model do.

    Returns:
        [`Pool`]

    Raises:
        ValueError: If the dataset is not of an accepted format, a row has no text or fewer than two completions, or no
            pair is left.
    """
    name = "unlabeled_dataset"
    if isinstance(dataset, IterableDataset):
        if max_samples is None:
            raise ValueError(f"`{name}` is an `IterableDataset`; set `max_unlabeled_samples` to the rows to take.")
        dataset = Dataset.from_list(list(dataset.take(max_samples)), features=dataset.features)
    elif max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    check_not_empty(dataset, name)
    check_format(dataset, name)
    columns = set(dataset.column_names)
    if with_gold and ("completions" in columns or "chosen" not in columns):
        raise ValueError(
            f"`track_pseudo_label_accuracy` needs gold labels, but `{name}` has no `chosen` and `rejected`; turn it off."
        )
    has_prompt = "prompt" in columns
    num_completions = []
    for number, row in enumerate(dataset):
        completions = completions_of(row)
        if is_conversational is None:
            is_conversational = isinstance(next(iter(completions), None), list)
        texts = {"prompt": row["prompt"]} if has_prompt else {}
        check_row(texts | named_completions(row), f"row {number} of `{name}`", is_conversational)
        if len(completions) < 2:
            raise ValueError(f"Row {number} of `{name}` has {len(completions)} completions; give it two or more.")
        num_completions.append(len(completions))

    tokenized = PairedSequences.from_tokenized(tokenize(_two_by_two(dataset, by_pair)))
    digests = tokenized.digests
    known_pairs, seen = known_pairs or {}, set()
    dropped: Counter[str] = Counter()
    rows, kept_completions, first, second = [], [], [], []
    offset = 0
    for row, count in enumerate(num_completions):
        tokenized_pairs = _pairs_to_tokenize(count, by_pair)
        sequences = {}
        for pair in tokenized_pairs:
            own = {pair[0]: int(tokenized.first[offset]), pair[1]: int(tokenized.second[offset])}
            sequences.update({(pair, i) if by_pair else i: sequence for i, sequence in own.items()})
            offset += 1
        for pair in itertools.combinations(range(count), 2):
            sequence_of = {i: sequences[(pair, i) if by_pair else i] for i in pair}
            # The order is drawn from the seed, the row and the tokens, never from the order in the input, which may be
            # the label.
            i, j = sorted(pair, key=lambda i: _draw(seed, row, digests[sequence_of[i]]))
            key = tuple(sorted((digests[sequence_of[i]], digests[sequence_of[j]])))
            reason = next((f"overlap with {other}" for other, keys in known_pairs.items() if key in keys), None)
            if key[0] == key[1]:
                reason = "identical completions"
            elif max_length is not None and max(tokenized.lengths[[sequence_of[i], sequence_of[j]]]) > max_length:
                reason = f"longer than max_length={max_length}"
            elif reason is None and key in seen:
                reason = "duplicate"
            if reason is not None:
                dropped[reason] += 1
                continue
            seen.add(key)
            rows.append(row)
            kept_completions.append((i, j))
            first.append(sequence_of[i])
            second.append(sequence_of[j])
    report_dropped(name, dropped)
    if not rows:
        raise ValueError(f"No pair of `{name}` is left ({in_words(dropped)}); give it other rows, or mend that.")
    positions = np.array(kept_completions, dtype=np.int64)
    pool = Pool(
        source=dataset,
        rows=np.array(rows, dtype=np.int64),
        completions=positions,
        pairs=PairedSequences(
            tokenized.sequences,
            tokenized.lengths,
            digests,
            np.array(first, dtype=np.int64),
            np.array(second, dtype=np.int64),
        ),
        # The completions of a preference row are `chosen` and `rejected`, in that order.
        gold=positions[:, 0] == 0 if with_gold else None,
        dropped=dict(dropped),
    )
    return pool.take(np.arange(len(pool)))


def report_dropped(name: str, dropped: dict[str, int]) -> None:
    """Log how much of a dataset was left out, and why."""
    if any(dropped.values()):
        logger.warning(f"Left out of `{name}`: {in_words(dropped)}.")


def in_words(dropped: dict[str, int]) -> str:
    """`str`: counts by reason."""
    return ", ".join(f"{count} ({reason})" for reason, count in sorted(dropped.items())) or "none was given"


def _pairs_to_tokenize(num_completions: int, by_pair: bool) -> list[tuple[int, int]]:
    """`RewardTrainer` tokenizes two completions a row, so they go through it so; one without a partner goes twice."""
    if by_pair:
        return list(itertools.combinations(range(num_completions), 2))
    return [(start, min(start + 1, num_completions - 1)) for start in range(0, num_completions, 2)]


def _two_by_two(dataset: Dataset, by_pair: bool) -> Dataset:
    shared = [column for column in ("prompt", *TEMPLATE_COLUMNS) if column in dataset.column_names]
    feature = completion_feature(dataset)

    def split(batch: dict[str, list]) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        split_rows: dict[str, list] = {name: [] for name in (*shared, "chosen", "rejected")}
        for row in rows:
            completions = completions_of(row)
            for first, second in _pairs_to_tokenize(len(completions), by_pair):
                for name in shared:
                    split_rows[name].append(row[name])
                split_rows["chosen"].append(completions[first])
                split_rows["rejected"].append(completions[second])
        return split_rows

    features = Features({**{name: dataset.features[name] for name in shared}, "chosen": feature, "rejected": feature})
    return dataset.map(
        split,
        batched=True,
        remove_columns=dataset.column_names,
        features=features,
        desc="Splitting the unlabeled dataset into completions",
    )


def check_format(dataset: Dataset, name: str) -> None:
    """Refuse a dataset that is not of an accepted format."""
    columns = set(dataset.column_names)
    if not ({"chosen", "rejected"} <= columns or {"prompt", "completions"} <= columns) and not (
        {"prompt", "completion_a", "completion_b"} <= columns
    ):
        raise ValueError(f"`{name}` has the columns {sorted(columns)}; it needs {POOL_FORMATS}. Rename or add them.")
    if "completions" not in columns:
        one, other = named_completions(dataset.features).items()
        if one[1] != other[1]:
            raise ValueError(
                f"`{one[0]}` and `{other[0]}` of `{name}` have different fields or types ({one[1]} and {other[1]}), of "
                "which some would be lost; cast them to the same features."
            )


def completions_of(row: dict[str, Any]) -> list:
    """`list`: the completions of a row, in whichever of the accepted formats."""
    return list(named_completions(row).values())


def named_completions(row: dict[str, Any]) -> dict[str, Any]:
    """`dict[str, Any]`: the completions of a row by what to call them in a message."""
    if "completions" in row:
        return {f"completions[{position}]": value for position, value in enumerate(row["completions"] or [])}
    names = ("chosen", "rejected") if "chosen" in row else ("completion_a", "completion_b")
    return {name: row[name] for name in names}


def completion_feature(dataset: Dataset) -> Any:
    """The feature type of one completion in a dataset of an accepted format."""
    if "completions" in dataset.features:
        return dataset.features["completions"].feature
    return completions_of(dataset.features)[0]


def _draw(seed: int, row: int, digest: bytes) -> bytes:
    return hashlib.blake2b(json.dumps([seed, row]).encode() + digest, digest_size=8).digest()
