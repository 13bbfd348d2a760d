"""From the scores of two sequences to the probability that the first completion is preferred."""

from collections.abc import Callable

import numpy as np

from .pair_scores import sigmoid


def scalar_logits(scores: np.ndarray) -> np.ndarray:
    """
    Pair logits of a scalar reward model: the difference of two rewards, as in the Bradley-Terry model.

    Args:
        scores (`np.ndarray` of shape `(num_pairs, 2)`, float64):
            Rewards of the first and the second completion.

    Returns:
        `np.ndarray` of shape `(num_pairs,)`, float64: `z`, where `sigmoid(z)` is the probability that the first is
        preferred.
    """
    return scores[:, 0] - scores[:, 1]


def pairwise_logits(scores: np.ndarray) -> np.ndarray:
    """
    Pair logits of a pairwise preference model: its probabilities in the two orders are averaged, as in
    [Semi-Supervised Reward Modeling](https://huggingface.co/papers/2409.06903).

    Args:
        scores (`np.ndarray` of shape `(num_pairs, 2)`, float64):
            Logits that the answer shown first is preferred: with the first completion shown first, and with the second
            completion shown first.

    Returns:
        `np.ndarray` of shape `(num_pairs,)`, float64: `z`, where `sigmoid(z)` is the mean probability. Exchanging the
        completions changes only the sign of `z`.
    """
    first, second = scores[:, 0], scores[:, 1]
    # log(sigmoid(x)) is -log(1 + exp(-x)).
    log_first = np.logaddexp(-np.logaddexp(0.0, -first), -np.logaddexp(0.0, second))
    log_second = np.logaddexp(-np.logaddexp(0.0, -second), -np.logaddexp(0.0, first))
    return log_first - log_second


def orders_agree(scores: np.ndarray) -> np.ndarray:
    """`np.ndarray` of shape `(num_pairs,)`, bool: whether both orders of a comparison prefer the same completion."""
    return np.sign(scores[:, 0]) == -np.sign(scores[:, 1])


def mean_win_probability(logits: np.ndarray) -> np.ndarray:
    """
    Mean probability of each completion to be preferred to the others.

    Args:
        logits (`np.ndarray` of shape `(n, n)`, float64):
            Pair logits of every completion against every other; NaN where two were not compared. The diagonal is
            ignored.

    Returns:
        `np.ndarray` of shape `(n,)`, float64: mean over the completions that it was compared with; 0.5 if there are
        none.
    """
    is_compared = ~np.isnan(logits) & ~np.eye(len(logits), dtype=bool)
    wins = np.where(is_compared, sigmoid(np.nan_to_num(logits)), 0.0).sum(axis=1)
    return np.where(is_compared.any(axis=1), wins / np.maximum(is_compared.sum(axis=1), 1), 0.5)


LOGITS_OF: dict[str, Callable[[np.ndarray], np.ndarray]] = {"scalar": scalar_logits, "pairwise": pairwise_logits}
