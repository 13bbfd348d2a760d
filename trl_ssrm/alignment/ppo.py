"""The models of PPO."""

import logging
from typing import Any

import torch
from transformers import AutoTokenizer

from ..io.hub import check_model_is_there
from ..models.loading import load_policy, load_reward_model


logger = logging.getLogger(__name__)


def load_ppo_models(
    model_name_or_path: str,
    reward_model: str,
    with_ref_model: bool = True,
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
    model_init_kwargs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    The models of [`~trl.experimental.ppo.PPOTrainer`] (TRL 1.12): policy and reference from one checkpoint, reward and
    value model from another.

    Example:

    ```python
    >>> trainer = PPOTrainer(args=args, train_dataset=dataset, **load_ppo_models("sft-model", "reward-model"))
    ```

    Args:
        model_name_or_path (`str`):
            Directory or model ID of the policy.
        reward_model (`str`):
            Directory or model ID of the reward model, or of an adapter for one, which is merged.
        with_ref_model (`bool`, *optional*, defaults to `True`):
            Whether to load a reference model. With `peft_config` for the policy there is none.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load the models in.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with a checkpoint.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments to load the policy and its reference with, such as `quantization_config`.

    Returns:
        `dict[str, Any]`: the arguments `processing_class` (that of the policy, padded on the left with the padding
        token of the reward model), `model`, `ref_model`, `reward_model` and `value_model`. All of the value model is
        trained, also where `peft_config` is given for the policy.

    Raises:
        ValueError: If the two do not share a vocabulary, if the padding token is the end token, or if the reward model
            is not a decoder with a `score` layer, has several labels, or has weights missing. Nothing is loaded of the
            policy then.
    """
    check_model_is_there(model_name_or_path, **model_init_kwargs or {})
    check_model_is_there(reward_model)
    revision = (model_init_kwargs or {}).get("revision")
    processing_class, reward_tokenizer = (
        AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
        for name, revision in ((model_name_or_path, revision), (reward_model, None))
    )
    if processing_class.get_vocab() != reward_tokenizer.get_vocab():
        raise ValueError(
            f"PPO gives the tokens of the policy to the reward model, but {model_name_or_path} and {reward_model} have "
            "different vocabularies; train the reward model from the policy's family, or use RLOO."
        )
    if reward_tokenizer.pad_token is None or reward_tokenizer.pad_token_id == processing_class.eos_token_id:
        raise ValueError(
            f"PPO tells the end of a completion from padding, but {reward_model} pads with "
            f"{reward_tokenizer.pad_token!r}; train the reward model with another token as `pad_token` of its tokenizer."
        )
    processing_class.pad_token = reward_tokenizer.pad_token
    if reward_tokenizer.chat_template is not None:
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        # It returns one of many types, depending on its arguments.
        ids = reward_tokenizer.apply_chat_template(exchange, return_dict=True)["input_ids"]  # type: ignore[call-overload,index]
        if ids[-1] != processing_class.eos_token_id:
            logger.warning(
                f"The chat template of {reward_model} puts text behind the end token. PPO reads the reward at that token, "
                "the reward model was trained to give it behind; a template that ends with the end token avoids that."
            )
    loaded = [load_reward_model(reward_model, dtype=dtype, trust_remote_code=trust_remote_code)]
    # What `PPOTrainer` calls on every token: the decoder, and the score of its last hidden state.
    if not hasattr(loaded[0], "score") or not hasattr(loaded[0], loaded[0].base_model_prefix):
        raise ValueError(
            f"PPO reads a reward at every token, which {type(loaded[0]).__name__} can't give; train the reward model "
            "from a decoder, or use RLOO."
        )
    loaded.append(load_reward_model(reward_model, dtype=dtype, trust_remote_code=trust_remote_code))
    for each in loaded:
        each.config.get_text_config().pad_token_id = processing_class.pad_token_id
    policies = [
        load_policy(model_name_or_path, dtype, trust_remote_code, **(model_init_kwargs or {}))
        for _ in range(1 + with_ref_model)
    ]
    return {
        "processing_class": processing_class,
        "model": policies[0],
        "ref_model": policies[1] if with_ref_model else None,
        "reward_model": loaded[0],
        "value_model": loaded[1],
    }
