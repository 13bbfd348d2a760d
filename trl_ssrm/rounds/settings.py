"""Settings of a run, resolved once."""

import os
import tempfile
from dataclasses import fields
from typing import Any

import numpy as np
from datasets import Dataset
from trl import RewardConfig

from ..config import SSRMConfig
from ..data.collator import ConfidenceFilteredDataCollator
from ..models.tokenizers import _model_id
from .run_data import RunData
from .select import wilson_lower_bound


def check_arguments(
    args: SSRMConfig,
    data_collator: Any,
    train_dataset: Any,
    optimizers: tuple[Any, Any],
    has_held_out: bool,
    has_calibration: bool,
) -> None:
    """Refuse arguments of the trainer that can't go with a pool, and an output directory that can't be written."""
    if not isinstance(train_dataset, Dataset):
        raise TypeError(
            f"`train_dataset` must be a `Dataset` beside `unlabeled_dataset`, got `{type(train_dataset).__name__}`; it "
            "is the small one."
        )
    if data_collator is not None and not isinstance(data_collator, ConfidenceFilteredDataCollator):
        raise TypeError(
            f"`data_collator` must be a `ConfidenceFilteredDataCollator`, got `{type(data_collator).__name__}`; leave "
            "it out for the default one."
        )
    if optimizers != (None, None):
        raise ValueError(
            "`optimizers` can't be started afresh each round; use `optimizer_cls_and_kwargs`, or `optim` in the config."
        )
    for name in ("keep_best_round", "round_patience"):
        if getattr(args, name) and not has_held_out and args.num_folds == 0:
            raise ValueError(
                f"`{name}` needs `calibration_dataset`, `num_folds` or `eval_dataset` to compare the rounds by."
            )
    if args.target_precision is not None and not has_calibration and args.num_folds == 0:
        raise ValueError("`target_precision` needs `calibration_dataset` or `num_folds` to find the threshold by.")
    try:
        os.makedirs(str(args.output_dir), exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` can't be written: {error}. Choose another one.") from error


def check_held_out(args: SSRMConfig, data: "RunData", num_folds: int) -> None:
    """Refuse what the held-out pairs can't answer, now that they are known."""
    if (args.keep_best_round or args.round_patience) and not (data.held_out or num_folds):
        raise ValueError(
            "`keep_best_round` and `round_patience` compare rounds on pairs that are there as a whole, but `eval_dataset` "
            "is a stream; give `calibration_dataset`, or set `num_folds`."
        )
    if args.target_precision is not None:
        if "calibration" not in data.held_out and not num_folds:
            raise ValueError(
                "`target_precision` needs `calibration_dataset`, since `num_folds` is 0 here; see there for the reasons."
            )
        best = highest_precision(data, num_folds)
        if best < args.target_precision:
            raise ValueError(
                f"`target_precision` is {args.target_precision}, but the held-out labels can vouch for {best:.3f} at "
                "most, were they all predicted right; lower it, or give more labels."
            )


def highest_precision(data: "RunData", num_folds: int) -> float:
    """`float`: precision that the held-out labels could vouch for if all were predicted right; 0 without any."""
    if "calibration" in data.held_out:
        num_pairs = len(data.held_out["calibration"].first)
    else:
        num_pairs = len(data.labeled) if num_folds else 0
    return float(wilson_lower_bound(np.array([num_pairs]), np.array([num_pairs]))[0])


def complete_args(args: RewardConfig | None, model: Any) -> SSRMConfig:
    """A configuration with the default rounds where none, or one of [`~trl.RewardTrainer`], was given."""
    if isinstance(args, SSRMConfig):
        return args
    if args is None:
        return SSRMConfig(f"{_model_id(model).split('/')[-1]}-SSRM")
    return SSRMConfig(**{each.name: getattr(args, each.name) for each in fields(args) if each.init})
