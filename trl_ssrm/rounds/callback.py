import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import SSRMConfig
from ..data.build_pool import written_out
from ..data.prompts import prompt_groups
from ..data.sequences import PairedSequences, group_numbers, in_memory, iterate_rows, select_rows
from ..reporting.labeling_summary import summarize_labeling
from ..scoring.layout import choose_layout
from ..scoring.pair_scores import PairScores
from ..scoring.preference import mean_logits, orders_agree, pairwise_logits
from ..scoring.score import NonFiniteScoreError, score_pairs
from .select import SelectionPolicy, above_threshold, adaptive_threshold, balanced, fraction_threshold, within_quota


if TYPE_CHECKING:
    from ..alignment.judge import PairwiseJudge
    from ..data.pool import Pool
    from ..trainer import SSRMTrainer


logger = logging.getLogger(__name__)

# That of the paper's released code.
DEFAULT_CONFIDENCE_THRESHOLD = 0.8

# What is kept of a pair besides its texts.
LABEL_FEATURES = Features({"confidence": Value("float64"), "pair": Value("int64"), "first_is_chosen": Value("bool")})

# Groups of pairs by their difference in length, for `balance_by=["length"]`.
NUM_LENGTH_GROUPS = 5


class PseudoLabelingCallback(TrainerCallback):
    """
    Labels the unlabeled pool at the end of a round, and hands over what the next round trains on.

    [`SSRMTrainer`] makes one by itself. Pass your own in `callbacks` to select pairs in another way, or subclass it and
    override [`PseudoLabelingCallback.score`] or [`PseudoLabelingCallback.select`].

    Args:
        selection_policy (`Callable[[PairScores], np.ndarray]`, *optional*):
            Function of the scores of the pool that returns a mask of shape `(num_pairs,)` of the pairs to keep. If
            `None`, the pairs whose confidence is greater than a threshold are kept; otherwise the settings that choose
            the threshold have no effect.
        teacher ([`PairwiseJudge`], *optional*):
            Who labels the pool, instead of the model that is trained. With `pseudo_label_type="soft"` a scalar model
            learns the probabilities of a pairwise one.

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_ssrm import PairScores, PseudoLabelingCallback


    >>> def top_tenth(scores: PairScores) -> np.ndarray:
    ...     return scores.confidence >= np.quantile(scores.confidence, 0.9)


    >>> callback = PseudoLabelingCallback(selection_policy=top_tenth)
    ```
    """

    # Set by the trainer.
    trainer: "SSRMTrainer"

    def __init__(self, selection_policy: SelectionPolicy | None = None, teacher: "PairwiseJudge | None" = None):
        self.selection_policy = selection_policy
        self.teacher = teacher
        self.termination_reason: str | None = None
        # Logs of the rounds that are over; `Trainer` starts every call of `train` with none.
        self.log_history: list[dict[str, float]] = []

    @property
    def has_own_scores(self) -> bool:
        """`bool`: whether someone else than the model of the round, or of a fold, labels the pool."""
        return self.teacher is not None or type(self).score is not PseudoLabelingCallback.score

    @property
    def has_own_policy(self) -> bool:
        """`bool`: whether something else than a threshold selects the pairs."""
        return self.selection_policy is not None or type(self).select is not PseudoLabelingCallback.select

    def check(self, args: SSRMConfig, pool: "Pool") -> bool:
        """
        Refuse settings that the pool can't meet, before any work.

        Args:
            args ([`SSRMConfig`]):
                The training arguments.
            pool ([`Pool`]):
                The unlabeled pairs.

        Returns:
            `bool`: whether something else than `confidence_threshold` selects the pairs.

        Raises:
            ValueError: If `balance_by` names no column of the pool.
        """
        shares = range(1, args.num_rounds + 1) if args.pool_per_round == "shard" else []
        if empty := [round for round in shares if not len(self.trainer.share_of_pool(round))]:
            raise ValueError(
                f"`pool_per_round='shard'` leaves no pair of the {len(pool)} in the pool to round {empty[0]}; lower "
                "`num_rounds`, or give a larger pool."
            )
        for name in args.balance_by or []:
            if name not in ("length", "prompt") and name not in pool.source.column_names:
                raise ValueError(
                    f"`balance_by` names {name!r}, which is no column of `unlabeled_dataset` ({pool.source.column_names}); "
                    'give it "length", "prompt" or one of them.'
                )
        needs_own_model = {
            "second_opinion": args.second_opinion in ("first_round", "folds"),
            "debias_pseudo_labels": args.debias_pseudo_labels,
            "target_precision": args.target_precision is not None,
            "use_vllm": args.use_vllm,
        }
        if self.has_own_scores and (names := [f"`{name}`" for name, is_set in needs_own_model.items() if is_set]):
            raise ValueError(
                f"Someone else than the model of the round labels the pool; leave {', '.join(names)} out."
            )
        if type(self).score is not PseudoLabelingCallback.score and args.num_folds:
            raise ValueError(
                "The models of `num_folds` label the pool for themselves, which a callback with a `score` of its own "
                "prevents; set `num_folds=0`."
            )
        if self.has_own_policy and args.debias_pseudo_labels:
            raise ValueError("`debias_pseudo_labels` selects by a threshold; leave it, or the selection policy, out.")
        is_fixed = (
            self.trainer.target_precision is None and args.selected_fraction is None and not args.adaptive_threshold
        )
        return self.has_own_policy or not is_fixed or type(self).threshold is not PseudoLabelingCallback.threshold

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # A checkpoint within a round brings the logs of the rounds before with it.
        state.log_history = state.log_history or list(self.log_history)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # Every process is done with its part of the checkpoint once all of them are here.
        trainer = self.trainer
        trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            trainer.run.end_checkpoint(trainer.run.round_dir(trainer.round) / f"checkpoint-{state.global_step}")

    def on_round_end(
        self, args: SSRMConfig, state: TrainerState, control: TrainerControl, trainer: "SSRMTrainer", round: int
    ) -> Dataset | None:
        """
        Event called by [`SSRMTrainer`] after a round, but for the last one: score the pool with the weights of this
        round, select, keep the pairs in `output_dir`, log, and hand over the next round's data.

        Args:
            args ([`SSRMConfig`]):
                The training arguments.
            state ([`~transformers.TrainerState`]):
                The state at the end of the round.
            control ([`~transformers.TrainerControl`]):
                Not used here.
            trainer ([`SSRMTrainer`]):
                The trainer, which holds the model and the pool.
            round (`int`):
                The round that has ended, 0 for the supervised one.

        Returns:
            [`~datasets.Dataset`] or `None`: columns `chosen_ids`, `rejected_ids` and `probability`, for
            [`ConfidenceFilteredDataCollator`]; `None` if the rounds end here, and then `termination_reason` says why.

        Raises:
            NonFiniteScoreError: If the model gives a row of the pool a reward that is NaN or infinite.
        """
        if not trainer.on_main_process(lambda: trainer.run.has_pseudo_labels(round + 1)):
            self._label_pool(args, trainer, round)
        stored = trainer.run.read_numbers_of_pseudo_labels(round + 1, list(LABEL_FEATURES))
        assert stored is not None
        pseudo_labels, facts = stored
        trainer.log(dict(facts))
        trainer.labeling_facts = facts
        if facts["kept"] == 0:
            self.termination_reason = "nothing_selected"
            logger.warning(
                f"Nothing was selected from the {facts['pool_size']} pairs of the pool after round {round}, so the rounds "
                "end here with the model so far. Lower `confidence_threshold` or `target_precision`, or train round 0 "
                "longer."
            )
            return None
        previous = None
        if round > 0 and args.pool_per_round == "full" and self._weight(round) == self._weight(round + 1):
            previous = trainer.run.read_numbers_of_pseudo_labels(round, list(LABEL_FEATURES))
            if previous is None:
                raise ValueError(
                    f"The pseudo-labels of round {round} in {trainer.run.round_dir(round)} are missing or damaged, so nobody "
                    "can say whether they have changed since; put copies in their place, or start the run anew elsewhere."
                )
        if previous is not None and _same_labels(previous[0], pseudo_labels):
            self.termination_reason = "no_change"
            return None
        rows = self._training_rows(pseudo_labels, round + 1)
        return self._debiased(rows, facts) if args.debias_pseudo_labels else rows

    def pseudo_label(self, scores: PairScores, round: int) -> Dataset | None:
        """
        What a round would train on beside labeled pairs if the pool had other scores.

        Args:
            scores ([`PairScores`]):
                Scores of the pairs of the pool that the round may train on.
            round (`int`):
                The round that is to be trained.

        Returns:
            [`~datasets.Dataset`] or `None`: as from [`PseudoLabelingCallback.on_round_end`]; `None` if nothing is kept.
        """
        share = self.trainer.share_of_pool(round)
        mask, _ = self._select_with_quotas(scores, self.trainer.data.pool.take(share))
        kept = np.flatnonzero(mask)
        return self._training_rows(self._labels(scores, share, kept), round) if len(kept) else None

    def score(self, trainer: "SSRMTrainer", pool: "Pool", round: int) -> PairScores:
        """
        Score the pairs of a pool with the current weights.

        Args:
            trainer ([`SSRMTrainer`]):
                The trainer.
            pool ([`Pool`]):
                What to score.
            round (`int`):
                The round that has ended.

        Returns:
            [`PairScores`]: the same in every process.
        """
        directory = trainer.run.round_dir(round + 1) / "scores"
        if self.teacher is not None:
            # It does not change from round to round, so neither do its scores.
            return self._ask_teacher(self.teacher, trainer, pool, trainer.run.root / "teacher_scores")
        key = trainer.scores_key(round, pool)
        scores = trainer.score_pool(pool, directory, key)
        temperature = trainer.round_history[round]["temperature"]
        logits = [scores.logits, *trainer.second_opinions(round, temperature)]
        agree = np.all([np.sign(each) == np.sign(logits[0]) for each in logits], axis=0)
        return replace(
            scores,
            logits=mean_logits(logits, temperature) if len(logits) > 1 else scores.logits,
            temperature=temperature,
            models_agree=agree if len(logits) > 1 else None,
        )

    def select(self, scores: PairScores) -> np.ndarray:
        """
        Choose the pairs to keep.

        Args:
            scores ([`PairScores`]):
                Scores of the pairs.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`, bool: the kept pairs. Ties are left out afterwards in any case.
        """
        if self.selection_policy is not None:
            return self.selection_policy(scores)
        return above_threshold(scores, self.threshold(scores))

    def threshold(self, scores: PairScores) -> float:
        """
        Confidence that a pair has to exceed, as the settings choose it.

        Args:
            scores ([`PairScores`]):
                Scores of the pairs.

        Returns:
            `float`: the threshold, in `[0.5, 1]`.
        """
        args, last = self.trainer.args, self.trainer.round_history[-1]
        if self.trainer.target_precision is not None:
            return last["precision_threshold"]
        if args.selected_fraction is not None:
            return fraction_threshold(scores, args.selected_fraction)
        if args.adaptive_threshold:
            return adaptive_threshold(scores, last.get("confidence_threshold"))
        return DEFAULT_CONFIDENCE_THRESHOLD if args.confidence_threshold is None else args.confidence_threshold

    @staticmethod
    def _ask_teacher(teacher: "PairwiseJudge", trainer: "SSRMTrainer", pool: "Pool", directory: Path) -> PairScores:
        def tokenize(texts: dict[str, Any]) -> dict[str, list[int]]:
            ids = teacher.comparison.tokenize(
                teacher.processing_class, texts["prompt"], texts["chosen"], texts["rejected"]
            )
            return dict(zip(("chosen_ids", "rejected_ids"), ids, strict=True))

        texts = pool.iterate_texts(np.arange(len(pool)), np.ones(len(pool), dtype=bool))
        rows = (tokenize(each) for batch in texts for each in batch)
        pairs = PairedSequences.from_tokenized(written_out(rows, directory / "pairs"))
        if getattr(teacher.model, "hf_device_map", None) is None:
            teacher.model.to(trainer.accelerator.device)
        scores = score_pairs(
            teacher.model,
            pairs,
            teacher.processing_class.pad_token_id,
            trainer.accelerator,
            choose_layout(teacher.model),
            trainer.args.score_batch_tokens,
            directory=directory,
            key=f"{teacher.fingerprint} {pairs.fingerprint}",
            name="unlabeled_dataset",
            rows=pool.rows,
            disable_tqdm=bool(trainer.args.disable_tqdm),
        )
        logits, longest = pairwise_logits(scores), teacher.comparison.max_length
        if longest is not None:
            lengths = np.maximum(pairs.lengths[pairs.first], pairs.lengths[pairs.second])
            if (lengths > longest).any():
                logger.warning(f"{(lengths > longest).sum()} pairs are longer than the teacher compares and not kept.")
            # A tie is never kept.
            logits[lengths > longest] = 0.0
        return PairScores(logits, orders_agree=orders_agree(scores))

    def _label_pool(self, args: SSRMConfig, trainer: "SSRMTrainer", round: int) -> None:
        share = trainer.share_of_pool(round + 1)
        pool = trainer.data.pool.take(share)
        start = time.perf_counter()
        scores = self.score(trainer, pool, round)
        seconds = time.perf_counter() - start
        if not (is_finite := np.isfinite(scores.logits)).all():
            raise NonFiniteScoreError("unlabeled_dataset", np.unique(pool.rows[~is_finite]).tolist())
        mask, threshold = self._select_with_quotas(scores, pool)
        kept = np.flatnonzero(mask)
        first_is_chosen = scores.logits > 0
        # The two sequences of a comparison are its two orders.
        is_scalar = trainer.comparison is None
        length_difference = _length_difference(pool, first_is_chosen)
        chosen_is_longer = length_difference > 0
        facts: dict[str, Any] = {
            "round": round + 1,
            "pool_size": len(pool),
            "kept": len(kept),
            "coverage": len(kept) / len(pool),
            "ties": int(scores.is_tie.sum()),
            "mean_confidence": float(scores.confidence[kept].mean()) if len(kept) else None,
            "confidence_threshold": threshold,
            "temperature": scores.temperature,
            # A model that likes length keeps pairs that teach it more of that.
            "chosen_longer": float(chosen_is_longer[kept].mean()) if len(kept) and is_scalar else None,
            "chosen_longer_in_pool": float(chosen_is_longer.mean()) if is_scalar else None,
            "scoring_seconds": seconds,
            "scoring_pairs_per_second": len(pool) / seconds,
        }
        if scores.orders_agree is not None:
            facts["order_disagreement"] = float(1 - scores.orders_agree.mean())
        if scores.models_agree is not None:
            facts["model_disagreement"] = float(1 - scores.models_agree.mean())
        if pool.gold is not None and len(kept):
            facts["pseudo_label_accuracy"] = float((first_is_chosen == pool.gold)[kept].mean())
        facts = {name: value for name, value in facts.items() if value is not None}
        if trainer.accelerator.is_main_process:
            summary = summarize_labeling(pool, scores, mask, threshold, length_difference if is_scalar else None)
            trainer.run.write_labeling(round + 1, summary)
            labels = self._labels(scores, share, kept)
            features = Features({**pool.text_features, **LABEL_FEATURES, "round": Value("int64")})
            parts = self._with_texts(labels, round + 1, pool, kept, features)
            trainer.run.write_pseudo_labels(round + 1, features, parts, facts)
        trainer.accelerator.wait_for_everyone()

    @staticmethod
    def _with_texts(
        labels: dict[str, np.ndarray], round: int, pool: "Pool", kept: np.ndarray, features: Features
    ) -> Iterator[Dataset]:
        """Pseudo-labels in parts, each pair with its texts and the round that it is for."""
        start = 0
        for texts in pool.iterate_texts(kept, labels["first_is_chosen"]):
            columns = {name: [each[name] for each in texts] for name in pool.text_features}
            columns |= {name: values[start : start + len(texts)].tolist() for name, values in labels.items()}
            yield Dataset.from_dict({**columns, "round": [round] * len(texts)}, features=features)
            start += len(texts)

    @staticmethod
    def _labels(scores: PairScores, share: np.ndarray, kept: np.ndarray) -> dict[str, np.ndarray]:
        """The kept pairs by their place in the pool: the columns of `LABEL_FEATURES`."""
        return {
            "confidence": scores.confidence[kept],
            "pair": share[kept],
            "first_is_chosen": (scores.logits > 0)[kept],
        }

    def _select_with_quotas(self, scores: PairScores, pool: "Pool") -> tuple[np.ndarray, float | None]:
        """Mask of the pairs to keep, after every condition and quota, and the threshold if there is one."""
        # Rewards so close that the confidence is one half are a tie too: the collator trains on none of them.
        args, is_candidate = self.trainer.args, scores.confidence > 0.5
        if args.require_order_agreement:
            assert scores.orders_agree is not None
            is_candidate &= scores.orders_agree
        if args.require_agreement and scores.models_agree is not None:
            is_candidate &= scores.models_agree
        if args.max_pairs_per_prompt is not None:
            prompts = prompt_groups(pool.source)[pool.rows]
            quota = np.full(prompts.max() + 1, args.max_pairs_per_prompt)
            is_candidate = within_quota(is_candidate, scores.confidence, prompts, quota)
        threshold = None
        if self.has_own_policy:
            mask = np.asarray(self.select(scores))
            if mask.shape != (len(pool),) or mask.dtype != bool:
                raise ValueError(
                    f"The selection policy returned an array of shape {mask.shape} and type {mask.dtype}; it has to be a "
                    f"mask of type bool with one value for each of the {len(pool)} pairs."
                )
        else:
            candidates = scores.take(np.flatnonzero(is_candidate))
            threshold = self.threshold(candidates) if len(candidates.logits) else 1.0
            mask = above_threshold(scores, threshold)
        mask = mask & is_candidate
        for name in args.balance_by or []:
            if name == "length":
                difference = _length_difference(pool, scores.logits > 0)
                borders = np.quantile(difference, np.linspace(0, 1, NUM_LENGTH_GROUPS + 1)[1:-1])
                groups = np.searchsorted(borders, difference)
            elif name == "prompt":
                groups = prompt_groups(pool.source)[pool.rows]
            else:
                values = (str(row[name]) for row in iterate_rows(pool.source, [name]))
                groups = group_numbers(values)[pool.rows]
            mask = balanced(mask, scores.confidence, groups)
        return mask, threshold

    def _weight(self, round: int) -> float:
        """Weight of a pseudo-label in a round."""
        args = self.trainer.args
        return args.pseudo_label_weight * min(1.0, round / max(1, args.pseudo_label_warmup_rounds))

    def _debiased(self, rows: Dataset, facts: dict[str, Any]) -> Dataset:
        """
        The rows, whose weights make their sum a mean over the pool, and the pseudo-labels that the labeled pairs would
        have got, to be subtracted.
        """
        trainer = self.trainer
        scores = PairScores(trainer.folds.held_out_logits(trainer.round), trainer.round_history[-1]["temperature"])
        kept = np.flatnonzero(above_threshold(scores, facts["confidence_threshold"]))
        own = trainer.data.labeled.select_columns(["chosen_ids", "rejected_ids"]).select(kept)
        own = own.add_column("probability", scores.probability[kept].tolist())
        own = own.add_column("weight", [-self._weight(facts["round"])] * len(own))
        return concatenate_datasets([rows, own.cast(rows.features)]) if len(own) else rows

    def _training_rows(self, labels: dict[str, np.ndarray], round: int) -> Dataset:
        pool, pairs, confidence = self.trainer.data.pool, labels["pair"], labels["confidence"]
        columns = {"probability": np.where(labels["first_is_chosen"], confidence, 1 - confidence)}
        args, weight = self.trainer.args, self._weight(round)
        if args.debias_pseudo_labels:
            weight *= len(self.trainer.data.labeled) / len(self.trainer.share_of_pool(round))
        # Otherwise it is the collator's, which may be the user's own.
        if args.debias_pseudo_labels or args.pseudo_label_warmup_rounds:
            columns["weight"] = np.full(len(pairs), weight)
        ids = {"chosen_ids": pool.pairs.first, "rejected_ids": pool.pairs.second}
        # What lies on disk is written to disk in its new order, once for all processes, and as Arrow, not as objects.
        with self.trainer.accelerator.main_process_first():
            tokens = [
                select_rows(pool.pairs.sequences, position[pairs])
                .rename_column("input_ids", name)
                .with_format("arrow")
                .flatten_indices()
                .with_format(None)
                for name, position in ids.items()
            ]
        return concatenate_datasets([*tokens, in_memory(columns)], axis=1)


def _length_difference(pool: "Pool", first_is_chosen: np.ndarray) -> np.ndarray:
    """`np.ndarray` of shape `(num_pairs,)`, int64: tokens that the preferred sequence has more than the other."""
    difference = pool.pairs.lengths[pool.pairs.first] - pool.pairs.lengths[pool.pairs.second]
    return np.where(first_is_chosen, difference, -difference)


def _same_labels(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(before[name], now[name]) for name in ("pair", "first_is_chosen"))
