"""Adapters of PEFT: a score head that is trained with them, and their merge into the base model."""

import copy
import logging
import tempfile
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from transformers import AutoModelForSequenceClassification, PreTrainedModel


logger = logging.getLogger(__name__)


def with_score_head(peft_config: PeftConfig | None) -> PeftConfig | None:
    """
    A PEFT configuration under which the score head is trained and saved.

    Args:
        peft_config ([`~peft.PeftConfig`], *optional*):
            The configuration that the user gave.

    Returns:
        [`~peft.PeftConfig`] or `None`: the same, with `task_type="SEQ_CLS"`; PEFT then takes care of the head. A change
        is logged.
    """
    if peft_config is None or peft_config.task_type == TaskType.SEQ_CLS:
        return peft_config
    logger.warning(
        "`peft_config` is taken as one with `task_type='SEQ_CLS'`, so that the score head is trained and saved."
    )
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = TaskType.SEQ_CLS
    return peft_config


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
        return PeftModel.from_pretrained(base, adapter).merge_and_unload()
