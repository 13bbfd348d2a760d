"""Fold models: each lacks a part of the labeled pairs, so its predictions on that part cost no label."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from datasets import Dataset
from transformers import DefaultFlowCallback, ProgressCallback

from ..scoring.pair_scores import PairScores
from ..scoring.preference import mean_logits
from .callback import PseudoLabelingCallback
from .label import join, label
from .round_trainer import RoundTrainer
from .settings import fold_of_pairs


# What a fold model does not do in training: these are the round's.
_SILENT = {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no"}


class Folds:
    """
    Splits the labeled pairs of a run into parts, by prompt, and does the rounds once more without each of them.

    Each fold model trains on pseudo-labels of its own: those of another model would carry labels of the part that it must
    not see.

    Args:
        trainer ([`~trl_ssrm.rounds.round_trainer.RoundTrainer`]):
            The trainer, whose model and run directory are used.
        num_folds (`int`):
            Number of parts, 0 for none.
        callback ([`PseudoLabelingCallback`]):
            Selects the pairs that a fold model keeps.
    """

    def __init__(self, trainer: RoundTrainer, num_folds: int, callback: PseudoLabelingCallback):
        self.trainer = trainer
        self.num_folds = num_folds
        self.callback = callback
        self.fold_of = fold_of_pairs(trainer.data.prompts, max(1, num_folds), trainer.args.seed)

    def train(self, round: int, ignore_keys_for_eval: list[str] | None) -> None:
        """
        Train the fold models of a round, keep their predictions in the run directory, and load the weights of the round
        before into the model.

        Args:
            round (`int`):
                The round, whose data is the trainer's `train_dataset`, the labeled pairs first.
            ignore_keys_for_eval (`list[str]`, *optional*):
                As in [`~transformers.Trainer.train`].
        """
        trainer, run = self.trainer, self.trainer.run
        train_dataset = trainer.train_dataset
        for fold in range(self.num_folds):
            if trainer.on_main_process(functools.partial(run.has_fold, round, fold)):
                continue
            weights = run.fold_weights_path(round, fold)
            if trainer.on_main_process(functools.partial(run.has_weights, weights)):
                run.read_weights(weights, trainer.unwrapped_model)
            else:
                # Not from the weights of the last round, which have seen the part.
                is_fresh = round == 0 or trainer.args.round_init == "base"
                before = run.weights_path(-1) if is_fresh else run.fold_weights_path(round - 1, fold)
                trainer.train_dataset = self._training_data(train_dataset, round, fold)
                run.read_weights(before, trainer.unwrapped_model)
                with self._in_silence():
                    trainer.train_once(None, ignore_keys_for_eval)
                trainer.write_weights(weights)
            self._keep_predictions(round, fold)
        trainer.train_dataset = train_dataset
        if self.num_folds:
            run.read_weights(run.weights_path(round - 1), trainer.unwrapped_model)

    def _training_data(self, train_dataset: Dataset, round: int, fold: int) -> Dataset:
        """The labeled pairs without a part, and the pairs that the model without that part keeps of the pool."""
        trainer = self.trainer
        labeled, seen = trainer.data.labeled, np.flatnonzero(self.fold_of != fold)
        if round == 0:
            return labeled.select(seen)
        if not self.callback.labels_by_itself:
            # The labeled pairs come first in `train_dataset`, then those of the teacher.
            rest = np.arange(len(labeled), len(train_dataset))
            return train_dataset.select(np.concatenate([seen, rest]))
        stored = self._read(round - 1, fold)
        share = trainer.share_of_pool(round)
        temperature = trainer.round_history[-1]["temperature"]
        scores = PairScores(stored["pool"], temperature, orders_agree=stored.get("orders_agree"))
        scores = trainer.told_apart(scores, trainer.data.pool.take(share))
        labels = label(scores, share, self.callback.kept(scores))
        if not len(labels["pair"]):
            return labeled.select(seen)
        return join(labeled.select(seen), trainer.rows_of(labels))

    def _keep_predictions(self, round: int, fold: int) -> None:
        """Score the part that the model in memory has not seen, and the pool that the next round labels."""
        trainer, run = self.trainer, self.trainer.run
        left_out = np.flatnonzero(self.fold_of == fold)
        pairs = trainer.data.labeled_pairs.take(left_out)
        logits = {"labeled": trainer.score_pairs(pairs, "train_dataset", rows=left_out).logits}
        if round < trainer.args.num_rounds and self.callback.labels_by_itself:
            pool = trainer.data.pool.take(trainer.share_of_pool(round + 1))
            weights = run.fold_weights_path(round, fold)
            scores = trainer.score_with(weights, pool, weights.parent / "scores")
            logits["pool"] = scores.logits
            if scores.orders_agree is not None:
                logits["orders_agree"] = scores.orders_agree
        if trainer.accelerator.is_main_process:
            run.write_fold(round, fold, logits)
        trainer.accelerator.wait_for_everyone()

    def held_out_logits(self, round: int) -> np.ndarray:
        """
        Predictions for all labeled pairs, each by the model of a round that was trained without it.

        Args:
            round (`int`):
                A round whose fold models are trained.

        Returns:
            `np.ndarray` of shape `(num_labeled,)`, float64: pair logits `z = r(chosen) - r(rejected)`.
        """
        logits = np.empty(len(self.fold_of))
        for fold in range(self.num_folds):
            logits[self.fold_of == fold] = self._read(round, fold)["labeled"]
        return logits

    def pool_logits(self, round: int) -> list[np.ndarray]:
        """`list[np.ndarray]` of shape `(num_pairs,)` each, float64: pair logits of each fold model on the next pool."""
        return [self._read(round, fold)["pool"] for fold in range(self.num_folds)]

    def _read(self, round: int, fold: int) -> dict[str, np.ndarray]:
        logits = self.trainer.on_main_process(lambda: self.trainer.run.read_fold(round, fold))
        if logits is None:
            raise ValueError(
                f"The predictions of fold {fold} of round {round} in {self.trainer.run.round_dir(round)} are missing or "
                "damaged; put a copy in their place, or start the run anew in another `output_dir`."
            )
        return logits

    @contextlib.contextmanager
    def _in_silence(self) -> Iterator[None]:
        """Train with a bar, but without evaluations, checkpoints, logs and callbacks of the user."""
        trainer, handler = self.trainer, self.trainer.callback_handler
        before = {name: getattr(trainer.args, name) for name in _SILENT}
        callbacks = handler.callbacks
        handler.callbacks = [each for each in callbacks if isinstance(each, DefaultFlowCallback | ProgressCallback)]
        vars(trainer.args).update(_SILENT)
        trainer.is_training_fold = True
        try:
            yield
        finally:
            trainer.is_training_fold = False
            vars(trainer.args).update(before)
            handler.callbacks = callbacks


def with_second_opinions(scores: PairScores, others: list[np.ndarray], temperature: float) -> PairScores:
    """
    Scores of several models together.

    Args:
        scores ([`PairScores`]):
            Scores of the model of the round.
        others (`list[np.ndarray]` of shape `(num_pairs,)` each):
            Pair logits of other models; may be empty.
        temperature (`float`):
            Temperature of the round, which all of them have.

    Returns:
        [`PairScores`]: the mean probability at that temperature, and in `models_agree` whether all models prefer the same
        completion. With no other model, the scores at that temperature.
    """
    if not others:
        return replace(scores, temperature=temperature)
    logits = [scores.logits, *others]
    agree = np.all([np.sign(each) == np.sign(scores.logits) for each in others], axis=0)
    return replace(scores, logits=mean_logits(logits, temperature), temperature=temperature, models_agree=agree)
