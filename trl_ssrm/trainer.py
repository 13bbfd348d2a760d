import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction, TrainOutput
from trl import RewardConfig

from .config import SSRMConfig
from .data.checks import check_labeled_data
from .data.collator import ConfidenceFilteredDataCollator
from .data.pool import Pool
from .io.files import telling_where
from .io.hub import check_model_is_there
from .models.adapters import is_quantized_by_bitsandbytes, merged, prepare_quantized, with_score_head
from .models.backbone import freeze_backbone
from .models.comparison import Comparison
from .models.pairwise import prepare_pairwise
from .models.sharding import check_sharding, spread, whole_weights
from .models.tokenizers import check_tokenizer, load_tokenizer
from .reporting.plots import saved_plots
from .reporting.progress import RoundProgress
from .reporting.report import round_table
from .reporting.trackers import RoundCallbackHandler, report_run
from .rounds.annotation import most_useful, write_for_labeling
from .rounds.calibrate import fit_temperature
from .rounds.callback import PseudoLabelingCallback
from .rounds.folds import Folds
from .rounds.interruption import leaving_with_advice
from .rounds.pair_trainer import PairTrainer
from .rounds.run_data import RunData, by_name, prepare_run_data, report_too_long
from .rounds.run_directory import RunDirectory, run_identity
from .rounds.select import precision_threshold
from .rounds.settings import check_arguments, check_held_out, complete_args, highest_precision
from .scoring.metrics import calibrated_metrics, preference_metrics, reliability_curve
from .scoring.pair_scores import PairScores
from .scoring.score import NonFiniteWeightError
from .scoring.vllm_scoring import VLLMScorer, check_vllm


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = logging.getLogger(__name__)
# What is used where the settings leave it open; the benchmark of quality says why.
DEFAULT_TARGET_PRECISION = 0.9


