"""`RewardTrainer` for pairs that have weights, soft labels or two orders, in any launcher."""

import copy
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from trl import RewardTrainer

from ..config import SSRMConfig
from ..data.collator import ConfidenceFilteredDataCollator
from ..data.formats import argument_name
from ..data.sequences import PairedSequences
from ..data.ties import TIE, ties_of, with_ties_settled
from ..data.tokenization import tokenized_or_refused, with_literal_messages
from ..io.storage import mapping
from ..models.comparison import Comparison, tokenize_comparisons
from ..models.linear import NoStatesError, scoring_by_states
from ..models.sharding import is_sharded
from ..scoring.layout import choose_layout, laid_out
from ..scoring.pair_scores import PairScores
from ..scoring.preference import LOGITS_OF, orders_agree
from ..scoring.rows import paired_rows
from ..scoring.score import score_pairs


T = TypeVar("T")


class PairTrainer(RewardTrainer):
    """
    [`~trl.RewardTrainer`] for pairs with a weight, a soft label or two orders. It can score pairs too. It knows nothing of
    rounds.
    """

    # What `Trainer` leaves open, and what `SSRMTrainer` sets.
    args: SSRMConfig
    model: Any
    processing_class: PreTrainedTokenizerBase
    data_collator: ConfidenceFilteredDataCollator
    _signature_columns: list[str]  # type: ignore[assignment]
    has_pool: bool
    comparison: Comparison | None
    # A dataset to evaluate on may have the name "train", too.
    _has_prepared_train = False

    @property
    def unwrapped_model(self) -> Any:
        """[`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]: the model, without what a launcher wraps it in."""
        return self.accelerator.unwrap_model(self.model)

    @functools.cached_property
    def layout(self) -> str:
        """`str`: how sequences lie before the model in scoring; see [`~trl_ssrm.scoring.layout.choose_layout`]."""
        is_off = isinstance(self.args, SSRMConfig) and self.args.share_prompts is False
        # The same in every process: rounding decides where a model is near the tolerance.
        return broadcast_object_list(["padded" if is_off else choose_layout(self.unwrapped_model)])[0]

    @functools.cached_property
    def _training_layout(self) -> str:
        """Layout in training, where the two halves of a batch are pairs. Without a pool it is TRL's own, unless asked for."""
        args = self.args
        is_on = isinstance(args, SSRMConfig) and (self.has_pool if args.share_prompts is None else args.share_prompts)
        has_pairs = self.comparison is None or args.comparison_orders == "both"
        # A compiled model would be compiled anew for each length, one that is copied to several devices has no hooks, and
        # dropout differs from sequence to sequence.
        is_plain = not args.torch_compile and args.n_gpu <= 1 and args.disable_dropout
        return self.layout if is_on and has_pairs and is_plain else "padded"

    def _complete_collator(self, given: Any) -> None:
        """Take the default collator where that of `RewardTrainer` is not enough, and refuse one that would not see ties."""
        has_ties = TIE in (getattr(self.train_dataset, "column_names", None) or [])
        if given is None and (self.has_pool or self.comparison is not None or has_ties):
            self.data_collator = self._default_collator()
        elif has_ties and not isinstance(self.data_collator, ConfidenceFilteredDataCollator):
            raise ValueError(
                "`train_dataset` has ties, which `data_collator` would not see; leave it out, or give a "
                "`ConfidenceFilteredDataCollator`."
            )

    def _default_collator(self) -> ConfidenceFilteredDataCollator:
        padding: dict[str, Any] = {
            "pad_token_id": self.processing_class.pad_token_id,
            "pad_to_multiple_of": self.args.pad_to_multiple_of,
        }
        if not isinstance(self.args, SSRMConfig):
            return ConfidenceFilteredDataCollator(**padding)
        # The selection has chosen the pairs, so the threshold of the collator leaves out none.
        return ConfidenceFilteredDataCollator(
            **padding,
            pseudo_label_type=self.args.pseudo_label_type,
            pseudo_label_weight=self.args.pseudo_label_weight,
            comparison_seed=None if self.comparison is None else self.args.seed,
            comparison_orders=self.args.comparison_orders,
        )

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

    def score_pairs(self, pairs: PairedSequences, name: str, **kwargs: Any) -> PairScores:
        """
        Score pairs with the current weights.

        Args:
            pairs ([`PairedSequences`]):
                What to score.
            name (`str`):
                What the pairs are called on the progress bar and in an error.
            kwargs (`dict[str, Any]`):
                `rows`, `directory` and `key` of [`~trl_ssrm.scoring.score.score_pairs`].

        Returns:
            [`PairScores`]: the scores at temperature 1, the same in every process.

        Raises:
            NonFiniteScoreError: If a reward is NaN or infinite.
        """
        scores = self._scores(pairs, name, self.layout, **kwargs)
        kind = "scalar" if self.comparison is None else "pairwise"
        return PairScores(LOGITS_OF[kind](scores), orders_agree=None if kind == "scalar" else orders_agree(scores))

    def state_differences(
        self, pairs: PairedSequences, name: str, function: Callable[[torch.Tensor], torch.Tensor], **kwargs: Any
    ) -> np.ndarray:
        """
        A function of the [`~trl_ssrm.models.linear.mean_states`] of the first sequence of each pair, less that of the second.

        Args:
            pairs, name, kwargs:
                As in [`score_pairs`].
            function (`Callable[[torch.Tensor], torch.Tensor]`):
                As in [`~trl_ssrm.models.linear.scoring_by_states`].

        Returns:
            `np.ndarray` of shape `(num_pairs,)`, or `(num_pairs, num_features)`, float64, the same in every process.

        Raises:
            NoStatesError: If the model gives no hidden state of each token.
            NonFiniteScoreError: If a difference is NaN or infinite.
        """
        # The other layouts know where a sequence ends, but not where its tokens are.
        layout = "unpadded" if self.layout == "unpadded" else "padded"
        with scoring_by_states(self.unwrapped_model, function) as without_states:
            scores = self._scores(pairs, name, layout, **kwargs)
        # In every process at once, also in those that had nothing to score.
        if any(gather_object([len(without_states) > 0])):
            raise NoStatesError
        return scores[:, 0] - scores[:, 1]

    def _scores(self, pairs: PairedSequences, name: str, layout: str, **kwargs: Any) -> np.ndarray:
        # A resumed run may score before it trains.
        self.shard()
        return score_pairs(
            self.unwrapped_model,
            pairs,
            pad_token_id=self.processing_class.pad_token_id,
            accelerator=self.accelerator,
            layout=layout,
            batch_tokens=self.args.score_batch_tokens,
            name=name,
            disable_tqdm=bool(self.args.disable_tqdm),
            **kwargs,
        )

    # ---- Training ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with laid_out(self.unwrapped_model, self._training_layout, paired_rows):
            return self._compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(self, model, inputs, return_outputs, num_items_in_batch):
        if self.comparison is not None:
            return self._compute_comparison_loss(model, inputs, return_outputs)
        # `RewardTrainer` would hand them to the model.
        label, weight = inputs.pop("label", None), inputs.pop("weight", None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if weight is not None:
            rewards_chosen, rewards_rejected = torch.chunk(outputs.logits.squeeze(-1), chunks=2)
            logits = rewards_chosen - rewards_rejected
            if "margin" in inputs:
                logits = logits - inputs["margin"]
            loss = weighted_loss(logits, label, weight)
            if self.args.center_rewards_coefficient is not None:
                centered = weight * (rewards_chosen + rewards_rejected) ** 2
                loss += self.args.center_rewards_coefficient * torch.mean(centered)
        return (loss, outputs) if return_outputs else loss

    def _compute_comparison_loss(self, model, inputs, return_outputs):
        """The same loss for a pairwise model, whose score is the pair logit itself, in the order that is shown."""
        label, weight, margin = inputs.pop("label"), inputs.pop("weight"), inputs.pop("margin", 0.0)
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits.squeeze(-1)
        loss = weighted_loss(logits - margin, label, weight)
        mode = "train" if self.model.training else "eval"
        # Private in `RewardTrainer`: where its `log` finds what to log.
        accuracy = ((logits > 0) == (label > 0.5)).float().mean()
        # An evaluation asks in one order; the facts of a round are of both.
        name = "accuracy" if mode == "train" else "accuracy_in_one_order"
        self._metrics[mode][name].append(self.accelerator.gather_for_metrics(accuracy).mean().item())
        return (loss, outputs) if return_outputs else loss

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        is_train = dataset_name == "train" and not self._has_prepared_train
        self._has_prepared_train = self._has_prepared_train or is_train
        is_one = is_train or dataset_name in ("eval", "calibration", "unlabeled")
        name = argument_name(dataset_name if is_one else f"eval_{dataset_name}")
        # Before rows that are too long are left out, so that the message has the number of the row.
        ties_of(dataset, name)
        with mapping(dataset):
            dataset = self._tokenized(dataset, processing_class, args, dataset_name, name)
        return with_ties_settled(dataset, name, is_train)

    def _tokenized(self, dataset, processing_class, args, dataset_name, name):
        # The collator would take the column for a pseudo-label.
        is_ours = self.has_pool or self.comparison is not None
        if is_ours and "probability" in (dataset.column_names or []):
            dataset = dataset.remove_columns("probability")
        # Private in `RewardTrainer`, which takes a dataset with these two columns as tokenized.
        if self.comparison is not None and "chosen_ids" not in (dataset.column_names or []):
            dataset = tokenize_comparisons(
                dataset, processing_class, self.comparison, args.max_length, args.dataset_num_proc
            )
        if not self.has_pool:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        prepare = super()._prepare_dataset
        return tokenized_or_refused(
            lambda rows: prepare(rows, processing_class, args, dataset_name),
            with_literal_messages(dataset, processing_class, name),
            name,
        )

    def tokenize(self, dataset: Any, name: str, max_length: int | None) -> Any:
        """
        Tokenize preference pairs exactly as the labeled ones are.

        Args:
            dataset ([`~datasets.Dataset`]):
                Preference pairs.
            name (`str`):
                Name of the dataset without `_dataset`, for errors and progress bars.
            max_length (`int`, *optional*):
                Longest sequence in tokens; pairs with a longer one are left out.

        Returns:
            [`~datasets.Dataset`]: the pairs with `chosen_ids` and `rejected_ids`.
        """
        args = copy.copy(self.args)
        args.max_length = max_length
        return self._prepare_dataset(dataset, self.processing_class, args, name)

    def _set_signature_columns_if_needed(self):
        # Private in `Trainer`: the only place that says which columns reach the collator.
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in ("probability", TIE) if name not in self._signature_columns]

    # Both are private in `Trainer`: the only place that sees the dataset before its columns are left out.
    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(self._with_lengths(train_dataset or self.train_dataset))

    def _get_eval_sampler(self, eval_dataset):
        return super()._get_eval_sampler(self._with_lengths(eval_dataset))

    def _with_lengths(self, dataset):
        """The dataset with the lengths that `train_sampling_strategy` asks for, which `Trainer` can't tell of pairs."""
        by_length = self.args.train_sampling_strategy in ("group_by_length", "batch_rebalance")
        name = self.args.length_column_name
        if not by_length or not isinstance(dataset, Dataset) or name in dataset.column_names:
            return dataset

        def measure(*columns: list[list[int]]) -> dict[str, list[int]]:
            return {name: [max(map(len, pair)) for pair in zip(*columns, strict=True)]}

        columns = ["chosen_ids", "rejected_ids"]
        with mapping(dataset):
            return dataset.map(measure, batched=True, input_columns=columns, desc="Measuring lengths")

    # ---- Launchers ----

    def _leave_engine(self) -> None:
        """Take the model out of the DeepSpeed engine of the round before: an engine has one optimizer and one schedule."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and self.model_wrapped is not self.model:
            engine: Any = self.model_wrapped
            engine.destroy()
            self.accelerator.free_memory()
            self.model_wrapped, self.deepspeed = self.model, None

    def shard(self) -> None:
        """Spread a model that is not trained first over the processes as for training."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED and not is_sharded(self.accelerator):
            # `Trainer` leaves it to the engine, which is there with the first training step.
            self.model.to(self.accelerator.device)
        if is_sharded(self.accelerator) and self.model_wrapped is self.model and not self.accelerator._models:
            set_seed(self.args.seed)
            # Private in `Trainer`: the only place that knows how each launcher wants its model.
            self._prepare_for_training(1, None, None)
            self.optimizer = self.lr_scheduler = None


def weighted_loss(logits: torch.Tensor, label: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """TRL's loss with a weight and a target probability for each pair. With 1 and 1 it is TRL's."""
    losses = label * nn.functional.logsigmoid(logits) + (1 - label) * nn.functional.logsigmoid(-logits)
    return -(weight * losses).mean()
