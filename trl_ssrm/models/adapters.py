"""PEFT adapters: train their score head, and merge them into the base model."""

import copy
import logging
import tempfile
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType, load_peft_weights
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .classifier import complete_config, num_embeddings


logger = logging.getLogger(__name__)

# The first two have no `modules_to_save`, Poly reads a task ID, and X-LoRA takes adapters that are trained.
_NO_REWARD_MODELS = (PeftType.ADAPTION_PROMPT, PeftType.TRAINABLE_TOKENS, PeftType.POLY, PeftType.XLORA)


def with_score_head(peft_config: PeftConfig | None) -> PeftConfig | None:
    """
    Make sure that the score head is trained and saved with an adapter.

    Args:
        peft_config ([`~peft.PeftConfig`], *optional*):
            Configuration that the user gave.

    Returns:
        [`~peft.PeftConfig`] or `None`: the configuration with `task_type="SEQ_CLS"`, for which PEFT adds the head to
        `modules_to_save`. A changed `task_type` is logged.

    Raises:
        ValueError: If an adapter of this type does not make a reward model.
    """
    if peft_config is not None:
        check_adapter_type(peft_config)
    if peft_config is None or peft_config.task_type == TaskType.SEQ_CLS:
        return peft_config
    logger.warning(
        "`peft_config` is used with `task_type='SEQ_CLS'`, which adds the score head to `modules_to_save`: it is "
        "trained and saved."
    )
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = TaskType.SEQ_CLS
    return peft_config


def check_adapter_type(peft_config: PeftConfig) -> None:
    """Refuse adapters that put virtual tokens before a sequence, that train no score head, or that need other inputs."""
    if peft_config.is_prompt_learning or peft_config.peft_type in _NO_REWARD_MODELS:
        raise ValueError(
            f"An adapter of type {PeftType(peft_config.peft_type).value} does not work here: the score head has to be "
            "trained with it, and it has to read plain sequences; use another one, such as `LoraConfig`."
        )


def is_quantized_by_bitsandbytes(model: Any) -> bool:
    """`bool`: whether bitsandbytes has quantized a model; [`~trl.RewardTrainer`] asks the same before QLoRA."""
    # Only quantized models have these attributes.
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def prepare_quantized(model: PeftModel) -> None:
    """
    Prepare an adapter on a quantized base for rounds of training and scoring, with its score head in float32.

    [`~trl.RewardTrainer`] casts all trained weights beside a quantized base to bfloat16. There, neighboring values
    near 5 are 0.03 apart: rewards tie, and small updates are lost.

    Args:
        model ([`~peft.PeftModel`]):
            Sequence classifier with an adapter, before its optimizer is made.
    """
    # Imported here since it is an optional dependency.
    from bitsandbytes.nn import Linear4bit

    def in_precision_of_head(head: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        # Without autocast, the hidden states are bfloat16 and the head is float32.
        return (args[0].to(next(head.parameters()).dtype),)

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                if isinstance(head, torch.nn.Linear) and head.out_features == 1:
                    head.float().register_forward_pre_hook(in_precision_of_head)
        elif isinstance(module, Linear4bit):
            # On a CPU, bitsandbytes 0.50 packs the weights in scoring for a kernel that has no gradient, and later
            # rounds would train with a wrong gradient. This switch is not documented; there is no other one.
            module.support_avx512bf16_for_cpu = False
    logger.warning("The score head beside the quantized base is trained and saved in float32.")


def adapter_shapes(name_or_path: str, revision: str | None = None) -> dict[str, torch.Size]:
    """`dict[str, torch.Size]`: shapes of the weights of a saved adapter, by their names in the base model."""
    weights = load_peft_weights(name_or_path, device="cpu", revision=revision)
    return {name.removeprefix("base_model.model."): weight.shape for name, weight in weights.items()}


def make_room(base: PreTrainedModel, shapes: dict[str, torch.Size]) -> None:
    """
    Give a base model as many embeddings as a saved adapter brings.

    PEFT saves embeddings with an adapter if they were resized, for a padding token or a chat template, and then can't
    load them into the base model as it is.

    Args:
        base ([`~transformers.PreTrainedModel`]):
            Sequence classifier without an adapter.
        shapes (`dict[str, torch.Size]`):
            Shapes of the weights of the adapter, from [`adapter_shapes`].
    """
    own = num_embeddings(base)
    if own is None:
        return
    embedding = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    # With an adapter of their own, or with single tokens that are trained, they have other names.
    for part in ("", "base_layer.", "token_adapter.base_layer."):
        name = f"{embedding}.{part}weight"
        if name in shapes and shapes[name][0] != own:
            # The new rows are read from the adapter.
            base.resize_token_embeddings(shapes[name][0], mean_resizing=False)


def with_adapter(
    base: PreTrainedModel, name_or_path: str, revision: str | None = None, is_trainable: bool = False
) -> PeftModel:
    """[`~peft.PeftModel`]: the base model with a saved adapter and its score head, to be trained further or not."""
    check_adapter_type(PeftConfig.from_pretrained(name_or_path, revision=revision))
    make_room(base, adapter_shapes(name_or_path, revision))
    return PeftModel.from_pretrained(base, name_or_path, revision=revision, is_trainable=is_trainable)


def merge_adapter(base: PreTrainedModel, name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """[`~transformers.PreTrainedModel`]: the base model with a saved adapter and its score head merged; trainable."""
    merged_model = with_adapter(base, name_or_path, revision).merge_and_unload()
    # PEFT has frozen it; without this, a value model that starts from it would never learn.
    return merged_model.requires_grad_(True)


def merged(model: PeftModel) -> PreTrainedModel:
    """
    Merge an adapter into a copy of its base model; the given model stays as it is.

    If the base is quantized, the unquantized base is loaded again in float32 from its directory or model ID, and the
    adapter is merged into that: in quantized weights, the small changes of the adapter would be rounded away.

    Args:
        model ([`~peft.PeftModel`]):
            Sequence classifier with an adapter.

    Returns:
        [`~transformers.PreTrainedModel`]: sequence classifier without an adapter.
    """
    base: Any = model.get_base_model()
    complete_config(base)
    if not getattr(base, "is_quantized", False):
        return copy.deepcopy(model).merge_and_unload()
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        # A decoder finds the end of a sequence by the padding token, which the trainer set on this model only.
        pad_token_id = base.config.get_text_config().pad_token_id
        base = AutoModelForSequenceClassification.from_pretrained(
            base.config.name_or_path, num_labels=1, dtype=torch.float32
        )
        base.config.get_text_config().pad_token_id = pad_token_id
        complete_config(base)
        return merge_adapter(base, adapter)
