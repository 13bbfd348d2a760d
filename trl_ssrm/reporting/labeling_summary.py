"""What one labeling of the pool looked like, small enough to keep: histograms, and a few pairs to read."""

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scoring.pair_scores import PairScores


if TYPE_CHECKING:
    from ..data.pool import Pool


NUM_EXAMPLES = 5
NUM_CONFIDENCE_BINS = 25
NUM_BINS = 31

# Of a prompt its end counts too: that is what the completions answer.
PROMPT_HEAD, PROMPT_TAIL, COMPLETION_HEAD = 400, 600, 1000


def summarize_labeling(
    pool: "Pool",
    scores: PairScores,
    mask: np.ndarray,
    threshold: float | None = None,
    length_difference: np.ndarray | None = None,
) -> dict[str, Any]:
    """
    What a report tells of one labeling of the pool.

    Args:
        pool ([`Pool`]):
            The pairs that were labeled. Where it tracks gold labels, they are compared with the pseudo-labels here.
        scores ([`PairScores`]):
            Scores of the pairs.
        mask (`np.ndarray` of shape `(num_pairs,)`, bool):
            The pairs that are kept.
        threshold (`float`, *optional*):
            Confidence that a kept pair exceeds. `None` if something else selected them.
        length_difference (`np.ndarray` of shape `(num_pairs,)`, int64, *optional*):
            Tokens that the preferred completion has more than the other. `None` if that can't be told.

    Returns:
        `dict[str, Any]`: JSON values. `threshold` and `temperature`; `histograms` of `confidence`, `margin` (the size of
        the pair logit) and `length`, each with `edges` and the counts of the `pool`, of the `kept` pairs and, where gold
        is tracked, of the kept pairs that are `wrong`; values beyond the outer edges are counted in the outer bins.
        `examples`: up to 5 pairs each, the most sure ones of `most_confident` (kept), of `mistakes` (only where gold is
        tracked) and of `below_threshold`, the least sure ones of `above_threshold` (kept).
    """
    confidence, margin, first_is_chosen = scores.confidence, np.abs(scores.logits), scores.logits > 0
    is_wrong = None if pool.gold is None else (first_is_chosen != pool.gold) & ~scores.is_tie
    top = max(float(np.quantile(margin, 0.995)), 1e-6)
    edges: dict[str, np.ndarray] = {
        "confidence": np.linspace(0.5, 1, NUM_CONFIDENCE_BINS + 1),
        "margin": np.linspace(0, top, NUM_BINS + 1),
    }
    values = {"confidence": confidence, "margin": margin}
    if length_difference is not None:
        # Whole tokens: bins of a whole, odd width have the same number of them each, and none of them at a border.
        half = float(np.quantile(np.abs(length_difference), 0.995))
        width = 2 * max(0, math.ceil(half / NUM_BINS - 0.5)) + 1
        edges["length"] = (np.arange(NUM_BINS + 1) - NUM_BINS / 2) * width
        values["length"] = length_difference
    groups = {"pool": np.ones_like(mask), "kept": mask}
    if is_wrong is not None:
        groups["wrong"] = mask & is_wrong
    histograms = {
        name: {
            "edges": edges[name].tolist(),
            **{group: _counts(values[name][members], edges[name]) for group, members in groups.items()},
        }
        for name in values
    }
    # By the margin: the confidence of many pairs may be 1.
    order = np.argsort(-margin, kind="stable")
    is_below = ~mask if threshold is None else ~mask & (confidence <= threshold)
    chosen = {
        "most_confident": order[mask[order]][:NUM_EXAMPLES],
        "above_threshold": order[mask[order]][::-1][:NUM_EXAMPLES],
        "below_threshold": order[is_below[order]][:NUM_EXAMPLES],
    }
    if is_wrong is not None:
        chosen["mistakes"] = order[is_wrong[order]][:NUM_EXAMPLES]

    def example(pair: int) -> dict[str, Any]:
        texts = pool.texts(pair, bool(first_is_chosen[pair]))
        shown = {
            "prompt": shorten(as_text(texts.get("prompt", "")), PROMPT_HEAD, PROMPT_TAIL),
            "chosen": shorten(as_text(texts["chosen"]), COMPLETION_HEAD),
            "rejected": shorten(as_text(texts["rejected"]), COMPLETION_HEAD),
            "row": int(pool.rows[pair]),
            "confidence": float(confidence[pair]),
            "margin": float(margin[pair]),
            "is_kept": bool(mask[pair]),
        }
        return shown if is_wrong is None else {**shown, "is_wrong": bool(is_wrong[pair])}

    return {
        "threshold": threshold,
        "temperature": scores.temperature,
        "histograms": histograms,
        "examples": {name: [example(int(pair)) for pair in pairs] for name, pairs in chosen.items()},
    }


def _counts(values: np.ndarray, edges: np.ndarray) -> list[int]:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()


def as_text(value: Any) -> str:
    """`str`: a text, or messages as a person reads them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False, default=str)
    if len(value) == 1 and value[0].get("role") == "assistant":
        return _in_message(value[0])
    return "\n".join(f"{message.get('role')}: {_in_message(message)}" for message in value)


def _in_message(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    parts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)]
    if message.get("tool_calls"):
        parts.append(json.dumps(message["tool_calls"], ensure_ascii=False, default=str))
    return "\n".join(part for part in parts if part)


def shorten(text: str, head: int, tail: int = 0) -> str:
    """
    Leave out the middle of a text, or its end, and say so.

    Args:
        text (`str`):
            Text of any length.
        head (`int`):
            Characters to keep at its beginning.
        tail (`int`, *optional*, defaults to `0`):
            Characters to keep at its end.

    Returns:
        `str`: the text, with a mark in the place of what was left out.
    """
    left_out = len(text) - head - tail
    if left_out <= 0:
        return text
    return f"{text[:head]} [… {left_out:,} characters left out …] {text[len(text) - tail :]}".rstrip()
