"""Tokenizers: loading and checks."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import SSRMConfig


def check_tokenizer(args: SSRMConfig, tokenizer: PreTrainedTokenizerBase, is_conversational: bool | None) -> None:
    """Refuse a tokenizer that lacks what [`~trl.RewardTrainer`] needs for this kind of data."""
    if is_conversational and tokenizer.chat_template is None and args.chat_template_path is None:
        raise ValueError(
            "The data is conversational, but the tokenizer has no chat template; set `chat_template_path`, or give the "
            "data as text."
        )
    eos_token = args.eos_token or tokenizer.eos_token
    if is_conversational is False and eos_token is None:
        raise ValueError(
            "The data is text, which ends with an end-of-sequence token, but the tokenizer has none; set `eos_token`, "
            "for a BERT-like model to '[SEP]'."
        )
    if args.pad_token is None and tokenizer.pad_token is None and eos_token is None:
        raise ValueError("The tokenizer has no padding token and none to fall back on; set its `pad_token`.")


def check_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with the end token if there is no other; refuse a tokenizer that has neither."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no padding token and none to fall back on; set its `pad_token`.")
        tokenizer.pad_token = tokenizer.eos_token


def load_tokenizer(model: Any, args: SSRMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, as [`~trl.RewardTrainer`] loads it, but before the data is checked against it."""
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return AutoTokenizer.from_pretrained(
        _model_id(model), revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
    )


def _model_id(model: Any) -> str:
    return model if isinstance(model, str) else model.config.name_or_path
