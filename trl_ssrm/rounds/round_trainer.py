"""How one round differs from one run of `RewardTrainer`: its length, its seed, its files, its logs."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from transformers import (
    DefaultFlowCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.pool import Pool
from ..io.files import telling_where
from ..models.sharding import spread, whole_weights
from ..scoring.pair_scores import PairScores
from ..scoring.score import NonFiniteWeightError
from .label import PseudoLabels, training_rows
from .pair_trainer import PairTrainer
from .run_data import RunData
from .run_directory import PRETRAINED, RunDirectory
from .settings import RoundSettings


logger = logging.getLogger(__name__)


class RunRecorder(TrainerCallback):
    """
    Keeps the logs of the rounds that are over, and marks checkpoints that are whole.

    Args:
        trainer ([`RoundTrainer`]):
            The trainer.
    """

    def __init__(self, trainer: "RoundTrainer"):
        self.trainer = trainer
        # `Trainer` starts every call of `train` with no logs.
        self.log_history: list[dict[str, float]] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        # A checkpoint within a round brings the logs of the rounds before with it.
        state.log_history = state.log_history or list(self.log_history)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        trainer = self.trainer
        # Every process has written its part of the checkpoint when all of them are here.
        trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            trainer.run.end_checkpoint(trainer.run.round_dir(trainer.round) / f"checkpoint-{state.global_step}")


class RoundTrainer(PairTrainer):
    """
    [`~trl_ssrm.rounds.pair_trainer.PairTrainer`] that trains one round at a time, keeps its weights in a run directory,
    and scores the pool with them. [`SSRMTrainer`] puts the rounds together.
    """

    # What there is only with a pool.
    train_dataset: Dataset
    data: RunData
    run: RunDirectory
    round: int
    round_history: list[dict[str, Any]]
    settings: RoundSettings
    is_silent = False
    # How to resume an interrupted run.
    advice = "Go on with `train(resume_from_checkpoint=True)`. "

    def train_once(self, checkpoint: str | None, ignore_keys_for_eval: list[str] | None) -> None:
        """
        Train on `train_dataset` as [`~trl.RewardTrainer`] does, from the weights in the model, for one round.

        Args:
            checkpoint (`str` or `None`):
                Directory of a checkpoint of this round to go on from.
            ignore_keys_for_eval (`list[str]` or `None`):
                As in [`~transformers.Trainer.train`].

        Raises:
            torch.OutOfMemoryError: If a batch does not fit into memory; the message says what to change.
        """
        # A round depends on its data, its initial weights and this seed alone, so that it can be resumed. Round 0 has the
        # seed of `RewardTrainer`.
        set_seed(self.args.seed + max(self.round, 0))
        self.optimizer = None
        self._num_norms = 0
        self._num_overflows: Any = 0
        self._leave_engine()
        spread(self.unwrapped_model)
        with self._round_arguments():
            try:
                super().train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                raise torch.OutOfMemoryError(
                    f"{self._round_in_words} does not fit into memory with batches of {self.args.per_device_train_batch_size} "
                    "pairs; lower `per_device_train_batch_size` and raise `gradient_accumulation_steps` as much, set "
                    "`gradient_checkpointing=True`, lower `max_length`, or train an adapter (`peft_config`)."
                ) from error
        if num_lost := int(self._num_overflows):
            logger.warning(
                f"{self._round_in_words}: in {num_lost} of {self._num_norms} steps the norm of the gradients overflowed. "
                "Clipping makes such gradients zero, so nothing was learned from these steps. Make the rewards smaller: "
                "scale the weights of the score head down, or start from another checkpoint."
            )

    @contextlib.contextmanager
    def _round_arguments(self) -> Iterator[None]:
        """Give the arguments the length and the learning rate of the current round, or of the pretraining: one epoch."""
        args = self.args
        first_round = args.num_train_epochs, args.max_steps, args.learning_rate
        if self.round != 0 and self.settings.num_train_epochs is not None:
            epochs = 1 if self.round == PRETRAINED else self.settings.num_train_epochs
            args.num_train_epochs, args.max_steps = epochs, -1
        if self.round > 0 and args.round_learning_rate is not None:
            args.learning_rate = args.round_learning_rate
        try:
            yield
        finally:
            args.num_train_epochs, args.max_steps, args.learning_rate = first_round

    @contextlib.contextmanager
    def in_silence(self, with_checkpoints: bool = False) -> Iterator[None]:
        """
        Train with a bar, but without evaluations, logs and callbacks of the user: these are the round's.

        Args:
            with_checkpoints (`bool`, *optional*, defaults to `False`):
                Whether checkpoints are saved as in a round.
        """
        changed = {"eval_strategy": "no", "eval_on_start": False}
        own: tuple[type, ...] = (DefaultFlowCallback, ProgressCallback)
        if with_checkpoints:
            own = (*own, RunRecorder)
        else:
            changed["save_strategy"] = "no"
        before = {name: getattr(self.args, name) for name in changed}
        callbacks = self.callback_handler.callbacks
        self.callback_handler.callbacks = [each for each in callbacks if isinstance(each, own)]
        vars(self.args).update(changed)
        self.is_silent = True
        try:
            yield
        finally:
            self.is_silent = False
            vars(self.args).update(before)
            self.callback_handler.callbacks = callbacks

    def write_weights(self, path: Path) -> None:
        """
        Keep the trainable weights of the model. Every process has to call it at the same time.

        Args:
            path (`Path`):
                File to write.

        Raises:
            NonFiniteWeightError: If one of them is NaN or infinite.
        """
        weights = whole_weights(self.unwrapped_model)
        if broken := [name for name, weight in weights.items() if not torch.isfinite(weight).all()]:
            raise NonFiniteWeightError(self.round, broken)
        if self.accelerator.is_main_process:
            self.run.write_weights(path, weights)
        self.accelerator.wait_for_everyone()

    # ---- The pool ----

    def share_of_pool(self, round: int) -> np.ndarray:
        """
        Pairs of the pool that a round may train on.

        Args:
            round (`int`):
                Round after round 0.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`, int64: positions in the pool, ascending.
        """
        pool = self.data.pool
        if self.args.pool_per_round == "full":
            return np.arange(len(pool))
        rows = np.random.default_rng(self.args.seed).permutation(len(pool.source))
        return np.flatnonzero(np.isin(pool.rows, rows[round - 1 :: self.args.num_rounds]))

    def check_shares(self) -> None:
        """Refuse shares of the pool that have no pair."""
        shares = range(1, self.args.num_rounds + 1) if self.args.pool_per_round == "shard" else []
        if empty := [round for round in shares if not len(self.share_of_pool(round))]:
            raise ValueError(
                f"`pool_per_round='shard'` leaves no pair of the {len(self.data.pool)} in the pool to round {empty[0]}; lower "
                "`num_rounds`, or give a larger pool."
            )

    def score_with(self, weights: Path, pool: Pool, directory: Path) -> PairScores:
        """
        Score pairs of the pool with the model in memory.

        Args:
            weights (`Path`):
                File with the weights that the model has, whose hash names the scores.
            pool ([`Pool`]):
                The pairs.
            directory (`Path`):
                Where finished shards are kept.

        Returns:
            [`PairScores`]: the scores at temperature 1, the same in every process.

        Raises:
            NonFiniteScoreError: If a reward is NaN or infinite.
        """
        key = f"{self.run.weights_hash(weights)} {pool.pairs.fingerprint}"
        scores = self.score_pairs(pool.pairs, "unlabeled_dataset", rows=pool.rows, directory=directory, key=key)
        return self.told_apart(scores, pool)

    def told_apart(self, scores: PairScores, pool: Pool) -> PairScores:
        """
        Scores with what a selection policy may want to know of the pairs.

        Args:
            scores ([`PairScores`]):
                Scores of the pairs.
            pool ([`Pool`]):
                The pairs.

        Returns:
            [`PairScores`]: the same, with `rows` and, if a sequence holds one completion, `lengths`.
        """
        pairs = pool.pairs
        lengths = np.stack([pairs.lengths[pairs.first], pairs.lengths[pairs.second]], axis=1)
        return replace(scores, rows=pool.rows, lengths=None if self.comparison is not None else lengths)

    def rows_of(self, labels: PseudoLabels) -> Dataset:
        """Rows to train on, as from [`~trl_ssrm.rounds.label.training_rows`], written to disk once for all processes."""
        with self.accelerator.main_process_first():
            return training_rows(labels, self.data.pool)

    # ---- The run directory ----

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse to work beside another run in the output directory."""
        self._or_refuse(self.run.acquire)
        try:
            yield
        finally:
            self.run.release()

    def start_run(self, identity: dict[str, Any], resume_from_checkpoint: str | bool | None) -> None:
        """
        Start a run in the output directory, or check that the run in it is the same.

        Args:
            identity (`dict[str, Any]`):
                As from [`~trl_ssrm.rounds.run_identity.run_identity`].
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As in [`SSRMTrainer.train`].

        Raises:
            ValueError: If the run can't be started or resumed.
        """
        output_dir = self.run.output_dir
        if isinstance(resume_from_checkpoint, str) and Path(resume_from_checkpoint).resolve() != output_dir.resolve():
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, but a run with `unlabeled_dataset` is resumed "
                f"from its `output_dir` ({self.args.output_dir!r}); pass `True`."
            )
        self._or_refuse(lambda: self.run.start(identity, resume=bool(resume_from_checkpoint)))

    def _or_refuse(self, function: Callable[[], None]) -> None:
        """Run a function in the main process, and raise its error in every process: the others would wait otherwise."""

        def error_of() -> str | None:
            try:
                function()
            except (ValueError, OSError) as error:
                return str(error)
            return None

        if (error := self.on_main_process(error_of)) is not None:
            raise ValueError(error)

    def _how_to_go_on(self) -> str | None:
        if not self.accelerator.is_main_process or not self.run.has_run:
            return None
        where = "in pretraining" if self.round == PRETRAINED else f"in round {self.round}"
        return (
            f"Interrupted {where}. {self.advice}The run in {self.args.output_dir} continues from its last checkpoint or scored "
            "shard."
        )

    @property
    def _round_in_words(self) -> str:
        return "Pretraining" if self.round == PRETRAINED else f"Round {self.round}"

    def _load_state(self, round: int) -> None:
        self.state = self.run.read_state(round)
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()

    # ---- Where a round differs from a run of `Trainer` ----

    @property
    def _steps_before_round(self) -> int:
        finished = self.round_history[: max(self.round, 0)]
        return finished[-1]["global_step"] if finished else 0

    def _get_output_dir(self, trial):
        # Private in `Trainer`: each round counts its steps from 0, so each has its own place for checkpoints.
        if not self.has_pool:
            return super()._get_output_dir(trial)
        return str(self.run.round_dir(self.round))

    def _get_grad_norm(self, model, grad_norm=None):
        # Private in `Trainer`: the only place that sees the norm of every step, and not of the logged steps alone.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Scaling of half precision overflows on purpose.
        if self.has_pool and norm is not None and not self.args.fp16:
            norm_of_all = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
            # Added up on the device: reading it would wait for the device.
            self._num_norms, self._num_overflows = self._num_norms + 1, self._num_overflows + ~norm_of_all.isfinite()
        return norm

    def _save_checkpoint(self, model, trial):
        # Private in `Trainer`, whose libraries each report a full disk in their own way.
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with telling_where(checkpoint):
            super()._save_checkpoint(model, trial)

    def _load_best_model(self):
        # Private in `Trainer`, which would load damaged weights without a check.
        if self.has_pool:
            checkpoint = Path(str(self.state.best_model_checkpoint))
            if (damage := self.on_main_process(lambda: self.run.damage_of(checkpoint))) is not None:
                raise ValueError(
                    f"{damage}, and it is the best of round {self.round}; put a copy in its place, or delete the checkpoints "
                    "of the round and resume it."
                )
        super()._load_best_model()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.has_pool:
            return super().log(logs, start_time)
        if self.is_silent:
            # Private in `RewardTrainer`: otherwise the next log of the round's own model would average these in.
            for metrics in self._metrics.values():
                metrics.clear()
            return
        # Trackers draw over the steps of all rounds, while `Trainer` counts the steps of one.
        steps = self._steps_before_round
        logs.setdefault("round", self.round)
        self.state.global_step += steps
        try:
            super().log(logs, start_time)
        finally:
            self.state.global_step -= steps
