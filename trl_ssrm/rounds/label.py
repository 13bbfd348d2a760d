"""From kept pairs to pseudo-labels, and to what a round trains on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets

from ..data.pool import Pool
from ..data.sequences import in_memory, select_rows
from ..data.ties import TIE
from ..scoring.pair_scores import PairScores


# What is stored of a pair besides its texts.
LABEL_FEATURES = Features({"confidence": Value("float64"), "pair": Value("int64"), "first_is_chosen": Value("bool")})

PseudoLabels = dict[str, np.ndarray]


def label(scores: PairScores, share: np.ndarray, kept: np.ndarray) -> PseudoLabels:
    """
    Pseudo-labels of the kept pairs: the completion with the higher reward is the preferred one.

    Args:
        scores ([`PairScores`]):
            Scores of the pairs that were labeled.
        share (`np.ndarray` of shape `(num_pairs,)`, int64):
            Positions of these pairs in the pool.
        kept (`np.ndarray` of shape `(num_pairs,)`, bool):
            The pairs to keep.

    Returns:
        `dict[str, np.ndarray]`: the columns of [`LABEL_FEATURES`], one value for each kept pair: `confidence`, `pair` (its
        position in the pool) and `first_is_chosen`.
    """
    return {
        "confidence": scores.confidence[kept],
        "pair": share[kept],
        "first_is_chosen": (scores.logits > 0)[kept],
    }


def are_the_same(before: PseudoLabels, now: PseudoLabels, are_soft: bool) -> bool:
    """`bool`: whether the same pairs are kept with the same labels, which are the probabilities if they are soft."""
    names = ("pair", "first_is_chosen", *(("confidence",) if are_soft else ()))
    return all(np.array_equal(before[name], now[name]) for name in names)


def labeling_facts(scores: PairScores, kept: np.ndarray, pool: Pool, threshold: float | None) -> dict[str, Any]:
    """
    Facts about one labeling of the pool, for logs and the report.

    Args:
        scores ([`PairScores`]):
            Scores of the pairs that were labeled.
        kept (`np.ndarray` of shape `(num_pairs,)`, bool):
            The pairs that were kept.
        pool ([`Pool`]):
            These pairs.
        threshold (`float`, *optional*):
            Confidence that the kept pairs exceed; `None` if a policy has selected them.

    Returns:
        `dict[str, Any]`: JSON values by name. Values that are not known are left out.
    """
    first_is_chosen, any_kept = scores.logits > 0, bool(kept.any())
    facts: dict[str, Any] = {
        "pool_size": len(pool),
        "kept": int(kept.sum()),
        "coverage": float(kept.mean()),
        "ties": int(scores.is_tie.sum()),
        "mean_confidence": float(scores.confidence[kept].mean()) if any_kept else None,
        "confidence_threshold": threshold,
        "temperature": scores.temperature,
    }
    if scores.lengths is not None:
        # A model that prefers long answers keeps pairs that teach it more of that.
        is_longer = length_difference(scores) > 0
        facts["chosen_longer"] = float(is_longer[kept].mean()) if any_kept else None
        facts["chosen_longer_in_pool"] = float(is_longer.mean())
    if scores.orders_agree is not None:
        facts["order_disagreement"] = float(1 - scores.orders_agree.mean())
    if pool.gold is not None and (known := kept & ~np.isnan(pool.gold)).any():
        facts["pseudo_label_accuracy"] = float((first_is_chosen == pool.gold)[known].mean())
    return {name: value for name, value in facts.items() if value is not None}


def length_difference(scores: PairScores) -> np.ndarray:
    """`np.ndarray` of shape `(num_pairs,)`, int64: tokens that the preferred sequence has more than the other."""
    assert scores.lengths is not None
    difference = scores.lengths[:, 0].astype(np.int64) - scores.lengths[:, 1]
    return np.where(scores.logits > 0, difference, -difference)


def features_to_store(pool: Pool) -> Features:
    """[`~datasets.Features`]: columns of the stored pseudo-labels, with the texts of each pair."""
    return Features({**pool.text_features, **LABEL_FEATURES, "round": Value("int64")})


def with_texts(labels: PseudoLabels, round: int, pool: Pool, kept: np.ndarray) -> Iterator[Dataset]:
    """
    Pseudo-labels with the texts of their pairs, to be stored.

    Args:
        labels (`dict[str, np.ndarray]`):
            What [`label`] gave.
        round (`int`):
            The round that trains on them.
        pool ([`Pool`]):
            The pairs that were labeled.
        kept (`np.ndarray` of shape `(num_pairs,)`, bool):
            The pairs that were kept.

    Yields:
        [`~datasets.Dataset`]: some of the rows at a time, so that a large pool does not fill the memory.
    """
    features, start = features_to_store(pool), 0
    for texts in pool.iterate_texts(np.flatnonzero(kept), labels["first_is_chosen"]):
        columns = {name: [each[name] for each in texts] for name in pool.text_features}
        columns |= {name: values[start : start + len(texts)].tolist() for name, values in labels.items()}
        yield Dataset.from_dict({**columns, "round": [round] * len(texts)}, features=features)
        start += len(texts)


def training_rows(labels: PseudoLabels, pool: Pool) -> Dataset:
    """
    Pseudo-labels as rows for [`ConfidenceFilteredDataCollator`].

    Args:
        labels (`dict[str, np.ndarray]`):
            What [`label`] gave.
        pool ([`Pool`]):
            The whole pool.

    Returns:
        [`~datasets.Dataset`]: columns `chosen_ids` and `rejected_ids`, the first and the second sequence of each pair, and
        `probability`, that the first is preferred.
    """
    pairs, confidence = labels["pair"], labels["confidence"]
    probability = np.where(labels["first_is_chosen"], confidence, 1 - confidence)
    # As Arrow, not as Python objects: a pool may be large.
    tokens = [
        select_rows(pool.pairs.sequences, positions[pairs])
        .rename_column("input_ids", name)
        .with_format("arrow")
        .flatten_indices()
        .with_format(None)
        for name, positions in (("chosen_ids", pool.pairs.first), ("rejected_ids", pool.pairs.second))
    ]
    return concatenate_datasets([*tokens, in_memory({"probability": probability})], axis=1)


def join(labeled: Dataset, pseudo_labeled: Dataset) -> Dataset:
    """
    Training data of a round: the labeled pairs, then the pseudo-labeled ones.

    Args:
        labeled ([`~datasets.Dataset`]):
            Columns `chosen_ids`, `rejected_ids` and, optionally, `margin` and `tie`.
        pseudo_labeled ([`~datasets.Dataset`]):
            What [`training_rows`] gave. Their margin is 0, and none is a tie.

    Returns:
        [`~datasets.Dataset`]: rows for [`ConfidenceFilteredDataCollator`], with a `probability` of `None` for labeled
        pairs.
    """
    own = ("chosen_ids", "rejected_ids", "margin", TIE)
    labeled = labeled.select_columns([name for name in own if name in labeled.column_names])
    features = Features({**labeled.features, "probability": Value("float64")})
    if "margin" in features:
        pseudo_labeled = pseudo_labeled.add_column("margin", np.zeros(len(pseudo_labeled)))
    if TIE in features:
        pseudo_labeled = pseudo_labeled.add_column(TIE, np.zeros(len(pseudo_labeled), dtype=bool))
    labeled = labeled.add_column("probability", [None] * len(labeled))
    parts = [part.select_columns(list(features)) for part in (labeled, pseudo_labeled)]
    return concatenate_datasets([part if part.features == features else part.cast(features) for part in parts])
