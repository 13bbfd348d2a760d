"""The temperature that calibrates a model on held-out pairs, and what a round is measured by."""

import logging
from typing import Any

import numpy as np

from ..data.formats import argument_name
from ..scoring.metrics import (
    HALF_INTERVAL,
    calibrated_metrics,
    paired_change,
    preference_metrics,
    prompt_weights,
    reliability_curve,
)
from .select import labels_needed, precision_threshold
from .settings import RoundSettings


logger = logging.getLogger(__name__)

TEMPERATURES = np.geomspace(0.1, 100.0, 692)
# Of the logarithm of the temperature. Of 0.25 to 3, the two lowest came closest to the best temperature on dev pairs of quality.py.
PRIOR_WIDTH = 0.35
# Nats of log-loss for each label, by which a model has to be better than 0.5 for every pair. In quality.py, labels that taught .002 cost
# 7 points.
LEAST_GAIN = 0.01


def measure(
    logits_of: dict[str, np.ndarray],
    prompts: np.ndarray | None,
    settings: RoundSettings,
    round_history: list[dict[str, Any]],
) -> dict[str, Any]:
    """
    Facts about the model of a round from its predictions on held-out pairs.

    Args:
        logits_of (`dict[str, np.ndarray]` of shape `(num_pairs,)` each):
            Pair logits `z = r(chosen) - r(rejected)` of each held-out dataset by its name.
        prompts (`np.ndarray` of shape `(num_pairs,)`, int64, *optional*):
            Number of the prompt of each pair that fits the temperature; `None` if there are none.
        settings ([`~trl_ssrm.rounds.settings.RoundSettings`]):
            Settings of the run.
        round_history (`list[dict[str, Any]]`):
            Facts of the rounds before.

    Returns:
        `dict[str, Any]`: the `temperature`, fitted where there are held-out predictions of this model (see
        [`_temperature`]), `has_learned` where it is fitted, the `precision_threshold` for a target precision (1, which
        nothing exceeds, if it can't be reached), and the metrics of [`preference_metrics`] and [`calibrated_metrics`] with the
        name of each dataset before them.
    """
    own = logits_of.get(settings.calibrated_by or "")
    facts: dict[str, Any] = {"temperature": _temperature(own, prompts, settings, round_history)}
    if own is not None:
        facts["has_learned"] = has_learned(own)
    for name, logits in logits_of.items():
        metrics = preference_metrics(logits)
        if own is not None or facts["temperature"] != 1:
            metrics |= calibrated_metrics(logits, facts["temperature"])
        facts |= {f"{name}_{metric}": value for metric, value in metrics.items()} | {f"{name}_pairs": len(logits)}
    if settings.target_precision is not None:
        if own is not None and prompts is not None:
            wanted = own, prompts, facts["temperature"], settings.target_precision
            threshold, highest = precision_threshold(*wanted)
            facts["precision_threshold"] = 1.0 if threshold is None else threshold
            if threshold is None and (needed := labels_needed(*wanted)) is not None:
                facts["labels_needed"] = needed
            facts |= {"highest_precision": highest, "target_precision": settings.target_precision}
        else:
            names = ("precision_threshold", "highest_precision", "target_precision")
            facts |= {name: round_history[0][name] for name in names}
    return facts


def changes(
    logits_of: dict[str, np.ndarray],
    before: dict[str, np.ndarray],
    prompts_of: dict[str, np.ndarray],
    temperatures: tuple[float, float],
    round: int,
) -> dict[str, Any]:
    """
    What has changed on the held-out pairs since round 0. A warning is logged if a round is worse.

    Args:
        logits_of, before (`dict[str, np.ndarray]` of shape `(num_pairs,)` each):
            Pair logits `z = r(chosen) - r(rejected)` of each held-out dataset by its name, now and after round 0.
        prompts_of (`dict[str, np.ndarray]` of shape `(num_pairs,)` each, int64):
            Number of the prompt of each of these pairs.
        temperatures (`tuple[float, float]`):
            Temperature of the model, now and after round 0. Each log-loss is that with or without it, whichever is lower, so that no
            temperature that fits these pairs badly makes a round look better or worse than its model is.
        round (`int`):
            The round that has ended.

    Returns:
        `dict[str, Any]`: the facts of [`paired_change`] with the name of each dataset before them.
    """
    facts: dict[str, Any] = {}
    for name, logits in logits_of.items():
        if name not in before:
            continue
        now, first = (
            min((z, z / temperature), key=lambda each: np.logaddexp(0.0, -each).mean())
            for z, temperature in zip((logits, before[name]), temperatures, strict=True)
        )
        change = paired_change(now, first, prompts_of[name])
        facts |= {f"{name}_{fact}": value for fact, value in change.items()}
        for metric, sign, words in (("accuracy", 1, "accuracy"), ("log_loss", -1, "log-loss")):
            half = HALF_INTERVAL * change[f"{metric}_change_error"]
            if sign * change[f"{metric}_change"] < -half:
                logger.warning(
                    f"Round {round} is worse than round 0 on `{argument_name(name)}`: {words} {change[f'{metric}_change']:+.3f} ± {half:.3f}. "
                    "To end with the better round, pass `calibration_dataset`; to end with round 0, set `num_rounds=0`."
                )
    return facts


def _temperature(
    logits: np.ndarray | None, prompts: np.ndarray | None, settings: RoundSettings, round_history: list[dict[str, Any]]
) -> float:
    """
    Temperature of a round. Fold models are there for round 0 alone. A model that later rounds train on soft labels learns
    calibrated probabilities, so its temperature is 1; with hard labels, the temperature of round 0 is the best guess.
    """
    if logits is not None and prompts is not None:
        return fit_temperature(logits, prompts)
    return 1.0 if settings.calibrated_by is None or settings.has_soft_labels else round_history[0]["temperature"]


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


def has_learned(logits: np.ndarray) -> bool:
    """
    Whether predictions of pairs that a model has not seen are better than 0.5 for every pair.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)`.

    Returns:
        `bool`: whether their log-loss, at its best temperature, is lower than that of 0.5 by [`LEAST_GAIN`].
    """
    return bool(np.logaddexp(0.0, -at_best_temperature(logits)).mean() <= np.log(2) - LEAST_GAIN)


def at_best_temperature(logits: np.ndarray) -> np.ndarray:
    """`np.ndarray` of shape `(num_pairs,)`: pair logits, divided by the temperature with the lowest log-loss."""
    return min((logits / temperature for temperature in TEMPERATURES), key=lambda z: np.logaddexp(0.0, -z).mean())


def fit_temperature(logits: np.ndarray, prompts: np.ndarray) -> float:
    """
    Temperature that fits pairs whose preferred completion is known.

    It is the most likely one if the logarithm of the temperature has a normal distribution around 0 before these pairs are
    seen (standard deviation `PRIOR_WIDTH`), and each prompt counts once, however many pairs it has, since pairs of one prompt
    tell much the same. So a few lucky or unlucky pairs move it by little, and hundreds of prompts decide alone.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)`.
        prompts (`np.ndarray` of shape `(num_pairs,)`, int64):
            Number of the prompt of each pair, from 0 on.

    Returns:
        `float`: the temperature, within `[0.1, 100]` and on a grid with steps of one percent.
    """
    logits = logits.astype(np.float64)
    weights = prompt_weights(prompts)
    penalty = np.log(TEMPERATURES) ** 2 / (2 * PRIOR_WIDTH**2)
    losses = [weights @ np.logaddexp(0.0, -logits / temperature) for temperature in TEMPERATURES]
    return float(TEMPERATURES[np.argmin(losses + penalty)])
