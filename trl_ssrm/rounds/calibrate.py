"""The temperature that calibrates a model on held-out pairs, and what a round is measured by."""

import logging
import math
from typing import Any

import numpy as np

from ..scoring.metrics import calibrated_metrics, paired_change, preference_metrics, reliability_curve
from .select import precision_threshold
from .settings import RoundSettings


logger = logging.getLogger(__name__)

TEMPERATURE_RANGE = (0.1, 100.0)
NUM_TEMPERATURES = 100
PRIOR_DEVIATION = 0.5


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
            threshold, highest = precision_threshold(
                logits_of[calibrated_by], facts["temperature"], settings.target_precision
            )
            facts["precision_threshold"] = 1.0 if threshold is None else threshold
            facts |= {"highest_precision": highest, "target_precision": settings.target_precision}
        else:
            names = ("precision_threshold", "highest_precision", "target_precision")
            facts |= {name: round_history[0][name] for name in names}
    return facts


def changes(logits_of: dict[str, np.ndarray], before: dict[str, np.ndarray], round: int) -> dict[str, Any]:
    """
    What has changed on the held-out pairs since round 0, the labels alone. A warning is logged if a round is worse.

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
                    f"Round {round} is worse than the labels alone on `{name}_dataset`: {words} {change[f'{metric}_change']:+.3f}, "
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
    Temperature for pairs whose preferred completion is known: the most probable one, if its logarithm is normal around 0 with
    the standard deviation `PRIOR_DEVIATION` before the pairs are seen. A few lucky pairs so move it little, and many decide it.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)`.

    Returns:
        `float`: the temperature, within `[0.1, 100]`.
    """
    logits = logits.astype(np.float64)

    def loss(logarithm: float) -> float:
        surprise = np.logaddexp(0.0, -logits / math.exp(logarithm)).sum()
        return float(surprise + (logarithm / PRIOR_DEVIATION) ** 2 / 2)

    lowest, highest = map(math.log, TEMPERATURE_RANGE)
    grid = np.linspace(lowest, highest, num=NUM_TEMPERATURES)
    step = grid[1] - grid[0]
    best = grid[int(np.argmin([loss(logarithm) for logarithm in grid]))]
    low, high = max(lowest, best - step), min(highest, best + step)
    # Between two points of the grid there is one minimum, which thirds close in on.
    for _ in range(40):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if loss(first) <= loss(second) else (first, high)
    return float(np.exp((low + high) / 2))
