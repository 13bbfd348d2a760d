"""How far a reward model's confidence can be believed: metrics of held-out pairs, and the temperature that mends it."""

import logging

import numpy as np

from .selection import sigmoid


logger = logging.getLogger(__name__)

TEMPERATURE_RANGE = (0.1, 100.0)
NUM_ECE_BINS = 15


def preference_metrics(logits: np.ndarray, temperature: float = 1.0) -> dict[str, float]:
    """
    Accuracy and calibration of pair logits on pairs whose preferred completion is known.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divisor of the logits.

    Returns:
        `dict[str, float]`: `accuracy` (a tie is wrong), `log_loss` in nats, `brier`, the mean squared distance of the
        probability of the chosen completion from 1, and `ece`, the expected calibration error over 15 bins of equal
        width ([On Calibration of Modern Neural Networks](https://huggingface.co/papers/1706.04599)).
    """
    scaled = logits.astype(np.float64) / temperature
    return {
        "accuracy": float(np.mean(scaled > 0)),
        "log_loss": float(np.mean(np.logaddexp(0.0, -scaled))),
        "brier": float(np.mean((1 - sigmoid(scaled)) ** 2)),
        "ece": expected_calibration_error(sigmoid(np.abs(scaled)), scaled > 0),
    }


def expected_calibration_error(confidence: np.ndarray, is_correct: np.ndarray) -> float:
    """
    Mean distance of confidence from accuracy over bins of equal width on `[0, 1]`, weighted by their size.

    Args:
        confidence (`np.ndarray` of shape `(num_pairs,)`):
            Probability of the predicted label.
        is_correct (`np.ndarray` of shape `(num_pairs,)`, bool):
            Whether the predicted label is the true one.

    Returns:
        `float`: the error, in `[0, 1]`.
    """
    # Bins are open on the left, so that a confidence of 1 falls into the last one.
    bins = np.clip(np.ceil(confidence * NUM_ECE_BINS).astype(int) - 1, 0, NUM_ECE_BINS - 1)
    gap = np.bincount(bins, weights=confidence - is_correct, minlength=NUM_ECE_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def fit_temperature(logits: np.ndarray) -> float:
    """
    Temperature with the lowest log-loss on pairs whose preferred completion is known.

    The log-loss is convex in `1 / temperature`, so the zero of its slope is found by bisection.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)`.

    Returns:
        `float`: the temperature, kept within `[0.1, 100]`; a warning tells where an end of it is reached. Pairs that
        are all ranked right call for no uncertainty at all, however few they are: then the temperature is left at 1,
        with a warning.
    """
    logits = logits.astype(np.float64)
    if np.all(logits > 0):
        logger.warning(
            f"All {len(logits)} calibration pairs are ranked right, so they fit no temperature and 1 is used. Give "
            "`calibration_dataset` more or harder pairs."
        )
        return 1.0
    lowest, highest = (1 / temperature for temperature in reversed(TEMPERATURE_RANGE))

    def slope(inverse_temperature: float) -> float:
        return float(np.mean(-logits * sigmoid(-inverse_temperature * logits)))

    for inverse_temperature, wrong_side in ((lowest, slope(lowest) >= 0), (highest, slope(highest) <= 0)):
        if wrong_side:
            logger.warning(
                f"No temperature within {list(TEMPERATURE_RANGE)} is best for the {len(logits)} calibration pairs; "
                f"{1 / inverse_temperature:g} is used. Give `calibration_dataset` more pairs."
            )
            return 1 / inverse_temperature
    for _ in range(60):
        middle = (lowest * highest) ** 0.5
        lowest, highest = (middle, highest) if slope(middle) < 0 else (lowest, middle)
    return 1 / middle
