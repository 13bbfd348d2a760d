"""The temperature that calibrates a model on held-out pairs, and what a round is measured by."""

import logging
from typing import Any

import numpy as np

from ..scoring.metrics import calibrated_metrics, paired_change, preference_metrics, reliability_curve
from ..scoring.pair_scores import sigmoid
from .select import labels_needed, precision_threshold
from .settings import RoundSettings


logger = logging.getLogger(__name__)

TEMPERATURE_RANGE = (0.1, 100.0)


def measure(
    logits_of: dict[str, np.ndarray], settings: RoundSettings, round_history: list[dict[str, Any]]
) -> dict[str, Any]:
    """
    Facts about the model of a round from its predictions on held-out pairs.

    Args:
        logits_of (`dict[str, np.ndarray]` of shape `(num_pairs,)` each):
            Pair logits `z = r(chosen) - r(rejected)` of each held-out dataset by its name.
        settings ([`~trl_ssrm.rounds.settings.RoundSettings`]):
            Settings of the run.
        round_history (`list[dict[str, Any]]`):
            Facts of the rounds before.

    Returns:
        `dict[str, Any]`: the `temperature`, fitted where there are held-out predictions of this model (see
        [`_temperature`]), the `precision_threshold` for a target
        precision (1, which nothing exceeds, if it can't be reached), and the metrics of [`preference_metrics`] and
        [`calibrated_metrics`] with the name of each dataset before them.
    """
    calibrated_by = settings.calibrated_by
    is_fitted = calibrated_by in logits_of
    facts: dict[str, Any] = {"temperature": _temperature(logits_of, settings, round_history)}
    for name, logits in logits_of.items():
        metrics = preference_metrics(logits)
        if is_fitted or facts["temperature"] != 1:
            metrics |= calibrated_metrics(logits, facts["temperature"])
        facts |= {f"{name}_{metric}": value for metric, value in metrics.items()} | {f"{name}_pairs": len(logits)}
    if settings.target_precision is not None:
        if is_fitted:
            assert calibrated_by is not None
            own = logits_of[calibrated_by], facts["temperature"], settings.target_precision
            threshold, highest = precision_threshold(*own)
            facts["precision_threshold"] = 1.0 if threshold is None else threshold
            if threshold is None and (needed := labels_needed(*own)) is not None:
                facts["labels_needed"] = needed
            facts |= {"highest_precision": highest, "target_precision": settings.target_precision}
        else:
            names = ("precision_threshold", "highest_precision", "target_precision")
            facts |= {name: round_history[0][name] for name in names}
    return facts


def changes(logits_of: dict[str, np.ndarray], before: dict[str, np.ndarray], round: int) -> dict[str, Any]:
    """
    What has changed on the held-out pairs since round 0. A warning is logged if a round is worse.

    Args:
        logits_of, before (`dict[str, np.ndarray]` of shape `(num_pairs,)` each):
            Pair logits `z = r(chosen) - r(rejected)` of each held-out dataset by its name, now and after round 0.
        round (`int`):
            The round that has ended.

    Returns:
        `dict[str, Any]`: the facts of [`paired_change`] with the name of each dataset before them.
    """
    facts: dict[str, Any] = {}
    for name, logits in logits_of.items():
        if name not in before:
            continue
        change = paired_change(logits, before[name])
        facts |= {f"{name}_{fact}": value for fact, value in change.items()}
        for metric, sign, words in (("accuracy", 1, "accuracy"), ("log_loss", -1, "log-loss")):
            if sign * change[f"{metric}_change"] < -2 * change[f"{metric}_change_error"]:
                logger.warning(
                    f"Round {round} is worse than round 0 on `{name}_dataset`: {words} {change[f'{metric}_change']:+.3f}, "
                    f"standard error {change[f'{metric}_change_error']:.3f}. To keep the better round, pass `calibration_dataset`; "
                    "for the labels alone, set `num_rounds=0`."
                )
    return facts


def _temperature(
    logits_of: dict[str, np.ndarray], settings: RoundSettings, round_history: list[dict[str, Any]]
) -> float:
    """
    Temperature of a round. Fold models are there for round 0 alone. A model that later rounds train on soft labels learns
    calibrated probabilities, so its temperature is 1; with hard labels, the temperature of round 0 is the best guess.
    """
    if settings.calibrated_by is None:
        return 1.0
    if settings.calibrated_by in logits_of:
        return fit_temperature(logits_of[settings.calibrated_by])
    return 1.0 if settings.has_soft_labels else round_history[0]["temperature"]


def reliability(logits_of: dict[str, np.ndarray], temperature: float) -> dict[str, Any]:
    """`dict[str, Any]`: the [`reliability_curve`] `before` and `after` the temperature, by held-out dataset."""
    return {
        name: {"before": reliability_curve(logits), "after": reliability_curve(logits, temperature)}
        for name, logits in logits_of.items()
    }


def best_round(round_history: list[dict[str, Any]], settings: RoundSettings) -> int:
    """`int`: the round with the lowest log-loss at the fitted temperature on the pairs that calibrate."""
    metric = f"{settings.calibrated_by}_calibrated_log_loss"
    return min(round_history, key=lambda facts: facts[metric])["round"]


def fit_temperature(logits: np.ndarray) -> float:
    """
    Temperature with the lowest log-loss on pairs whose preferred completion is known.

    The log-loss is convex in `1 / temperature`, so bisection finds the zero of its slope. If the best temperature is below
    1, we use the largest value up to 1 whose log-loss is within one standard error of the best (the one-standard-error rule
    of Breiman et al., Classification and Regression Trees, 1984), since a few lucky pairs are enough to ask for a
    temperature below 1.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)`.

    Returns:
        `float`: the temperature, within `[0.1, 100]`. If an end of this range is reached, a warning is logged. If all pairs
        are ranked right, no temperature can be fitted: it is 1, with a warning.
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
    The highest temperature from the best one to 1 whose log-loss is within one standard error of the lowest. If the best
    one is not below 1, it is returned.
    """
    if best >= 1:
        return best
    lowest_losses = np.logaddexp(0.0, -logits / best)
    for temperature in np.geomspace(1.0, best, num=50):
        excess = np.logaddexp(0.0, -logits / temperature) - lowest_losses
        if excess.mean() <= excess.std(ddof=1) / np.sqrt(len(logits)):
            return float(temperature)
    return best
