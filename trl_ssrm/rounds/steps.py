"""The steps of a round. Each takes what an interrupted run has left of it, so that the run goes on from there."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.formats import argument_name
from ..data.pool import Pool
from ..io.storage import content_hash
from ..scoring.pair_scores import PairScores
from ..scoring.score import NonFiniteScoreError
from .annotation import most_useful, write_for_labeling
from .calibrate import best_round, changes, measure, reliability
from .callback import PseudoLabelingCallback, RoundCallbackHandler
from .folds import Folds
from .label import (
    PseudoLabels,
    are_the_same,
    features_to_store,
    label,
    labeling_facts,
    length_difference,
    with_texts,
)
from .labeling_summary import summarize_labeling
from .linear import LinearModel
from .pretraining import Pretraining
from .round_trainer import RoundTrainer, RunRecorder
from .run_directory import INITIAL
from .run_identity import run_identity


class RoundSteps(RoundTrainer):
    """
    [`~trl_ssrm.rounds.round_trainer.RoundTrainer`] with the steps that [`SSRMTrainer.train`] puts together: choose the weights
    to start from, train and measure the model of a round, score the pool, keep pseudo-labels, and say when to stop.
    """

    callback_handler: RoundCallbackHandler
    pseudo_labeling_callback: PseudoLabelingCallback
    recorder: RunRecorder
    folds: Folds
    pretraining: Pretraining
    linear_model: LinearModel
    start: int
    start_facts: dict[str, Any]
    labeling_facts: dict[str, Any]
    termination_reason: str | None

    def choose_start(self, ignore_keys_for_eval: list[str] | None) -> None:
        """
        Unless it is off, pretrain on the texts of the pool, and let the labels choose what round 0 starts from. Train the fold
        models. Get the linear model ready.
        """
        run = self.run
        if (chosen := self.on_main_process(run.read_start)) is None:
            chosen = self.pretraining.choose_start(ignore_keys_for_eval)
            if self.accelerator.is_main_process:
                run.write_start(*chosen)
            self.accelerator.wait_for_everyone()
        self.start, self.start_facts = chosen
        self.start_facts |= self.linear_model.prepare(self.start, self.start_facts)
        run.read_weights(run.weights_path(self.round if self.round_history else self.start), self.unwrapped_model)

    def train_round(self, ignore_keys_for_eval: list[str] | None) -> None:
        """Train the weights of the round."""
        run, round = self.run, self.round
        if self._is_over:
            return
        self._tell("on_round_begin", round=round, num_train_pairs=len(self.train_dataset))
        if self.on_main_process(lambda: run.is_trained(round)):
            # The run was interrupted between training and measuring.
            run.read_weights(run.weights_path(round), self.unwrapped_model)
            self._load_state(round)
            return
        if round > 0 and self.args.round_init == "base":
            run.read_weights(run.weights_path(self.start), self.unwrapped_model)
        self.train_once(self.on_main_process(lambda: run.last_checkpoint(round)), ignore_keys_for_eval)
        self.write_weights(run.weights_path(round))
        if self.accelerator.is_main_process:
            run.write_state(round, self.state)
        self.accelerator.wait_for_everyone()

    def measure_round(self) -> None:
        """Measure the model on the held-out pairs, fit the temperature, and log and keep the facts of the round."""
        if self._is_over:
            return
        facts: dict[str, Any] = {"round": self.round}
        logits_of: dict[str, np.ndarray] = {}
        for name, pairs in self.data.held_out.items():
            scores = self.score_pairs(pairs, argument_name(name))
            logits_of[name] = scores.logits
            if scores.orders_agree is not None:
                facts[f"{name}_order_disagreement"] = float(1 - scores.orders_agree.mean())
        if self.folds.num_folds and self.round == 0:
            logits_of["cross_fit"] = self.folds.held_out_logits(self.start)
        prompts_of = {**self.data.held_out_prompts, "cross_fit": self.data.prompts[~self.data.is_tie]}
        calibration_prompts = prompts_of.get(self.settings.calibrated_by or "")
        facts |= measure(logits_of, calibration_prompts, self.settings, self.round_history)
        if self.round == 0:
            facts |= self.start_facts
            if self.accelerator.is_main_process:
                self.run.write_held_out(logits_of)
        else:
            before = self.on_main_process(self.run.read_held_out)
            temperatures = facts["temperature"], self.round_history[0]["temperature"]
            facts |= changes(logits_of, before, prompts_of, temperatures, self.round)
        self.log(dict(facts))
        self.recorder.log_history = self.state.log_history
        steps = self._steps_before_round + self.state.global_step
        # Facts about the pseudo-labels that this round was trained on. Round 0 had none.
        facts = {**self.labeling_facts, **facts, "num_train_pairs": len(self.train_dataset), "global_step": steps}
        self.round_history.append(facts)
        if self.accelerator.is_main_process:
            curves = reliability(logits_of, facts["temperature"])
            self.run.write_round(self.round, facts, self.state.log_history, curves)
            needed = {self.round} | ({self.start} if self.args.round_init == "base" else set())
            needed |= {INITIAL} if self.linear_model.labels_pool and self.round == 0 else set()
            self.run.prune_weights(needed | ({self.kept_round} if self.settings.keeps_best_round else set()))
        self.accelerator.wait_for_everyone()
        self._tell("on_round_end", round=self.round, facts=facts, round_history=self.round_history)

    def reason_not_to_label(self) -> str | None:
        """`str` or `None`: why the pool is not labeled for another round, if it is not."""
        if self.round == self.args.num_rounds:
            return "max_rounds"
        facts = self.round_history[self.round]
        has_learned = facts.get("has_learned", True) or facts.get("linear_model_has_learned", False)
        is_asked = self.settings.has_soft_labels and self.pseudo_labeling_callback.labels_by_itself
        return "nothing_learned" if is_asked and not has_learned else None

    def begin_labeling(self) -> None:
        """Tell the callbacks that the pool is labeled now, and what is known of the round that labels it."""
        facts = self.round_history[self.round]
        self._tell("on_labeling_begin", round=self.round, facts=facts, settings=self.settings)

    @property
    def has_labels(self) -> bool:
        """`bool`: whether an interrupted run has labeled the pool for the next round."""
        return self.on_main_process(lambda: self.run.has_pseudo_labels(self.round + 1))

    def score(self, share: np.ndarray) -> PairScores:
        """Score a share of the pool, every distinct sequence once."""
        pool, start = self.data.pool.take(share), time.perf_counter()
        scores = self.pseudo_labeling_callback.score(self, pool, self.round)
        self._scoring_seconds = time.perf_counter() - start
        if not (is_finite := np.isfinite(scores.logits)).all():
            raise NonFiniteScoreError("unlabeled_dataset", np.unique(pool.rows[~is_finite]).tolist())
        return self.told_apart(scores, pool)

    def score_pool(self, pool: Pool, round: int) -> PairScores:
        """
        Score pairs of the pool with the weights of a round.

        Args:
            pool ([`Pool`]):
                The pairs that the next round may train on.
            round (`int`):
                The round that has ended, whose weights are in the model.

        Returns:
            [`PairScores`]: the scores at the temperature of the round, the same in every process.

        Raises:
            NonFiniteScoreError: If a reward is NaN or infinite.
        """
        scores = self.score_with(self.run.weights_path(round), pool, self.run.round_dir(round + 1) / "scores")
        return self.linear_model.join(
            replace(scores, temperature=self.round_history[round]["temperature"]), pool, round
        )

    def keep(self, share: np.ndarray, scores: PairScores, kept: np.ndarray) -> None:
        """Store the pseudo-labels of the kept pairs, and facts about them, for the next round."""
        callback, pool, round = self.pseudo_labeling_callback, self.data.pool.take(share), self.round + 1
        threshold = None if callback.has_own_policy else callback.threshold(scores)
        facts = {
            "round": round,
            **labeling_facts(scores, kept, pool, threshold),
            "scoring_seconds": self._scoring_seconds,
            "scoring_pairs_per_second": len(pool) / self._scoring_seconds,
        }
        if self.accelerator.is_main_process:
            labels = label(scores, share, kept)
            difference = None if scores.lengths is None else length_difference(scores)
            self.run.write_labeling(round, summarize_labeling(pool, scores, kept, threshold, difference))
            parts = with_texts(labels, round, pool, kept)
            self.run.write_pseudo_labels(round, features_to_store(pool), parts, facts)
        self.accelerator.wait_for_everyone()

    def read_labels(self) -> PseudoLabels:
        """Read the pseudo-labels for the next round, and log the facts about them."""
        labels, self.labeling_facts = self.run.read_labels(self.round + 1)
        self.log(dict(self.labeling_facts))
        self._tell("on_labeling_end", round=self.round + 1, facts=self.labeling_facts)
        return labels

    def reason_to_stop(self, labels: PseudoLabels) -> str | None:
        """`str` or `None`: why the next round is not trained, if it is not."""
        if not len(labels["pair"]):
            return "nothing_selected"
        if self.control.should_training_stop:
            return "callback"
        if self.round == 0 or self.args.pool_per_round == "shard":
            return None
        before, _ = self.run.read_labels(self.round)
        return "no_change" if are_the_same(before, labels, self.settings.has_soft_labels) else None

    @property
    def kept_round(self) -> int:
        """`int`: the round whose weights the run ends with, if it ended now."""
        if self.settings.keeps_best_round:
            return best_round(self.round_history, self.settings)
        return self.round_history[-1]["round"]

    @property
    def kept_temperature(self) -> float | None:
        """`float` or `None`: the temperature of that round; `None` without a pool, or before round 0 is over."""
        has_rounds = self.has_pool and self.round_history
        return self.round_history[self.kept_round]["temperature"] if has_rounds else None

    @property
    def _ends_of_rounds(self) -> list[dict[str, Any]]:
        return [log for log in self.state.log_history if "train_loss" in log]

    def _speed(self) -> dict[str, float]:
        """Seconds of training over all rounds, and samples and steps a second, as [`~trl.RewardTrainer`] has them."""
        ends = self._ends_of_rounds
        seconds = sum(end["train_runtime"] for end in ends)
        rates = ("train_samples_per_second", "train_steps_per_second")
        totals = {name: sum(end[name] * end["train_runtime"] for end in ends) for name in rates}
        return {"train_runtime": seconds, **{name: total / max(seconds, 1e-9) for name, total in totals.items()}}

    @property
    def _is_over(self) -> bool:
        """Whether the current round was trained and measured before the run was resumed."""
        return self.round < len(self.round_history)

    def _tell(self, event: str, **facts: Any) -> None:
        """Fire an event of a round. `Trainer` sets `should_training_stop` at the end of each round; here callbacks do."""
        self.control.should_training_stop = False
        self.control = self.callback_handler.tell(event, self.args, self.state, self.control, **facts)

    def export_for_labeling(self, path: str, num_pairs: int) -> None:
        """
        Write the pairs of the pool whose labels would help most: uncertain ones, of different prompts, and unlike one
        another. [`load_labels`] reads the answers.

        Args:
            path (`str`):
                File to write, one JSON object a line; see [`load_labels`].
            num_pairs (`int`):
                Number of pairs to write, fewer if the pool has fewer prompts.

        Raises:
            ValueError: If there is no pool, `num_pairs` is not positive, or the file exists.
        """
        if not self.has_pool:
            raise ValueError("`export_for_labeling` chooses from the pool, so it needs `unlabeled_dataset`.")
        if num_pairs < 1:
            raise ValueError(f"`num_pairs` must be positive, got {num_pairs}.")
        if self.on_main_process(lambda: Path(path).exists()):
            raise ValueError(f"{path} exists, and may hold labels; choose another file, or delete it.")
        pool = self.data.pool
        scores = self.score_pairs(pool.pairs, "unlabeled_dataset", rows=pool.rows)
        scores = replace(scores, temperature=self.kept_temperature or 1.0)
        if self.accelerator.is_main_process:
            write_for_labeling(pool, most_useful(scores, pool, num_pairs), scores, path)
        self.accelerator.wait_for_everyone()

    @property
    def identity(self) -> dict[str, Any]:
        """`dict[str, Any]`: the facts that decide the result of the run, as JSON values."""
        data = self.data.fingerprints
        if (teacher := self.pseudo_labeling_callback.teacher) is not None:
            data["teacher"] = teacher.fingerprint
        if self.comparison is not None:
            data["comparison"] = content_hash(asdict(self.comparison))
        return run_identity(self.args, self.unwrapped_model, data)

    def _open_run(self, resume_from_checkpoint: str | bool | None) -> None:
        """Start a run in the output directory, or load the one in it up to the last round that is over."""
        run, model = self.run, self.unwrapped_model
        self.start_run(self.identity, resume_from_checkpoint)
        num_finished = self.on_main_process(lambda: run.num_finished)
        if num_finished == 0 and not self.on_main_process(run.weights_path(INITIAL).is_file):
            self.write_weights(run.weights_path(INITIAL))
        rounds = [run.read_round(round) for round in range(num_finished)]
        self.round, self.labeling_facts = max(num_finished - 1, 0), {}
        self.round_history = [round["facts"] for round in rounds]
        self.recorder.log_history = rounds[-1]["log_history"] if rounds else []
        run.read_weights(run.weights_path(num_finished - 1 if num_finished else INITIAL), model)
        if num_finished > 0:
            self.shard()
        if self.args.freeze_backbone:
            # In batches that depend on the content alone, so that a resumed run has the same features to the bit.
            for name, pairs in self.data.all_pairs.items():
                self.score_pairs(pairs, name)
        if num_finished > 0:
            self._load_state(self.round)
            self.state.log_history = self.recorder.log_history
            self.accelerator.print(f"Resuming the run in {self.args.output_dir} after round {self.round}.")
