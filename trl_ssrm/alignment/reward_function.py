"""The finished reward model in TRL's alignment trainers: as a reward function, and as the models of PPO."""

import json
import logging
import os
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.checks import check_columns, check_prompts
from ..data.markup import as_literal, special_tokens_of
from ..io.hub import check_model_is_there
from ..models.classifier import num_positions
from ..models.loading import load_reward_model
from ..models.tokenizers import check_padding
from ..scoring.layout import choose_layout
from ..scoring.score import NonFiniteScoreError, score_sequences


logger = logging.getLogger(__name__)

REWARD_MODEL_VARIABLE = "SSRM_REWARD_MODEL"


class SSRMRewardFunction:
    """
    A reward model as a reward function for [`~trl.GRPOTrainer`], [`~trl.RLOOTrainer`] and
    [`~trl.experimental.online_dpo.OnlineDPOTrainer`].

    It reads text, so the policy may have another tokenizer and chat template. Prompt and completion are put together
    as [`~trl.RewardTrainer`] puts them together in training: conversations by the chat template of the reward model,
    with the columns `tools` and `chat_template_kwargs` of the dataset if it has them; text with the end-of-sequence
    token behind it. (TRL itself, given the directory of a reward model, leaves that token and those columns out.)
    Special tokens that a message spells out are read as the characters that they are: no completion opens a turn.

    Example:

    ```python
    >>> from trl import RLOOTrainer
    >>> from trl_ssrm import SSRMRewardFunction

    >>> trainer = RLOOTrainer(
    ...     model="Qwen/Qwen3-0.6B", reward_funcs=SSRMRewardFunction("Qwen3-0.6B-SSRM"), train_dataset=dataset
    ... )
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Reward model. A directory or model ID is loaded by [`load_reward_model`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the reward model. If `None`, it is loaded from where the model comes from.
        reference_dataset ([`~datasets.Dataset`], *optional*):
            Rows with `prompt` and `completion`. Rewards are shifted and scaled so that those of these rows have mean 0
            and variance 1.
        baseline_column (`str`, *optional*):
            Column of the training dataset with a completion to compare with. The reward is then the difference to the
            reward of that completion, which under the Bradley-Terry model is the log-odds of being preferred to it.
            Not together with `reference_dataset`.
        reward_clip_range (`tuple[float, float]`, *optional*):
            Lowest and highest reward; others are clipped, after shifting and scaling.
        batch_tokens (`int`, *optional*):
            Size of a scoring batch in tokens, padding included. It does not change the rewards. If `None`, it is found by
            trying.
        device (`str` or `torch.device`, *optional*):
            Where the reward model runs. If `None`, on the device of the process, from the first call on.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load the model in. The last layer is computed in float32 in any case.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments to load the model with.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.

    Raises:
        ValueError: If the model is none with one trained label, or the arguments can't go together.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | None = None,
        reference_dataset: Dataset | None = None,
        baseline_column: str | None = None,
        reward_clip_range: tuple[float, float] | None = None,
        batch_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        model_init_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ):
        if reference_dataset is not None:
            if baseline_column is not None:
                raise ValueError(
                    "`baseline_column` gives log-odds, and `reference_dataset` would rescale them; choose one."
                )
            check_columns(reference_dataset, ("prompt", "completion"), "reference_dataset")
            check_prompts(reference_dataset, "reference_dataset", lambda row: {"completion": row["completion"]})
        if reward_clip_range is not None and not reward_clip_range[0] < reward_clip_range[1]:
            raise ValueError(f"`reward_clip_range` must be a lower and a higher bound, got {reward_clip_range}.")
        kwargs = model_init_kwargs or {}
        check_model_is_there(model, **kwargs)
        if isinstance(model, str):
            # TRL names the column of the logs after it.
            self.__name__ = os.path.basename(model.rstrip("/"))
            processing_class = processing_class or AutoTokenizer.from_pretrained(
                model, revision=kwargs.get("revision"), trust_remote_code=trust_remote_code
            )
            model = load_reward_model(model, dtype, trust_remote_code, **kwargs)
        else:
            name_or_path = str(model.config.name_or_path)
            self.__name__ = os.path.basename(name_or_path)
            processing_class = processing_class or AutoTokenizer.from_pretrained(
                name_or_path, trust_remote_code=trust_remote_code
            )
            if model.config.num_labels != 1:
                raise ValueError(f"The model has {model.config.num_labels} labels, but a reward model has one.")
        check_padding(processing_class)
        # A decoder reads the reward at the last token that is no padding.
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        self.model = model.eval()
        self.processing_class = processing_class
        self.reference_dataset = reference_dataset
        self.baseline_column = baseline_column
        self.reward_clip_range = reward_clip_range
        self.batch_tokens = batch_tokens
        self.layout = choose_layout(self.model)
        self.num_positions = num_positions(self.model)
        self.device = device

    def __call__(self, prompts: list, completions: list, **kwargs: Any) -> list[float]:
        """
        Rewards of completions, as TRL asks for them.

        Args:
            prompts (`list` of length `num_completions`):
                Text or conversations, one for each completion.
            completions (`list` of length `num_completions`):
                Text or messages.
            kwargs:
                Columns of the dataset, each of length `num_completions`. `tools`, `chat_template_kwargs` and
                `baseline_column` are used.

        Returns:
            `list[float]` of length `num_completions`: the rewards.

        Raises:
            NonFiniteScoreError: If a reward is NaN or infinite.
            ValueError: If the model has no positions for so many tokens.
        """
        columns = {name: kwargs.get(name) for name in ("tools", "chat_template_kwargs")}
        if self.baseline_column is None:
            mean, std = self._reference_statistics
            rewards = (self.score(prompts, completions, **columns) - mean) / std
        else:
            if kwargs.get(self.baseline_column) is None:
                raise ValueError(
                    f"The dataset has no column `{self.baseline_column}`; add it, or leave `baseline_column` out."
                )
            baselines = [
                [{"role": "assistant", "content": baseline}]
                if isinstance(prompt, list) and isinstance(baseline, str)
                # It is put together with the prompt as any completion is.
                else baseline
                for prompt, baseline in zip(prompts, kwargs[self.baseline_column], strict=True)
            ]
            twice = {name: None if column is None else [*column, *column] for name, column in columns.items()}
            own, other = np.split(self.score([*prompts, *prompts], [*completions, *baselines], **twice), 2)
            rewards = own - other
        if self.reward_clip_range is not None:
            rewards = rewards.clip(*self.reward_clip_range)
        return rewards.tolist()

    def score(
        self, prompts: Sequence, completions: Sequence, tools: Sequence | None = None, chat_template_kwargs=None
    ) -> np.ndarray:
        """
        Rewards as the model gives them, neither shifted nor clipped.

        Args:
            prompts (`list` of length `num_completions`):
                Text or conversations.
            completions (`list` of length `num_completions`):
                Text or messages.
            tools (`list`, *optional*):
                Tools of each conversation, as a list or as JSON.
            chat_template_kwargs (`list[dict[str, Any] | None]`, *optional*):
                Arguments of the chat template for each conversation.

        Returns:
            `np.ndarray` of shape `(num_completions,)`, float64.

        Raises:
            NonFiniteScoreError: If a reward is NaN or infinite.
            ValueError: If the model has no positions for so many tokens.
        """
        nothing = [None] * len(prompts)
        return self.score_tokenized(
            [
                self.tokenize(*row)
                for row in zip(prompts, completions, tools or nothing, chat_template_kwargs or nothing, strict=True)
            ]
        )

    def score_tokenized(self, sequences: list[list[int]]) -> np.ndarray:
        """
        Rewards of tokenized sequences, neither shifted nor clipped.

        Args:
            sequences (`list[list[int]]` of length `num_sequences`):
                What [`SSRMRewardFunction.tokenize`] gives.

        Returns:
            `np.ndarray` of shape `(num_sequences,)`, float64.

        Raises:
            NonFiniteScoreError: If a reward is NaN or infinite.
            ValueError: If the model has no positions for so many tokens.
        """
        longest = max(map(len, sequences), default=0)
        if self.num_positions is not None and longest > self.num_positions:
            raise ValueError(
                f"A prompt with its completion has {longest} tokens, but the reward model has positions for "
                f"{self.num_positions}; shorten the prompts, or limit the completions (`max_completion_length`)."
            )
        if getattr(self.model, "hf_device_map", None) is None:
            self.model.to(self.device or PartialState().device)
        rewards = score_sequences(
            self.model, sequences, self.processing_class.pad_token_id, self.layout, self.batch_tokens
        )
        if not np.isfinite(rewards).all():
            raise NonFiniteScoreError("completions", np.flatnonzero(~np.isfinite(rewards)).tolist())
        return rewards.astype(np.float64)

    def tokenize(self, prompt, completion, tools=None, chat_template_kwargs=None) -> list[int]:
        """
        Token IDs of a prompt with a completion, the same as [`~trl.RewardTrainer`] trains on.

        Args:
            prompt (`str` or `list[dict[str, Any]]`):
                Text or conversation.
            completion (`str` or `list[dict[str, Any]]`):
                Text or messages.
            tools (`list` or `str`, *optional*):
                Tools of the conversation, as a list or as JSON.
            chat_template_kwargs (`dict[str, Any]`, *optional*):
                Arguments of the chat template.

        Returns:
            `list[int]`: the token IDs.

        Raises:
            ValueError: If the prompt is a conversation and the tokenizer has no chat template.
        """
        tokenizer: Any = self.processing_class
        if isinstance(prompt, str):
            end = (
                "" if tokenizer.eos_token is None or completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
            )
            return tokenizer(prompt + completion + end)["input_ids"]
        if tokenizer.chat_template is None:
            raise ValueError(
                "The prompts are conversations, but the tokenizer of the reward model has no chat template; set one, or "
                "give the prompts as text, as the reward model was trained on."
            )
        tools = json.loads(tools) if isinstance(tools, str) else tools
        # A policy that spells the end of a turn out must not be rewarded for what comes behind it.
        messages, tools = as_literal([prompt + completion, tools], self._special_tokens)
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=True,
            return_dict=True,
            **(chat_template_kwargs or {}),
        )["input_ids"]

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        return special_tokens_of(self.processing_class)

    @cached_property
    def _reference_statistics(self) -> tuple[float, float]:
        if self.reference_dataset is None:
            return 0.0, 1.0
        columns = {
            name: self.reference_dataset[name]
            for name in ("tools", "chat_template_kwargs")
            if name in self.reference_dataset.column_names
        }
        rewards = self.score(self.reference_dataset["prompt"], self.reference_dataset["completion"], **columns)
        if not rewards.std() > 0:
            raise ValueError("All rows of `reference_dataset` get the same reward; give it completions that differ.")
        return float(rewards.mean()), float(rewards.std())


def __getattr__(name: str):
    # For scripts that take a reward function by its import path. Made on being named, so that a wrong directory is
    # known before the policy is loaded.
    if name != "ssrm_reward":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if REWARD_MODEL_VARIABLE not in os.environ:
        raise ValueError(
            f"`trl_ssrm.ssrm_reward` needs the environment variable {REWARD_MODEL_VARIABLE} with the directory of the "
            "reward model; set it, or list it under `env` in the YAML configuration."
        )
    return SSRMRewardFunction(os.environ[REWARD_MODEL_VARIABLE])
