"""Models that each lack a part of the labeled pairs: what they say of that part costs no label."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from transformers import DefaultFlowCallback, ProgressCallback

from ..data.prompts import prompt_groups
from ..scoring.pair_scores import PairScores


if TYPE_CHECKING:
    from ..trainer import SSRMTrainer


logger = logging.getLogger(__name__)

NUM_FOLDS = 5


class Folds:
    """
    Splits the labeled pairs of a run into parts, by prompt, and does the rounds without each of them once more.

    Every such model trains on the pseudo-labels that it has given itself: those of another one would carry the labels of
    the part that it must not see.

    Args:
        trainer ([`SSRMTrainer`]):
            The trainer, whose model and run directory are used.
        labels_by_itself (`bool`):
            Whether the model of a round labels the pool, so that that of a fold can do it too.

    Raises:
        ValueError: If there are fewer prompts than parts.
    """

    def __init__(self, trainer: "SSRMTrainer", labels_by_itself: bool):
        self.trainer = trainer
        self.is_training = False
        prompts = prompt_groups(trainer.data.labeled)
        num_prompts = int(prompts.max()) + 1
        self.num_folds = self._choose(num_prompts, labels_by_itself)
        if num_prompts < self.num_folds:
            raise ValueError(
                f"`num_folds` is {self.num_folds}, but the labeled pairs have {num_prompts} prompts; set it to that or "
                "less."
            )
        places = np.random.default_rng(trainer.args.seed).permutation(num_prompts)
        self.fold_of = places[prompts] % max(1, self.num_folds)

    def _choose(self, num_prompts: int, labels_by_itself: bool) -> int:
        """`num_folds` as it was set or, left open, as the rest of the settings calls for it."""
        args = self.trainer.args
        if args.num_folds is not None:
            return args.num_folds
        is_asked_for = args.second_opinion == "folds" or args.debias_pseudo_labels
        is_needed = "calibration" not in self.trainer.data.held_out and args.num_rounds > 0
        is_possible = labels_by_itself and not args.load_best_model_at_end and num_prompts > 1
        if is_asked_for and not is_possible:
            raise ValueError(
                "`second_opinion='folds'` and `debias_pseudo_labels` need labeled pairs of two prompts or more, no "
                "`load_best_model_at_end`, and a model that labels the pool itself."
            )
        if not is_possible or not (is_asked_for or is_needed):
            return 0
        num_folds = min(NUM_FOLDS, num_prompts)
        logger.warning(
            f"Without `calibration_dataset`, the rounds are done {num_folds} times more, each time without a part of the "
            "labels, to calibrate the confidence and to keep the best round (`num_folds`); `num_folds=0` does without."
        )
        return num_folds

    def train(self, round: int, ignore_keys_for_eval: list[str] | None) -> None:
        """
        Train the models of a round, keep what they say in the run directory, and put the round's weights back.

        Args:
            round (`int`):
                The round, whose data is the trainer's `train_dataset`, the labeled pairs first.
            ignore_keys_for_eval (`list[str]`, *optional*):
                As in [`~transformers.Trainer.train`].
        """
        trainer, run = self.trainer, self.trainer.run
        train_dataset = trainer.train_dataset
        for fold in range(self.num_folds):
            if self._is_trained(round, fold):
                continue
            left_out = np.flatnonzero(self.fold_of == fold)
            # Not from the weights of the last round, which have seen the part.
            is_fresh = round == 0 or trainer.args.round_init == "base"
            weights = run.fold_weights_path(round, fold)
            if trainer.on_main_process(functools.partial(run.has_weights, weights)):
                run.read_weights(weights, trainer.unwrapped_model)
            else:
                trainer.train_dataset = self._training_data(train_dataset, round, fold)
                before = run.weights_path(-1) if is_fresh else run.fold_weights_path(round - 1, fold)
                run.read_weights(before, trainer.unwrapped_model)
                with self._in_silence():
                    trainer.train_once(None, ignore_keys_for_eval)
                trainer.write_weights(weights)
            pairs = trainer.data.labeled_pairs.take(left_out)
            logits = {"labeled": trainer.score_pairs(pairs, "train_dataset", rows=left_out).logits}
            if round < trainer.args.num_rounds and not trainer.pseudo_labeling_callback.has_own_scores:
                pool = trainer.data.pool.take(trainer.share_of_pool(round + 1))
                directory, key = weights.parent / "scores", f"{run.weights_hash(weights)} {pool.pairs.fingerprint}"
                scores = trainer.score_pool(pool, directory, key)
                logits["pool"] = scores.logits
                if scores.orders_agree is not None:
                    logits["orders_agree"] = scores.orders_agree
            if trainer.accelerator.is_main_process:
                run.write_fold(round, fold, logits)
            trainer.accelerator.wait_for_everyone()
        trainer.train_dataset = train_dataset
        if self.num_folds:
            run.read_weights(run.weights_path(round - 1), trainer.unwrapped_model)

    def _training_data(self, train_dataset: Dataset, round: int, fold: int) -> Dataset:
        """The labeled pairs but for a part, and what the model without that part keeps of the pool."""
        trainer, callback = self.trainer, self.trainer.pseudo_labeling_callback
        labeled, seen = trainer.data.labeled, np.flatnonzero(self.fold_of != fold)
        if round == 0:
            return labeled.select(seen)
        if callback.has_own_scores:
            # The labeled pairs come first.
            rest = np.arange(len(labeled), len(train_dataset))
            return train_dataset.select(np.concatenate([seen, rest]))
        stored = self._read(round - 1, fold)
        temperature = trainer.round_history[-1]["temperature"]
        scores = PairScores(stored["pool"], temperature, orders_agree=stored.get("orders_agree"))
        kept = callback.pseudo_label(scores, round)
        return (
            labeled.select(seen) if kept is None else trainer.data_collator.build_dataset(labeled.select(seen), kept)
        )

    def held_out_logits(self, round: int) -> np.ndarray:
        """
        What the models of a round say of the labeled pairs that they were not trained on.

        Args:
            round (`int`):
                A round whose models are trained.

        Returns:
            `np.ndarray` of shape `(num_labeled,)`, float64: pair logits `z = r(chosen) - r(rejected)`.
        """
        logits = np.empty(len(self.fold_of))
        for fold in range(self.num_folds):
            logits[self.fold_of == fold] = self._read(round, fold)["labeled"]
        return logits

    def pool_logits(self, round: int) -> list[np.ndarray]:
        """`list[np.ndarray]` of shape `(num_pairs,)` each, float64: what each of them says of the next round's pool."""
        return [self._read(round, fold)["pool"] for fold in range(self.num_folds)]

    def _is_trained(self, round: int, fold: int) -> bool:
        return self.trainer.on_main_process(lambda: self.trainer.run.read_fold(round, fold) is not None)

    def _read(self, round: int, fold: int) -> dict[str, np.ndarray]:
        logits = self.trainer.on_main_process(lambda: self.trainer.run.read_fold(round, fold))
        if logits is None:
            raise ValueError(
                f"What fold {fold} of round {round} says, in {self.trainer.run.round_dir(round)}, is missing or damaged; put a "
                "copy in its place, or start the run anew elsewhere."
            )
        return logits

    @contextlib.contextmanager
    def _in_silence(self) -> Iterator[None]:
        """With a bar, but without evaluations, checkpoints, logs and callbacks of the user, which are the round's."""
        args, handler = self.trainer.args, self.trainer.callback_handler
        silent = {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no"}
        before = {name: getattr(args, name) for name in silent}
        callbacks = handler.callbacks
        handler.callbacks = [each for each in callbacks if isinstance(each, DefaultFlowCallback | ProgressCallback)]
        self._set(silent)
        self.is_training = True
        try:
            yield
        finally:
            self.is_training = False
            self._set(before)
            handler.callbacks = callbacks

    def _set(self, settings: dict) -> None:
        for name, value in settings.items():
            setattr(self.trainer.args, name, value)
