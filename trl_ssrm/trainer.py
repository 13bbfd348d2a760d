import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn as nn
from accelerate.utils import DistributedType, broadcast_object_list, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction, TrainOutput
from transformers.utils import logging
from trl import RewardConfig, RewardTrainer

from .calibration import fit_temperature, preference_metrics
from .callback import PseudoLabelingCallback, RoundCallbackHandler
from .collator import ConfidenceFilteredDataCollator
from .config import SSRMConfig
from .pool import Pool, build_pool, check_preference_dataset, report_dropped
from .report import round_line, round_table
from .rounds import RunDirectory, content_hash
from .scoring import PairedSequences, score_pairs


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


logger = logging.get_logger(__name__)

T = TypeVar("T")

# Settings that decide the result besides the data and the model. A run is resumed with the same ones only.
_DECISIVE_SETTINGS = (
    *(name for name in SSRMConfig.__annotations__ if name not in ("score_batch_tokens", "track_pseudo_label_accuracy")),
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "max_grad_norm"),
    *("seed", "data_seed", "bf16", "fp16", "max_length", "center_rewards_coefficient", "disable_dropout"),
    *("load_best_model_at_end", "metric_for_best_model", "neftune_noise_alpha", "train_sampling_strategy"),
)


class SSRMTrainer(RewardTrainer):
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
            Model to be trained, as in [`~trl.RewardTrainer`].
        args ([`SSRMConfig`] or [`~trl.RewardConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used. A plain
            [`~trl.RewardConfig`] is completed with the default rounds.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function to use to form a batch. With `unlabeled_dataset` it has to be a
            [`ConfidenceFilteredDataCollator`], which is also the default.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Labeled pairs, in any of the preference formats of [`~trl.RewardTrainer`]. With `unlabeled_dataset` it has
            to be a [`~datasets.Dataset`].
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], [`~datasets.DatasetDict`], [`~datasets.IterableDatasetDict`] or `dict[str, Dataset | IterableDataset]`):
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
            Without it, the temperature is 1.

    Attributes:
        round_history (`list[dict[str, float]]`):
            Facts of each round, from round 0 on.
        termination_reason (`str` or `None`):
            Why the rounds ended: `"max_rounds"`, `"nothing_selected"` or `"no_change"`.

    Raises:
        ValueError: If the data, the settings or the output directory can't be used; the message names what to mend.
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
        self.pool: Pool | None = None
        self.run: RunDirectory | None = None
        if unlabeled_dataset is not None:
            args = self._complete_args(args, model)
            processing_class = processing_class or self._load_tokenizer(model, args)
            self._check_arguments(args, data_collator, train_dataset, eval_dataset, optimizers, calibration_dataset)
            is_conversational = self._check_data(
                args, processing_class, train_dataset, _as_dict(eval_dataset, "eval_dataset"), calibration_dataset
            )
            peft_config = _with_score_head(peft_config)
        elif calibration_dataset is not None:
            raise ValueError("`calibration_dataset` calibrates pseudo-labels, so it needs `unlabeled_dataset`.")
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
        if unlabeled_dataset is None:
            # The model card names the trainer, and this one has done nothing that the parent does not do.
            self._name, self._paper = super()._name, super()._paper
            return

        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"`unlabeled_dataset` needs the whole model in every process, but this run is launched with "
                f"{self.accelerator.distributed_type.value}; launch it with DDP (`--multi_gpu`)."
            )
        if data_collator is None:
            self.data_collator = ConfidenceFilteredDataCollator(
                pad_token_id=self.processing_class.pad_token_id,
                pad_to_multiple_of=self.args.pad_to_multiple_of,
                confidence_threshold=self.args.confidence_threshold,
                pseudo_label_type=self.args.pseudo_label_type,
                pseudo_label_weight=self.args.pseudo_label_weight,
            )
        self._prepare_data(train_dataset, eval_dataset, unlabeled_dataset, calibration_dataset, is_conversational)

        self.run = RunDirectory(self.args.output_dir)
        self.round = 0
        self.round_history: list[dict[str, Any]] = []
        self.labeling_facts: dict[str, Any] = {}
        self.termination_reason: str | None = None
        own = [callback for callback in self.callback_handler.callbacks if isinstance(callback, PseudoLabelingCallback)]
        if len(own) > 1:
            raise ValueError(f"`callbacks` has {len(own)} callbacks that label the pool; pass one.")
        self.pseudo_labeling_callback = own[0] if own else PseudoLabelingCallback()
        self.pseudo_labeling_callback.trainer = self
        if not own:
            self.add_callback(self.pseudo_labeling_callback)
        if self.pseudo_labeling_callback.has_own_policy:
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
        """
        if self.pool is None:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if trial is not None:
            raise ValueError("Hyperparameter search does not support `unlabeled_dataset`; search on the labeled pairs.")

        labeled = self.train_dataset
        self._open_run(resume_from_checkpoint)
        while True:
            if self.round == len(self.round_history):
                self._train_round(ignore_keys_for_eval)
                self._end_round()
            if self.round == self.args.num_rounds:
                self.termination_reason = "max_rounds"
                break
            pseudo_labeled = self.pseudo_labeling_callback.on_round_end(
                self.args, self.state, self.control, trainer=self, round=self.round
            )
            if pseudo_labeled is None:
                self.termination_reason = self.pseudo_labeling_callback.termination_reason
                break
            self.train_dataset = self.data_collator.build_dataset(labeled, pseudo_labeled)
            self.round += 1
        self.train_dataset = labeled
        return self._end_run()

    def _open_run(self, resume_from_checkpoint: str | bool | None) -> None:
        """Start a run in the output directory, or load the one in it up to the last round that is over."""
        run, model = self.run, self._unwrapped_model
        if isinstance(resume_from_checkpoint, str) and (
            Path(resume_from_checkpoint).resolve() != Path(self.args.output_dir).resolve()
        ):
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, but a run with `unlabeled_dataset` is resumed "
                f"from its `output_dir` ({self.args.output_dir!r}); pass `True`."
            )
        identity = self._identity()

        def start() -> str | None:
            try:
                run.start(identity, resume=bool(resume_from_checkpoint))
                if run.num_finished == 0 and not run.weights_path(-1).is_file():
                    run.write_weights(run.weights_path(-1), model)
            except (ValueError, OSError) as error:
                return str(error)
            return None

        # Told to every process: one that stopped alone would leave the others waiting.
        if (error := self.on_main_process(start)) is not None:
            raise ValueError(error)
        num_finished = self.on_main_process(lambda: run.num_finished)
        self.round = max(num_finished - 1, 0)
        self.round_history = [run.read_round(round) for round in range(num_finished)]
        run.read_weights(run.weights_path(num_finished - 1), model)
        if num_finished > 0:
            self._load_state(self.round)
            self.accelerator.print(f"Resuming the run in {self.args.output_dir} after round {self.round}.")

    def _train_round(self, ignore_keys_for_eval: list[str] | None) -> None:
        """Train the weights of a round, or load them if the run was interrupted between training and measuring."""
        run, round = self.run, self.round
        if self.on_main_process(lambda: run.state_path(round).is_file()):
            run.read_weights(run.weights_path(round), self._unwrapped_model)
            self._load_state(round)
            return
        if round > 0:
            # A round depends on its data, its initial weights and this seed alone, so that it can be resumed.
            set_seed(self.args.seed + round)
            self.optimizer = None
            if self.args.round_init == "base":
                run.read_weights(run.weights_path(-1), self._unwrapped_model)
        with self._round_length():
            super().train(
                resume_from_checkpoint=self.on_main_process(lambda: run.last_checkpoint(round)),
                ignore_keys_for_eval=ignore_keys_for_eval,
            )
        if self.accelerator.is_main_process:
            run.write_weights(run.weights_path(round), self._unwrapped_model)
            run.write_state(round, self.state)
        self.accelerator.wait_for_everyone()

    def _end_round(self) -> None:
        """Measure the model of a round on the held-out pairs, fit the temperature, and log and keep the facts."""
        facts: dict[str, Any] = {"round": self.round, "temperature": 1.0}
        for name, pairs in self._held_out.items():
            logits = self.score_pairs(pairs, f"Scoring {name} after round {self.round}")
            facts |= {f"{name}_{metric}": value for metric, value in preference_metrics(logits).items()}
            if name == "calibration":
                facts["temperature"] = fit_temperature(logits)
        self.log(dict(facts))
        self.pseudo_labeling_callback.log_history = self.state.log_history
        facts |= {"num_train_pairs": len(self.train_dataset), "global_step": self._steps_before_round + self.state.global_step}
        # What the pool gave to this round. Round 0 had nothing from it.
        facts |= {name: value for name, value in self.labeling_facts.items() if name not in facts}
        self.round_history.append(facts)
        self.accelerator.print(round_line(facts))
        if self.accelerator.is_main_process:
            self.run.write_state(self.round, self.state)
            self.run.write_round(self.round, facts)
            initial = {-1} if self.args.round_init == "base" else set()
            best = {self.best_round} if self.args.keep_best_round else set()
            self.run.prune_weights({self.round} | initial | best)
        self.accelerator.wait_for_everyone()

    def _end_run(self) -> TrainOutput:
        """Load the round that is kept, write the model card, and close the trackers."""
        last = self.round_history[-1]
        kept = self.best_round if self.args.keep_best_round else last["round"]
        self.run.read_weights(self.run.weights_path(kept), self._unwrapped_model)
        self.create_model_card(model_name=Path(self.args.output_dir).name)
        self.control = self.callback_handler.end_trackers(self.args, self.state, self.control)
        self.accelerator.print(
            f"The rounds ended after round {last['round']} ({self.termination_reason}); the model is that of round {kept}."
        )
        train_loss = next(log["train_loss"] for log in reversed(self.state.log_history) if "train_loss" in log)
        metrics = {**last, "termination_reason": self.termination_reason, "kept_round": kept}
        return TrainOutput(last["global_step"], train_loss, metrics)

    @property
    def best_round(self) -> int:
        """`int`: the round so far with the lowest log-loss on the calibration or else the evaluation pairs."""
        name = next(name for name in ("calibration", "eval", *self._held_out) if name in self._held_out)
        return min(self.round_history, key=lambda facts: facts[f"{name}_log_loss"])["round"]

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

    def _load_state(self, round: int) -> None:
        self.state = TrainerState.load_from_json(str(self.run.state_path(round)))
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.pseudo_labeling_callback.log_history = self.state.log_history

    def _identity(self) -> dict[str, Any]:
        """What decides the result of a run."""
        settings = self.args.to_dict()
        parameters = sorted((name, list(value.shape)) for name, value in self._unwrapped_model.named_parameters())
        return {
            **{name: settings[name] for name in _DECISIVE_SETTINGS},
            "total_train_batch_size": self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            "model": f"{type(self._unwrapped_model).__name__} {content_hash(parameters)}",
            "train_dataset": content_hash(self._labeled_pairs.fingerprint, self.train_dataset.to_dict().get("margin")),
            "unlabeled_dataset": self.pool.pairs.fingerprint,
            **{f"{name}_dataset": pairs.fingerprint for name, pairs in self._held_out.items()},
        }

    # ---- What the callback uses ----

    @property
    def _unwrapped_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def on_main_process(self, function: Callable[[], T]) -> T:
        """
        Run a function in the main process, and give its result to all of them.

        Args:
            function (`Callable[[], T]`):
                Function whose result can be pickled.

        Returns:
            `T`: its result.
        """
        return broadcast_object_list([function() if self.accelerator.is_main_process else None])[0]

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
            return np.arange(len(self.pool))
        rows = np.random.default_rng(self.args.seed).permutation(len(self.pool.source))
        return np.flatnonzero(np.isin(self.pool.rows, rows[round - 1 :: self.args.num_rounds]))

    def score_pairs(
        self, pairs: PairedSequences, description: str, directory: Path | None = None, key: str = ""
    ) -> np.ndarray:
        """
        Pair logits under the current weights.

        Args:
            pairs ([`PairedSequences`]):
                What to score.
            description (`str`):
                Label of the progress bar.
            directory (`Path`, *optional*):
                Where finished shards are kept, and read from.
            key (`str`, *optional*, defaults to `""`):
                Names the weights and the sequences of these shards.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`, float64: `r(first) - r(second)`, the same in every process.
        """
        return score_pairs(
            self._unwrapped_model,
            pairs,
            pad_token_id=self.processing_class.pad_token_id,
            accelerator=self.accelerator,
            batch_tokens=self.args.score_batch_tokens,
            directory=directory,
            key=key,
            description=description,
            disable_tqdm=self.args.disable_tqdm,
        )

    # ---- What is different from `RewardTrainer` within a round ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The parent would hand them to the model.
        label, weight = inputs.pop("label", None), inputs.pop("weight", None)
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if weight is not None:
            loss = self._weighted_loss(outputs.logits.squeeze(-1), label, weight, inputs.get("margin"))
        return (loss, outputs) if return_outputs else loss

    def _weighted_loss(
        self, rewards: torch.Tensor, label: torch.Tensor, weight: torch.Tensor, margin: torch.Tensor | None
    ) -> torch.Tensor:
        """The parent's loss with a weight and a target probability for each pair; with 1 and 1 it is the same."""
        rewards_chosen, rewards_rejected = torch.chunk(rewards, chunks=2)
        logits = rewards_chosen - rewards_rejected
        if margin is not None:
            logits = logits - margin
        loss = -(
            weight * (label * nn.functional.logsigmoid(logits) + (1 - label) * nn.functional.logsigmoid(-logits))
        ).mean()
        if self.args.center_rewards_coefficient is not None:
            centered = weight * (rewards_chosen + rewards_rejected) ** 2
            loss += self.args.center_rewards_coefficient * torch.mean(centered)
        return loss

    def _set_signature_columns_if_needed(self):
        # Private in `Trainer`: the only place that says which columns reach the collator.
        super()._set_signature_columns_if_needed()
        if "probability" not in self._signature_columns:
            self._signature_columns.append("probability")

    def _get_output_dir(self, trial):
        # Private in `Trainer`: each round counts its steps from 0, so each has its own place for checkpoints.
        if self.run is None:
            return super()._get_output_dir(trial)
        return str(self.run.round_dir(self.round))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.run is None:
            return super().log(logs, start_time)
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
        card = Path(self.args.output_dir) / "README.md"
        if self.run is not None and not _internal_call and self.args.should_save and card.is_file():
            target = Path(output_dir or self.args.output_dir) / "README.md"
            if target.resolve() != card.resolve():
                shutil.copyfile(card, target)

    def merge_and_save(self, output_dir: str) -> None:
        """
        Save a PEFT model with its adapter merged into the base model, for tools that take no adapters.

        A quantized base is loaded again in full precision from where it came, and the adapter merged into that, since
        merging into quantized weights would round the adapter away. Other models are saved as they are.

        Args:
            output_dir (`str`):
                Directory to save to.

        Raises:
            ValueError: If the model is no PEFT model; use `save_model` then.
        """
        model = self._unwrapped_model
        if not is_peft_model(model):
            raise ValueError("The model has no adapter to merge; use `save_model`.")
        if not self.args.should_save:
            return
        if getattr(model.get_base_model(), "is_quantized", False):
            from peft import PeftModel

            adapter = Path(output_dir) / "adapter"
            model.save_pretrained(adapter)
            base = AutoModelForSequenceClassification.from_pretrained(
                model.get_base_model().config.name_or_path, num_labels=1, dtype=torch.float32
            )
            merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
            shutil.rmtree(adapter)
        else:
            merged = copy.deepcopy(model).merge_and_unload()
        merged.config.pad_token_id = self.processing_class.pad_token_id
        merged.save_pretrained(output_dir)
        self.processing_class.save_pretrained(output_dir)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ):
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.run is not None and self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            text, heading = card.read_text(encoding="utf-8"), "### Framework versions"
            section = f"### Rounds\n\n{round_table(self.round_history)}\n\n"
            card.write_text(text.replace(heading, section + heading, 1), encoding="utf-8")

    # ---- What is refused, and what the data becomes ----

    @staticmethod
    def _complete_args(args: RewardConfig | None, model: "str | PreTrainedModel | PeftModel") -> SSRMConfig:
        if isinstance(args, SSRMConfig):
            return args
        if args is None:
            model_id = model if isinstance(model, str) else model.config.name_or_path
            return SSRMConfig(f"{model_id.split('/')[-1]}-SSRM")
        return SSRMConfig(**{each.name: getattr(args, each.name) for each in fields(args) if each.init})

    @staticmethod
    def _load_tokenizer(model: "str | PreTrainedModel | PeftModel", args: SSRMConfig) -> PreTrainedTokenizerBase:
        # As the parent does it, but before the data is checked against it.
        model_id = model if isinstance(model, str) else model.config.name_or_path
        revision = (args.model_init_kwargs or {}).get("revision")
        return AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=args.trust_remote_code)

    @staticmethod
    def _check_arguments(args, data_collator, train_dataset, eval_dataset, optimizers, calibration_dataset) -> None:
        if not isinstance(train_dataset, Dataset):
            raise TypeError(
                f"`train_dataset` must be a `Dataset` beside `unlabeled_dataset`, got `{type(train_dataset).__name__}`; it "
                "is the small one."
            )
        if data_collator is not None and not isinstance(data_collator, ConfidenceFilteredDataCollator):
            raise TypeError(
                f"`data_collator` must be a `ConfidenceFilteredDataCollator`, got `{type(data_collator).__name__}`; leave it "
                "out for the default one."
            )
        if optimizers != (None, None):
            raise ValueError(
                "`optimizers` can't be started afresh each round; use `optimizer_cls_and_kwargs`, or `optim` in the config."
            )
        if args.keep_best_round and eval_dataset is None and calibration_dataset is None:
            raise ValueError("`keep_best_round` needs `calibration_dataset` or `eval_dataset` to choose the round by.")
        try:
            os.makedirs(args.output_dir, exist_ok=True)
            with tempfile.TemporaryFile(dir=args.output_dir):
                pass
        except OSError as error:
            raise ValueError(f"`output_dir` can't be written: {error}. Choose another one.") from error

    @staticmethod
    def _check_data(args, processing_class, train_dataset, eval_datasets, calibration_dataset) -> bool:
        named = {"train_dataset": train_dataset, **eval_datasets}
        if calibration_dataset is not None:
            named["calibration_dataset"] = calibration_dataset
        kinds = {
            name: check_preference_dataset(dataset, name)
            for name, dataset in named.items()
            if isinstance(dataset, Dataset)
        }
        is_conversational = kinds["train_dataset"]
        for name, kind in kinds.items():
            if kind != is_conversational:
                raise ValueError(
                    f"`train_dataset` holds {_kind(is_conversational)} and `{name}` {_kind(kind)}; make all of it one or "
                    "the other."
                )
        if is_conversational and processing_class.chat_template is None and args.chat_template_path is None:
            raise ValueError(
                "The data is conversational, but the tokenizer has no chat template; set `chat_template_path`, or give "
                "the data as text."
            )
        eos_token = args.eos_token or processing_class.eos_token
        if not is_conversational and eos_token is None:
            raise ValueError(
                "The data is text, which ends with an end-of-sequence token, but the tokenizer has none; set `eos_token`, "
                "for a BERT-like model to '[SEP]'."
            )
        if args.pad_token is None and processing_class.pad_token is None and eos_token is None:
            raise ValueError("The tokenizer has no padding token and none to fall back on; set its `pad_token`.")
        return is_conversational

    def _prepare_data(
        self, train_dataset, eval_dataset, unlabeled_dataset, calibration_dataset, is_conversational
    ) -> None:
        """Index the labeled and held-out pairs, and make the pool of those that are in none of them."""
        without_filter = copy.copy(self.args)
        without_filter.max_length = None
        max_length = f"longer than max_length={self.args.max_length}"
        # `_prepare_dataset` is private in `RewardTrainer`: the pool has to be tokenized exactly as the labeled pairs.
        report_dropped("train_dataset", {max_length: len(train_dataset) - len(self.train_dataset)})
        if len(self.train_dataset) == 0:
            raise ValueError(f"Every row of `train_dataset` is {max_length}; raise it, or shorten the texts.")
        self._labeled_pairs = PairedSequences.from_tokenized(self.train_dataset)
        held_out = {
            name.removesuffix("_dataset"): (given, prepared)
            for (name, given), prepared in zip(
                _as_dict(eval_dataset, "eval_dataset").items(), _as_dict(self.eval_dataset, "eval").values(), strict=True
            )
        }
        if calibration_dataset is not None:
            prepared = self._prepare_dataset(calibration_dataset, self.processing_class, self.args, "calibration")
            held_out["calibration"] = (calibration_dataset, prepared)
        self._held_out: dict[str, PairedSequences] = {}
        for name, (given, prepared) in held_out.items():
            if not isinstance(prepared, Dataset):
                logger.warning(f"`{name}` is a stream, so the metrics of a round leave it out.")
                continue
            report_dropped(name, {max_length: len(given) - len(prepared)})
            if len(prepared) == 0:
                raise ValueError(f"Every row of `{name}` is {max_length}; raise it, or shorten the texts.")
            self._held_out[name] = PairedSequences.from_tokenized(prepared)
        self.pool = build_pool(
            unlabeled_dataset,
            lambda dataset: self._prepare_dataset(dataset, self.processing_class, without_filter, "unlabeled"),
            seed=self.args.seed,
            max_length=self.args.max_length,
            max_samples=self.args.max_unlabeled_samples,
            is_conversational=is_conversational,
            with_gold=self.args.track_pseudo_label_accuracy,
            known_pairs={
                name: set(pairs.pair_keys())
                for name, pairs in {"the labeled pairs": self._labeled_pairs, **self._held_out}.items()
            },
        )


def _as_dict(dataset: Any, name: str) -> dict[str, Any]:
    if dataset is None:
        return {}
    return {f"{name}_{key}": value for key, value in dataset.items()} if isinstance(dataset, dict) else {name: dataset}


def _kind(is_conversational: bool) -> str:
    return "conversations" if is_conversational else "text"


def _with_score_head(peft_config: "PeftConfig | None") -> "PeftConfig | None":
    """A PEFT configuration under which the score head is trained and saved."""
    if peft_config is None or peft_config.task_type == "SEQ_CLS":
        return peft_config
    logger.warning("`peft_config` is taken as one with `task_type='SEQ_CLS'`, so that the score head is trained and saved.")
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = "SEQ_CLS"
    return peft_config
