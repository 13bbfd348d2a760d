"""Load and check tokenizers."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import RewardConfig

from ..config import SSRMConfig


_NO_PADDING = "The tokenizer has no padding token and no end-of-sequence token to use instead; set its `pad_token`."


def load_tokenizer(model: Any, args: RewardConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model as [`~trl.RewardTrainer`] does, but early enough to check the data against it."""
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return AutoTokenizer.from_pretrained(
        model_id(model), revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
    )


def model_id(model: Any) -> str:
    """`str`: directory or model ID of a model, given by name or loaded."""
    return model if isinstance(model, str) else model.config.name_or_path


def check_tokenizer(args: SSRMConfig, tokenizer: PreTrainedTokenizerBase, is_conversational: bool | None) -> None:
    """Refuse a tokenizer that lacks a template or token which [`~trl.RewardTrainer`] needs for the data."""
    if is_conversational and tokenizer.chat_template is None and args.chat_template_path is None:
        raise ValueError(
            "The data is conversational, but the tokenizer has no chat template; set `chat_template_path`, or give "
            "the data as text."
        )
    eos_token = args.eos_token or tokenizer.eos_token
    if is_conversational is False and eos_token is None:
        raise ValueError(
            "The data is text, which ends with an end-of-sequence token, but the tokenizer has none; set `eos_token`, "
            "for a BERT-like model to '[SEP]'."
        )
    if args.pad_token is None and tokenizer.pad_token is None and eos_token is None:
        raise ValueError(_NO_PADDING)


def check_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use the end-of-sequence token for padding if there is no padding token; refuse a tokenizer without both."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(_NO_PADDING)
        tokenizer.pad_token = tokenizer.eos_token