class SSRMTrainer(PairTrainer):
    """
    Trainer for reward models on few labeled and many unlabeled pairs, by [Semi-Supervised Reward Modeling via Iterative
    Self-Training](https://huggingface.co/papers/2409.06903).

    Round 0 trains on the labeled pairs as [`~trl.RewardTrainer`] does. Each further round labels the unlabeled pairs
    with the model so far, keeps those it is confident about, and trains on the labeled and the kept pairs. Without
    `unlabeled_dataset` it is [`~trl.RewardTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ssrm import SSRMConfig, SSRMTrainer

    >>> dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

    >>> trainer = SSRMTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=SSRMConfig(output_dir="Qwen3-0.6B-SSRM", num_rounds=3),
    ...     train_dataset=dataset.select(range(2_000)),
    ...     unlabeled_dataset=dataset.select(range(2_000, 32_000)),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.RewardTrainer`]. For a pairwise model, a directory or model ID of a causal
            language model, or what [`load_pairwise_model`] gives.
        args ([`SSRMConfig`] or [`~trl.RewardConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used. A plain
            [`~trl.RewardConfig`] is completed with the default rounds.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function to use to form a batch. With `unlabeled_dataset` it has to be a
            [`ConfidenceFilteredDataCollator`], which is also the default.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Labeled pairs, in any of the preference formats of [`~trl.RewardTrainer`]. With `unlabeled_dataset` it has
            to be a [`~datasets.Dataset`].
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `dict[str, Dataset | IterableDataset]`, *optional*):
            Held-out labeled pairs. Besides the evaluation of [`~trl.RewardTrainer`], accuracy, log-loss, ECE and Brier
            score on them are logged at the end of each round.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, as in [`~trl.RewardTrainer`].
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            As in [`~trl.RewardTrainer`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            As in [`~trl.RewardTrainer`]. A [`PseudoLabelingCallback`] among them replaces the default one.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            As in [`~trl.RewardTrainer`]; not with `unlabeled_dataset`, since every round starts a fresh optimizer.
        optimizer_cls_and_kwargs (`tuple[Type[torch.optim.Optimizer], Dict[str, Any]]`, *optional*):
            As in [`~trl.RewardTrainer`].
        preprocess_logits_for_metrics (`Callable[[torch.Tensor, torch.Tensor], torch.Tensor]`, *optional*):
            As in [`~trl.RewardTrainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            As in [`~trl.RewardTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            As in [`~trl.RewardTrainer`].
        unlabeled_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            The unlabeled pool: rows with `prompt` and `completions` (two or more, which give all their pairs), with
            `prompt`, `completion_a` and `completion_b`, or with `chosen` and `rejected`, whose labels are hidden. Text
            or conversations, as the labeled data. Pairs that are also in another dataset given here are left out. An
            [`~datasets.IterableDataset`] needs `max_unlabeled_samples`.
        calibration_dataset ([`~datasets.Dataset`], *optional*):
            Held-out labeled pairs on which a temperature for the confidence is fitted at the end of each round.
            Without it, `num_folds` does that on the labeled pairs; without both, the temperature is 1.

    Attributes:
        round_history (`list[dict[str, float]]`):
            Facts of each round, from round 0 on.
        termination_reason (`str` or `None`):
            Why the rounds ended: `"max_rounds"`, `"nothing_selected"`, `"no_change"` or `"no_improvement"`.

    Raises:
        ValueError: If the data, the settings or the output directory can't be used; the message names what to mend.
        ImportError: If `use_vllm` is set and vLLM is not installed.
    """

    _tag_names = ["trl", "reward-trainer", "ssrm"]
    _name = "SSRM"
    _paper = {
        "title": "Semi-Supervised Reward Modeling via Iterative Self-Training",
        "id": "2409.06903",
        # docstyle-ignore
        "citation": """\
@inproceedings{he2024semi,
    title     = {Semi-Supervised Reward Modeling via Iterative Self-Training},
    author    = {He, Yifei and Wang, Haoxiang and Jiang, Ziyan and Papangelis, Alexandros and Zhao, Han},
    booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2024},
    year      = {2024},
    url       = {https://arxiv.org/abs/2409.06903},
}""",
    }

    # What there is only with a pool.
    train_dataset: Dataset
    callback_handler: RoundCallbackHandler
    data: RunData
    run: RunDirectory
    round_history: list[dict[str, Any]]
    labeling_facts: dict[str, Any]
    termination_reason: str | None
    progress: RoundProgress

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: RewardConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        unlabeled_dataset: Dataset | IterableDataset | None = None,
        calibration_dataset: Dataset | None = None,
    ):
        self.has_pool = unlabeled_dataset is not None
        self.comparison: Comparison | None = None
        is_conversational = None
        is_pairwise = isinstance(args, SSRMConfig) and args.preference_model == "pairwise"
        is_quantized = quantization_config is not None or is_quantized_by_bitsandbytes(model)
        if self.has_pool or is_pairwise:
            loading = getattr(args, "model_init_kwargs", None)
            check_model_is_there(model, **loading if isinstance(loading, dict) else {})
        if self.has_pool:
            args = complete_args(args, model)
            processing_class = processing_class or load_tokenizer(model, args)
            held_out = by_name(eval_dataset, "eval_dataset") | by_name(calibration_dataset, "calibration_dataset")
            has_calibration = calibration_dataset is not None
            check_arguments(args, data_collator, train_dataset, optimizers, bool(held_out), has_calibration)
            is_conversational = check_labeled_data({"train_dataset": train_dataset, **held_out})
            check_tokenizer(args, processing_class, is_conversational)
            if args.use_vllm:
                check_vllm(args, is_quantized)
        elif calibration_dataset is not None:
            raise ValueError("`calibration_dataset` calibrates pseudo-labels, so it needs `unlabeled_dataset`.")
        elif any(isinstance(callback, PseudoLabelingCallback) for callback in callbacks or []):
            raise ValueError("`PseudoLabelingCallback` labels the pool, so it needs `unlabeled_dataset`.")
        if is_pairwise:
            assert isinstance(args, SSRMConfig)
            processing_class = processing_class or load_tokenizer(model, args)
            if data_collator is not None and getattr(data_collator, "comparison_seed", None) is None:
                raise ValueError(
                    "`data_collator` must be a `ConfidenceFilteredDataCollator` with a `comparison_seed`."
                )
            self.comparison, model, quantization_config, args = prepare_pairwise(
                model, args, processing_class, quantization_config
            )
        if self.has_pool or is_pairwise or is_quantized:
            peft_config = with_score_head(peft_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if is_quantized and is_peft_model(self.model):
            prepare_quantized(self.model)
        if isinstance(args, SSRMConfig) and args.freeze_backbone:
            if is_peft_model(self.model):
                raise ValueError("`freeze_backbone` trains the score head alone; leave `peft_config` out.")
            freeze_backbone(self.model)
        if data_collator is None and (self.has_pool or self.comparison is not None):
            self.data_collator = ConfidenceFilteredDataCollator(
                pad_token_id=self.processing_class.pad_token_id,
                pad_to_multiple_of=self.args.pad_to_multiple_of,  # type: ignore[arg-type]  # `"auto"` is resolved
                confidence_threshold=self.args.confidence_threshold or 0.5,
                pseudo_label_type=self.args.pseudo_label_type,
                pseudo_label_weight=self.args.pseudo_label_weight,
                pseudo_label_smoothing=self.args.pseudo_label_smoothing,
                comparison_seed=None if self.comparison is None else self.args.seed,
                comparison_orders=self.args.comparison_orders,
            )
        if not self.has_pool:
            # The model card names the trainer, and this one has done nothing that the parent does not do.
            self._name, self._paper = super()._name, super()._paper
            if self.comparison is not None:
                given = {"train_dataset": train_dataset, **by_name(eval_dataset, "eval_dataset")}
                made = {"train_dataset": self.train_dataset, **by_name(self.eval_dataset, "eval_dataset")}
                for name, data in given.items():
                    if isinstance(data, Dataset):
                        report_too_long(name, len(data), len(made[name]), self.args.max_length)
            return

        check_sharding(self.accelerator, self.args.freeze_backbone, self.args.use_vllm)
        self.run = RunDirectory(str(self.args.output_dir))
        # A stream is written to where the run is, and may replace that of another one.
        with contextlib.nullcontext() if isinstance(unlabeled_dataset, Dataset) else self._alone():
            self.data = prepare_run_data(
                self, train_dataset, eval_dataset, unlabeled_dataset, calibration_dataset, is_conversational
            )
        self.round = 0
        self.round_history = []
        self.labeling_facts = {}
        self.termination_reason = None
        own = [
            callback for callback in self.callback_handler.callbacks if isinstance(callback, PseudoLabelingCallback)
        ]
        if len(own) > 1:
            raise ValueError(f"`callbacks` has {len(own)} callbacks that label the pool; pass one.")
        self.pseudo_labeling_callback = own[0] if own else PseudoLabelingCallback()
        self.pseudo_labeling_callback.trainer = self
        if not own:
            self.add_callback(self.pseudo_labeling_callback)
        labels_by_itself = not self.pseudo_labeling_callback.has_own_scores
        self.folds = Folds(self, labels_by_itself)
        can_ask_folds = self.folds.num_folds and labels_by_itself and not self.args.debias_pseudo_labels
        self.second_opinion = self.args.second_opinion or ("folds" if can_ask_folds else "none")
        check_held_out(self.args, self.data, self.folds.num_folds)
        self.target_precision = self._choose_target_precision()
        if self.pseudo_labeling_callback.check(self.args, self.data.pool):
            # It decides; the collator's own filter leaves only ties out.
            self.data_collator.confidence_threshold = 0.5
        self.callback_handler = RoundCallbackHandler(self.callback_handler, self.args.report_to)

    # ---- The rounds ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: "Any | None" = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Main training entry point: all the rounds.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True`, or the output directory, to go on with the run in `output_dir` wherever it was interrupted, in
                training or in scoring.
            trial (`optuna.Trial` or `dict[str, Any]`, *optional*):
                As in [`~transformers.Trainer.train`]; not with `unlabeled_dataset`.
            ignore_keys_for_eval (`list[str]`, *optional*):
                As in [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: the steps of all rounds, the training loss of the last one,
            and its facts.

        Raises:
            ValueError: If `output_dir` holds another run, or holds a run that is not to be resumed.
            NonFiniteScoreError: If the model gives a NaN or infinite reward.
            NonFiniteWeightError: If training makes a weight NaN or infinite.
            torch.OutOfMemoryError: If a batch does not fit into memory in training; the message says what to change.
            RuntimeError: If vLLM can't run the model, before a round is trained, or fails in scoring.
        """
        if not self.has_pool:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if trial is not None:
            raise ValueError(
                "Hyperparameter search does not support `unlabeled_dataset`; search on the labeled pairs."
            )

        self.progress = RoundProgress(self.accelerator, bool(self.args.disable_tqdm))
        with self._alone(), leaving_with_advice(self._how_to_go_on):
            # A run that was interrupted in this process has left the pairs of its round.
            self.train_dataset = self.data.labeled
            self._open_run(resume_from_checkpoint)
            while True:
                if self.round == len(self.round_history):
                    self.folds.train(self.round, ignore_keys_for_eval)
                    self._train_round(ignore_keys_for_eval)
                    self._end_round()
                if self.round == self.args.num_rounds:
                    self.termination_reason = "max_rounds"
                    break
                if self.args.round_patience is not None and self.round - self.best_round >= self.args.round_patience:
                    self.termination_reason = "no_improvement"
                    break
                pseudo_labeled = self.pseudo_labeling_callback.on_round_end(
                    self.args, self.state, self.control, trainer=self, round=self.round
                )
                if pseudo_labeled is None:
                    self.termination_reason = self.pseudo_labeling_callback.termination_reason
                    break
                self.train_dataset = self.data_collator.build_dataset(self.data.labeled, pseudo_labeled)
                self.round += 1
            self.train_dataset = self.data.labeled
            return self._end_run()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse to work beside another run in the output directory."""

        def acquire() -> str | None:
            try:
                self.run.acquire()
            except (ValueError, OSError) as error:
                return str(error)
            return None

        # Told to every process: one that stopped alone would leave the others waiting.
        if (error := self.on_main_process(acquire)) is not None:
            raise ValueError(error)
        try:
            yield
        finally:
            self.run.release()

    def _how_to_go_on(self) -> str | None:
        if not self.accelerator.is_main_process or not self.run.has_run:
            return None
        return (
            f"Interrupted in round {self.round}. Go on with `train(resume_from_checkpoint=True)`: the run in "
            f"{self.args.output_dir} continues from its last checkpoint or scored shard."
        )

    def _open_run(self, resume_from_checkpoint: str | bool | None) -> None:
        """Start a run in the output directory, or load the one in it up to the last round that is over."""
        run, model = self.run, self.unwrapped_model
        if isinstance(resume_from_checkpoint, str) and (
            Path(resume_from_checkpoint).resolve() != run.output_dir.resolve()
        ):
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, but a run with `unlabeled_dataset` is resumed "
                f"from its `output_dir` ({self.args.output_dir!r}); pass `True`."
            )
        data = self.data.fingerprints
        if (teacher := self.pseudo_labeling_callback.teacher) is not None:
            data["teacher"] = teacher.fingerprint
        identity = run_identity(self.args, model, data)

        def start() -> str | None:
            try:
                run.start(identity, resume=bool(resume_from_checkpoint))
            except (ValueError, OSError) as error:
                return str(error)
            return None

        # Told to every process: one that stopped alone would leave the others waiting.
        if (error := self.on_main_process(start)) is not None:
            raise ValueError(error)
        num_finished = self.on_main_process(lambda: run.num_finished)
        if num_finished == 0 and not self.on_main_process(run.weights_path(-1).is_file):
            self.write_weights(run.weights_path(-1))
        self.round = max(num_finished - 1, 0)
        rounds = [run.read_round(round) for round in range(num_finished)]
        self.round_history = [round["facts"] for round in rounds]
        self.labeling_facts = {}
        self.pseudo_labeling_callback.log_history = rounds[-1]["log_history"] if rounds else []
        run.read_weights(run.weights_path(num_finished - 1), model)
        if num_finished > 0:
            self._shard()
        if self.args.freeze_backbone:
            # In batches that depend on the content alone, so that a resumed run has the same features to the bit.
            for name, pairs in self.data.all_pairs.items():
                self.score_pairs(pairs, name)
        if self.args.use_vllm and num_finished == 0 and self.args.num_rounds > 0:
            # What vLLM can't do shows before a round is trained.
            self.score_pool(self.data.pool.take(np.arange(1)))
        if num_finished > 0:
            self._load_state(self.round)
            self.state.log_history = self.pseudo_labeling_callback.log_history
            self.accelerator.print(f"Resuming the run in {self.args.output_dir} after round {self.round}.")

    def _train_round(self, ignore_keys_for_eval: list[str] | None) -> None:
        """Train the weights of a round, or load them if the run was interrupted between training and measuring."""
        run, round = self.run, self.round
        if self.on_main_process(lambda: run.is_trained(round)):
            run.read_weights(run.weights_path(round), self.unwrapped_model)
            self._load_state(round)
            return
        if round > 0 and self.args.round_init == "base":
            run.read_weights(run.weights_path(-1), self.unwrapped_model)
        self.train_once(self.on_main_process(lambda: run.last_checkpoint(round)), ignore_keys_for_eval)
        self.write_weights(run.weights_path(round))
        if self.accelerator.is_main_process:
            run.write_state(round, self.state)
        self.accelerator.wait_for_everyone()

    def train_once(self, checkpoint: str | None, ignore_keys_for_eval: list[str] | None) -> None:
        """
        Train on `train_dataset` as [`~trl.RewardTrainer`] does, from the weights in the model, for one round.

        Args:
            checkpoint (`str` or `None`):
                Directory of a checkpoint of this round to go on from.
            ignore_keys_for_eval (`list[str]` or `None`):
                As in [`~transformers.Trainer.train`].
        """
        # A round depends on its data, its initial weights and this seed alone, so that it can be resumed. Round 0 starts
        # from the seed that `RewardTrainer` starts from.
        set_seed(self.args.seed + self.round)
        self.optimizer = None
        self._num_norms = 0
        self._num_overflows: Any = 0
        self._leave_engine()
        spread(self.unwrapped_model)
        with self._round_length():
            try:
                super().train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                raise torch.OutOfMemoryError(
                    f"Round {self.round} does not fit into memory with batches of {self.args.per_device_train_batch_size} "
                    "pairs; lower `per_device_train_batch_size` and raise `gradient_accumulation_steps` as much, set "
                    "`gradient_checkpointing=True`, lower `max_length`, or train an adapter (`peft_config`)."
                ) from error
        if num_lost := int(self._num_overflows):
            logger.warning(
                f"In {num_lost} of {self._num_norms} steps of round {self.round} the gradients were so large that their norm "
                "overflowed; clipping makes such gradients zero, so nothing was learned from these steps. Make the rewards "
                "smaller: scale the weights of the score head down, or start from another checkpoint."
            )

    def write_weights(self, path: Path) -> None:
        """
        Keep the trainable weights of the model, in every process at the same time.

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

    def _end_round(self) -> None:
        """Measure the model of a round on the held-out pairs, fit the temperature, and log and keep the facts."""
        facts: dict[str, Any] = {"round": self.round, "temperature": 1.0}
        logits_of: dict[str, np.ndarray] = {}
        for name, pairs in self.data.held_out.items():
            scores = self.score_pairs(pairs, f"{name}_dataset")
            logits_of[name] = scores.logits
            if scores.orders_agree is not None:
                facts[f"{name}_order_disagreement"] = float(1 - scores.orders_agree.mean())
        if self.folds.num_folds:
            logits_of["cross_fit"] = self.folds.held_out_logits(self.round)
        calibrated_by = next((name for name in ("calibration", "cross_fit") if name in logits_of), None)
        if calibrated_by is not None:
            facts["temperature"] = fit_temperature(logits_of[calibrated_by])
        for name, logits in logits_of.items():
            metrics = preference_metrics(logits)
            if calibrated_by is not None:
                metrics |= calibrated_metrics(logits, facts["temperature"])
            facts |= {f"{name}_{metric}": value for metric, value in metrics.items()}
        if self.target_precision is not None:
            assert calibrated_by is not None
            threshold = precision_threshold(logits_of[calibrated_by], facts["temperature"], self.target_precision)
            # 1 is exceeded by nothing.
            facts["precision_threshold"] = 1.0 if threshold is None else threshold
        self.log(dict(facts))
        self.pseudo_labeling_callback.log_history = self.state.log_history
        facts |= {
            "num_train_pairs": len(self.train_dataset),
            "global_step": self._steps_before_round + self.state.global_step,
        }
        # What the pool gave to this round. Round 0 had nothing from it.
        facts |= {name: value for name, value in self.labeling_facts.items() if name not in facts}
        self.round_history.append(facts)
        self.progress.end_round(self.round_history)
        reliability = {
            name: {
                "before": reliability_curve(logits),
                "after": reliability_curve(logits, facts["temperature"]),
            }
            for name, logits in logits_of.items()
        }
        if self.accelerator.is_main_process:
            self.run.write_round(self.round, facts, self.state.log_history, reliability)
            needed = {self.round}
            needed |= {-1} if self.args.round_init == "base" else set()
            needed |= {self.best_round} if self._keeps_best_round else set()
            needed |= {0} if self.second_opinion == "first_round" else set()
            self.run.prune_weights(needed)
        self.accelerator.wait_for_everyone()

    def _end_run(self) -> TrainOutput:
        """Load the round that is kept, write the model card, and close the trackers."""
        last = self.round_history[-1]
        kept = self.best_round if self._keeps_best_round else last["round"]
        if kept != last["round"]:
            self.run.read_weights(self.run.weights_path(kept), self.unwrapped_model)
        if self.accelerator.is_main_process:
            self.run.write_end(self.termination_reason, kept)
            report_run(str(self.args.output_dir), self.callback_handler.open_trackers, last["global_step"])
        self.create_model_card(model_name=self.run.output_dir.name)
        self.control = self.callback_handler.end_trackers(self.args, self.state, self.control)
        self.accelerator.print(
            f"The rounds ended after round {last['round']} ({self.termination_reason}); the model is that of round {kept}."
        )
        train_loss = next(log["train_loss"] for log in reversed(self.state.log_history) if "train_loss" in log)
        # Read from a file, which has no other word for what is not finite.
        train_loss = math.nan if train_loss is None else train_loss
        metrics = {**last, "termination_reason": self.termination_reason, "kept_round": kept}
        return TrainOutput(last["global_step"], train_loss, metrics)

    @property
    def best_round(self) -> int:
        """`int`: the round so far with the lowest held-out log-loss; see `keep_best_round`."""
        names = ("calibration", "cross_fit", "eval", *self.data.held_out)
        facts_of = self.round_history
        name = next(name for name in names if f"{name}_log_loss" in facts_of[0])
        metric = f"{name}_calibrated_log_loss" if f"{name}_calibrated_log_loss" in facts_of[0] else f"{name}_log_loss"
        return min(facts_of, key=lambda facts: facts[metric])["round"]

    def _choose_target_precision(self) -> float | None:
        """`target_precision` as it was set or, where nothing says how to choose the threshold, that of the default."""
        args = self.args
        is_set = args.confidence_threshold is not None or args.selected_fraction is not None or args.adaptive_threshold
        if args.target_precision is not None or is_set or self.pseudo_labeling_callback.has_own_scores:
            return args.target_precision
        is_possible = highest_precision(self.data, self.folds.num_folds) >= DEFAULT_TARGET_PRECISION
        return DEFAULT_TARGET_PRECISION if is_possible else None

    @property
    def _keeps_best_round(self) -> bool:
        if self.args.keep_best_round is None:
            return "calibration" in self.data.held_out or self.folds.num_folds > 0
        return self.args.keep_best_round

    @property
    def _steps_before_round(self) -> int:
        finished = self.round_history[: self.round]
        return finished[-1]["global_step"] if finished else 0

    @contextlib.contextmanager
    def _round_length(self) -> Iterator[None]:
        """Make the arguments say how long the current round is."""
        args = self.args
        first_round = args.num_train_epochs, args.max_steps
        if self.round > 0 and args.round_num_train_epochs is not None:
            args.num_train_epochs, args.max_steps = args.round_num_train_epochs, -1
        try:
            yield
        finally:
            args.num_train_epochs, args.max_steps = first_round

    def second_opinions(self, round: int, temperature: float) -> list[np.ndarray]:
        """
        What everyone but the model of a round says of the pairs that the next round may train on.

        Args:
            round (`int`):
                The round that has ended.
            temperature (`float`):
                Its temperature.

        Returns:
            `list[np.ndarray]` of shape `(num_pairs,)` each, float64: pair logits to be divided by that temperature; none
            without `second_opinion`.
        """
        if self.second_opinion == "folds":
            return self.folds.pool_logits(round)
        if self.second_opinion == "none" or round == 0:
            return []
        pool = self.data.pool.take(self.share_of_pool(round + 1))
        self.run.read_weights(self.run.weights_path(0), self.unwrapped_model)
        # Round 1 has scored them, unless its share of the pool was another one.
        directory, key = self.run.round_dir(1) / "scores", self.scores_key(0, pool)
        scores = self.score_pool(pool, directory, key)
        self.run.read_weights(self.run.weights_path(round), self.unwrapped_model)
        return [scores.logits * temperature / self.round_history[0]["temperature"]]

    def score_pool(self, pool: Pool, directory: Path | None = None, key: str = "") -> PairScores:
        """
        Score pairs of the pool with the current weights, with `use_vllm` in an engine that is started over them.

        Args:
            pool ([`Pool`]):
                The pool, or a part of it.
            directory (`Path`, *optional*):
                Where finished shards are kept.
            key (`str`, *optional*, defaults to `""`):
                Names the weights and the pairs; a shard with another key is scored again.

        Returns:
            [`PairScores`]: the scores at temperature 1, the same in every process.

        Raises:
            NonFiniteScoreError: If a reward is NaN or infinite.
            RuntimeError: If vLLM fails.
        """
        engine = None
        if self.args.use_vllm:
            engine = VLLMScorer(
                self.unwrapped_model,
                self.processing_class,
                self.accelerator,
                self.run.root,
                longest=int(self.data.pool.pairs.lengths.max()),
                gpu_memory_utilization=self.args.vllm_gpu_memory_utilization,
            )
        return self.score_pairs(
            pool.pairs, "unlabeled_dataset", rows=pool.rows, directory=directory, key=key, engine=engine
        )

    def scores_key(self, round: int, pool: Pool) -> str:
        """
        Name of the scores of a pool under the weights of a round.

        Args:
            round (`int`):
                The round.
            pool ([`Pool`]):
                What was scored.

        Returns:
            `str`
        """
        return f"{self.run.weights_hash(self.run.weights_path(round))} {pool.pairs.fingerprint}"

    def export_for_labeling(self, path: str, num_pairs: int) -> None:
        """
        Write the pairs of the pool whose labels would help most: uncertain ones, of different prompts, and far from one
        another. [`load_labels`] brings the answers back.

        Args:
            path (`str`):
                File to write, one JSON object a line; see [`load_labels`].
            num_pairs (`int`):
                Number of pairs to write, fewer if the pool has fewer prompts.

        Raises:
            ValueError: If there is no pool, `num_pairs` is not positive, or the file is there, whose labels would be lost.
        """
        if not self.has_pool:
            raise ValueError("`export_for_labeling` chooses from the pool, so it needs `unlabeled_dataset`.")
        if num_pairs < 1:
            raise ValueError(f"`num_pairs` must be positive, got {num_pairs}.")
        if self.on_main_process(lambda: Path(path).exists()):
            raise ValueError(f"{path} is there already, perhaps with labels in it; choose another file, or delete it.")
        pool = self.data.pool
        scores = self.score_pool(pool)
        if self.accelerator.is_main_process:
            write_for_labeling(pool, most_useful(scores, pool, num_pairs), scores, path)
        self.accelerator.wait_for_everyone()

    def _load_state(self, round: int) -> None:
        self.state = self.run.read_state(round)
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()

    # ---- What the callback uses ----

    def share_of_pool(self, round: int) -> np.ndarray:
        """
        Pairs of the pool that a round may train on.

        Args:
            round (`int`):
                Round after round 0.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`, int64: positions in the pool, ascending.
        """
        if self.args.pool_per_round == "full":
            return np.arange(len(self.data.pool))
        rows = np.random.default_rng(self.args.seed).permutation(len(self.data.pool.source))
        return np.flatnonzero(np.isin(self.data.pool.rows, rows[round - 1 :: self.args.num_rounds]))

    # ---- Where a round differs from a run of the parent ----

    def _get_output_dir(self, trial):
        # Private in `Trainer`: each round counts its steps from 0, so each has its own place for checkpoints.
        if not self.has_pool:
            return super()._get_output_dir(trial)
        return str(self.run.round_dir(self.round))

    def _get_grad_norm(self, model, grad_norm=None):
        # Private in `Trainer`: the only place that sees the norm of every step, and not of those alone that are logged.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # Scaling of half precision overflows on purpose.
        if self.has_pool and norm is not None and not self.args.fp16:
            norm_of_all = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
            # Added up where it is: to read it would wait for the device.
            self._num_norms, self._num_overflows = self._num_norms + 1, self._num_overflows + ~norm_of_all.isfinite()
        return norm

    def _save_checkpoint(self, model, trial):
        # Private in `Trainer`, whose libraries each have their own way to say that a disk is full.
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with telling_where(checkpoint):
            super()._save_checkpoint(model, trial)

    def _load_best_model(self):
        # Private in `Trainer`, which would take whatever the weights are by now.
        if self.has_pool:
            checkpoint = Path(str(self.state.best_model_checkpoint))
            if (damage := self.on_main_process(lambda: self.run.damage_of(checkpoint))) is not None:
                raise ValueError(
                    f"{damage}, which is the best of round {self.round}; put a copy in its place, or delete the checkpoints "
                    "of the round and resume it."
                )
        super()._load_best_model()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.has_pool:
            return super().log(logs, start_time)
        if self.folds.is_training:
            # Private in `RewardTrainer`: what the log of the round's own model would take for its own.
            for metrics in self._metrics.values():
                metrics.clear()
            return
        # Trackers draw over the steps of all rounds, while `Trainer` counts those of one.
        steps = self._steps_before_round
        logs.setdefault("round", self.round)
        self.state.global_step += steps
        try:
            super().log(logs, start_time)
        finally:
            self.state.global_step -= steps

    # ---- What comes out ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.comparison is not None and self.args.should_save:
            self.comparison.save_pretrained(str(output_dir or self.args.output_dir))
        if not self.has_pool or _internal_call or not self.args.should_save:
            return
        card = self.run.output_dir / "README.md"
        target = Path(output_dir or self.run.output_dir) / "README.md"
        if card.is_file() and target.resolve() != card.resolve():
            shutil.copyfile(card, target)
            for plot in saved_plots(card.parent / "plots").values():
                target.with_name("plots").mkdir(exist_ok=True)
                shutil.copyfile(plot, target.parent / "plots" / plot.name)

    def merge_and_save(self, output_dir: str) -> None:
        """
        Save a PEFT model with its adapter merged into the base model, for tools that take no adapters.

        A quantized base is loaded again in float32 from where it came, and the adapter merged into that.

        Args:
            output_dir (`str`):
                Directory to save to.

        Raises:
            ValueError: If the model is no PEFT model; use `save_model` then.
        """
        if not is_peft_model(self.unwrapped_model):
            raise ValueError("The model has no adapter to merge; use `save_model`.")
        if self.args.should_save:
            merged(self.unwrapped_model).save_pretrained(output_dir)
            if self.comparison is not None:
                self.comparison.save_pretrained(output_dir)
            self.processing_class.save_pretrained(output_dir)

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ):
        with telling_where(Path(str(self.args.output_dir)) / "README.md"):
            super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.has_pool and self.is_world_process_zero():
            card = self.run.output_dir / "README.md"
            text, heading = card.read_text(encoding="utf-8"), "### Framework versions"
            plots = saved_plots(card.parent / "plots")
            images = "".join(f"![{title}](plots/{path.name})\n\n" for title, path in plots.items())
            section = f"### Rounds\n\n{round_table(self.round_history)}\n\n{images}"
            card.write_text(text.replace(heading, section + heading, 1), encoding="utf-8")
