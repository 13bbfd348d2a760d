"""The finished reward model as a reward function of TRL's online trainers."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.checks import (
    check_columns,
    check_prompt_of_completion,
    check_prompts,
    tokenizing,
    unformatted,
)
from ..data.conversations import ConversationReader, begins_with, template_arguments
from ..io.hub import check_model_is_there
from ..io.storage import content_hash, tensors_hash
from ..models.calibration import load_temperature
from ..models.classifier import num_positions
from ..models.loading import load_reward_model
from ..models.tokenizers import check_padding
from ..scoring.layout import choose_layout
from ..scoring.score import NonFiniteScoreError, score_sequences


REWARD_MODEL_VARIABLE = "SSRM_REWARD_MODEL"


class SSRMRewardFunction:
    """
    A reward model as a reward function for [`~trl.GRPOTrainer`], [`~trl.RLOOTrainer`] and
    [`~trl.experimental.online_dpo.OnlineDPOTrainer`].

    It reads text, so the policy may have another tokenizer and chat template. Prompt and completion are joined as
    [`~trl.RewardTrainer`] joins them in training: conversations by the chat template of the reward model, with the
    columns `tools` and `chat_template_kwargs` of the dataset if it has them; text with the end-of-sequence token
    appended. (TRL leaves out this token and these columns if it gets the directory of a reward model.) Special tokens
    that are spelled out in a message are read as plain characters, so a completion can't open a turn.

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
            Tokenizer of the reward model. If `None`, it is loaded from the directory or ID of the model.
        reference_dataset ([`~datasets.Dataset`], *optional*):
            Rows with `prompt` and `completion`. Rewards are shifted and scaled so that the rewards of these rows have
            mean 0 and variance 1.
        baseline_column (`str`, *optional*):
            Column of the training dataset with a completion to compare with. The reward is then the difference to the
            reward of this completion. Under the Bradley-Terry model it is the log-odds of being preferred to it. Can't
            be combined with `reference_dataset`.
        reward_clip_range (`tuple[float, float]`, *optional*):
            Lowest and highest reward. Rewards are clipped after shifting and scaling.
        batch_tokens (`int`, *optional*):
            Size of a scoring batch in tokens, padding included. It does not change the rewards. If `None`, 4,096 on a
            CPU; on an accelerator 16,384 at first, and more as long as it fits.
        device (`str` or `torch.device`, *optional*):
            Device to run the reward model on. If `None`, the device of the process. The model is moved at the first
            call.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load the model in. The last layer is computed in float32 in any case.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments to load the model with.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.

    Attributes:
        - **model** ([`~transformers.PreTrainedModel`]) -- Sequence classifier with one label, in evaluation mode.
        - **processing_class** ([`~transformers.PreTrainedTokenizerBase`]) -- Its tokenizer, with a padding token.
        - **temperature** (`float`) -- `sigmoid((r(a) - r(b)) / temperature)` is the probability that `a` is preferred. The one
          that [`SSRMTrainer`] has saved with the model, otherwise 1. It does not change the rewards.

    Raises:
        ValueError: If the model is not a reward model with one trained label, if a row of `reference_dataset` lacks
            text, if `reward_clip_range` is empty, or if `baseline_column` and `reference_dataset` are both given.
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
        _check_shaping(reference_dataset, baseline_column, reward_clip_range)
        kwargs = model_init_kwargs or {}
        check_model_is_there(model, **kwargs)
        name_or_path = model if isinstance(model, str) else str(model.config.name_or_path)
        # TRL names a column of its logs after the function.
        self.__name__ = os.path.basename(name_or_path.rstrip("/"))
        self.processing_class: Any = processing_class or AutoTokenizer.from_pretrained(
            name_or_path, revision=kwargs.get("revision"), trust_remote_code=trust_remote_code
        )
        self.temperature = load_temperature(model, kwargs.get("revision"))
        if isinstance(model, str):
            model = load_reward_model(model, dtype, trust_remote_code, **kwargs)
        elif model.config.num_labels != 1:
            raise ValueError(
                f"The model has {model.config.num_labels} labels, but a reward model has one; train it with "
                "`num_labels=1`."
            )
        check_padding(self.processing_class)
        # A decoder reads the reward at the last token that is not padding.
        model.config.get_text_config().pad_token_id = self.processing_class.pad_token_id
        self.model = model.eval()
        self.reference_dataset = reference_dataset
        self.baseline_column = baseline_column
        self.reward_clip_range = reward_clip_range
        self.batch_tokens = batch_tokens
        self.layout = choose_layout(self.model)
        self.num_positions = num_positions(self.model)
        self.device = device

    # What a teacher of a pool needs, here and in `PairwiseJudge`.
    kind = "scalar"

    @property
    def fingerprint(self) -> str:
        """`str`: hash of the weights, the temperature and the chat template. Together they decide the probabilities."""
        weights = tensors_hash(dict(self.model.named_parameters()))
        return content_hash(weights, self.temperature, self.processing_class.chat_template)

    @property
    def max_length(self) -> int | None:
        """`int` or `None`: the longest sequence in tokens that the model reads."""
        return self.num_positions

    def tokenize_pair(self, prompt, first, second) -> tuple[list[int], list[int]]:
        """
        Token IDs of a prompt with each of two completions, in the form that a teacher of a pool gives them.

        Args:
            prompt (`str` or `list[dict[str, Any]]`):
                Text or conversation.
            first, second (`str` or `list[dict[str, Any]]`):
                The completions, as text or messages.

        Returns:
            `tuple[list[int], list[int]]`: the token IDs of each sequence.
        """
        return self.tokenize(prompt, first), self.tokenize(prompt, second)

    def __call__(self, prompts: list, completions: list, **kwargs: Any) -> list[float]:
        """
        Rewards of completions, with the arguments that TRL calls a reward function with.

        Args:
            prompts (`list` of length `num_completions`):
                Text or conversations, one for each completion.
            completions (`list` of length `num_completions`):
                Text or messages.
            kwargs:
                Columns of the dataset, each of length `num_completions`. Only `tools`, `chat_template_kwargs` and the
                column named by `baseline_column` are used.

        Returns:
            `list[float]` of length `num_completions`: the rewards.

        Raises:
            NonFiniteScoreError: If a reward is NaN or infinite.
            ValueError: If `baseline_column` is missing, or if a text has more tokens than the model has positions.
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
            rewards = self._log_odds(prompts, completions, kwargs[self.baseline_column], columns)
        if self.reward_clip_range is not None:
            rewards = rewards.clip(*self.reward_clip_range)
        return rewards.tolist()

    def score(
        self, prompts: Sequence, completions: Sequence, tools: Sequence | None = None, chat_template_kwargs=None
    ) -> np.ndarray:
        """
        Rewards of the model, before they are shifted, scaled and clipped.

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
            ValueError: If a text has more tokens than the model has positions.
        """
        nothing = [None] * len(prompts)
        rows = zip(prompts, completions, tools or nothing, chat_template_kwargs or nothing, strict=True)
        sequences = []
        for number, row in enumerate(rows):
            check_prompt_of_completion(row[0], f"row {number}")
            with tokenizing(f"The completion of row {number}", number):
                sequences.append(self.tokenize(*row))
        return self.score_tokenized(sequences)

    def score_tokenized(self, sequences: list[list[int]]) -> np.ndarray:
        """
        Rewards of tokenized sequences, before they are shifted, scaled and clipped.

        Args:
            sequences (`list[list[int]]` of length `num_sequences`):
                Token IDs, as from [`SSRMRewardFunction.tokenize`].

        Returns:
            `np.ndarray` of shape `(num_sequences,)`, float64.

        Raises:
            NonFiniteScoreError: If a reward is NaN or infinite.
            ValueError: If a text has more tokens than the model has positions.
        """
        longest = max(map(len, sequences), default=0)
        if self.num_positions is not None and longest > self.num_positions:
            raise ValueError(
                f"A prompt with its completion has {longest} tokens, but the reward model has positions for "
                f"{self.num_positions}; shorten the prompts or set a lower `max_completion_length`."
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
        Token IDs of a prompt with a completion, the same that [`~trl.RewardTrainer`] trains on.

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
            ValueError: If the prompt is a conversation and the tokenizer has no chat template, or the template does not
                read a message.
        """
        tokenizer = self.processing_class
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("one of prompt and completion is text and the other one a conversation")
        if begins_with(completion, prompt):
            raise ValueError("it begins with the messages of the prompt, which would be read twice")
        if isinstance(prompt, str):
            # Text shows neither, but a row that can't be trained on gets no reward either.
            template_arguments(tools, chat_template_kwargs)
            end = (
                "" if tokenizer.eos_token is None or completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
            )
            return tokenizer(prompt + completion + end)["input_ids"]
        if tokenizer.chat_template is None:
            raise ValueError(
                "The prompts are conversations, but the tokenizer of the reward model has no chat template; give the "
                "prompts as text, or set the template that the reward model was trained with."
            )
        # A policy that spells out the end of a turn must not be rewarded for the text after it.
        messages, arguments = self._reader.read(prompt + completion, tools, chat_template_kwargs)
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)["input_ids"]

    def _log_odds(self, prompts: list, completions: list, baselines: list, columns: dict[str, Any]) -> np.ndarray:
        # Text becomes a message, so that it is joined with a conversation as a completion is.
        baselines = [
            [{"role": "assistant", "content": baseline}]
            if isinstance(prompt, list) and isinstance(baseline, str)
            else baseline
            for prompt, baseline in zip(prompts, baselines, strict=True)
        ]
        twice = {name: None if column is None else [*column, *column] for name, column in columns.items()}
        own, other = np.split(self.score([*prompts, *prompts], [*completions, *baselines], **twice), 2)
        return own - other

    @cached_property
    def _reader(self) -> ConversationReader:
        return ConversationReader(self.processing_class)

    @cached_property
    def _reference_statistics(self) -> tuple[float, float]:
        if self.reference_dataset is None:
            return 0.0, 1.0
        rows = unformatted(self.reference_dataset)
        columns = {name: rows[name] for name in ("tools", "chat_template_kwargs") if name in rows.column_names}
        rewards = self.score(rows["prompt"], rows["completion"], **columns)
        if not rewards.std() > 0:
            raise ValueError(
                "All rows of `reference_dataset` get the same reward, so rewards can't be scaled; give it completions "
                "that differ."
            )
        return float(rewards.mean()), float(rewards.std())


