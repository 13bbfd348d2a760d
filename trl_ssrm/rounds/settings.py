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
from ..scoring.metrics import prompt_weights
from .run_data import RunData
from .select import wilson_lower_bound


logger = logging.getLogger(__name__)

# The threshold of the paper's released code, for hard labels.
DEFAULT_CONFIDENCE_THRESHOLD = 0.8
NUM_FOLDS = 3
# Passes over the pool in a round, if nothing else is set. In five of six comparisons on dev parts of quality.py, two had a lower
# log-loss than one, by .006 in the mean of all.
MOST_EPOCHS = 2
# With more labels, fitting a linear model takes minutes, and was not tried.
MOST_LINEAR_PAIRS = 2_000


# Settings of `Trainer` without effect on reward models, here and in `RewardTrainer`, and why.
_WITHOUT_EFFECT = {
    "label_smoothing_factor": "set `pseudo_label_weight`, or `pseudo_label_type='soft'`",
    "label_names": "the columns of a preference dataset have fixed names",
    "average_tokens_across_devices": "the loss is a mean over pairs",
    "use_cache": "no text is generated",
    "do_train": "call `train`",
    "do_predict": "call `predict`",
    "resume_from_checkpoint": "pass it to `train`",
}


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
            Whether the run ends with the weights of the round with the lowest log-loss on `calibration_dataset`.
        has_soft_labels (`bool`):
            Whether kept pairs are trained on their probability.
        pretrains (`str`):
            Whether the model is pretrained on the texts of the pool: `"never"`, `"always"`, or `"if_better"`, where the
            labels decide.
        fits_linear_model (`bool`):
            Whether a linear model on the hidden states can be fitted to the labels. If so it judges pretraining; fold models do where it
            can't, at more cost.
        linear_model_labels_pool (`bool`):
            Whether it helps to label the pool for round 1, unless the labels are sure that pretraining is better.
        num_train_epochs (`float`, *optional*):
            Number of epochs of a round after round 0; `None` if `max_steps` decides.
        confidence_threshold (`float`, *optional*):
            Confidence that a pair has to exceed, if the threshold is fixed.
        target_precision (`float`, *optional*):
            Share of pseudo-labels that should be right, if held-out labels find the threshold. One of these two is set.
    """

    num_folds: int
    calibrated_by: str | None
    keeps_best_round: bool
    has_soft_labels: bool
    pretrains: str
    fits_linear_model: bool
    linear_model_labels_pool: bool
    num_train_epochs: float | None
    confidence_threshold: float | None = None
    target_precision: float | None = None


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
    calibration_dataset: Any,
    eval_dataset: Any,
    has_own_metrics: bool,
) -> None:
    """
    Refuse arguments of the trainer that don't work with a pool, and an output directory that can't be written. Name the
    settings that have no effect.
    """
    if not isinstance(train_dataset, Dataset):
        raise TypeError(
            f"`train_dataset` must be a `Dataset` beside `unlabeled_dataset`, got `{type(train_dataset).__name__}`. Only "
            "`unlabeled_dataset` can be a stream."
        )
    if calibration_dataset is not None and not isinstance(calibration_dataset, Dataset):
        raise TypeError(
            f"`calibration_dataset` must be a `Dataset`, got `{type(calibration_dataset).__name__}`; of several, choose one."
        )
    if data_collator is not None:
        _check_collator(args, data_collator)
    if optimizers != (None, None):
        raise ValueError(
            "Every round starts a new optimizer, so `optimizers` can't be used; use `optimizer_cls_and_kwargs`, or `optim` "
            "in the config."
        )
    check_inherited(args, eval_dataset, has_own_metrics)
    if args.keep_best_round and calibration_dataset is None:
        raise ValueError("`keep_best_round` compares the rounds on held-out labels; give `calibration_dataset`.")
    if args.target_precision is not None and calibration_dataset is None and args.num_folds == 0:
        raise ValueError("`target_precision` needs held-out labels; give `calibration_dataset`, or set `num_folds=3`.")
    try:
        os.makedirs(str(args.output_dir), exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` can't be written: {error}. Choose another one.") from error


def check_inherited(args: SSRMConfig, eval_dataset: Any, has_own_metrics: bool) -> None:
    """
    Refuse inherited settings that don't work with a pool, and name those without effect in one warning.

    Args:
        args ([`SSRMConfig`]):
            Configuration of the trainer.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Held-out pairs; those in a dictionary have their name in the names of their metrics.
        has_own_metrics (`bool`):
            Whether `compute_metrics` adds metrics with other names.

    Raises:
        ValueError: If `metric_for_best_model` is no metric, or if `parallelism_config` is set.
    """
    if args.parallelism_config is not None:
        raise ValueError(
            "`parallelism_config` splits a sequence or a layer over processes, which scoring does not support; use FSDP or "
            "DeepSpeed."
        )
    metric = args.metric_for_best_model
    if metric is not None and eval_dataset is not None and not has_own_metrics:
        metrics = _metrics_of_evaluation(args, eval_dataset)
        if f"eval_{metric.removeprefix('eval_')}" not in metrics:
            raise ValueError(
                f"`metric_for_best_model` is {metric!r}, which no evaluation within a round gives; choose one of "
                f"{', '.join(metrics)}. To choose among rounds, give `calibration_dataset`."
            )
    defaults = {each.name: each.default for each in fields(args)}
    if without := [name for name in _WITHOUT_EFFECT if getattr(args, name) != defaults[name]]:
        reasons = ", ".join(f"`{name}` ({_WITHOUT_EFFECT[name]})" for name in without)
        logger.warning(f"Settings without effect: {reasons}.")


def _metrics_of_evaluation(args: SSRMConfig, eval_dataset: Any) -> list[str]:
    """Names of the metrics that a model can be chosen by within a round."""
    if isinstance(eval_dataset, dict):
        # `RewardTrainer` calls the accuracy of each of them `eval_accuracy`, so that only the last one is left.
        return [f"eval_{name}_loss" for name in eval_dataset]
    if args.preference_model == "pairwise":
        return ["eval_loss", "eval_accuracy_in_one_order"]
    return [f"eval_{name}" for name in ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")]


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


def resolve_settings(args: SSRMConfig, data: RunData, labels_by_itself: bool) -> RoundSettings:
    """
    Replace every `None` among the settings of the rounds by what it means for this run.

    Args:
        args ([`SSRMConfig`]):
            Configuration of the trainer.
        data ([`RunData`]):
            Data of the run.
        labels_by_itself (`bool`):
            Whether the model of the round labels the pool, and not a teacher or a callback with a `score` of its own.

    Returns:
        [`RoundSettings`]

    Raises:
        ValueError: If the data can't meet a setting.
    """
    has_calibration = "calibration" in data.held_out
    fits_linear_model = _fits_linear_model(args, data, labels_by_itself)
    num_folds = _resolve_num_folds(args, data, labels_by_itself, has_calibration, fits_linear_model)
    _check_drop_last(args, data, num_folds)
    calibrated_by = "calibration" if has_calibration else "cross_fit" if num_folds else None
    prompts = data.held_out_prompts["calibration"] if has_calibration else data.prompts[~data.is_tie]
    _check_target_precision(args, labels_by_itself, calibrated_by, round(prompt_weights(prompts).sum()))
    if args.target_precision is not None and calibrated_by == "cross_fit" and args.num_rounds > 1:
        logger.warning(
            "Fold models find the threshold for `target_precision` after round 0 alone, and later rounds keep it, though their models "
            "may be surer. Pass `calibration_dataset`, which finds one after each round, or set `num_rounds=1`."
        )
    threshold: dict[str, Any] = {name: getattr(args, name) for name in ("confidence_threshold", "target_precision")}
    has_soft_labels = args.pseudo_label_type == "soft"
    if all(value is None for value in threshold.values()):
        # A soft label says how sure it is, so unsure pairs are kept too: they teach more than sure ones.
        threshold["confidence_threshold"] = 0.5 if has_soft_labels else DEFAULT_CONFIDENCE_THRESHOLD
    keeps_best_round = has_calibration if args.keep_best_round is None else args.keep_best_round
    num_train_epochs: float | None = args.round_num_train_epochs
    if num_train_epochs is None and args.max_steps <= 0:
        num_train_epochs = min(args.num_train_epochs, MOST_EPOCHS)
    can_judge = num_folds > 0 or fits_linear_model and _may_have_folds(args, data, labels_by_itself)
    pretrains = {
        None: "if_better" if can_judge and not args.freeze_backbone else "never",
        True: "always",
        False: "never",
    }
    return RoundSettings(
        num_folds,
        calibrated_by,
        keeps_best_round,
        has_soft_labels,
        pretrains[args.pretrain_on_pool],
        fits_linear_model,
        fits_linear_model and _linear_model_labels_pool(args, labels_by_itself, calibrated_by),
        num_train_epochs,
        **threshold,
    )


def fold_of_pairs(prompts: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """
    Divide labeled pairs into parts of about the same number of prompts.

    Args:
        prompts (`np.ndarray` of shape `(num_labeled,)`, int64):
            Number of the prompt of each pair, from 0 on.
        num_folds (`int`):
            Number of parts, at least 1.
        seed (`int`):
            Seed of the draw.

    Returns:
        `np.ndarray` of shape `(num_labeled,)`, int64: the part of each pair; pairs with the same prompt are in one.
    """
    places = np.random.default_rng(seed).permutation(int(prompts.max()) + 1)
    return places[prompts] % num_folds


def _check_target_precision(
    args: SSRMConfig, labels_by_itself: bool, calibrated_by: str | None, num_prompts: int
) -> None:
    """Refuse a precision that no held-out labels can find or confirm."""
    if args.target_precision is None:
        return
    if calibrated_by is None:
        raise ValueError(
            "`target_precision` needs `calibration_dataset`: there are no fold models here, since a teacher or a callback "
            "labels the pool, `load_best_model_at_end` is set, or the labeled pairs have one prompt only."
        )
    if not labels_by_itself:
        raise ValueError(
            "`target_precision` finds a threshold for the confidence of the trained model, but a teacher or a callback with "
            "a `score` of its own labels the pool here; set `confidence_threshold`."
        )
    # The precision that these labels could confirm if all of them were predicted right; 0 without any.
    highest = float(wilson_lower_bound(np.array([num_prompts]), np.array([num_prompts]))[0])
    if highest < args.target_precision:
        raise ValueError(
            f"`target_precision` is {args.target_precision}, but held-out labels of {num_prompts} prompts can confirm "
            f"{highest:.3f} at most, even if all are predicted right. Lower it, or give labels of more prompts."
        )


def _fits_linear_model(args: SSRMConfig, data: RunData, labels_by_itself: bool) -> bool:
    """Whether a linear model can be fitted. A pairwise model was not tried, and a frozen backbone is a linear model by itself."""
    is_possible = args.preference_model == "scalar" and not args.freeze_backbone and data.num_prompts > 1
    has_too_many = is_possible and len(data.labeled) > MOST_LINEAR_PAIRS
    if has_too_many and labels_by_itself and args.pseudo_label_type == "soft":
        logger.warning(f"No linear model is fitted, since there are more than {MOST_LINEAR_PAIRS:,} labels.")
    return is_possible and not has_too_many


def _linear_model_labels_pool(args: SSRMConfig, labels_by_itself: bool, calibrated_by: str | None) -> bool:
    """
    Whether a linear model helps to label the pool, if there can be one. Not with hard labels or a target precision, whose threshold
    is for the confidence of the trained model; and not where pretraining is asked for, since nothing judges it then.
    """
    return (
        args.pseudo_label_type == "soft"
        and labels_by_itself
        and calibrated_by is not None
        and args.target_precision is None
        and args.round_init == "base"
        and args.num_rounds > 0
        and not args.pretrain_on_pool
    )


def _check_drop_last(args: SSRMConfig, data: RunData, num_folds: int) -> None:
    """Refuse to leave out the only batch of a round, or of a fold model."""
    smallest, batch = len(data.labeled), args.train_batch_size * args.world_size
    if num_folds:
        smallest -= int(np.bincount(fold_of_pairs(data.prompts, num_folds, args.seed)).max())
    if args.dataloader_drop_last and smallest < batch:
        of = "a fold model" if num_folds else "round 0"
        raise ValueError(
            f"`dataloader_drop_last` leaves {of} nothing to train on: its {smallest} labeled pairs fill no batch of "
            f"{batch}. Set `dataloader_drop_last=False`, or lower `per_device_train_batch_size`."
        )


def _may_have_folds(args: SSRMConfig, data: RunData, labels_by_itself: bool) -> bool:
    """Whether there may be fold models."""
    return args.num_folds != 0 and labels_by_itself and not args.load_best_model_at_end and data.num_prompts > 1


def _resolve_num_folds(
    args: SSRMConfig, data: RunData, labels_by_itself: bool, has_calibration: bool, fits_linear_model: bool
) -> int:
    num_prompts = data.num_prompts
    if args.num_folds is None:
        judges_pretraining = args.pretrain_on_pool is None and not args.freeze_backbone and not fits_linear_model
        uses = [] if has_calibration else ["calibrate the confidence"]
        uses += ["decide whether the model is pretrained on the texts of the pool"] if judges_pretraining else []
        if not uses or not _may_have_folds(args, data, labels_by_itself):
            return 0
        num_folds = min(NUM_FOLDS, num_prompts)
        logger.warning(
            f"{num_folds} fold models are trained on the labels alone, each without one part of them. Their predictions on that "
            f"part {' and '.join(uses)}. `num_folds=0` leaves them out, and pretraining with them."
        )
        return num_folds
    if num_prompts < args.num_folds:
        raise ValueError(
            f"`num_folds` is {args.num_folds}, but the labeled pairs have {num_prompts} prompts; set it to {num_prompts} or "
            "less."
        )
    return args.num_folds
