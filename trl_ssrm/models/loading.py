"""Check and load models for use outside a trainer: scalar reward models, pairwise models and policies."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations import deepspeed
from transformers.utils import cached_file, find_adapter_config_file, logging

from ..io.hub import check_model_is_there
from .adapters import adapter_shapes, merge_adapter, with_adapter
from .comparison import Comparison


logger = logging.get_logger(__name__)


def load_reward_model(
    model_name_or_path: str, dtype: str | torch.dtype = "float32", trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """
    Load a reward model for use. An adapter is merged into its base model.

    Args:
        model_name_or_path (`str`):
            Directory or model ID of a sequence classifier with one label, or of an adapter for one.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load the model in. `"auto"` is the precision of the checkpoint.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.
        kwargs (`dict[str, Any]`):
            Further arguments of [`~transformers.PreTrainedModel.from_pretrained`].

    Returns:
        [`~transformers.PreTrainedModel`]: the model, in evaluation mode, on the CPU unless `kwargs` name a device.

    Raises:
        ValueError: If there is no such model, if it has several labels, if it is a pairwise model, or if weights are
            missing in the checkpoint, such as a score head that was never trained.
    """
    check_model_is_there(model_name_or_path, **kwargs)
    if Comparison.from_pretrained(model_name_or_path, kwargs.get("revision")) is not None:
        raise ValueError(
            f"{model_name_or_path} is a pairwise model, which gives no reward to a single completion; use "
            "`PairwiseJudge`, or train a scalar model with it as the teacher."
        )
    return _load_classifier(model_name_or_path, dtype, trust_remote_code, **kwargs)


def load_adapter_to_train(
    model_name_or_path: str, dtype: str | torch.dtype = "float32", trust_remote_code: bool = False, **kwargs: Any
) -> PeftModel:
    """
    Load a saved adapter on its base model to train it further, with its score head.

    Args:
        model_name_or_path (`str`):
            Directory or model ID of an adapter that a reward trainer saved.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load the base model in. `"auto"` is the precision of the checkpoint.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the base model.
        kwargs (`dict[str, Any]`):
            Further arguments of [`~transformers.PreTrainedModel.from_pretrained`], such as `quantization_config`.

    Returns:
        [`~peft.PeftModel`]: the model; the adapter and its score head are trainable, the base is not.

    Raises:
        ValueError: If the base model is not there, or if the adapter has no score head with one label.
    """
    revision = kwargs.get("revision")
    base, missing = _load_base(model_name_or_path, dtype, trust_remote_code, **kwargs)
    # The names that PEFT gives heads a place in `modules_to_save` by.
    has_head = any(
        {"score", "classifier"} & set(name.split("."))
        for name in adapter_shapes(model_name_or_path, revision=revision)
    )
    if missing or not has_head:
        raise ValueError(
            f"{model_name_or_path} is an adapter without a score head, so it is no reward model; merge it into its base "
            "model with `merge_and_unload`, and start from that with a `peft_config`."
        )
    return with_adapter(base, model_name_or_path, revision, is_trainable=True)


def is_adapter(model: Any, revision: str | None = None) -> bool:
    """`bool`: whether a model is given as the directory or model ID of an adapter."""
    return isinstance(model, str) and find_adapter_config_file(model, revision=revision) is not None


def check_num_labels(model_name_or_path: str, advice: str = "train it with `num_labels=1`", **kwargs: Any) -> None:
    """
    Refuse a classifier with several labels.

    Args:
        model_name_or_path (`str`):
            Directory or model ID of a model.
        advice (`str`, *optional*):
            What the message says to do.
        kwargs (`dict[str, Any]`):
            Arguments of [`~transformers.PreTrainedModel.from_pretrained`]. With `ignore_mismatched_sizes`, the head is
            meant to be replaced.

    Raises:
        ValueError: If it is a sequence classifier with more than one label.
    """
    read = {name: kwargs[name] for name in ("revision", "trust_remote_code", "cache_dir") if name in kwargs}
    config = AutoConfig.from_pretrained(model_name_or_path, **read)
    is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
    if is_classifier and config.num_labels != 1 and not kwargs.get("ignore_mismatched_sizes"):
        raise ValueError(f"{model_name_or_path} has {config.num_labels} labels, but a reward model has one; {advice}.")


def _load_base(
    model_name_or_path: str, dtype: str | torch.dtype, trust_remote_code: bool, **kwargs: Any
) -> tuple[PreTrainedModel, set[str]]:
    """A classifier, for an adapter its base; and the names of the weights that are neither in it nor in the adapter."""
    revision, base = kwargs.get("revision"), model_name_or_path
    loading = {"trust_remote_code": trust_remote_code, **kwargs}
    shapes: dict[str, torch.Size] = {}
    if is_adapter(model_name_or_path, revision):
        adapter_config = PeftConfig.from_pretrained(model_name_or_path, revision=revision)
        base, loading["revision"] = adapter_config.base_model_name_or_path, adapter_config.revision
        check_model_is_there(base, f"the base model of {model_name_or_path}", **loading)
        shapes = adapter_shapes(model_name_or_path, revision=revision)
    check_num_labels(base, **loading)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=dtype, output_loading_info=True, **loading
    )
    missing = set(info["missing_keys"])
    for name in missing & shapes.keys():
        # The model was made with one label.
        if shapes[name] != model.get_parameter(name).shape:
            raise ValueError(
                f"{model_name_or_path} has {shapes[name][0]} labels, but a reward model has one; train it with "
                "`num_labels=1`."
            )
    return model, missing - shapes.keys()


def _load_classifier(
    model_name_or_path: str, dtype: str | torch.dtype, trust_remote_code: bool, **kwargs: Any
) -> PreTrainedModel:
    with whole_in_every_process():
        model, missing = _load_base(model_name_or_path, dtype, trust_remote_code, **kwargs)
    if missing:
        raise ValueError(
            f"{model_name_or_path} holds no weights for {', '.join(sorted(missing))}, which would be random; give the "
            "directory that a reward trainer saved, not the model that it started from."
        )
    if is_adapter(model_name_or_path, kwargs.get("revision")):
        model = merge_adapter(model, model_name_or_path, revision=kwargs.get("revision"))
    return model.eval()


def load_pairwise_model(
    model_name_or_path: str,
    label_token_ids: tuple[int, int],
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    Load a pairwise preference model: a sequence classifier with one label, which reads comparisons.

    A causal language model is converted. Its score for a comparison is the logit of the first label minus the logit of
    the second, so its score layer is the difference of the labels' rows in the output embedding.

    Args:
        model_name_or_path (`str`):
            Directory or model ID of a causal language model, of a pairwise preference model, or of an adapter for one.
        label_token_ids (`tuple[int, int]`):
            Token IDs of the two labels.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load the model in. `"auto"` is the precision of the checkpoint.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.
        kwargs (`dict[str, Any]`):
            Further arguments of [`~transformers.PreTrainedModel.from_pretrained`], such as `quantization_config`.

    Returns:
        [`~transformers.PreTrainedModel`]: the model, in evaluation mode.

    Raises:
        ValueError: If there is no such model, if it is an encoder or a scalar reward model, or if weights other than
            the score layer are missing in the checkpoint.
    """
    check_model_is_there(model_name_or_path, **kwargs)
    if not is_adapter(model_name_or_path, kwargs.get("revision")):
        check_num_labels(model_name_or_path, trust_remote_code=trust_remote_code, **kwargs)
    was_pairwise = Comparison.from_pretrained(model_name_or_path, kwargs.get("revision")) is not None
    is_saved_adapter = is_adapter(model_name_or_path, kwargs.get("revision"))
    if is_saved_adapter and was_pairwise:
        return _load_classifier(model_name_or_path, dtype, trust_remote_code, **kwargs)
    with whole_in_every_process(), suppress_load_report():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            model_name_or_path,
            num_labels=1,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    check_answers_behind(model)
    if is_saved_adapter or not (info["missing_keys"] or was_pairwise):
        raise ValueError(
            f"{model_name_or_path} is a scalar reward model, which can't score a comparison; start from a causal "
            "language model."
        )
    if missing := sorted(set(info["missing_keys"]) - {"score.weight"}):
        raise ValueError(
            f"{model_name_or_path} holds no weights for {', '.join(missing)}; give a complete checkpoint."
        )
    if info["missing_keys"]:
        rows = _output_embedding(model, model_name_or_path, sorted(info["unexpected_keys"]), label_token_ids, kwargs)
        with torch.no_grad():
            model.score.weight.copy_(rows[:1] - rows[1:])
    return model.eval()


