"""Accuracy and calibration of pair logits on pairs with known labels."""

import numpy as np

from .pair_scores import sigmoid


NUM_ECE_BINS = 15
# Half of a 95 % interval, in standard errors.
HALF_INTERVAL = 1.96


def preference_metrics(logits: np.ndarray, temperature: float = 1.0) -> dict[str, float]:
    """
    Accuracy and calibration of pair logits on pairs whose preferred completion is known.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divisor of the logits.

    Returns:
        `dict[str, float]`:

        - `accuracy`: share of pairs with the right sign; a tie is wrong.
        - `log_loss`: mean negative log-probability of the chosen completion, in nats.
        - `brier`: mean squared distance of the probability of the chosen completion from 1.
        - `ece`: expected calibration error over 15 bins of equal width ([On Calibration of Modern Neural
          Networks](https://huggingface.co/papers/1706.04599)).
        - `ece_floor`: the `ece` to expect by chance if the confidence is right; see [`calibration_error_floor`].
        - `adaptive_ece`: calibration error over 15 bins with equal numbers of pairs ([Measuring Calibration in Deep
          Learning](https://huggingface.co/papers/1904.01685)).
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
    The metrics of [`preference_metrics`] that depend on the temperature, with the prefix `calibrated_`.

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


def prompt_weights(prompts: np.ndarray) -> np.ndarray:
    """
    Weights of pairs with which each prompt counts once, however many pairs it has, since pairs of one prompt tell much the same.

    Args:
        prompts (`np.ndarray` of shape `(num_pairs,)`, int64):
            Number of the prompt of each pair.

    Returns:
        `np.ndarray` of shape `(num_pairs,)`, float64: one, divided by the number of pairs with the same prompt. If all have one prompt,
        each pair counts.
    """
    _, groups, num_pairs = np.unique(prompts, return_inverse=True, return_counts=True)
    return np.ones(len(prompts)) if len(num_pairs) == 1 else 1 / num_pairs[groups]


def standard_error(values: np.ndarray, prompts: np.ndarray) -> float:
    """
    Standard error of a mean over pairs. Pairs of one prompt tell much the same, so other prompts are what might have been drawn.

    Args:
        values (`np.ndarray` of shape `(num_pairs,)`):
            A number for each pair.
        prompts (`np.ndarray` of shape `(num_pairs,)`, int64):
            Number of the prompt of each pair.

    Returns:
        `float`: the standard error, infinite for one value. It is at least that of independent pairs, which is what is left with one
        prompt for all: few prompts can't tell how much alike their pairs are.
    """
    if len(values) < 2:
        return float("inf")
    rest = values - values.mean()
    _, groups = np.unique(prompts, return_inverse=True)
    sums = np.bincount(groups, weights=rest)
    squares = [len(each) / (len(each) - 1) * (each**2).sum() for each in (rest, sums) if len(each) > 1]
    return float(np.sqrt(max(squares)) / len(values))


def paired_change(logits: np.ndarray, before: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """
    What has changed on the same pairs from one model to another.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)` of the later model.
        before (`np.ndarray` of shape `(num_pairs,)`):
            Those of the earlier one.
        prompts (`np.ndarray` of shape `(num_pairs,)`, int64):
            Number of the prompt of each pair.

    Returns:
        `dict[str, float]`: `accuracy_change` and `log_loss_change`, later minus earlier, and the [`standard_error`] of these
        paired differences, `accuracy_change_error` and `log_loss_change_error`.
    """
    differences = {
        "accuracy": (logits > 0).astype(np.float64) - (before > 0),
        "log_loss": np.logaddexp(0.0, -logits.astype(np.float64)) - np.logaddexp(0.0, -before.astype(np.float64)),
    }
    facts = {}
    for name, each in differences.items():
        facts[f"{name}_change"] = float(each.mean())
        facts[f"{name}_change_error"] = standard_error(each, prompts)
    return facts


def reliability_curve(logits: np.ndarray, temperature: float = 1.0) -> list[dict[str, float]]:
    """
    Accuracy by confidence, the curve of a reliability diagram.

    Args:
        logits (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divisor of the logits.

    Returns:
        `list[dict[str, float]]`: for each bin of `ece` with pairs, in ascending order: `confidence` and `accuracy`
        (means over the bin) and `count` (number of pairs).
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
    Mean distance between confidence and accuracy over 15 bins of equal width on `[0, 1]`, weighted by their size.

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
    Expected calibration error of a model whose confidence is right. It is above 0 by chance, more so with few pairs
    ([Mitigating Bias in Calibration Error Estimation](https://huggingface.co/papers/2012.08668)).

    Args:
        confidence (`np.ndarray` of shape `(num_pairs,)`):
            Probability of the predicted label.

    Returns:
        `float`: mean error over labels drawn from the confidence, with a normal approximation for the sum over a bin.
    """
    variance = np.bincount(_bin_of(confidence), weights=confidence * (1 - confidence), minlength=NUM_ECE_BINS)
    return float(np.sqrt(2 / np.pi * variance).sum() / len(confidence))


def adaptive_calibration_error(confidence: np.ndarray, is_correct: np.ndarray) -> float:
    """
    Calibration error over 15 bins with equal numbers of pairs. Pairs of equal confidence share a bin, so bins may
    differ in size.

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
    # Bins are open on the left, so that a confidence of 1 is in the last bin.
    return np.clip(np.ceil(confidence * NUM_ECE_BINS).astype(int) - 1, 0, NUM_ECE_BINS - 1)
