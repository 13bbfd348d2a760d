"""What the settings of a run come to: checked before any work, and resolved once, when the data is known."""

import logging
import os
import tempfile
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from datasets import Dataset
from trl import RewardConfig

from ..config import SSRMConfig
from ..data.collator import ConfidenceFilteredDataCollator
from ..models.tokenizers import model_id
from .run_data import RunData
from .select import wilson_lower_bound


logger = logging.getLogger(__name__)

# The threshold of the paper's released code.
DEFAULT_CONFIDENCE_THRESHOLD = 0.8
# Used where enough labels are held out; recipes/benchmark/quality.py compares it with the fixed threshold.
DEFAULT_TARGET_PRECISION = 0.9
NUM_FOLDS = 5


@dataclass(frozen=True)
class RoundSettings:
    """
    The settings of the rounds, with every `None` replaced by what it means for this run.

    Args:
        num_folds (`int`):
            Number of fold models, 0 for none.
        calibrated_by (`str`, *optional*):
            Held-out pairs that fit the temperature, choose the best round and find the threshold for a precision:
            `"calibration"`, `"cross_fit"` (the parts left out by the folds), or `None`.
        keeps_best_round (`bool`):
            Whether the run ends with the weights of the round with the lowest log-loss on these pairs.
        confidence_threshold (`float`, *optional*):
            Confidence that a pair has to exceed, if the threshold is fixed.
        target_precision (`float`, *optional*):
            Share of pseudo-labels that should be right, if held-out labels find the threshold.
        selected_fraction (`float`, *optional*):
            Share of the pairs to keep, if that is fixed. Exactly one of these three is set.
    """

    num_folds: int
    calibrated_by: str | None
    keeps_best_round: bool
    confidence_threshold: float | None = None
    target_precision: float | None = None
    selected_fraction: float | None = None


def complete_args(args: RewardConfig | None, model: Any) -> SSRMConfig:
    """The given configuration with the default rounds, if it has none of its own."""
    if isinstance(args, SSRMConfig):
        return args
    if args is None:
        return SSRMConfig(f"{model_id(model).split('/')[-1]}-SSRM")
    return SSRMConfig(**{each.name: getattr(args, each.name) for each in fields(args) if each.init})


