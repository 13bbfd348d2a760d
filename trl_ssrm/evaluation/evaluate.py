"""How good a finished model is: its accuracy and calibration on preference pairs and on published benchmarks."""

import logging
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..alignment.judge import PairwiseJudge
from ..alignment.reward_function import SSRMRewardFunction
from ..data.checks import NotTokenizedError, check_is_dataset, tokenizing, unformatted
from ..data.prompts import prompt_groups
from ..data.ties import with_ties_settled
from ..io.hub import check_model_is_there
from ..io.storage import content_hash
from ..models.comparison import Comparison
from ..scoring.metrics import preference_metrics, standard_error
from ..scoring.score import NonFiniteScoreError
from .benchmarks import (
    ALL,
    BENCHMARKS,
    LEVELS,
    TEXT_COLUMNS,
    BenchmarkRow,
    best_is_right,
    check_rows,
    missing_strata,
    read_row,
    rm_bench_levels,
    section_scores,
    strata_of,
)
from .published import PUBLISHED, REWARDBENCH_2_PARTS, TIES, as_known_rows, ties_score
from .table import Evaluation


logger = logging.getLogger(__name__)

# Rows that are tokenized and scored together, between two steps of the progress bar.
CHUNK_ROWS = 512


def evaluate(
    model: str | PreTrainedModel | SSRMRewardFunction | PairwiseJudge,
    dataset: Dataset,
    benchmark: str = "preferences",
    subset_column: str | None = None,
    batch_tokens: int = 16384,
    disable_tqdm: bool = False,
    max_length: int | None = None,
) -> Evaluation:
    """
    Evaluate a reward model, scalar or pairwise, on labeled data.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_ssrm import evaluate, evaluation_table

    >>> dataset = load_dataset("allenai/reward-bench", split="filtered")
    >>> models = ["reward-model", "other-reward-model"]
    >>> print(evaluation_table([evaluate(model, dataset, benchmark="rewardbench") for model in models]))
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`], [`SSRMRewardFunction`] or [`PairwiseJudge`]):
            Directory or model ID of a scalar reward model or of a pairwise one that [`SSRMTrainer`] saved, or a loaded
            one. The rewards of a reward function are taken before it shifts and clips them. For a language model that
            was not trained to judge, give a [`PairwiseJudge`].
        dataset ([`~datasets.Dataset`]):
            Labeled rows, in the form that `benchmark` takes.
        benchmark (`str`, *optional*, defaults to `"preferences"`):
            Form of the rows, and how the scores are computed:

            - `"preferences"`: preference pairs in any of TRL's formats. Accuracy; a tie counts as half, and as wrong in the
              published benchmarks below.
            - `"rewardbench"`: `prompt`, `chosen`, `rejected` and `subset` of
              [RewardBench](https://huggingface.co/papers/2403.13787) (`allenai/reward-bench`, split `filtered`), with
              or without the prior sets (`allenai/pref-test-sets`). As published, a tie is wrong. The score of a
              section is the mean of its subsets weighted by their published numbers of examples. The final score is
              the mean of the four sections, and of the prior sets with weight 0.5 if they are present.
            - `"rm_bench"`: `prompt`, three `chosen` and three `rejected` in order of style, and `domain` of
              [RM-Bench](https://huggingface.co/papers/2410.16184) (`THU-KEG/RM-Bench`). As published, a tie is wrong.
              Of the nine comparisons, those of equal style are normal, those in which the chosen completion has the
              plainer style are hard, and the others easy. Each number is the mean over the four domains.
            - `"best_of_n"`: `prompt`, `completions` and `labels` (whether each is right), or `prompt` with a list of
              `chosen` and one of `rejected`. Share of rows whose best completion is right; if several share the first
              place, the row counts as the share of right ones among them.
            - `"rewardbench_2"`: `id`, `prompt`, lists `chosen` and `rejected`, and `subset` of
              [RewardBench 2](https://huggingface.co/papers/2506.01937) (`allenai/reward-bench-2`). As `"best_of_n"`; the
              part Ties has a score of its own, see [`~trl_ssrm.evaluation.published.ties_score`]. The final score is the
              mean of the six parts.
            - `"judgebench"`: `question`, `response_A`, `response_B`, `label` and `source` of
              [JudgeBench](https://huggingface.co/papers/2410.12784) (`ScalerLab/JudgeBench`), by domain.
            - `"llmbar"`: `input`, `output_1`, `output_2` and `label` of [LLMBar](https://huggingface.co/papers/2310.07641).
            - `"rmb"`: the pairs, or the best-of-n set, of [RMB](https://huggingface.co/papers/2410.09893), by goal. The best
              completion has to beat every other.

            If the tokenizer has a chat template, text prompts of published benchmarks become conversations.
        subset_column (`str`, *optional*):
            Column with the subset of each row; metrics are given for each subset. If `None`, `"subset"` for
            `"rewardbench"`, `"domain"` for `"rm_bench"`, the parts, domains or goals of the newer ones, and no subsets for
            the others.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Size of a scoring batch in tokens, padding included. Only used if the model is loaded here.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.
        max_length (`int`, *optional*):
            Longest sequence in tokens that a scalar model reads. A comparison with a longer one counts as a tie and as
            `not_judged`. If `None`, the limit of the tokenizer or the number of learned positions, whichever is
            smaller. For a judge, set `max_length` of its comparison.

    Returns:
        [`Evaluation`]: its metrics are `num_rows`, `accuracy`, `accuracy_low` and `accuracy_high` (Wilson's 95 %
        interval, over the prompts), `ties` and `not_judged` (numbers of rows). For pairs there are
        also `log_loss`, `brier`, `ece`, `ece_floor` and `adaptive_ece`, as in [`preference_metrics`], at the `temperature`
        that was saved with the model, which is a metric too if it is not 1; for RM-Bench
        `easy`, `normal` and `hard` in place of the interval. The metrics `"all"` of a published benchmark have its
        final `score` if all of its subsets or domains are present.

    Raises:
        ValueError: If the benchmark or one of the subsets is unknown, if a row has another form, or if the model is
            not a reward model with one trained label.
        NonFiniteScoreError: If a score is NaN or infinite.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"`benchmark` must be one of {list(BENCHMARKS)}, got {benchmark!r}.")
    if isinstance(model, PairwiseJudge) and max_length is not None:
        raise ValueError("`max_length` is for scalar models; set `max_length` of the judge's `comparison` instead.")
    if benchmark == "rewardbench_2" and subset_column is not None:
        raise ValueError(
            "`subset_column` can't be combined with 'rewardbench_2', whose score needs its own parts; leave it out."
        )
    subset_column = subset_column or {"rewardbench": "subset", "rm_bench": "domain"}.get(benchmark)
    check_is_dataset(dataset, "dataset")
    dataset, form, subset_column = as_known_rows(unformatted(dataset), benchmark, subset_column)
    if benchmark not in PUBLISHED:
        check_rows(dataset, benchmark, subset_column)
    if benchmark == "preferences":
        dataset = with_ties_settled(dataset, "dataset", is_trained_on=False)
    subsets = [] if subset_column is None else [str(subset) for subset in dataset[subset_column]]
    strata, weights = strata_of(benchmark, subsets, len(dataset))
    scorer = _load(model, batch_tokens)
    judged = _judge(
        scorer, dataset, form, max_length, disable_tqdm, form != benchmark or form not in ("preferences", "best_of_n")
    )
    prompts, of_tie = prompt_groups(dataset), 0.5 if benchmark == "preferences" else 0.0
    results = _results(judged, form, prompts, scorer.temperature, of_tie)
    if not results.is_judged.all():
        logger.warning(
            f"{(~results.is_judged).sum()} of {len(dataset)} rows of `dataset` have a text that is too long for the "
            "model; they count as ties."
        )
    metrics = _metrics(results, benchmark, subsets, strata, weights)
    if benchmark == "rewardbench_2":
        _add_rewardbench_2(metrics, judged, dataset)
    return Evaluation(
        model=model if isinstance(model, str) else scorer.__name__,
        benchmark=benchmark,
        metrics=metrics,
        outcomes=results.outcomes.tolist(),
        prompts=prompts.tolist(),
        strata=strata,
        stratum_weights=weights,
        rows_hash=content_hash(benchmark, strata, judged.hashes),
    )


def independent_count(outcomes: np.ndarray, prompts: np.ndarray) -> float:
    """
    The number of rows with prompts of their own that would say as much about the mean outcome.

    Args:
        outcomes (`np.ndarray` of shape `(num_rows,)`):
            Outcome of each row.
        prompts (`np.ndarray` of shape `(num_rows,)`, int64):
            Number of the prompt of each row.

    Returns:
        `float`: at most the number of rows. The number of prompts where all outcomes are the same. If all rows have one prompt,
        they are taken to be independent.
    """
    num_rows, num_prompts = len(outcomes), len(np.unique(prompts))
    if num_prompts in (1, num_rows):
        return num_rows
    by_row, by_prompt = (standard_error(outcomes, groups) for groups in (np.arange(num_rows), prompts))
    if by_row == 0:
        return num_prompts
    return num_rows * (by_row / by_prompt) ** 2


def wilson_interval(right: float, count: float) -> tuple[float, float]:
    """
    Wilson's 95 % interval of a share
    ([Interval Estimation for a Binomial Proportion](https://doi.org/10.1214/ss/1009213286)).

    Args:
        right (`float`):
            Number of successes.
        count (`float`):
            Number of trials. Positive.

    Returns:
        `tuple[float, float]`: its bounds, in `[0, 1]`.
    """
    quantile = NormalDist().inv_cdf(0.975)
    share = right / count
    center = share + quantile**2 / (2 * count)
    spread = quantile * math.sqrt(share * (1 - share) / count + quantile**2 / (4 * count**2))
    low, high = ((center + sign * spread) / (1 + quantile**2 / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def _load(
    model: str | PreTrainedModel | SSRMRewardFunction | PairwiseJudge, batch_tokens: int
) -> SSRMRewardFunction | PairwiseJudge:
    if isinstance(model, SSRMRewardFunction | PairwiseJudge):
        return model
    check_model_is_there(model)
    if isinstance(model, str) and Comparison.from_pretrained(model) is not None:
        return PairwiseJudge(model, batch_tokens=batch_tokens)
    return SSRMRewardFunction(model, batch_tokens=batch_tokens)


@dataclass
class _Judged:
    """For each row: the logits of its pairs (NaN if a text is too long), which completions are right, and a hash."""

    logits: list[np.ndarray]
    is_right: list[list[bool]]
    hashes: list[str]


def _judge(
    scorer: SSRMRewardFunction | PairwiseJudge,
    dataset: Dataset,
    benchmark: str,
    max_length: int | None,
    disable_tqdm: bool,
    is_published: bool,
) -> _Judged:
    # The text of published benchmarks is what a user says. A judge makes a conversation of it as well.
    has_template = isinstance(scorer, PairwiseJudge) or scorer.processing_class.chat_template is not None
    as_messages = is_published and has_template
    judged = _Judged([], [], [])
    with tqdm(total=len(dataset), desc="Evaluating", unit="row", disable=disable_tqdm) as progress:
        for start in range(0, len(dataset), CHUNK_ROWS):
            raw = [dataset[number] for number in range(start, min(start + CHUNK_ROWS, len(dataset)))]
            rows = [read_row(row, benchmark, as_messages) for row in raw]
            if isinstance(scorer, PairwiseJudge):
                judged.logits += _pairwise_logits(scorer, rows, start)
            else:
                judged.logits += _scalar_logits(scorer, rows, start, max_length)
            judged.is_right += [row.is_right for row in rows]
            judged.hashes += [content_hash({name: row[name] for name in TEXT_COLUMNS if name in row}) for row in raw]
            progress.update(len(rows))
    return judged


def _pairwise_logits(judge: PairwiseJudge, rows: list[BenchmarkRow], first_row: int) -> list[np.ndarray]:
    prompts = [row.prompt for row in rows for _ in row.pairs]
    pairs = [(row.completions[i], row.completions[j]) for row in rows for i, j in row.pairs]
    ends = np.cumsum([len(row.pairs) for row in rows])
    try:
        logits = judge.logits(prompts, pairs)
    except NonFiniteScoreError as error:
        raise _naming_rows(error.rows, ends, first_row) from error
    except NotTokenizedError as error:
        row = first_row + int(np.searchsorted(ends, error.position, side="right"))
        raise NotTokenizedError(f"Row {row} of `dataset`", error.reason) from error
    return np.split(logits, ends[:-1])


def _scalar_logits(
    reward_function: SSRMRewardFunction, rows: list[BenchmarkRow], first_row: int, max_length: int | None
) -> list[np.ndarray]:
    readable = min(reward_function.processing_class.model_max_length, reward_function.num_positions or math.inf)
    longest = readable if max_length is None else max_length
    sequences = []
    for number, row in enumerate(rows, first_row):
        with tokenizing(f"Row {number} of `dataset`"):
            sequences += [reward_function.tokenize(row.prompt, each, *row.template) for each in row.completions]
    fitting = np.flatnonzero([len(ids) <= longest for ids in sequences])
    ends = np.cumsum([len(row.completions) for row in rows])
    rewards = np.full(len(sequences), np.nan)
    if len(fitting) > 0:
        try:
            rewards[fitting] = reward_function.score_tokenized([sequences[place] for place in fitting])
        except NonFiniteScoreError as error:
            raise _naming_rows(fitting[error.rows], ends, first_row) from error
    return [
        np.array([own[i] - own[j] for i, j in row.pairs])
        for row, own in zip(rows, np.split(rewards, ends[:-1]), strict=True)
    ]


def _naming_rows(places: np.ndarray | list[int], ends: np.ndarray, first_row: int) -> NonFiniteScoreError:
    """The same error, naming rows of `dataset`: row `n` has the places from `ends[n - 1]` up to `ends[n]`."""
    rows = np.unique(np.searchsorted(ends, places, side="right")) + first_row
    return NonFiniteScoreError("dataset", rows.tolist())


@dataclass(frozen=True)
class _Results:
    """Arrays of shape `(num_rows,)`, and the logits without NaN, `(num_rows, num_pairs)`, but for `"best_of_n"`."""

    outcomes: np.ndarray
    is_tie: np.ndarray
    is_judged: np.ndarray
    prompts: np.ndarray
    cells: np.ndarray | None
    temperature: float


def _results(judged: _Judged, benchmark: str, prompts: np.ndarray, temperature: float, of_tie: float) -> _Results:
    is_judged = np.array([not np.isnan(logits).any() for logits in judged.logits])
    if benchmark == "best_of_n":
        best = np.array([best_is_right(*row) for row in zip(judged.logits, judged.is_right, strict=True)])
        return _Results(best[:, 0], best[:, 1] > 0, is_judged, prompts, None, temperature)
    if benchmark == "best_beats_all":
        # The comparisons of the first completion come first.
        first = [own[: len(right) - 1] for own, right in zip(judged.logits, judged.is_right, strict=True)]
        wins = np.array([float((own > 0).all()) for own in first])
        is_tie = np.array([bool((own == 0).any()) for own in first])
        return _Results(wins, is_tie, is_judged, prompts, None, temperature)
    logits = np.stack(judged.logits)
    # A pair that is too long is a tie.
    cells = np.nan_to_num(logits)
    outcomes = np.where(cells == 0, of_tie, cells > 0).mean(axis=1)
    return _Results(outcomes, (logits == 0).any(axis=1), is_judged, prompts, cells, temperature)


def _metrics(
    results: _Results, benchmark: str, subsets: list[str], strata: list[str], weights: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Metrics over all rows, of the sections of RewardBench, and of each subset."""
    names = np.array(strata if benchmark == "rm_bench" else subsets)
    by_subset = {
        str(name): _metrics_of_rows(results, benchmark, np.flatnonzero(names == name)) for name in np.unique(names)
    }
    overall = _metrics_of_rows(results, benchmark, np.arange(len(strata)))
    sections: dict[str, dict[str, float]] = {}
    if benchmark == "rewardbench":
        scores = section_scores({subset: own["accuracy"] for subset, own in by_subset.items()})
        sections = {section: {"accuracy": score} for section, score in scores.items()}
    if benchmark == "rm_bench":
        overall |= {level: float(np.mean([by_subset[domain][level] for domain in weights])) for level in LEVELS}
    if missing := missing_strata(benchmark, strata):
        logger.warning(f"`dataset` has no rows of {', '.join(missing)}, so there is no final score of {benchmark}.")
    elif benchmark in ("rewardbench", "rm_bench", "rewardbench_2"):
        overall["score"] = sum(weight * by_subset[part]["accuracy"] for part, weight in weights.items())
    return {ALL: overall, **sections, **by_subset}


def _add_rewardbench_2(metrics: dict[str, dict[str, float]], judged: _Judged, dataset: Dataset) -> None:
    """Put the score of the part Ties beside its accuracy, and into the final score in place of it."""
    rows = [row for row, subset in enumerate(dataset["subset"]) if subset == TIES]
    if not rows:
        return
    logits, is_right = ([np.nan_to_num(judged.logits[row]) for row in rows], [judged.is_right[row] for row in rows])
    metrics[TIES]["score"] = ties_score([dataset[row]["id"] for row in rows], logits, is_right)
    if "score" in metrics[ALL]:
        metrics[ALL]["score"] += (metrics[TIES]["score"] - metrics[TIES]["accuracy"]) / len(REWARDBENCH_2_PARTS)


def _metrics_of_rows(results: _Results, benchmark: str, rows: np.ndarray) -> dict[str, float]:
    outcomes = results.outcomes[rows]
    count = independent_count(outcomes, results.prompts[rows])
    low, high = wilson_interval(float(outcomes.mean()) * count, count)
    metrics = {
        "num_rows": len(rows),
        "accuracy": float(outcomes.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": int(results.is_tie[rows].sum()),
        "not_judged": int((~results.is_judged[rows]).sum()),
    }
    if results.cells is None:
        return metrics
    cells = results.cells[rows]
    if benchmark == "rm_bench":
        # The nine comparisons of a row are not independent.
        del metrics["accuracy_low"], metrics["accuracy_high"]
        return metrics | rm_bench_levels(cells)
    # `preference_metrics` counts ties as wrong; here they count as half for `"preferences"`.
    calibrated = preference_metrics(cells[:, 0], results.temperature)
    temperature = {} if results.temperature == 1 else {"temperature": results.temperature}
    return metrics | {**calibrated, "accuracy": metrics["accuracy"]} | temperature
