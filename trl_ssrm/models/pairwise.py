"""Prepare a pairwise preference model for training: its comparison, and a score layer that answers it."""

import copy
import os
from dataclasses import replace
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase, set_seed

from ..config import SSRMConfig
from ..io.hub import check_model_is_there
from .comparison import FILE_NAME, Comparison
from .loading import check_answers_behind, is_adapter, load_adapter_to_train, load_pairwise_model


def prepare_pairwise(
    model: Any, args: SSRMConfig, tokenizer: PreTrainedTokenizerBase, quantization_config: Any
) -> tuple[Comparison, Any, Any, SSRMConfig]:
    """
    Choose the comparison, and load the model with a score layer that answers it.

    The comparison is the one in `args.comparison`; else the one saved with the model, if the model is given by its
    name; else the paper's. Its `max_length` is always the one in `args`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model that the trainer was given.
        args ([`SSRMConfig`]):
            Configuration of the trainer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of the model.

    Returns:
        `tuple`: the comparison; the loaded model; and the quantization and the configuration to pass on to
        [`~trl.RewardTrainer`], which has nothing left to load.

    Raises:
        ValueError: If the comparison can't be read, if the model can't answer one, or if it was trained on another
        one.
    """
    if args.chat_template_path is not None:
        raise ValueError(
            "`chat_template_path` would change the text that a pairwise model reads; pass a `processing_class` with "
            "the template."
        )
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # TRL has parsed a `str`
    comparison = _choose_comparison(model, args, kwargs.get("revision"))
    token_ids = comparison.label_token_ids(tokenizer)
    if not isinstance(model, str):
        check_answers_behind(model.get_base_model() if is_peft_model(model) else model)
        return comparison, model, quantization_config, args
    # The same arguments and seed as `RewardTrainer` loads a model with.
    dtype = kwargs.pop("dtype", "float32")
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    set_seed(args.seed)
    is_pairwise_adapter = is_adapter(model, kwargs.get("revision")) and Comparison.from_pretrained(model) is not None
    loaded: Any = (
        load_adapter_to_train(model, dtype, args.trust_remote_code, **kwargs)
        if is_pairwise_adapter
        else load_pairwise_model(model, token_ids, dtype, args.trust_remote_code, **kwargs)
    )
    # `RewardTrainer` would warn that they have no effect on a loaded model.
    args = copy.copy(args)
    args.model_init_kwargs = None
    return comparison, loaded, None, args


def _choose_comparison(model: Any, args: SSRMConfig, revision: str | None) -> Comparison:
    stored = Comparison.from_pretrained(model, revision) if isinstance(model, str) else None
    if stored is not None:
        stored = replace(stored, max_length=args.max_length)
    if args.comparison is None:
        return stored or Comparison(max_length=args.max_length)
    given = replace(_read_comparison(args.comparison), max_length=args.max_length)
    if stored is not None and stored != given:
        raise ValueError(
            f"{model} was trained on another comparison ({stored}) than `comparison={args.comparison!r}`; leave "
            "`comparison` out."
        )
    return given


def _read_comparison(name_or_path: str) -> Comparison:
    if not os.path.isfile(name_or_path) and not name_or_path.endswith(".json"):
        check_model_is_there(name_or_path, "given as `comparison`")
    comparison = Comparison.from_pretrained(name_or_path)
    if comparison is None:
        raise ValueError(f"`comparison` is {name_or_path!r}, which has no {FILE_NAME}; give the path of the file.")
    return comparison
