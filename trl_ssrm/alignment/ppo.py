"""The four models and the tokenizer of TRL's `PPOTrainer`, from a policy and a reward model that fit together."""

import logging
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

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
    Load the models of [`~trl.experimental.ppo.PPOTrainer`] (TRL 1.12): policy and reference model from one checkpoint,
    reward and value model from another.

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
            Whether to load a reference model. Set it to `False` if the trainer gets a `peft_config`: the policy
            without its adapter is then the reference.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load the models in.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with a checkpoint.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments to load the policy and the reference model with, such as `quantization_config`.

    Returns:
        `dict[str, Any]`: the arguments `processing_class` (tokenizer of the policy, which pads on the left with the
        padding token of the reward model), `model`, `ref_model`, `reward_model` and `value_model`. All weights of the
        value model are trained, even if the trainer gets a `peft_config`.

    Raises:
        ValueError: If the two checkpoints have different vocabularies, if the padding token is the end token, or if
            the reward model is no decoder with a `score` layer, has several labels, or has weights missing. These are
            checked before the policy is loaded.
    """
    kwargs = model_init_kwargs or {}
    check_model_is_there(model_name_or_path, **kwargs)
    check_model_is_there(reward_model)
    processing_class = _load_tokenizer(model_name_or_path, reward_model, kwargs.get("revision"), trust_remote_code)
    reward, value = (_load_scorer(reward_model, dtype, trust_remote_code) for _ in range(2))
    for scorer in (reward, value):
        scorer.config.get_text_config().pad_token_id = processing_class.pad_token_id
    policies = [load_policy(model_name_or_path, dtype, trust_remote_code, **kwargs) for _ in range(1 + with_ref_model)]
    return {
        "processing_class": processing_class,
        "model": policies[0],
        "ref_model": policies[1] if with_ref_model else None,
        "reward_model": reward,
        "value_model": value,
    }


def _load_tokenizer(policy: str, reward_model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of the policy with the padding token of the reward model, if the two fit together."""
    tokenizer, reward_tokenizer = (
        AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, padding_side="left"
        )
        for name, revision in ((policy, revision), (reward_model, None))
    )
    if tokenizer.get_vocab() != reward_tokenizer.get_vocab():
        raise ValueError(
            f"PPO gives the tokens of the policy to the reward model, but {policy} and {reward_model} have different "
            "vocabularies; train the reward model from the policy's family, or use RLOO."
        )
    if reward_tokenizer.pad_token is None or reward_tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"PPO needs a padding token that is not the end token, but {reward_model} pads with "
            f"{reward_tokenizer.pad_token!r}; train the reward model with another `pad_token` of its tokenizer."
        )
    tokenizer.pad_token = reward_tokenizer.pad_token
    if reward_tokenizer.chat_template is not None:
        exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        encoded: Any = reward_tokenizer.apply_chat_template(exchange, return_dict=True)
        if encoded["input_ids"][-1] != tokenizer.eos_token_id:
            logger.warning(
                f"The chat template of {reward_model} puts text behind the end token. The reward model was trained to "
                "give its reward after that text, but PPO reads it at the end token. To avoid the difference, train "
                "with a template that ends with the end token."
            )
    return tokenizer


def _load_scorer(reward_model: str, dtype: str | torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    model = load_reward_model(reward_model, dtype=dtype, trust_remote_code=trust_remote_code)
    # `PPOTrainer` calls the decoder, and then `score` on its last hidden state at every token.
    if not hasattr(model, "score") or not hasattr(model, model.base_model_prefix):
        raise ValueError(
            f"PPO reads a reward at every token, which {type(model).__name__} can't give; train the reward model from "
            "a decoder, or use RLOO."
        )
    return model