def _check_shaping(
    reference_dataset: Dataset | None,
    baseline_column: str | None,
    reward_clip_range: tuple[float, float] | None,
) -> None:
    if reference_dataset is not None:
        if baseline_column is not None:
            raise ValueError(
                "`baseline_column` gives log-odds, and `reference_dataset` would rescale them; choose one."
            )
        check_columns(reference_dataset, ("prompt", "completion"), "reference_dataset")
        check_prompts(reference_dataset, "reference_dataset", lambda row: {"completion": row["completion"]})
    if reward_clip_range is not None and not reward_clip_range[0] < reward_clip_range[1]:
        raise ValueError(f"`reward_clip_range` must be a lower and a higher bound, got {reward_clip_range}.")


def __getattr__(name: str):
    # TRL's scripts take a reward function by its import path. It is made when the path is looked up, so that a wrong
    # directory is refused before the policy is loaded.
    if name != "ssrm_reward":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if REWARD_MODEL_VARIABLE not in os.environ:
        raise ValueError(
            f"`trl_ssrm.ssrm_reward` needs the environment variable {REWARD_MODEL_VARIABLE} with the directory of the "
            "reward model; set it in the shell, or under `env` in the YAML configuration."
        )
    return SSRMRewardFunction(os.environ[REWARD_MODEL_VARIABLE])
