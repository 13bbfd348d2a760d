"""Adapters of PEFT: a score head that is trained with them, and their merge into the base model."""

import copy
import logging
import tempfile
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, load_peft_weights
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForSequenceClassification, PreTrainedModel


logger = logging.getLogger(__name__)


def with_score_head(peft_config: PeftConfig | None) -> PeftConfig | None:
    """
    A PEFT configuration under which the score head is trained and saved.

    Args:
        peft_config ([`~peft.PeftConfig`], *optional*):
            The configuration that the user gave.

    Returns:
        [`~peft.PeftConfig`] or `None`: the same, with `task_type="SEQ_CLS"`; PEFT then adds the head to
        `modules_to_save`. A change is logged.
    """
    if peft_config is None or peft_config.task_type == TaskType.SEQ_CLS:
        return peft_config
    logger.warning(
        "`peft_config` is taken as one with `task_type='SEQ_CLS'`, which adds the score head to `modules_to_save`: it is "
        "trained and saved."
    )
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = TaskType.SEQ_CLS
    return peft_config


def is_quantized_by_bitsandbytes(model: Any) -> bool:
    """`bool`: whether a model is one that [`~trl.RewardTrainer`] takes for QLoRA."""
    # Only quantized models have these.
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def prepare_quantized(model: PeftModel) -> None:
    """
    Make an adapter on a quantized base ready for rounds of training and scoring, with its score head in float32.

    [`~trl.RewardTrainer`] casts all that is trained beside a quantized base to bfloat16, in which rewards near 5 are
    0.03 apart and small updates are lost.

    Args:
        model ([`~peft.PeftModel`]):
            Sequence classifier with an adapter, before its optimizer is made.
    """
    # Optional, and there if the base was quantized by it.
    from bitsandbytes.nn import Linear4bit

    def in_precision_of_head(head: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        # Without autocast, the hidden states of a base in bfloat16 would not go with the head.
        return (args[0].to(next(head.parameters()).dtype),)

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for head in module.modules_to_save.values():
                if isinstance(head, torch.nn.Linear) and head.out_features == 1:
                    head.float().register_forward_pre_hook(in_precision_of_head)
        elif isinstance(module, Linear4bit):
            # On a CPU, scoring would pack the weights for a kernel without a gradient (bitsandbytes 0.50), and the
            # rounds after it would train on a wrong one. Not documented; there is no other switch.
            module.support_avx512bf16_for_cpu = False
    logger.warning("The score head beside the quantized base is trained and saved in float32.")


def adapter_shapes(name_or_path: str, revision: str | None = None) -> dict[str, torch.Size]:
    """`dict[str, torch.Size]`: shapes of the weights in a saved adapter, by their names in the base model."""
    weights = load_peft_weights(name_or_path, device="cpu", revision=revision)
    return {name.removeprefix("base_model.model."): weight.shape for name, weight in weights.items()}


def merge_adapter(base: PreTrainedModel, name_or_path: str, revision: str | None = None) -> PreTrainedModel:
    """Load a saved adapter on a base model and merge it, its score head included; all of it can be trained on."""
    merged_model = PeftModel.from_pretrained(base, name_or_path, revision=revision).merge_and_unload()
    # PEFT has frozen it, and a value model that starts from it would never learn.
    return merged_model.requires_grad_(True)


def merged(model: PeftModel) -> PreTrainedModel:
    """
    The base model with the adapter merged into it; the given model stays as it is.

    A quantized base is loaded again in float32 from where it came, and the adapter merged into that, since merging into
    quantized weights would round the adapter away.

    Args:
        model ([`~peft.PeftModel`]):
            Sequence classifier with an adapter.

    Returns:
        [`~transformers.PreTrainedModel`]: sequence classifier without one.
    """
    base: Any = model.get_base_model()
    if not getattr(base, "is_quantized", False):
        return copy.deepcopy(model).merge_and_unload()
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        # The padding token is what tells a decoder where a sequence ends; the trainer has set it on the model only.
        pad_token_id = base.config.get_text_config().pad_token_id
        base = AutoModelForSequenceClassification.from_pretrained(
            base.config.name_or_path, num_labels=1, dtype=torch.float32
        )
        base.config.get_text_config().pad_token_id = pad_token_id
        return merge_adapter(base, adapter)
