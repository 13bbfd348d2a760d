"""A summary of one labeling of the pool, small enough to store: histograms, and a few pairs to read."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.pool import Pool
from ..scoring.pair_scores import PairScores


NUM_EXAMPLES = 5
NUM_CONFIDENCE_BINS = 25
NUM_BINS = 31

# The end of a prompt is kept too: the completions answer it.
PROMPT_HEAD, PROMPT_TAIL, COMPLETION_HEAD = 400, 600, 1000


def summarize_labeling(
    pool: Pool,
    scores: PairScores,
    mask: np.ndarray,
    threshold: float | None = None,
    length_difference: np.ndarray | None = None,
) -> dict[str, Any]:
    """
    Summarize one labeling of the pool for the report.

    Args:
        pool ([`Pool`]):
            The labeled pairs. If it has gold labels, the pseudo-labels are compared with them.
        scores ([`PairScores`]):
            Scores of the pairs.
        mask (`np.ndarray` of shape `(num_pairs,)`, bool):
            The kept pairs.
        threshold (`float`, *optional*):
            Confidence threshold: the confidence of every kept pair is above it. `None` if no threshold selected them.
        length_difference (`np.ndarray` of shape `(num_pairs,)`, int64, *optional*):
            Length of the preferred completion minus length of the other, in tokens. `None` for a pairwise model.

    Returns:
        `dict[str, Any]`: JSON values with the keys `threshold`, `temperature`, `histograms` and `examples`.

        `histograms` holds `confidence`, `margin` (the absolute pair logit) and `length`, each with its `edges` and the
        counts of the `pool`, of the `kept` pairs and, with gold labels, of the kept pairs that are `wrong`. The outer
        bins count the values beyond the outer edges too.

        `examples` holds up to 5 pairs of each kind: `most_confident` (the most confident kept pairs), `above_threshold`
        (the least confident kept pairs), `below_threshold` (the most confident pairs that the threshold left out) and,
        with gold labels, `mistakes` (the most confident wrong pairs).
    """
    first_is_chosen = scores.logits > 0
    labels = _Labels(
        confidence=scores.confidence,
        margin=np.abs(scores.logits),
        first_is_chosen=first_is_chosen,
        is_kept=mask,
        is_wrong=None if pool.gold is None else (first_is_chosen != pool.gold) & ~np.isnan(pool.gold) & ~scores.is_tie,
    )
    return {
        "threshold": threshold,
        "temperature": scores.temperature,
        "histograms": _histograms(labels, length_difference),
        "examples": {
            kind: [_example(pool, labels, int(pair)) for pair in pairs]
            for kind, pairs in _pairs_to_read(labels, threshold).items()
        },
    }


@dataclass(frozen=True)
class _Labels:
    """The pseudo-labels as arrays of shape `(num_pairs,)`: the first two float64, the others bool."""

    confidence: np.ndarray
    margin: np.ndarray
    first_is_chosen: np.ndarray
    is_kept: np.ndarray
    is_wrong: np.ndarray | None


def _histograms(labels: _Labels, length_difference: np.ndarray | None) -> dict[str, dict[str, list]]:
    values = {"confidence": labels.confidence, "margin": labels.margin}
    edges: dict[str, np.ndarray] = {
        "confidence": np.linspace(0.5, 1, NUM_CONFIDENCE_BINS + 1),
        "margin": np.linspace(0, max(float(np.quantile(labels.margin, 0.995)), 1e-6), NUM_BINS + 1),
    }
    if length_difference is not None:
        values["length"] = length_difference
        edges["length"] = _length_edges(length_difference)
    groups = {"pool": np.ones_like(labels.is_kept), "kept": labels.is_kept}
    if labels.is_wrong is not None:
        groups["wrong"] = labels.is_kept & labels.is_wrong
    return {
        name: {
            "edges": edges[name].tolist(),
            **{group: _counts(values[name][members], edges[name]) for group, members in groups.items()},
        }
        for name in values
    }


def _length_edges(length_difference: np.ndarray) -> np.ndarray:
    # Differences are whole tokens. Bins of an odd whole width around 0 hold equally many of them, none on an edge.
    half = float(np.quantile(np.abs(length_difference), 0.995))
    width = 2 * max(0, math.ceil(half / NUM_BINS - 0.5)) + 1
    return (np.arange(NUM_BINS + 1) - NUM_BINS / 2) * width


def _counts(values: np.ndarray, edges: np.ndarray) -> list[int]:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()


def _pairs_to_read(labels: _Labels, threshold: float | None) -> dict[str, np.ndarray]:
    """`dict[str, np.ndarray]`: positions in the pool of up to 5 pairs, int64, by kind of example."""
    # Sorted by the margin, because the confidence of many pairs may round to 1.
    order, is_kept = np.argsort(-labels.margin, kind="stable"), labels.is_kept
    is_below = ~is_kept if threshold is None else ~is_kept & (labels.confidence <= threshold)
    pairs = {
        "most_confident": order[is_kept[order]][:NUM_EXAMPLES],
        "above_threshold": order[is_kept[order]][::-1][:NUM_EXAMPLES],
        "below_threshold": order[is_below[order]][:NUM_EXAMPLES],
    }
    if labels.is_wrong is not None:
        pairs["mistakes"] = order[labels.is_wrong[order]][:NUM_EXAMPLES]
    return pairs


def _example(pool: Pool, labels: _Labels, pair: int) -> dict[str, Any]:
    texts = pool.texts(pair, bool(labels.first_is_chosen[pair]))
    example = {
        "prompt": shorten(as_text(texts.get("prompt", "")), PROMPT_HEAD, PROMPT_TAIL),
        "chosen": shorten(as_text(texts["chosen"]), COMPLETION_HEAD),
        "rejected": shorten(as_text(texts["rejected"]), COMPLETION_HEAD),
        "row": int(pool.rows[pair]),
        "confidence": float(labels.confidence[pair]),
        "margin": float(labels.margin[pair]),
        "is_kept": bool(labels.is_kept[pair]),
    }
    return example if labels.is_wrong is None else {**example, "is_wrong": bool(labels.is_wrong[pair])}


def as_text(value: Any) -> str:
    """`str`: a text as it is, messages as one readable text, any other value as JSON."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False, default=str)
    if len(value) == 1 and value[0].get("role") == "assistant":
        return _text_of_message(value[0])
    return "\n".join(f"{message.get('role')}: {_text_of_message(message)}" for message in value)


def _text_of_message(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    parts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)]
    if message.get("tool_calls"):
        parts.append(json.dumps(message["tool_calls"], ensure_ascii=False, default=str))
    return "\n".join(part for part in parts if part)


def shorten(text: str, head: int, tail: int = 0) -> str:
    """
    Cut a long text in the middle, or at its end, and mark the cut.

    Args:
        text (`str`):
            Text of any length.
        head (`int`):
            Number of characters to keep at the beginning.
        tail (`int`, *optional*, defaults to `0`):
            Number of characters to keep at the end.

    Returns:
        `str`: the text if it is short enough, otherwise both ends with a mark between them that counts the characters
        left out.
    """
    left_out = len(text) - head - tail
    if left_out <= 0:
        return text
    return f"{text[:head]} [… {left_out:,} characters left out …] {text[len(text) - tail :]}".rstrip()
