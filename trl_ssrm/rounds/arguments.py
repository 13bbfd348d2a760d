"""What the trainer was given, completed and checked before TRL sees it."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig

from ..config import SSRMConfig
from ..data.checks import check_labeled_data
from ..io.hub import check_model_is_there
from ..models.adapters import is_quantized_by_bitsandbytes, with_score_head
from ..models.comparison import Comparison
from ..models.pairwise import prepare_pairwise
from ..models.tokenizers import check_tokenizer, load_tokenizer
from .callback import PseudoLabelingCallback
from .run_data import by_name
from .settings import check_arguments, complete_args


@dataclass
class Arguments:
    """
    Arguments of [`~trl.RewardTrainer`], which its methods complete.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model; a pairwise one is loaded here.
        args ([`~trl.RewardConfig`], *optional*):
            The configuration; with a pool it becomes an [`SSRMConfig`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; with a pool it is loaded here.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            The quantization to load the model with.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter. With a pool, a pairwise model or a quantized base it trains and saves the score head too.
        has_pool (`bool`):
            Whether there is a pool.

    Raises:
        ValueError: If the model is neither a directory nor, as far as the hub can be reached, a model ID.
    """

    model: Any
    args: RewardConfig | None
    processing_class: PreTrainedTokenizerBase | None
    quantization_config: Any
    peft_config: PeftConfig | None
    has_pool: bool

    def __post_init__(self):
        self.is_quantized = self.quantization_config is not None or is_quantized_by_bitsandbytes(self.model)
        self.is_pairwise = isinstance(self.args, SSRMConfig) and self.args.preference_model == "pairwise"
        if self.has_pool or self.is_pairwise:
            loading = getattr(self.args, "model_init_kwargs", None)
            check_model_is_there(self.model, **loading if isinstance(loading, dict) else {})
        if self.has_pool or self.is_pairwise or self.is_quantized:
            self.peft_config = with_score_head(self.peft_config)

    def prepare_pool(
        self,
        train_dataset: Any,
        eval_dataset: Any,
        calibration_dataset: Dataset | None,
        data_collator: Any,
        optimizers: tuple[Any, Any],
    ) -> bool | None:
        """
        Complete the configuration, load the tokenizer, and refuse what does not work with a pool.

        Returns:
            `bool` or `None`: whether the labeled data is conversational; `None` if it is tokenized.

        Raises:
            TypeError: If a dataset or the collator is of another type.
            ValueError: If data, settings or tokenizer can't be used.
        """
        self.args = args = complete_args(self.args, self.model)
        self.processing_class = self.processing_class or load_tokenizer(self.model, args)
        check_arguments(args, data_collator, train_dataset, optimizers, calibration_dataset is not None)
        held_out = by_name(eval_dataset, "eval_dataset") | by_name(calibration_dataset, "calibration_dataset")
        is_conversational = check_labeled_data({"train_dataset": train_dataset, **held_out})
        check_tokenizer(args, self.processing_class, is_conversational)
        return is_conversational

    def prepare_pairwise(self, data_collator: Any) -> Comparison:
        """
        Make the comparison, and load the model that answers it.

        Returns:
            [`Comparison`]

        Raises:
            ValueError: If the collator has no `comparison_seed`, or the model answers no comparison or another one.
        """
        assert isinstance(self.args, SSRMConfig)
        self.processing_class = self.processing_class or load_tokenizer(self.model, self.args)
        if data_collator is not None and getattr(data_collator, "comparison_seed", None) is None:
            raise ValueError("`data_collator` must be a `ConfidenceFilteredDataCollator` with a `comparison_seed`.")
        comparison, self.model, self.quantization_config, self.args = prepare_pairwise(
            self.model, self.args, self.processing_class, self.quantization_config
        )
        return comparison


def refuse_without_pool(calibration_dataset: Any, callbacks: list | None) -> None:
    """Refuse arguments that do nothing without `unlabeled_dataset`."""
    if calibration_dataset is not None:
        raise ValueError("`calibration_dataset` calibrates pseudo-labels, so it needs `unlabeled_dataset`.")
    if any(isinstance(callback, PseudoLabelingCallback) for callback in callbacks or []):
        raise ValueError("`PseudoLabelingCallback` labels the pool, so it needs `unlabeled_dataset`.")
