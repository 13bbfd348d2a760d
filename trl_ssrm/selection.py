"""From scores to kept pairs. A selection idea is a function of [`PairScores`] that returns a mask."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairScores:
    """
    What the model of a round says about the pairs of the pool.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`, float64):
            Pair logits `z`: of a scalar model the difference of the two rewards, `r(first) - r(second)`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divisor of the logits that calibrates the confidence. Positive.
        orders_agree (`np.ndarray` of shape `(num_pairs,)`, bool, *optional*):
            Whether a pairwise model prefers the same completion in both orders. `None` for a scalar model.
    """

    logits: np.ndarray
    temperature: float = 1.0
    orders_agree: np.ndarray | None = None

    @property
    def probability(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_pairs,)`, float64: probability that the first completion is preferred."""
        # From the confidence, not from the logits: so the larger of the two probabilities is the confidence to the bit.
        return np.where(self.logits < 0, 1 - self.confidence, self.confidence)

    @property
    def confidence(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_pairs,)`, float64 in `[0.5, 1]`: probability of the pseudo-label."""
        return sigmoid(np.abs(self.logits) / self.temperature)

    @property
    def is_tie(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_pairs,)`, bool: pairs with equal rewards, which have no pseudo-label."""
        return self.logits == 0


SelectionPolicy = Callable[[PairScores], np.ndarray]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logistic function in the form that overflows for no float64."""
    return np.exp(-np.logaddexp(0.0, -logits))


def above_threshold(scores: PairScores, threshold: float) -> np.ndarray:
    """
    Keep the pairs whose confidence is strictly greater than a fixed threshold, as in [Semi-Supervised Reward
    Modeling](https://huggingface.co/papers/2409.06903).

    Args:
        scores ([`PairScores`]):
            Scores of the pairs.
        threshold (`float`):
            Confidence to exceed, in `[0.5, 1)`.

    Returns:
        `np.ndarray` of shape `(num_pairs,)`, bool: the kept pairs. A tie has confidence 0.5 and is never kept.
    """
    return scores.confidence > threshold
