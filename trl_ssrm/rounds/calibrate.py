"""How far a reward model's confidence can be believed: metrics of held-out pairs, and the temperature that mends it."""

import logging

import numpy as np

from ..scoring.pair_scores import sigmoid


logger = logging.getLogger(__name__)

TEMPERATURE_RANGE = (0.1, 100.0)


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
