import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction, TrainOutput
from trl import RewardConfig

from .config import SSRMConfig
from .io.files import telling_where
from .models.adapters import merged, prepare_quantized
from .models.backbone import freeze_backbone
from .models.calibration import save_temperature
from .models.classifier import complete_config
from .models.comparison import Comparison
from .models.loading import suppress_load_report
from .models.sharding import check_sharding
from .models.tokenizers import model_id
from .reporting.card import add_rounds, copy_card, trained_on
from .reporting.progress import RoundProgress, keep_logs_off_the_console
from .reporting.trackers import report_run
from .reporting.verdict import verdict
from .rounds.arguments import Arguments, refuse_without_pool
from .rounds.callback import PseudoLabelingCallback, RoundCallbackHandler
from .rounds.folds import Folds
from .rounds.interruption import leaving_with_advice
from .rounds.label import join
from .rounds.linear import LinearModel
from .rounds.pretraining import Pretraining
from .rounds.round_trainer import RunRecorder
from .rounds.run_data import by_name, prepare_run_data, report_too_long
from .rounds.run_directory import RunDirectory
from .rounds.settings import resolve_settings
from .rounds.steps import RoundSteps
from .scoring.inputs import check_padding


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class SSRMTrainer(RoundSteps):
    """
    Trainer for reward models on few labeled and many unlabeled pairs, by [Semi-Supervised Reward Modeling via Iterative
    Self-Training](https://huggingface.co/papers/2409.06903).

    Round 0 trains on the labeled pairs as [`~trl.RewardTrainer`] does. Each further round labels the unlabeled pairs
    with the model so far, and trains on labeled and pseudo-labeled pairs. By default one round starts again where round 0
    has started, and trains on soft labels of the whole pool; [`SSRMConfig.paper`] keeps the confident pairs, round after round. Without
    `unlabeled_dataset` it is [`~trl.RewardTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ssrm import SSRMConfig, SSRMTrainer

    >>> dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

    >>> trainer = SSRMTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=SSRMConfig(output_dir="Qwen3-0.6B-SSRM"),
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
            to be a [`~datasets.Dataset`]. A pair whose column `tie` is `True` is one that people called a tie: its two
            completions stand in any order, and it is trained on with the target probability 0.5.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `dict[str, Dataset | IterableDataset]`, *optional*):
            Held-out labeled pairs. Besides the evaluation of [`~trl.RewardTrainer`], accuracy, log-loss, ECE and Brier
            score on them are logged at the end of each round. Ties are left out of all held-out figures: accuracy,
            log-loss, calibration errors, temperature and thresholds.
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
            Without it, `num_folds` fits one for round 0 on the labeled pairs; later rounds have 1 with soft labels, and that of
            round 0 with hard ones. Without both, it is 1.

    Attributes:
        round_history (`list[dict[str, float]]`):
            Facts of each round, from round 0 on.
        termination_reason (`str` or `None`):
            Why the rounds ended: `"max_rounds"`, `"nothing_selected"`, `"nothing_learned"` (held-out labels are predicted
            no better than by 0.5 for every pair, so soft labels would say nothing), `"no_change"` or `"callback"`.

    Raises:
        ValueError: If the data, the settings or the output directory can't be used; the message says what to change.
    """

    comparison: Comparison | None = None
    # Files or dataset IDs of `"labels"` and `"pool"`, for the model card and the report.
    sources: dict[str, str] = {}

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
        given = Arguments(model, args, processing_class, quantization_config, peft_config, self.has_pool)
        is_conversational = None
        if self.has_pool:
            is_conversational = given.prepare_pool(
                train_dataset, eval_dataset, calibration_dataset, data_collator, optimizers, compute_metrics
            )
        else:
            refuse_without_pool(calibration_dataset, callbacks)
        given.load_adapter()
        if given.is_pairwise:
            self.comparison = given.prepare_pairwise(data_collator)
        with suppress_load_report() if self.has_pool else contextlib.nullcontext():
            super().__init__(
                model=given.model,
                args=given.args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=given.processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=given.quantization_config,
                peft_config=given.peft_config,
            )
        self._prepare_model(given.is_quantized)
        self._complete_collator(data_collator)
        raw = {"train": train_dataset, **by_name(eval_dataset, "eval")}
        if self.has_pool:
            raw |= by_name(calibration_dataset, "calibration")
            self._prepare_rounds(raw, unlabeled_dataset, is_conversational)
        else:
            self._prepare_without_pool(raw)

    def _prepare_without_pool(self, raw: dict[str, Any]) -> None:
        # The model card names the trainer. Without a pool this one does nothing that `RewardTrainer` does not do.
        self._name, self._paper = super()._name, super()._paper
        if self.comparison is not None:
            made = {"train": self.train_dataset, **by_name(self.eval_dataset, "eval")}
            for name, data in raw.items():
                if isinstance(data, Dataset):
                    report_too_long(f"{name}_dataset", data, len(made[name]), self.args.max_length)

    def _prepare_model(self, is_quantized: bool) -> None:
        if is_quantized and is_peft_model(self.model):
            prepare_quantized(self.model)
        if self.has_pool:
            check_padding(self.model, self.processing_class.pad_token_id, self.accelerator)
        if isinstance(self.args, SSRMConfig) and self.args.freeze_backbone:
            if is_peft_model(self.model):
                raise ValueError("`freeze_backbone` trains the score head alone; leave `peft_config` out.")
            freeze_backbone(self.model)

    def _prepare_rounds(self, raw: dict[str, Any], unlabeled_dataset: Any, is_conversational: bool | None) -> None:
        """Index the data, make the pool, and resolve the settings."""
        check_sharding(self.accelerator, self.args.freeze_backbone)
        self.run = RunDirectory(str(self.args.output_dir))
        # A stream is written to the run directory, and may replace the rows of another run.
        with contextlib.nullcontext() if isinstance(unlabeled_dataset, Dataset) else self._alone():
            self.data = prepare_run_data(
                raw,
                {"train": self.train_dataset, **by_name(self.eval_dataset, "eval")},
                unlabeled_dataset,
                self.tokenize,
                self.model,
                self.args,
                is_conversational,
                by_pair=self.comparison is not None,
            )
        self.check_shares()
        own = [each for each in self.callback_handler.callbacks if isinstance(each, PseudoLabelingCallback)]
        if len(own) > 1:
            raise ValueError(f"`callbacks` has {len(own)} callbacks that label the pool; pass one.")
        self.pseudo_labeling_callback = callback = own[0] if own else PseudoLabelingCallback()
        if not own:
            self.add_callback(callback)
        if callback.teacher is not None:
            self.sources = {"teacher": model_id(callback.teacher.model)}
        self.recorder = RunRecorder(self)
        self.add_callback(self.recorder)
        self.add_callback(RoundProgress(self.accelerator, bool(self.args.disable_tqdm)))
        keep_logs_off_the_console(self)
        self.settings = resolve_settings(self.args, self.data, callback.labels_by_itself)
        self.folds = Folds(self, self.settings.num_folds)
        self.linear_model = LinearModel(self)
        self.pretraining = Pretraining(self, self.folds, self.linear_model)
        self.callback_handler = RoundCallbackHandler(self.callback_handler, self.args.report_to)
        self.round, self.round_history, self.labeling_facts, self.termination_reason = 0, [], {}, None

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
        """
        if not self.has_pool:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if trial is not None:
            raise ValueError(
                "Hyperparameter search does not support `unlabeled_dataset`; search on the labeled pairs."
            )
        with self._alone(), leaving_with_advice(self._how_to_go_on):
            self.train_dataset = self.data.labeled
            # Each step takes what it finds of itself in the run directory, so an interrupted run goes on from there.
            self._open_run(resume_from_checkpoint)
            self.choose_start(ignore_keys_for_eval)
            while True:
                self.train_round(ignore_keys_for_eval)
                self.measure_round()
                if (reason := self.reason_not_to_label()) is not None:
                    self.termination_reason = reason
                    break
                self.begin_labeling()
                if not self.has_labels:
                    share = self.share_of_pool(self.round + 1)
                    scores = self.score(share)
                    self.keep(share, scores, self.pseudo_labeling_callback.kept(scores))
                labels = self.read_labels()
                if (reason := self.reason_to_stop(labels)) is not None:
                    self.termination_reason = reason
                    break
                self.train_dataset = join(self.data.labeled, self.rows_of(labels))
                self.round += 1
            self.train_dataset = self.data.labeled
            return self._end_run()

    def _end_run(self) -> TrainOutput:
        """Load the weights of the kept round, write report and model card, and close the trackers."""
        last, kept, reason = self.round_history[-1], self.kept_round, self.termination_reason
        if kept != last["round"]:
            self.run.read_weights(self.run.weights_path(kept), self.unwrapped_model)
        if self.accelerator.is_main_process:
            words = trained_on(self.round_history, model_id(self.unwrapped_model), self.sources)
            self.run.write_end(reason, kept, words)
            self.run.prune_at_end({kept, last["round"]})
            report_run(str(self.args.output_dir), self.callback_handler.open_trackers, last["global_step"])
        self.create_model_card(model_name=self.run.output_dir.name)
        self.control = self.callback_handler.end_trackers(self.args, self.state, self.control)
        self.accelerator.print(" ".join(verdict(self.round_history, reason, kept)))
        # JSON has no NaN, so it was stored as null.
        train_loss = math.nan if (stored := self._ends_of_rounds[-1]["train_loss"]) is None else stored
        metrics = {**last, **self._speed(), "termination_reason": reason, "kept_round": kept}
        return TrainOutput(last["global_step"], train_loss, {**metrics, "train_loss": train_loss})

    # ---- What comes out ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        complete_config(self.unwrapped_model)
        super().save_model(output_dir, _internal_call)
        if self.comparison is not None and self.args.should_save:
            self.comparison.save_pretrained(str(output_dir or self.args.output_dir))
        if not _internal_call and self.args.should_save:
            save_temperature(str(output_dir or self.args.output_dir), self.kept_temperature)
            if self.has_pool:
                copy_card(self.run.output_dir, Path(output_dir or self.run.output_dir))

    def merge_and_save(self, output_dir: str) -> None:
        """
        Save a PEFT model with its adapter merged into the base model, for tools that take no adapters.

        A quantized base is loaded again in float32 from its source, and the adapter is merged into that.

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
            save_temperature(output_dir, self.kept_temperature)

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ):
        card = Path(str(self.args.output_dir)) / "README.md"
        with telling_where(card):
            super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.has_pool and self.is_world_process_zero():
            model, words = model_id(self.unwrapped_model), []
            if self.termination_reason is not None:
                words = verdict(self.round_history, self.termination_reason, self.kept_round)
                words.append(trained_on(self.round_history, model, self.sources))
            add_rounds(card, model, self.round_history, words)
