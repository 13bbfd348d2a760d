"""Scores of pairs under a model: logits, confidence, and facts for choosing pairs."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairScores:
    """
    Scores that the model of a round gives to the pairs of the pool.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`, float64):
            Pair logits `z`: for a scalar model the difference of the two rewards, `r(first) - r(second)`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divisor of the logits that calibrates the confidence. Positive.
        orders_agree (`np.ndarray` of shape `(num_pairs,)`, bool, *optional*):
            Whether a pairwise model prefers the same completion in both orders. `None` for a scalar model.
        rows (`np.ndarray` of shape `(num_pairs,)`, integer, *optional*):
            Row of `unlabeled_dataset` that each pair comes from.
        lengths (`np.ndarray` of shape `(num_pairs, 2)`, integer, *optional*):
            Number of tokens of the first and of the second completion's sequence, prompt included. `None` for a
            pairwise model, whose sequences hold both completions.
    """

    logits: np.ndarray
    temperature: float = 1.0
    orders_agree: np.ndarray | None = None
    rows: np.ndarray | None = None
    lengths: np.ndarray | None = None

    @property
    def probability(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_pairs,)`, float64: probability that the first completion is preferred."""
        # Computed from the confidence, so that the larger of the two probabilities equals it to the last bit.
        return np.where(self.logits < 0, 1 - self.confidence, self.confidence)

    @property
    def confidence(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_pairs,)`, float64 in `[0.5, 1]`: probability of the pseudo-label."""
        return sigmoid(np.abs(self.logits) / self.temperature)

    @property
    def is_tie(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_pairs,)`, bool: pairs with equal rewards, which have no pseudo-label."""
        return self.logits == 0


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """`np.ndarray`: logistic function, in a form that overflows for no float64."""
    return np.exp(-np.logaddexp(0.0, -logits))