def check_answers_behind(model: Any) -> None:
    """Refuse a model without a score layer that reads the last token, such as an encoder."""
    if not hasattr(model, "score"):
        raise ValueError(
            f"A pairwise preference model answers after the comparison, which {type(model).__name__} can't; start "
            "from a causal language model."
        )


def _output_embedding(
    model: PreTrainedModel, name_or_path: str, unused: list[str], token_ids: tuple[int, int], kwargs: dict[str, Any]
) -> torch.Tensor:
    """
    Rows of a causal language model's output embedding for two tokens: `(2, hidden_size)`, float32. `model` is the
    classifier that was loaded from its checkpoint, `unused` the names of weights that the classifier does not have.
    """
    embedding: Any = model.get_input_embeddings().weight
    # An output embedding that is not tied to the input embedding is in the checkpoint, but not in the classifier.
    names = [name for name in unused if name.endswith(".weight") and name.split(".")[-2] in ("lm_head", "embed_out")]
    config = model.config.get_text_config()
    if not names and not config.tie_word_embeddings:
        raise ValueError(
            f"{name_or_path} has no output embedding named `lm_head` or `embed_out`; rename it in the checkpoint."
        )
    between = [
        name for name in ("logits_scaling", "logit_scale", "final_logit_softcapping") if getattr(config, name, None)
    ]
    between += [name for name in unused if name.endswith("lm_head.bias")]
    if between:
        logger.warning(
            f"The language model has {', '.join(between)} between its last hidden state and its answer. The score "
            "layer leaves it out, so before training the probabilities differ from the language model's."
        )
    if not names:
        return embedding[list(token_ids)].float()
    found = {"revision": kwargs.get("revision"), "_raise_exceptions_for_missing_entries": False}
    index = cached_file(name_or_path, "model.safetensors.index.json", **found)
    files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"] if index else {}
    path = cached_file(name_or_path, files.get(names[0], "model.safetensors"), revision=kwargs.get("revision"))
    with safe_open(path, framework="pt") as file:
        stored = file.get_slice(names[0])
        return torch.cat([stored[token_id : token_id + 1] for token_id in token_ids]).to(embedding.device).float()


@contextlib.contextmanager
def suppress_load_report() -> Iterator[None]:
    """Load without a bar, and without the warning of transformers about a missing score layer, which is trained."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def load_policy(
    model_name_or_path: str, dtype: str | torch.dtype = "float32", trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """[`~transformers.PreTrainedModel`]: a causal language model; the arguments are those of [`load_reward_model`]."""
    check_model_is_there(model_name_or_path, **kwargs)
    with whole_in_every_process():
        return AutoModelForCausalLM.from_pretrained(
            model_name_or_path, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs
        )


@contextlib.contextmanager
def whole_in_every_process() -> Iterator[None]:
    """
    Load complete models in every process, also under FSDP and DeepSpeed.

    Under FSDP, transformers loads the weights in the first process only; under DeepSpeed ZeRO-3, a part of them in
    each process. A trainer puts them together later, but models that score or generate have no trainer.
    """
    fsdp = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")
    # Private in transformers: it has a function to unset this, but none to set it again.
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
