"""What the trainer was given, completed and checked before TRL sees it."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase, set_seed
from trl import RewardConfig

from ..config import SSRMConfig
from ..data.checks import check_labeled_data
from ..data.formats import argument_name
from ..io.hub import check_model_is_there
from ..models.adapters import check_adapter_type, is_quantized_by_bitsandbytes, with_score_head
from ..models.comparison import Comparison
from ..models.loading import check_num_labels, is_adapter, load_adapter_to_train
from ..models.pairwise import prepare_pairwise
from ..models.tokenizers import check_tokenizer, load_tokenizer
from .callback import PseudoLabelingCallback
from .run_data import by_name
from .settings import check_arguments, complete_args


logger = logging.getLogger(__name__)


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
            check_model_is_there(self.model, **self.loading)
        if self.has_pool or self.is_pairwise or self.is_quantized:
            self.peft_config = with_score_head(self.peft_config)
            if isinstance(self.model, PeftModel):
                check_adapter_type(self.model.active_peft_config)
        self.is_adapter = is_adapter(self.model, self.loading.get("revision"))
        if self.is_adapter and self.peft_config is not None:
            raise ValueError(
                f"{self.model} is an adapter, which is trained further; leave `peft_config` out, or merge the adapter into "
                "its base model first."
            )
        if isinstance(self.model, str) and not self.is_adapter:
            advice = "start from its base model, or with `model_init_kwargs={'ignore_mismatched_sizes': True}`"
            check_num_labels(self.model, advice, **self.loading)

    @property
    def loading(self) -> dict[str, Any]:
        """`dict[str, Any]`: arguments to load the model with."""
        if self.args is None:
            return {}
        given = self.args.model_init_kwargs
        return {"trust_remote_code": self.args.trust_remote_code, **(given if isinstance(given, dict) else {})}

    def load_adapter(self) -> None:
        """
        Load a scalar model that is given as a saved adapter, so that the adapter is trained further.

        [`~trl.RewardTrainer`] would train its score head alone, and could not save it.
        """
        if not self.is_adapter or self.is_pairwise:
            return
        args = self.args or RewardConfig(f"{self.model.split('/')[-1]}-Reward")
        self.processing_class = self.processing_class or load_tokenizer(self.model, args)
        kwargs = {"dtype": "float32", **self.loading}
        # The same arguments and seed as `RewardTrainer` loads a model with.
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            kwargs["device_map"] = None
        if self.quantization_config is not None:
            kwargs["quantization_config"] = self.quantization_config
        set_seed(args.seed)
        self.model = load_adapter_to_train(self.model, **kwargs)
        # `RewardTrainer` would warn that they have no effect on a loaded model.
        self.args, self.quantization_config = copy.copy(args), None
        self.args.model_init_kwargs = None

    def prepare_pool(
        self,
        train_dataset: Any,
        eval_dataset: Any,
        calibration_dataset: Dataset | None,
        data_collator: Any,
        optimizers: tuple[Any, Any],
        compute_metrics: Any,
    ) -> bool | None:
        """
        Complete the configuration, load the tokenizer, and refuse what does not work with a pool.

        Returns:
            `bool` or `None`: whether the labeled data is conversational; `None` if it is tokenized.

        Raises:
            TypeError: If a dataset or the collator is of another type.
            ValueError: If data, settings or tokenizer can't be used.
        """
        self.args = args = copy.copy(complete_args(self.args, self.model))
        if not torch.accelerator.is_available():
            # Without an accelerator it does nothing but warn.
            args.dataloader_pin_memory = False
        self.processing_class = self.processing_class or load_tokenizer(self.model, args)
        check_arguments(
            args,
            data_collator,
            train_dataset,
            optimizers,
            calibration_dataset,
            eval_dataset,
            compute_metrics is not None,
        )
        held_out = by_name(eval_dataset, "eval") | by_name(calibration_dataset, "calibration")
        named = {argument_name(name): dataset for name, dataset in held_out.items()}
        is_conversational = check_labeled_data({"train_dataset": train_dataset, **named})
        separator = self.processing_class.sep_token
        if is_conversational is False and (args.eos_token or self.processing_class.eos_token) is None and separator:
            logger.warning(
                f"The tokenizer has no end-of-sequence token; {separator!r}, its separator, ends each text."
            )
            args.eos_token = separator
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
