"""The finished pairwise preference model as a judge of pairs, as a reward function, and as a teacher."""

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.checks import NotTokenizedError, check_prompt_of_completion, tokenizing
from ..io.hub import check_model_is_there
from ..io.storage import content_hash, tensors_hash
from ..models.calibration import load_temperature
from ..models.comparison import Comparison
from ..models.loading import check_answers_behind, load_pairwise_model
from ..models.tokenizers import check_padding
from ..scoring.layout import choose_layout
from ..scoring.pair_scores import sigmoid
from ..scoring.preference import mean_win_probability, pairwise_logits
from ..scoring.score import NonFiniteScoreError, score_sequences


logger = logging.getLogger(__name__)


class PairwiseJudge:
    """
    A pairwise preference model, which reads two completions together, in both orders, and tells the better one.

    It judges pairs, ranks completions, labels preferences ([`label_preferences`]), and labels the pool for a scalar
    model (`PseudoLabelingCallback(teacher=judge)`). It is also a reward function for [`~trl.GRPOTrainer`],
    [`~trl.RLOOTrainer`] and [`~trl.experimental.online_dpo.OnlineDPOTrainer`]: the reward of a completion is its mean
    probability of being preferred to the other completions of the same prompt in the batch.

    Example:

    ```python
    >>> from trl_ssrm import PairwiseJudge

    >>> judge = PairwiseJudge("Qwen3-0.6B-SSRM-pairwise")
    >>> judge.judge(["What is 2 + 2?"], [("4", "5")])
    [0.97]
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Directory or model ID of a pairwise preference model or an adapter for one; a loaded pairwise preference
            model; or a directory or model ID of a causal language model, which then judges without training.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the model. If `None`, it is loaded from the directory or ID of the model.
        comparison ([`Comparison`], *optional*):
            How pairs are shown to the model. If `None`, as in its training; the default comparison if it was not
            trained.
        batch_tokens (`int`, *optional*):
            Size of a scoring batch in tokens, padding included. It does not change the probabilities. If `None`, 4,096
            on a CPU; on an accelerator 16,384 at first, and more as long as it fits.
        device (`str` or `torch.device`, *optional*):
            Device to run the model on. If `None`, the device of the process. The model is moved at the first call.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load the model in. The last layer is computed in float32 in any case.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments to load the model with.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.

    Attributes:
        - **model** ([`~transformers.PreTrainedModel`]) -- Sequence classifier with one label, in evaluation mode. Its
          score of a tokenized comparison is the logit that the completion shown first is preferred.
        - **processing_class** ([`~transformers.PreTrainedTokenizerBase`]) -- Its tokenizer, with a padding token.
        - **comparison** ([`Comparison`]) -- How pairs are shown to the model. `comparison.tokenize(processing_class,
          prompt, first, second)` gives the token IDs of both orders.
        - **temperature** (`float`) -- Divisor of the pair logits in [`PairwiseJudge.judge`]. The one that [`SSRMTrainer`] has
          saved with the model, otherwise 1.
        - **fingerprint** (`str`) -- Hash of everything that decides the probabilities.

    Raises:
        ValueError: If the model is an encoder, or if a label of the comparison is not one token.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | None = None,
        comparison: Comparison | None = None,
        batch_tokens: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        model_init_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ):
        kwargs = model_init_kwargs or {}
        check_model_is_there(model, **kwargs)
        name_or_path = model if isinstance(model, str) else str(model.config.name_or_path)
        # TRL names a column of its logs after the function.
        self.__name__ = os.path.basename(name_or_path.rstrip("/"))
        self.processing_class: Any = processing_class or AutoTokenizer.from_pretrained(
            name_or_path, revision=kwargs.get("revision"), trust_remote_code=trust_remote_code
        )
        check_padding(self.processing_class)
        self.comparison = (
            comparison or Comparison.from_pretrained(name_or_path, kwargs.get("revision")) or Comparison()
        )
        self.temperature = load_temperature(model, kwargs.get("revision"))
        label_token_ids = self.comparison.label_token_ids(self.processing_class)
        if isinstance(model, str):
            model = load_pairwise_model(model, label_token_ids, dtype, trust_remote_code, **kwargs)
        check_answers_behind(model)
        model.config.get_text_config().pad_token_id = self.processing_class.pad_token_id
        self.model = model.eval()
        self.batch_tokens = batch_tokens
        self.layout = choose_layout(self.model)
        self.device = device

    @property
    def fingerprint(self) -> str:
        """`str`: hash of the weights, the temperature, the comparison and the chat template, which decide the probabilities."""
        weights = tensors_hash(dict(self.model.named_parameters()))
        return content_hash(weights, self.temperature, asdict(self.comparison), self.processing_class.chat_template)

    # What a teacher of a pool needs, here and in `SSRMRewardFunction`.
    kind = "pairwise"

    @property
    def max_length(self) -> int | None:
        """`int` or `None`: the longest comparison in tokens."""
        return self.comparison.max_length

    def tokenize_pair(self, prompt: Any, first: Any, second: Any) -> tuple[list[int], list[int]]:
        """
        Token IDs of a prompt with each of two completions, in the form that a teacher of a pool gives them.

        Args:
            prompt (`str` or `list[dict[str, Any]]`):
                Text or conversation.
            first, second (`str` or `list[dict[str, Any]]`):
                The completions, as text or messages.

        Returns:
            `tuple[list[int], list[int]]`: the token IDs of both orders of the comparison.
        """
        return self.comparison.tokenize(self.processing_class, prompt, first, second)

    def judge(self, prompts: Sequence, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
        """
        Probabilities that the first of two completions is preferred.

        Args:
            prompts (`list` of length `num_pairs`):
                Text or conversations.
            pairs (`list[tuple]` of length `num_pairs`):
                Two completions of each, as text or messages.

        Returns:
            `list[float]` of length `num_pairs`: the mean of the probabilities in the two orders, at the temperature. NaN if the pair is
            too long: more tokens than `max_length` of the comparison, even without the earlier turns. The number of
            such pairs is logged.

        Raises:
            NonFiniteScoreError: If a score is NaN or infinite.
        """
        return sigmoid(self.logits(prompts, pairs) / self.temperature).tolist()

    def logits(self, prompts: Sequence, pairs: Sequence[tuple[Any, Any]]) -> np.ndarray:
        """
        Logits of the mean of the probabilities in the two orders, before they are divided by the temperature.

        Args:
            prompts (`list` of length `num_pairs`):
                Text or conversations.
            pairs (`list[tuple]` of length `num_pairs`):
                Two completions of each, as text or messages.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`, float64: positive if the first completion is preferred. Exchanging
            the two completions only changes the sign. NaN if the pair is too long.

        Raises:
            NonFiniteScoreError: If a score is NaN or infinite.
        """
        both = []
        for number, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True)):
            check_prompt_of_completion(prompt, f"pair {number}")
            with tokenizing(f"Pair {number}", number):
                both.append(self.comparison.tokenize(self.processing_class, prompt, *pair))
        longest = self.comparison.max_length
        fits = np.array([longest is None or max(map(len, orders)) <= longest for orders in both], dtype=bool)
        if not fits.all():
            logger.warning(
                f"{(~fits).sum()} of {len(both)} pairs are not judged: they are longer than {longest} tokens, the "
                "`max_length` of the comparison."
            )
        if getattr(self.model, "hf_device_map", None) is None:
            self.model.to(self.device or PartialState().device)
        sequences = [order for orders, does_fit in zip(both, fits, strict=True) if does_fit for order in orders]
        scores = score_sequences(
            self.model, sequences, self.processing_class.pad_token_id, self.layout, self.batch_tokens
        )
        scores = scores.astype(np.float64).reshape(-1, 2)
        if not (is_finite := np.isfinite(scores).all(axis=1)).all():
            raise NonFiniteScoreError("pairs", np.flatnonzero(fits)[~is_finite].tolist())
        logits = np.full(len(both), np.nan)
        logits[fits] = pairwise_logits(scores)
        return logits

    def compare(self, prompts: Sequence, completions: Sequence[Sequence]) -> list[np.ndarray]:
        """
        Pair logits of all pairs among the completions of each prompt.

        Args:
            prompts (`list` of length `num_prompts`):
                Text or conversations.
            completions (`list[list]` of length `num_prompts`):
                Completions of each, as text or messages.

        Returns:
            `list[np.ndarray]` of length `num_prompts`: each of shape `(n, n)`, float64, with the logit that the row is
            preferred to the column, and 0 on the diagonal. NaN if the pair is too long.

        Raises:
            NonFiniteScoreError: If a score is NaN or infinite.
        """
        positions = [list(itertools.combinations(range(len(group)), 2)) for group in completions]
        repeated = [prompt for prompt, pairs in zip(prompts, positions, strict=True) for _ in pairs]
        pairs = [(group[i], group[j]) for group, own in zip(completions, positions, strict=True) for i, j in own]
        try:
            logits = iter(self.logits(repeated, pairs))
        except NonFiniteScoreError as error:
            prompt_of = [number for number, own in enumerate(positions) for _ in own]
            raise NonFiniteScoreError("prompts", sorted({prompt_of[pair] for pair in error.rows})) from error
        except NotTokenizedError as error:
            number = [number for number, own in enumerate(positions) for _ in own][error.position]
            raise NotTokenizedError(f"A pair of prompt {number}", error.reason, number) from error
        compared = []
        for group, own in zip(completions, positions, strict=True):
            matrix = np.zeros((len(group), len(group)))
            for i, j in own:
                matrix[i, j] = next(logits)
                matrix[j, i] = -matrix[i, j]
            compared.append(matrix)
        return compared

    def rank(self, prompt: Any, completions: Sequence, method: str = "all") -> list[int]:
        """
        Order completions of a prompt from the best to the worst.

        Args:
            prompt (`str` or `list[dict[str, Any]]`):
                Text or conversation.
            completions (`list` of length `n`):
                Completions, as text or messages.
            method (`str`, *optional*, defaults to `"all"`):
                `"all"` compares all `n * (n - 1) / 2` pairs and ranks by the mean probability of being preferred.
                `"tournament"` is a knock-out of `n - 1` comparisons: completions that lose in a later round rank
                higher, and within a round those with the smaller margin.

        Returns:
            `list[int]` of length `n`: positions in `completions`, the best one first.

        Raises:
            ValueError: If `method` is neither `"all"` nor `"tournament"`, or if a pair is too long.
        """
        if method == "all":
            compared = self.compare([prompt], [completions])[0]
            self._check_judged(compared)
            return np.argsort(-mean_win_probability(compared), kind="stable").tolist()
        if method == "tournament":
            return self._tournament(prompt, completions)
        raise ValueError(f"`method` must be 'all' or 'tournament', got {method!r}.")

    def __call__(self, prompts: list, completions: list, **kwargs: Any) -> list[float | None]:
        """
        Rewards of completions, with the arguments that TRL calls a reward function with.

        Args:
            prompts (`list` of length `num_completions`):
                Text or conversations, one for each completion. Completions of the same prompt are one group, even if
                TRL has spread them over processes. All processes have to make this call together.
            completions (`list` of length `num_completions`):
                Text or messages.
            kwargs:
                Ignored.

        Returns:
            `list[float | None]` of length `num_completions`: mean probability of being preferred to the others of the
            group. 0.5 for a group of one. `None`, which TRL ignores, if all pairs with the others are too long.

        Raises:
            NonFiniteScoreError: If a score is NaN or infinite.
        """
        gathered = gather_object([(prompts, completions)])
        start = sum(len(part[0]) for part in gathered[: PartialState().process_index])
        mine = range(start, start + len(prompts))
        prompts, completions = ([each for part in gathered for each in part[side]] for side in (0, 1))
        groups: dict[str, list[int]] = {}
        for position, prompt in enumerate(prompts):
            groups.setdefault(str(prompt), []).append(position)
        members = [group for group in groups.values() if any(position in mine for position in group)]
        compared = self.compare(
            [prompts[group[0]] for group in members],
            [[completions[position] for position in group] for group in members],
        )
        rewards: dict[int, float | None] = {}
        for group, logits in zip(members, compared, strict=True):
            is_judged = len(group) == 1 or ~np.isnan(logits + np.diag(np.full(len(group), np.nan))).all(axis=1)
            wins = np.where(is_judged, mean_win_probability(logits), np.nan)
            rewards.update(zip(group, (None if np.isnan(win) else float(win) for win in wins), strict=True))
        return [rewards[position] for position in mine]

    def _tournament(self, prompt: Any, completions: Sequence) -> list[int]:
        playing: list[int] = list(range(len(completions)))
        from_the_worst: list[int] = []
        while len(playing) > 1:
            games = list(zip(playing[0::2], playing[1::2], strict=False))
            logits = self.logits([prompt] * len(games), [(completions[i], completions[j]) for i, j in games])
            self._check_judged(logits)
            winners = [i if logit >= 0 else j for (i, j), logit in zip(games, logits, strict=True)]
            losers = [j if logit >= 0 else i for (i, j), logit in zip(games, logits, strict=True)]
            from_the_worst += [losers[position] for position in np.argsort(-np.abs(logits), kind="stable")]
            # If the number is odd, the last completion waits and plays first in the next round.
            playing = playing[2 * len(games) :] + winners
        return [*playing, *reversed(from_the_worst)]

    @staticmethod
    def _check_judged(logits: np.ndarray) -> None:
        if np.isnan(logits).any():
            raise ValueError(
                "A pair has more tokens than `max_length` of the comparison, so there is no ranking; shorten the "
                "completions, or raise `max_length`."
            )
