"""Completions labeled by the finished reward model: preference pairs for DPO, best completions for SFT."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Value
from transformers import PreTrainedModel

from ..data.checks import NotTokenizedError, check_prompts, tokenizing, unformatted
from ..data.formats import TEMPLATE_COLUMNS, check_format, completion_feature, completions_of, named_completions
from ..io.hub import check_model_is_there
from ..io.storage import content_hash, tensors_hash
from ..models.comparison import Comparison
from ..scoring.pair_scores import sigmoid
from ..scoring.preference import mean_win_probability
from ..scoring.score import NonFiniteScoreError
from .judge import PairwiseJudge
from .reward_function import SSRMRewardFunction
from .shards import Row, map_in_shards


# Rows that a process labels before it writes them. After an interruption, it labels at most so many again.
SHARD_ROWS = 64

PAIRINGS = ("best_vs_worst", "best_vs_random", "all")


def load_labeler(model: str, **kwargs: Any) -> SSRMRewardFunction | PairwiseJudge:
    """
    Load a saved model that labels pairs, scalar or pairwise.

    Args:
        model (`str`):
            Directory or model ID.
        kwargs (`dict[str, Any]`):
            Further arguments of [`SSRMRewardFunction`] or [`PairwiseJudge`].

    Returns:
        [`SSRMRewardFunction`] or [`PairwiseJudge`]: the model. A folder that holds a `comparison.json` has a pairwise one.

    Raises:
        ValueError: If there is no such model.
    """
    check_model_is_there(model)
    is_pairwise = Comparison.from_pretrained(model) is not None
    return (PairwiseJudge if is_pairwise else SSRMRewardFunction)(model, **kwargs)


def label_preferences(
    model: str | PreTrainedModel | SSRMRewardFunction | PairwiseJudge,
    dataset: Dataset,
    output_dir: str,
    pairing: str = "best_vs_worst",
    min_confidence: float = 0.5,
    temperature: float | None = None,
    max_length: int | None = None,
    seed: int = 42,
    disable_tqdm: bool = False,
) -> Dataset:
    """
    Turn prompts with completions into preference pairs for [`~trl.DPOTrainer`], labeled by a reward model.

    After an interruption, the same call continues with the missing shards. Several processes share the work.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`], [`SSRMRewardFunction`] or [`PairwiseJudge`]):
            Reward model. The rewards of a reward function are taken before it shifts and clips them. A judge compares
            all pairs of a row; the best completion is the one with the highest mean probability of being preferred.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and `completions`, with `prompt`, `completion_a` and `completion_b`, or with `prompt`,
            `chosen` and `rejected`, which are read as two completions in any order. Text or conversations; `tools` and
            `chat_template_kwargs` as in TRL.
        output_dir (`str`):
            Directory for the labels, the same for all processes.
        pairing (`str`, *optional*, defaults to `"best_vs_worst"`):
            Pairs to make of a row: `"best_vs_worst"`, `"best_vs_random"` (the best completion against one of the
            others, drawn from the seed and the row), or `"all"`.
        min_confidence (`float`, *optional*, defaults to `0.5`):
            A pair is kept if its confidence is at least this. In `[0.5, 1)`.
        temperature (`float`, *optional*):
            Divisor of the margin, which calibrates the confidence. Positive. If `None`, the temperature that was saved with
            the model, or 1.
        max_length (`int`, *optional*):
            Longest sequence in tokens of the reward model; longer completions are dropped. If `None`, the number of
            learned positions of the model, and no limit if it has none. For a judge, set `max_length` of its
            comparison.
        seed (`int`, *optional*, defaults to `42`):
            Seed of `"best_vs_random"`.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        [`~datasets.Dataset`]: memory-mapped, with `prompt`, `chosen`, `rejected`, `reward_margin` (difference of the two
        rewards, or pair logit of a judge; float64, positive), `confidence` (`sigmoid(reward_margin / temperature)`,
        float64), and `tools` and `chat_template_kwargs` if the input has them. Ties are dropped. The log counts everything that
        is dropped, by reason.

    Raises:
        ValueError: If a row or a setting can't be used, if no pair is left, or if `output_dir` holds the result of
            another job.
        NonFiniteScoreError: If a reward is NaN or infinite.
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"`pairing` must be one of {list(PAIRINGS)}, got {pairing!r}.")
    if not 0.5 <= min_confidence < 1:
        raise ValueError(f"`min_confidence` must be in [0.5, 1), got {min_confidence}.")
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be positive and finite, got {temperature}.")
    dataset = _checked(dataset)
    scorer = model if isinstance(model, PairwiseJudge | SSRMRewardFunction) else SSRMRewardFunction(model)
    used_temperature = scorer.temperature if temperature is None else temperature

    def label(number: int, scored: ScoredCompletions, dropped: Counter[str]) -> list[Row]:
        if len(scored.completions) < 2:
            dropped["rows with fewer than two completions"] += 1
            return []
        labeled = []
        for pair in _pairs(pairing, scored.rewards, np.random.default_rng([seed, number])):
            chosen, rejected = sorted(pair, key=lambda position: -scored.rewards[position])
            margin = float(scored.margins[chosen, rejected])
            confidence = float(sigmoid(np.array(margin / used_temperature)))
            if reason := _reason_to_drop(margin, confidence, min_confidence):
                dropped[reason] += 1
            else:
                texts = {"chosen": scored.completions[chosen], "rejected": scored.completions[rejected]}
                labeled.append({**texts, "reward_margin": margin, "confidence": confidence})
        return labeled

    feature = completion_feature(dataset)
    columns = {
        "chosen": feature,
        "rejected": feature,
        "reward_margin": Value("float64"),
        "confidence": Value("float64"),
    }
    settings = {"pairing": pairing, "min_confidence": min_confidence, "temperature": used_temperature, "seed": seed}
    return _map_scored(scorer, dataset, output_dir, label, columns, settings, max_length, "Labeling", disable_tqdm)


def best_of_n(
    model: str | PreTrainedModel | SSRMRewardFunction | PairwiseJudge,
    dataset: Dataset,
    output_dir: str,
    max_length: int | None = None,
    disable_tqdm: bool = False,
) -> Dataset:
    """
    Rejection sampling: choose the best completion of each prompt by a reward model, for [`~trl.SFTTrainer`].

    Args:
        model (`str`, [`~transformers.PreTrainedModel`], [`SSRMRewardFunction`] or [`PairwiseJudge`]):
            Reward model, as in [`label_preferences`]. The reward of a judge is the mean probability of being
            preferred.
        dataset ([`~datasets.Dataset`]):
            Prompts with completions, as in [`label_preferences`].
        output_dir (`str`):
            Directory for the result, the same for all processes.
        max_length (`int`, *optional*):
            As in [`label_preferences`].
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        [`~datasets.Dataset`]: memory-mapped, with `prompt`, `completion`, `reward` (float64), and `tools` and
        `chat_template_kwargs` if the input has them. If several completions are best, the first one is taken.

    Raises:
        ValueError: If a row can't be used, if no row is left, or if `output_dir` holds the result of another job.
        NonFiniteScoreError: If a reward is NaN or infinite.
    """

    def select(number: int, scored: ScoredCompletions, dropped: Counter[str]) -> list[Row]:
        if not scored.completions:
            dropped["rows without a completion"] += 1
            return []
        best = int(scored.rewards.argmax())
        return [{"completion": scored.completions[best], "reward": float(scored.rewards[best])}]

    dataset = _checked(dataset)
    columns = {"completion": completion_feature(dataset), "reward": Value("float64")}
    return _map_scored(model, dataset, output_dir, select, columns, {}, max_length, "Selecting", disable_tqdm)


@dataclass(frozen=True)
class ScoredCompletions:
    """Completions of a prompt, their rewards, of shape `(n,)`, and the margin of each over each, of shape `(n, n)`."""

    completions: list
    rewards: np.ndarray
    margins: np.ndarray


def _map_scored(
    model: str | PreTrainedModel | SSRMRewardFunction | PairwiseJudge,
    dataset: Dataset,
    output_dir: str,
    function: Callable[[int, ScoredCompletions, Counter[str]], list[Row]],
    columns: dict[str, Any],
    settings: dict[str, Any],
    max_length: int | None,
    desc: str,
    disable_tqdm: bool,
) -> Dataset:
    """Score the completions of each row, and turn each row into those that `function` makes of its scores."""
    if isinstance(model, PairwiseJudge):
        if max_length is not None:
            raise ValueError(
                "`max_length` is for scalar models; set `max_length` of the judge's `comparison` instead."
            )
        settings = {**settings, "comparison": asdict(model.comparison)}
        scorer: PairwiseJudge | SSRMRewardFunction = model
    else:
        scorer = model if isinstance(model, SSRMRewardFunction) else SSRMRewardFunction(model)

    def map_shard(rows: list[Row], first_row: int) -> tuple[list[Row], Counter[str]]:
        dropped: Counter[str] = Counter()
        if isinstance(scorer, PairwiseJudge):
            scored = _judge_rows(scorer, rows, first_row, dropped)
        else:
            scored = _score_rows(scorer, rows, first_row, max_length, dropped)
        made: list[Row] = []
        for number, (row, own) in enumerate(zip(rows, scored, strict=True), first_row):
            shared = {name: row[name] for name in ("prompt", *TEMPLATE_COLUMNS) if name in row}
            made += [{**shared, **new} for new in function(number, own, dropped)]
        return made, dropped

    used = ("prompt", *TEMPLATE_COLUMNS, "completions", "completion_a", "completion_b", "chosen", "rejected")
    return map_in_shards(
        dataset.select_columns([name for name in used if name in dataset.column_names]),
        map_shard,
        columns,
        output_dir,
        {
            "reward_model": tensors_hash(dict(scorer.model.named_parameters())),
            "chat_template": content_hash(scorer.processing_class.chat_template),
            "max_length": max_length,
            **settings,
        },
        shard_rows=SHARD_ROWS,
        desc=desc,
        disable_tqdm=disable_tqdm,
    )


def _score_rows(
    reward_function: SSRMRewardFunction,
    rows: list[Row],
    first_row: int,
    max_length: int | None,
    dropped: Counter[str],
) -> list[ScoredCompletions]:
    longest = reward_function.num_positions if max_length is None else max_length
    sequences, row_of, completions = [], [], []
    for number, row in enumerate(rows, first_row):
        template = [row.get(name) for name in TEMPLATE_COLUMNS]
        kept = []
        for completion in completions_of(row):
            with tokenizing(f"Row {number} of `dataset`"):
                ids = reward_function.tokenize(row["prompt"], completion, *template)
            if longest is not None and len(ids) > longest:
                dropped[f"completions longer than max_length={longest}"] += 1
                continue
            sequences.append(ids)
            row_of.append(number)
            kept.append(completion)
        completions.append(kept)
    try:
        scores = reward_function.score_tokenized(sequences)
    except NonFiniteScoreError as error:
        raise NonFiniteScoreError("dataset", sorted({row_of[position] for position in error.rows})) from error
    rewards = np.split(scores, np.cumsum([len(kept) for kept in completions])[:-1])
    return [
        ScoredCompletions(kept, own, own[:, None] - own[None, :])
        for kept, own in zip(completions, rewards, strict=True)
    ]


def _judge_rows(
    judge: PairwiseJudge, rows: list[Row], first_row: int, dropped: Counter[str]
) -> list[ScoredCompletions]:
    completions = [completions_of(row) for row in rows]
    try:
        margins = judge.compare([row["prompt"] for row in rows], completions)
    except NonFiniteScoreError as error:
        raise NonFiniteScoreError("dataset", [first_row + position for position in error.rows]) from error
    except NotTokenizedError as error:
        raise NotTokenizedError(f"Row {first_row + error.position} of `dataset`", error.reason) from error
    scored = []
    for group, own in zip(completions, margins, strict=True):
        is_judged = (~np.isnan(own) & ~np.eye(len(group), dtype=bool)).any(axis=1) | (len(group) == 1)
        dropped["completions too long to be compared"] += int((~is_judged).sum())
        kept = np.flatnonzero(is_judged)
        own = own[np.ix_(kept, kept)]
        scored.append(ScoredCompletions([group[position] for position in kept], mean_win_probability(own), own))
    return scored


def _checked(dataset: Dataset) -> Dataset:
    """Refuse prompts and completions that can't be labeled, before a model is loaded."""
    check_format(dataset, "dataset")
    check_prompts(dataset, "dataset", named_completions)
    return unformatted(dataset)


def _pairs(pairing: str, rewards: np.ndarray, draw: np.random.Generator) -> list[tuple[int, int]]:
    """Pairs of positions among the completions of a row."""
    if pairing == "all":
        return list(itertools.combinations(range(len(rewards)), 2))
    best = int(rewards.argmax())
    if pairing == "best_vs_worst":
        return [(best, int(rewards.argmin()))]
    return [(best, int(draw.choice(np.delete(np.arange(len(rewards)), best))))]


def _reason_to_drop(margin: float, confidence: float, min_confidence: float) -> str | None:
    if math.isnan(margin):
        return "pairs too long to be compared"
    if margin == 0:
        return "tie"
    if margin < 0:
        # A judge may prefer a to b, b to c, and c to a.
        return "preferred on average over the others, but not in the pair itself"
    return f"confidence below {min_confidence}" if confidence < min_confidence else None
