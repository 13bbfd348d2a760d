"""Checkpoints, checked and loaded whole in every process."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import find_adapter_config_file

from .adapters import adapter_weight_names, merge_adapter


def load_reward_model(
    model_name_or_path: str, dtype: str | torch.dtype = "float32", trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """
    Load a reward model for use, an adapter merged into its base model.

    Args:
        model_name_or_path (`str`):
            Directory or model ID of a sequence classifier with one label, or of an adapter for one.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load it in. `"auto"` is that of the checkpoint.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.
        kwargs:
            Further arguments of [`~transformers.PreTrainedModel.from_pretrained`].

    Returns:
        [`~transformers.PreTrainedModel`]: the model, in evaluation mode, on the CPU unless `kwargs` say otherwise.

    Raises:
        ValueError: If the model has several labels, or weights that the checkpoint does not hold: a score head that
            was never trained is random.
    """
    loading = {"trust_remote_code": trust_remote_code, **kwargs}
    base = model_name_or_path
    is_adapter = find_adapter_config_file(model_name_or_path, revision=kwargs.get("revision")) is not None
    if is_adapter:
        adapter_config = PeftConfig.from_pretrained(model_name_or_path, revision=kwargs.get("revision"))
        base, loading["revision"] = adapter_config.base_model_name_or_path, adapter_config.revision
    config = AutoConfig.from_pretrained(base, revision=loading.get("revision"), trust_remote_code=trust_remote_code)
    is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ValueError(
            f"{base} has {config.num_labels} labels, but a reward model has one; train it with `num_labels=1`."
        )
    with whole_in_every_process():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=dtype, output_loading_info=True, **loading
        )
    missing = set(info["missing_keys"])
    if is_adapter:
        missing -= adapter_weight_names(model_name_or_path, revision=kwargs.get("revision"))
    if missing:
        raise ValueError(
            f"{model_name_or_path} holds no weights for {', '.join(sorted(missing))}, which would be random; give the "
            "directory that a reward trainer saved, not the model that it started from."
        )
    if is_adapter:
        model = merge_adapter(model, model_name_or_path, revision=kwargs.get("revision"))
    return model.eval()


def load_policy(
    model_name_or_path: str, dtype: str | torch.dtype = "float32", trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """The causal language model of a directory or model ID, arguments as in [`load_reward_model`]."""
    with whole_in_every_process():
        return AutoModelForCausalLM.from_pretrained(
            model_name_or_path, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs
        )


@contextlib.contextmanager
def whole_in_every_process() -> Iterator[None]:
    """
    Load models whole, whatever the launcher shards.

    Under FSDP transformers loads a model in the first process only, and under DeepSpeed ZeRO-3 a part of it in each,
    for a trainer to put together. Models that score and generate beside a trainer have none to do that.
    """
    fsdp = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    # Private in transformers: there is a function that unsets it, and none that gives it back.
    zero3 = deepspeed._hf_deepspeed_config_weak_ref
    disable_fsdp_ram_efficient_loading()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
        if fsdp is None:
            del os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]
        else:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = fsdp
