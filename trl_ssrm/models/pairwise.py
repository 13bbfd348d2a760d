"""What a trainer is given, made whole before the work begins: its configuration, its tokenizer and a pairwise model."""

import copy
import logging
from dataclasses import replace
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase, set_seed

from ..config import SSRMConfig
from .comparison import DEFAULT_TEMPLATE, Comparison
from .loading import check_answers_behind, load_pairwise_model


logger = logging.getLogger(__name__)


def prepare_pairwise(
    model: Any, args: SSRMConfig, tokenizer: PreTrainedTokenizerBase, quantization_config: Any
) -> tuple[Comparison, Any, Any, SSRMConfig]:
    """
    Make the comparison, and load the model with the score layer that answers it.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            What the trainer was given.
        args ([`SSRMConfig`]):
            Its configuration.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Its quantization.

    Returns:
        `tuple`: the comparison, the model, and the quantization and configuration that are left for the parent, which
        has nothing to load any more.

    Raises:
        ValueError: If the model answers no comparison, or was trained on another one.
    """
    comparison = Comparison(
        args.comparison_template or DEFAULT_TEMPLATE,
        args.comparison_labels,
        args.comparison_add_generation_prompt,
        args.max_length,
    )
    if args.chat_template_path is not None:
        raise ValueError(
            "`chat_template_path` would change what a pairwise model reads; pass a `processing_class` with the template."
        )
    token_ids = comparison.label_token_ids(tokenizer)
    if not isinstance(model, str):
        check_answers_behind(model.get_base_model() if is_peft_model(model) else model)
        return comparison, model, quantization_config, args
    stored = Comparison.from_pretrained(model)
    if stored is not None and replace(stored, max_length=args.max_length) != comparison:
        raise ValueError(f"{model} was trained on another comparison ({stored}); give the config the same.")
    # As the parent loads it.
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # a `str` is parsed by now
    dtype = kwargs.pop("dtype", "float32")
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    set_seed(args.seed)
    loaded = load_pairwise_model(model, token_ids, dtype, args.trust_remote_code, **kwargs)
    # The parent would warn that they have no effect on a model that is loaded.
    args = copy.copy(args)
    args.model_init_kwargs = None
    return comparison, loaded, None, args
