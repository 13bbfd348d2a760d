"""From scores to kept pairs: arrays in, a mask out. A selection policy is a function of [`PairScores`] like these."""

from collections.abc import Callable

import numpy as np

from ..scoring.metrics import prompt_weights
from ..scoring.pair_scores import PairScores, sigmoid


SelectionPolicy = Callable[[PairScores], np.ndarray]


def candidates(scores: PairScores) -> np.ndarray:
    """`np.ndarray` of shape `(num_pairs,)`, bool: pairs that can have a pseudo-label, which ties can't."""
    # Rewards so close that the confidence rounds to one half are a tie too: the collator trains on none of them.
    return scores.confidence > 0.5


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


def precision_threshold(
    logits: np.ndarray, prompts: np.ndarray, temperature: float, target_precision: float
) -> tuple[float | None, float]:
    """
    Lowest confidence above which pseudo-labels are right as often as wanted, estimated on held-out labels.

    The bound is that of Wilson at 95 %, one-sided ([Interval Estimation for a Binomial
    Proportion](https://doi.org/10.1214/ss/1009213286)). Each prompt counts once, however many pairs it has. Labels that are all
    right reach 0.95 from 52 prompts on, and 0.99 from 268 on.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)` of held-out labeled pairs.
        prompts (`np.ndarray` of shape `(num_pairs,)`, int64):
            Number of the prompt of each pair.
        temperature (`float`):
            Divisor of the logits.
        target_precision (`float`):
            Share of right pseudo-labels to reach, in `(0.5, 1)`.

    Returns:
        `tuple[float | None, float]`: the threshold, for [`above_threshold`], or `None` if no confidence is high enough; and the
        highest precision that these labels confirm at any threshold.
    """
    values, right, count = _prompts_above(logits, prompts, temperature)
    bounds = wilson_lower_bound(right, count)
    reaches = bounds >= target_precision
    return (float(values[reaches].min()) if reaches.any() else None), float(bounds.max())


def labels_needed(logits: np.ndarray, prompts: np.ndarray, temperature: float, target_precision: float) -> int | None:
    """
    About how many held-out labels would confirm a precision, if the shares of right ones stay as they are.

    The lower bound of Wilson reaches `p` for a share `s > p` from `q² p (1 - p) / (s - p)²` pairs on, where `q` is its quantile.

    Args:
        logits, prompts, temperature, target_precision:
            As for [`precision_threshold`].

    Returns:
        `int` or `None`: number of held-out labels, with as many for each prompt as now, for the threshold that needs the fewest;
        `None` if above no threshold the share is higher than the target.
    """
    _, right, count = _prompts_above(logits, prompts, temperature)
    excess = _share(right, count) - target_precision
    if not (excess > 0).any():
        return None
    excess, count = excess[excess > 0], count[excess > 0]
    due = _QUANTILE**2 * target_precision * (1 - target_precision) / excess**2
    return int(np.ceil(len(logits) * (due / count).min()))


def _prompts_above(
    logits: np.ndarray, prompts: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Every value of the confidence from the highest down, and how many prompts are above it: those ranked right, and all. A prompt is
    there in parts, one for each of its pairs.
    """
    confidence = sigmoid(np.abs(logits.astype(np.float64)) / temperature)
    values = np.unique(np.concatenate([[0.5], confidence]))[::-1]
    order = np.argsort(-confidence, kind="stable")
    number = np.searchsorted(-confidence[order], -values, side="left")
    parts = prompt_weights(prompts)[order]
    right, count = (np.concatenate([[0.0], np.cumsum(each)])[number] for each in (parts * (logits[order] > 0), parts))
    return values, right, count


# Of the normal distribution, for a one-sided 95 % interval.
_QUANTILE = 1.6448536269514722


def wilson_lower_bound(right: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Lower end of Wilson's one-sided 95 % interval for a share; 0 for a share of nothing."""
    share, inverse = _share(right, count), np.divide(1.0, count, out=np.zeros(len(count)), where=count > 0)
    center = share + _QUANTILE**2 / 2 * inverse
    spread = _QUANTILE * np.sqrt(share * (1 - share) * inverse + _QUANTILE**2 / 4 * inverse**2)
    return np.where(count > 0, (center - spread) / (1 + _QUANTILE**2 * inverse), 0.0)


def _share(right: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(right, count, out=np.zeros(len(count)), where=count > 0)