def check_arguments(
    args: SSRMConfig,
    data_collator: Any,
    train_dataset: Any,
    optimizers: tuple[Any, Any],
    has_calibration: bool,
) -> None:
    """Refuse arguments of the trainer that don't work with a pool, and an output directory that can't be written."""
    if not isinstance(train_dataset, Dataset):
        raise TypeError(
            f"`train_dataset` must be a `Dataset` beside `unlabeled_dataset`, got `{type(train_dataset).__name__}`. Only "
            "`unlabeled_dataset` can be a stream."
        )
    if data_collator is not None:
        _check_collator(args, data_collator)
    if optimizers != (None, None):
        raise ValueError(
            "Every round starts a new optimizer, so `optimizers` can't be used; use `optimizer_cls_and_kwargs`, or `optim` "
            "in the config."
        )
    for name in ("keep_best_round", "target_precision"):
        if getattr(args, name) and not has_calibration and args.num_folds == 0:
            raise ValueError(f"`{name}` needs held-out labels; give `calibration_dataset`, or set `num_folds=5`.")
    try:
        os.makedirs(str(args.output_dir), exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` can't be written: {error}. Choose another one.") from error


def _check_collator(args: SSRMConfig, data_collator: Any) -> None:
    """Refuse a collator that would leave out pairs which the selection has kept."""
    if not isinstance(data_collator, ConfidenceFilteredDataCollator):
        raise TypeError(
            f"`data_collator` must be a `ConfidenceFilteredDataCollator`, got `{type(data_collator).__name__}`; leave "
            "it out for the default one."
        )
    lowest = 0.5 if args.confidence_threshold is None else args.confidence_threshold
    if data_collator.confidence_threshold > lowest:
        raise ValueError(
            f"`data_collator` leaves out pairs with a confidence up to {data_collator.confidence_threshold}, but the "
            f"settings may keep pairs from {lowest} on; give it `confidence_threshold=0.5`, and set the threshold in the "
            "config."
        )


def resolve_settings(
    args: SSRMConfig, data: RunData, labels_by_itself: bool, has_own_policy: bool, has_own_score: bool
) -> RoundSettings:
    """
    Replace every `None` among the settings of the rounds by what it means for this run.

    Args:
        args ([`SSRMConfig`]):
            Configuration of the trainer.
        data ([`RunData`]):
            Data of the run.
        labels_by_itself (`bool`):
            Whether the model of the round labels the pool, and not a teacher or a callback with a `score` of its own.
        has_own_policy (`bool`):
            Whether a policy selects the pairs, and not a threshold.
        has_own_score (`bool`):
            Whether a callback scores the pool with a `score` of its own.

    Returns:
        [`RoundSettings`]

    Raises:
        ValueError: If the data can't meet a setting.
    """
    if has_own_score and args.num_folds:
        raise ValueError(
            "`num_folds` makes fold models that label the pool, but a callback with a `score` of its own labels it here; "
            "set `num_folds=0`."
        )
    num_calibration = len(data.held_out["calibration"].first) if "calibration" in data.held_out else 0
    num_folds = _resolve_num_folds(args, data, labels_by_itself, num_calibration > 0)
    num_held_out = num_calibration or (len(data.labeled) if num_folds else 0)
    calibrated_by = "calibration" if num_calibration else "cross_fit" if num_folds else None
    for name in ("keep_best_round", "target_precision"):
        if getattr(args, name) and calibrated_by is None:
            raise ValueError(
                f"`{name}` needs `calibration_dataset`: there are no fold models here, since a teacher or a callback labels "
                "the pool, `load_best_model_at_end` is set, or the labeled pairs have one prompt only."
            )
    if args.target_precision is not None and not labels_by_itself:
        raise ValueError(
            "`target_precision` finds a threshold for the confidence of the trained model, but a teacher or a callback with "
            "a `score` of its own labels the pool here; set `confidence_threshold` or `selected_fraction`."
        )
    # The precision that these labels could confirm if all of them were predicted right; 0 without any.
    highest = float(wilson_lower_bound(np.array([num_held_out]), np.array([num_held_out]))[0])
    if args.target_precision is not None and highest < args.target_precision:
        raise ValueError(
            f"`target_precision` is {args.target_precision}, but {num_held_out} held-out labels can confirm {highest:.3f} "
            "at most, even if all are predicted right. Lower it, or give more labels."
        )
    threshold: dict[str, Any] = {
        name: getattr(args, name) for name in ("confidence_threshold", "target_precision", "selected_fraction")
    }
    if all(value is None for value in threshold.values()):
        is_possible = labels_by_itself and not has_own_policy and highest >= DEFAULT_TARGET_PRECISION
        name = "target_precision" if is_possible else "confidence_threshold"
        threshold[name] = DEFAULT_TARGET_PRECISION if is_possible else DEFAULT_CONFIDENCE_THRESHOLD
    keeps_best_round = calibrated_by is not None if args.keep_best_round is None else args.keep_best_round
    return RoundSettings(num_folds, calibrated_by, keeps_best_round, **threshold)


def _resolve_num_folds(args: SSRMConfig, data: RunData, labels_by_itself: bool, has_calibration: bool) -> int:
    num_prompts = data.num_prompts
    if args.num_folds is None:
        is_possible = labels_by_itself and not args.load_best_model_at_end and num_prompts > 1
        is_needed = not has_calibration and args.num_rounds > 0
        if not (is_possible and is_needed):
            return 0
        num_folds = min(NUM_FOLDS, num_prompts)
        logger.warning(
            f"No `calibration_dataset` is given, so {num_folds} more models are trained, each without one part of the labels. "
            "Their predictions on that part calibrate the confidence and choose the threshold and the round. The run takes "
            f"{num_folds + 1} times as long; set `num_folds=0` to go without."
        )
        return num_folds
    if num_prompts < args.num_folds:
        raise ValueError(
            f"`num_folds` is {args.num_folds}, but the labeled pairs have {num_prompts} prompts; set it to {num_prompts} or "
            "less."
        )
    return args.num_folds
