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
        probability of the chosen completion from 1, `ece`, the expected calibration error over 15 bins of equal width
        ([On Calibration of Modern Neural Networks](https://huggingface.co/papers/1706.04599)), `ece_floor`, what it would
        be by chance if the confidence were right (see [`calibration_error_floor`]), and `adaptive_ece`, over 15 bins of
        as many pairs each ([Measuring Calibration in Deep Learning](https://huggingface.co/papers/1904.01685)).
    """
    scaled = logits.astype(np.float64) / temperature
    confidence, is_correct = sigmoid(np.abs(scaled)), scaled > 0
    return {
        "accuracy": float(np.mean(is_correct)),
        "log_loss": float(np.mean(np.logaddexp(0.0, -scaled))),
        "brier": float(np.mean((1 - sigmoid(scaled)) ** 2)),
        "ece": expected_calibration_error(confidence, is_correct),
        "ece_floor": calibration_error_floor(confidence),
        "adaptive_ece": adaptive_calibration_error(confidence, is_correct),
    }


def calibrated_metrics(logits: np.ndarray, temperature: float) -> dict[str, float]:
    """
    The metrics of [`preference_metrics`] that a temperature changes, under names with `calibrated_` before them.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)`.
        temperature (`float`):
            Divisor of the logits.

    Returns:
        `dict[str, float]`: `calibrated_log_loss`, `calibrated_brier`, `calibrated_ece`, `calibrated_ece_floor` and
        `calibrated_adaptive_ece`.
    """
    metrics = preference_metrics(logits, temperature)
    return {f"calibrated_{name}": value for name, value in metrics.items() if name != "accuracy"}


def reliability_curve(logits: np.ndarray, temperature: float = 1.0) -> list[dict[str, float]]:
    """
    How often the predictions are right, by how sure they are: what a reliability diagram draws.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divisor of the logits.

    Returns:
        `list[dict[str, float]]`: `confidence` and `accuracy`, the means over a bin, and `count`, its number of pairs,
        for each of the bins of `ece` that is not empty, in ascending order.
    """
    scaled = logits.astype(np.float64) / temperature
    confidence, is_correct = sigmoid(np.abs(scaled)), scaled > 0
    bins = _bin_of(confidence)
    return [
        {
            "confidence": float(confidence[bins == each].mean()),
            "accuracy": float(is_correct[bins == each].mean()),
            "count": int((bins == each).sum()),
        }
        for each in np.unique(bins)
    ]


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
    gap = np.bincount(_bin_of(confidence), weights=confidence - is_correct, minlength=NUM_ECE_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def calibration_error_floor(confidence: np.ndarray) -> float:
    """
    The expected calibration error that a model has by chance if its confidence is right: of few pairs it is well above 0
    ([Mitigating Bias in Calibration Error Estimation](https://huggingface.co/papers/2012.08668)).

    Args:
        confidence (`np.ndarray` of shape `(num_pairs,)`):
            Probability of the predicted label.

    Returns:
        `float`: the mean over labels drawn from the confidence, the sum over a bin taken as normal.
    """
    variance = np.bincount(_bin_of(confidence), weights=confidence * (1 - confidence), minlength=NUM_ECE_BINS)
    return float(np.sqrt(2 / np.pi * variance).sum() / len(confidence))


def adaptive_calibration_error(confidence: np.ndarray, is_correct: np.ndarray) -> float:
    """
    The same over bins of as many pairs each, as far as pairs with one confidence, which share a bin, allow it.

    Args:
        confidence (`np.ndarray` of shape `(num_pairs,)`):
            Probability of the predicted label.
        is_correct (`np.ndarray` of shape `(num_pairs,)`, bool):
            Whether the predicted label is the true one.

    Returns:
        `float`: the error, in `[0, 1]`.
    """
    place = np.searchsorted(np.sort(confidence), confidence)
    gap = np.bincount(place * NUM_ECE_BINS // len(confidence), weights=confidence - is_correct)
    return float(np.abs(gap).sum() / len(confidence))


def _bin_of(confidence: np.ndarray) -> np.ndarray:
    # Bins are open on the left, so that a confidence of 1 falls into the last one.
    return np.clip(np.ceil(confidence * NUM_ECE_BINS).astype(int) - 1, 0, NUM_ECE_BINS - 1)


def fit_temperature(logits: np.ndarray) -> float:
    """
    Temperature with the lowest log-loss on pairs whose preferred completion is known.

    The log-loss is convex in `1 / temperature`, so the zero of its slope is found by bisection. A temperature below 1 makes
    the model surer than it was trained to be, and a few lucky pairs ask for that too: of those whose log-loss is within
    one standard error of the lowest, the highest is taken then, 1 at most (the one-standard-error rule of Breiman et al.,
    Classification and Regression Trees, 1984).

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
            temperature = _least_sharpening(logits, 1 / inverse_temperature)
            logger.warning(
                f"No temperature within {list(TEMPERATURE_RANGE)} is best for the {len(logits)} calibration pairs; "
                f"{temperature:g} is used. Give `calibration_dataset` more pairs."
            )
            return temperature
    for _ in range(60):
        middle = (lowest * highest) ** 0.5
        lowest, highest = (middle, highest) if slope(middle) < 0 else (lowest, middle)
    return _least_sharpening(logits, 1 / middle)


def _least_sharpening(logits: np.ndarray, best: float) -> float:
    """
    The highest temperature from the best one to 1 whose log-loss is within one standard error of that of the best; the
    best one itself, if it is not below 1.
    """
    if best >= 1:
        return best
    lowest_losses = np.logaddexp(0.0, -logits / best)
    for temperature in np.geomspace(1.0, best, num=50):
        excess = np.logaddexp(0.0, -logits / temperature) - lowest_losses
        if excess.mean() <= excess.std(ddof=1) / np.sqrt(len(logits)):
            return float(temperature)
    return best
