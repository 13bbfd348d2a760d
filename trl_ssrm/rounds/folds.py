"""Fold models: each is trained on the labels without a part, so its predictions on that part cost no label."""

import functools

import numpy as np

from .round_trainer import RoundTrainer
from .settings import fold_of_pairs


class Folds:
    """
    Splits the labeled pairs of a run into parts, by prompt, and trains one model without each of them, as round 0 does.

    Their predictions on the parts calibrate the confidence. They see labels alone: pseudo-labels of another model would
    carry labels of the part that they must not see.

    Args:
        trainer ([`~trl_ssrm.rounds.round_trainer.RoundTrainer`]):
            The trainer, whose model and run directory are used.
        num_folds (`int`):
            Number of parts, 0 for none.
    """

    def __init__(self, trainer: RoundTrainer, num_folds: int):
        self.trainer = trainer
        self.num_folds = num_folds
        self.fold_of = fold_of_pairs(trainer.data.prompts, max(1, num_folds), trainer.args.seed)

    def train(self, start: int, ignore_keys_for_eval: list[str] | None) -> None:
        """
        Train the fold models, and keep their predictions in the run directory. The model has other weights afterwards.

        Args:
            start (`int`):
                Weights to start from, `INITIAL` or `PRETRAINED`.
            ignore_keys_for_eval (`list[str]`, *optional*):
                As in [`~transformers.Trainer.train`].
        """
        trainer, run = self.trainer, self.trainer.run
        for fold in range(self.num_folds):
            if trainer.on_main_process(functools.partial(run.has_fold, fold, start)):
                continue
            weights = run.fold_weights_path(fold, start)
            if trainer.on_main_process(functools.partial(run.has_weights, weights)):
                run.read_weights(weights, trainer.unwrapped_model)
            else:
                trainer.train_dataset = trainer.data.labeled.select(np.flatnonzero(self.fold_of != fold))
                run.read_weights(run.weights_path(start), trainer.unwrapped_model)
                with trainer.in_silence():
                    trainer.train_once(None, ignore_keys_for_eval)
                trainer.write_weights(weights)
            left_out = np.flatnonzero(self.fold_of == fold)
            pairs = trainer.data.labeled_pairs.take(left_out)
            logits = trainer.score_pairs(pairs, "train_dataset", rows=left_out).logits
            if trainer.accelerator.is_main_process:
                run.write_fold(fold, start, logits)
            trainer.accelerator.wait_for_everyone()
        trainer.train_dataset = trainer.data.labeled

    def held_out_logits(self, start: int) -> np.ndarray:
        """
        Predictions for all labeled pairs but ties, each by the model that was trained without it.

        Args:
            start (`int`):
                Weights that these models have started from, `INITIAL` or `PRETRAINED`.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`, float64: pair logits `z = r(chosen) - r(rejected)`.
        """
        logits = np.empty(len(self.fold_of))
        for fold in range(self.num_folds):
            logits[self.fold_of == fold] = self._read(fold, start)
        return logits[~self.trainer.data.is_tie]

    def _read(self, fold: int, start: int) -> np.ndarray:
        logits = self.trainer.on_main_process(lambda: self.trainer.run.read_fold(fold, start))
        if logits is None:
            raise ValueError(
                f"The predictions of fold {fold} in {self.trainer.run.root} are missing or damaged; put a copy in their "
                "place, or start the run anew in another `output_dir`."
            )
        return logits
