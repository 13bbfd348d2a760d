"""How good a finished model is: accuracy and calibration on preference sets, published benchmarks, and paired tests."""

import itertools
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
from ..data.checks import tokenizing
from ..data.prompts import prompt_groups
from ..io.hub import check_model_is_there
from ..io.storage import content_hash
from ..models.comparison import Comparison
from ..scoring.metrics import preference_metrics
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


logger = logging.getLogger(__name__)

# Rows that are tokenized and scored together, between two steps of the progress bar.
CHUNK_ROWS = 512
NUM_BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class Evaluation:
    """
    What [`evaluate`] found out. `dataclasses.asdict` makes it JSON, and `Evaluation(**...)` makes it of JSON again, so
    a model can be compared with one that was evaluated earlier.

    Args:
        model (`str`):
            Name of the model.
        benchmark (`str`):
            Name of the benchmark.
        metrics (`dict[str, dict[str, float]]`):
            Metrics by subset, those over all rows under `"all"`. See [`evaluate`] for their names.
        outcomes (`list[float]` of length `num_rows`):
            How right the model is on each row, in `[0, 1]`.
        prompts (`list[int]` of length `num_rows`):
            Number of the prompt of each row. Rows with the same prompt are not independent.
        strata (`list[str]` of length `num_rows`):
            Part of the benchmark that each row belongs to.
        stratum_weights (`dict[str, float]`):
            Weight of the mean outcome of each part in the figure that the benchmark goes by. They sum to 1.
        rows_hash (`str`):
            Hash of the rows: two models were evaluated on the same rows if it is the same.
    """

    model: str
    benchmark: str
    metrics: dict[str, dict[str, float]]
    outcomes: list[float]
    prompts: list[int]
    strata: list[str]
    stratum_weights: dict[str, float]
    rows_hash: str


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
            Directory or model ID of a scalar reward model or of a pairwise one that [`SSRMTrainer`] saved, or one that
            is loaded. A reward function's shifting and clipping is left out. For a language model that was never trained
            to judge, give a [`PairwiseJudge`].
        dataset ([`~datasets.Dataset`]):
            Labeled rows, in the form that `benchmark` takes.
        benchmark (`str`, *optional*, defaults to `"preferences"`):
            What the rows are, and how the figures are made:

            - `"preferences"`: preference pairs in any of TRL's formats. Accuracy, a tie counting as half.
            - `"rewardbench"`: `prompt`, `chosen`, `rejected` and `subset` of
              [RewardBench](https://huggingface.co/papers/2403.13787) (`allenai/reward-bench`, split `filtered`), with or
              without the prior sets (`allenai/pref-test-sets`). As published, a tie is wrong, a section is the mean of
              its subsets weighted by their published numbers of examples, and the final score is the mean of the four
              sections, and of the prior sets with weight 0.5 if they are there.
            - `"rm_bench"`: `prompt`, three `chosen` and three `rejected` in order of style, and `domain` of
              [RM-Bench](https://huggingface.co/papers/2410.16184) (`THU-KEG/RM-Bench`). As published, a tie is wrong;
              of the nine comparisons, those of equal style are normal, those in which the chosen completion has the
              plainer style are hard, and the others easy; each figure is the mean over the four domains.
            - `"best_of_n"`: `prompt`, `completions` and `labels` (whether each is right), or `prompt` with a list of
              `chosen` and one of `rejected`. How often the best completion is right; of several that are best, the
              share that is.

            Text prompts of the two published benchmarks are made conversations where the tokenizer has a chat template.
        subset_column (`str`, *optional*):
            Column whose values name the subsets to give metrics by. Default: `"subset"` for `"rewardbench"`, `"domain"`
            for `"rm_bench"`, none for the others.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Size of a scoring batch in tokens, padding included, for a model that is loaded here.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to leave out the progress bar.
        max_length (`int`, *optional*):
            Longest sequence in tokens that a scalar model can read; a comparison with a longer one counts as a tie, and
            is counted as `not_judged`. Default: that of its tokenizer, or of its learned positions. For a judge, set that
            of its comparison.

    Returns:
        [`Evaluation`]: with the metrics `num_rows`, `accuracy`, `accuracy_low` and `accuracy_high` (Wilson's 95 %
        interval, as if no two rows had the same prompt), `ties` and `not_judged` (numbers of rows); of pairs also
        `log_loss`, `brier`, `ece`, `ece_floor` and `adaptive_ece`, as in [`preference_metrics`]; of RM-Bench `easy`,
        `normal` and `hard` instead of the interval; and under `"all"` the final `score` of a published benchmark,
        if all of its subsets or domains are there.

    Raises:
        ValueError: If the benchmark or a subset of it is unknown, the data is not of its form, or the model is none
            with one trained label.
        NonFiniteScoreError: If a score is NaN or infinite.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"`benchmark` must be one of {list(BENCHMARKS)}, got {benchmark!r}.")
    if isinstance(model, PairwiseJudge) and max_length is not None:
        raise ValueError("A judge has the `max_length` of its comparison; set it there.")
    subset_column = subset_column or {"rewardbench": "subset", "rm_bench": "domain"}.get(benchmark)
    check_rows(dataset, benchmark, subset_column)
    subsets = [] if subset_column is None else [str(subset) for subset in dataset[subset_column]]
    strata, weights = strata_of(benchmark, subsets, len(dataset))

    scorer = _load(model, batch_tokens)
    # A judge makes a conversation of everything.
    as_messages = isinstance(scorer, PairwiseJudge) or scorer.processing_class.chat_template is not None
    logits, rights, hashes = [], [], []
    with tqdm(total=len(dataset), desc="Evaluating", unit="row", disable=disable_tqdm) as progress:
        for start in range(0, len(dataset), CHUNK_ROWS):
            raw = [dataset[number] for number in range(start, min(start + CHUNK_ROWS, len(dataset)))]
            rows = [read_row(row, benchmark, as_messages) for row in raw]
            logits += _pair_logits(scorer, rows, start, max_length)
            rights += [row.is_right for row in rows]
            hashes += [content_hash({name: row[name] for name in TEXT_COLUMNS if name in row}) for row in raw]
            progress.update(len(rows))

    if benchmark == "best_of_n":
        outcomes, is_tie = map(np.array, zip(*map(best_is_right, logits, rights), strict=True))
    else:
        # What was not judged is a tie.
        cells = np.nan_to_num(np.stack(logits))
        of_tie = 0.5 if benchmark == "preferences" else 0.0
        outcomes = np.where(cells == 0, of_tie, cells > 0).mean(axis=1)
        is_tie = (np.stack(logits) == 0).any(axis=1)
    is_judged = np.array([not np.isnan(row).any() for row in logits])
    if not is_judged.all():
        logger.warning(
            f"{(~is_judged).sum()} of {len(dataset)} rows have a text that is too long for the model, which counts as a "
            "tie."
        )

    def measure(rows: np.ndarray) -> dict[str, float]:
        low, high = wilson_interval(float(outcomes[rows].sum()), len(rows))
        measured = {
            "num_rows": len(rows),
            "accuracy": float(outcomes[rows].mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "ties": int(is_tie[rows].sum()),
            "not_judged": int((~is_judged[rows]).sum()),
        }
        if benchmark in ("preferences", "rewardbench"):
            measured |= {**preference_metrics(cells[rows, 0]), "accuracy": measured["accuracy"]}
        if benchmark == "rm_bench":
            # The nine comparisons of a row are not independent.
            del measured["accuracy_low"], measured["accuracy_high"]
            measured |= rm_bench_levels(cells[rows])
        return measured

    names = np.array(strata if benchmark == "rm_bench" else subsets)
    by_subset = {str(name): measure(np.flatnonzero(names == name)) for name in np.unique(names)}
    metrics = {ALL: measure(np.arange(len(dataset)))}
    if benchmark == "rewardbench":
        sections = section_scores({subset: own["accuracy"] for subset, own in by_subset.items()})
        metrics |= {section: {"accuracy": score} for section, score in sections.items()}
    metrics |= by_subset
    if benchmark == "rm_bench":
        means = {level: np.mean([by_subset[domain][level] for domain in weights]) for level in LEVELS}
        metrics[ALL] |= {level: float(mean) for level, mean in means.items()}
    if missing := missing_strata(benchmark, strata):
        logger.warning(f"No row is of {', '.join(missing)}, so there is no final score of {benchmark}.")
    elif benchmark in ("rewardbench", "rm_bench"):
        metrics[ALL]["score"] = sum(weight * by_subset[part]["accuracy"] for part, weight in weights.items())
    return Evaluation(
        model=model if isinstance(model, str) else scorer.__name__,
        benchmark=benchmark,
        metrics=metrics,
        outcomes=outcomes.tolist(),
        prompts=prompt_groups(dataset).tolist(),
        strata=strata,
        stratum_weights=weights,
        rows_hash=content_hash(benchmark, strata, hashes),
    )


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """`tuple[float, float]`: 95 % interval of Wilson for a share ([Interval Estimation for a Binomial
    Proportion](https://doi.org/10.1214/ss/1009213286))."""
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


def _pair_logits(
    scorer: SSRMRewardFunction | PairwiseJudge, rows: list[BenchmarkRow], first_row: int, max_length: int | None
) -> list[np.ndarray]:
    """Logits of the pairs of each row; NaN where a text is too long."""
    if isinstance(scorer, PairwiseJudge):
        ends = np.cumsum([len(row.pairs) for row in rows])
        pairs = [(row.completions[i], row.completions[j]) for row in rows for i, j in row.pairs]
        try:
            logits = scorer.logits([row.prompt for row in rows for _ in row.pairs], pairs)
        except NonFiniteScoreError as error:
            raise _in_rows(error, ends, first_row) from error
        return np.split(logits, ends[:-1])
    readable = min(scorer.processing_class.model_max_length, scorer.num_positions or math.inf)
    longest = readable if max_length is None else max_length
    sequences = []
    for number, row in enumerate(rows, first_row):
        with tokenizing(f"Row {number} of `dataset`"):
            sequences += [scorer.tokenize(row.prompt, completion, *row.template) for completion in row.completions]
    fits = np.array([len(ids) <= longest for ids in sequences])
    ends = np.cumsum([len(row.completions) for row in rows])
    rewards = np.full(len(sequences), np.nan)
    if fits.any():
        try:
            rewards[fits] = scorer.score_tokenized([ids for ids, fit in zip(sequences, fits, strict=True) if fit])
        except NonFiniteScoreError as error:
            raise _in_rows(
                NonFiniteScoreError("", np.flatnonzero(fits)[error.rows].tolist()), ends, first_row
            ) from error
    return [
        np.array([own[i] - own[j] for i, j in row.pairs])
        for row, own in zip(rows, np.split(rewards, ends[:-1]), strict=True)
    ]


def _in_rows(error: NonFiniteScoreError, ends: np.ndarray, first_row: int) -> NonFiniteScoreError:
    rows = np.unique(np.searchsorted(ends, error.rows, side="right")) + first_row
    return NonFiniteScoreError("dataset", rows.tolist())


# ---- Several models ----


@dataclass(frozen=True)
class _PairedTest:
    """Two models on the same rows: difference of their figures, its 95 % interval, prompts won and lost, p-value."""

    difference: float
    low: float
    high: float
    won: int
    lost: int
    p_value: float


def _paired_test(one: Evaluation, other: Evaluation) -> _PairedTest:
    margins = np.array(one.outcomes) - np.array(other.outcomes)
    prompts, strata = np.array(one.prompts), np.array(one.strata)
    # Rows with the same prompt are not independent, so both answers are about prompts. Rounded, as sums of ninths are.
    of_prompts = np.round(np.bincount(prompts, weights=margins), 9)
    won, lost = int((of_prompts > 0).sum()), int((of_prompts < 0).sum())
    draw = np.random.default_rng(0)
    difference, samples = 0.0, np.zeros(NUM_BOOTSTRAP_SAMPLES)
    for stratum, weight in one.stratum_weights.items():
        is_in = strata == stratum
        _, group = np.unique(prompts[is_in], return_inverse=True)
        sums, counts = np.bincount(group, weights=margins[is_in]), np.bincount(group)
        difference += weight * sums.sum() / counts.sum()
        for number in range(NUM_BOOTSTRAP_SAMPLES):
            drawn = draw.integers(len(sums), size=len(sums))
            samples[number] += weight * sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(samples, [0.025, 0.975])
    return _PairedTest(float(difference), float(low), float(high), won, lost, sign_test(won, lost))


def sign_test(won: int, lost: int) -> float:
    """
    Two-sided p-value of the exact sign test, which is McNemar's exact test where outcomes are right or wrong
    ([McNemar](https://doi.org/10.1007/BF02295996)).

    Args:
        won (`int`):
            Number of prompts on which the first model is better.
        lost (`int`):
            Number of prompts on which the second one is.

    Returns:
        `float`: probability that one of two equally good models wins as many of them as the better one did, or more.
    """
    number = won + lost
    # By logarithms: the coefficients of a thousand prompts are larger than any float.
    total = sum(
        math.exp(math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1) - number * math.log(2))
        for k in range(min(won, lost) + 1)
    )
    return min(1.0, 2 * total)


_COLUMNS = {
    "score": "Score",
    "accuracy": "Accuracy",
    "easy": "Easy",
    "normal": "Normal",
    "hard": "Hard",
    "log_loss": "Log-loss",
    "ece": "ECE",
    "brier": "Brier",
    "ties": "Ties",
    "not_judged": "Not judged",
}
_UNITS = {"preferences": "Pairs", "rewardbench": "Pairs", "rm_bench": "Prompts", "best_of_n": "Prompts"}


def evaluation_table(evaluations: list[Evaluation]) -> str:
    """
    Compare models in Markdown.

    Args:
        evaluations (`list[Evaluation]`):
            Evaluations, as from [`evaluate`].

    Returns:
        `str`: for each benchmark a table of its models, one of their accuracies by subset, and one of paired tests
        between all models that were evaluated on the same rows: difference of the score or accuracy with its 95 %
        interval (bootstrap over the prompts, within each part of the benchmark), the number of prompts on which either
        is better, and the p-value of [`sign_test`] on these, not corrected for the number of tests.
    """
    blocks = []
    for benchmark in dict.fromkeys(evaluation.benchmark for evaluation in evaluations):
        own = [evaluation for evaluation in evaluations if evaluation.benchmark == benchmark]
        present = [name for name in _COLUMNS if any(name in evaluation.metrics[ALL] for evaluation in own)]
        if not any(evaluation.metrics[ALL]["not_judged"] for evaluation in own):
            present.remove("not_judged")
        lines = [["Model", _UNITS[benchmark], *(_COLUMNS[name] for name in present)]]
        for evaluation in own:
            metrics = evaluation.metrics[ALL]
            lines.append([evaluation.model, str(metrics["num_rows"]), *(_in_cell(metrics, name) for name in present)])
        blocks.append(_markdown(lines))
        if subsets := list(dict.fromkeys(name for evaluation in own for name in evaluation.metrics if name != ALL)):
            lines = [["Subset", _UNITS[benchmark], *(evaluation.model for evaluation in own)]]
            for subset in subsets:
                cells = [evaluation.metrics.get(subset, {}) for evaluation in own]
                numbers = {str(cell["num_rows"]) for cell in cells if "num_rows" in cell}
                lines.append(
                    [subset, " / ".join(sorted(numbers)) or "–", *(_in_cell(cell, "accuracy") for cell in cells)]
                )
            blocks.append(_markdown(lines))
        lines = [["Models", "Difference", "95 % interval", "Better on", "Worse on", "p"]]
        for one, other in itertools.combinations(own, 2):
            if one.rows_hash == other.rows_hash:
                test = _paired_test(one, other)
                interval = f"{test.low:+.3f} to {test.high:+.3f}"
                counts = [f"{test.won} prompts", f"{test.lost} prompts"]
                models = f"{one.model} over {other.model}"
                lines.append([models, f"{test.difference:+.3f}", interval, *counts, f"{test.p_value:.2g}"])
            else:
                blocks.append(
                    f"{one.model} and {other.model} were evaluated on different rows, so no test compares them."
                )
        if len(lines) > 1:
            blocks.append(_markdown(lines))
    return "\n\n".join(blocks)


def _in_cell(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "–"
    if isinstance(metrics[name], int):
        return str(metrics[name])
    if name == "accuracy" and "accuracy_low" in metrics:
        return f"{metrics[name]:.3f} ({metrics['accuracy_low']:.3f}–{metrics['accuracy_high']:.3f})"
    return f"{metrics[name]:.3f}"


def _markdown(lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [escaped[0], rule, *escaped[1:]])
