"""What a model says of pairs."""

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
        models_agree (`np.ndarray` of shape `(num_pairs,)`, bool, *optional*):
            Whether everyone who was asked prefers the same completion. `None` if one model was asked.
    """

    logits: np.ndarray
    temperature: float = 1.0
    orders_agree: np.ndarray | None = None
    models_agree: np.ndarray | None = None

    def take(self, pairs: np.ndarray) -> "PairScores":
        """
        Those of some of the pairs.

        Args:
            pairs (`np.ndarray` of shape `(n,)`, int64, or `(num_pairs,)`, bool):
                Their positions, or a mask.

        Returns:
            [`PairScores`]
        """
        orders, models = self.orders_agree, self.models_agree
        return PairScores(
            self.logits[pairs],
            self.temperature,
            None if orders is None else orders[pairs],
            None if models is None else models[pairs],
        )

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


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logistic function in the form that overflows for no float64."""
    return np.exp(-np.logaddexp(0.0, -logits))
