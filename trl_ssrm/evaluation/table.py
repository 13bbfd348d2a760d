"""The results of evaluations, compared in a table with paired tests."""

import html
import itertools
import math
from dataclasses import dataclass

import numpy as np

from .benchmarks import ALL


NUM_BOOTSTRAP_SAMPLES = 2000

_COLUMNS = {
    "score": "Score",
    "accuracy": "Accuracy",
    "easy": "Easy",
    "normal": "Normal",
    "hard": "Hard",
    "log_loss": "Log-loss",
    "ece": "ECE",
    "brier": "Brier",
    "temperature": "Temperature",
    "ties": "Ties",
    "not_judged": "Not judged",
}
_UNITS = {
    **{"preferences": "Pairs", "rewardbench": "Pairs", "judgebench": "Pairs", "llmbar": "Pairs"},
    **{"rm_bench": "Prompts", "best_of_n": "Prompts", "rewardbench_2": "Prompts", "rmb": "Rows"},
}


@dataclass(frozen=True)
class Evaluation:
    """
    Result of [`evaluate`]. `dataclasses.asdict` turns it into JSON values and `Evaluation(**...)` turns them back, so
    that a model can be compared with one that was evaluated earlier.

    Args:
        model (`str`):
            Name of the model.
        benchmark (`str`):
            Name of the benchmark.
        metrics (`dict[str, dict[str, float]]`):
            Metrics by subset, and over all rows under `"all"`. See [`evaluate`] for their names.
        outcomes (`list[float]` of length `num_rows`):
            How right the model is on each row, in `[0, 1]`.
        prompts (`list[int]` of length `num_rows`):
            Number of the prompt of each row. Rows with the same prompt are not independent.
        strata (`list[str]` of length `num_rows`):
            Part of the benchmark that each row belongs to.
        stratum_weights (`dict[str, float]`):
            Weight of the mean outcome of each part in the score of the benchmark. The weights sum to 1.
        rows_hash (`str`):
            Hash of the rows. Two models with the same hash were evaluated on the same rows.
    """

    model: str
    benchmark: str
    metrics: dict[str, dict[str, float]]
    outcomes: list[float]
    prompts: list[int]
    strata: list[str]
    stratum_weights: dict[str, float]
    rows_hash: str


def evaluation_table(evaluations: list[Evaluation], format: str = "markdown") -> str:
    """
    Compare models on one benchmark or several.

    Args:
        evaluations (`list[Evaluation]`):
            Evaluations, as from [`evaluate`].
        format (`str`, *optional*, defaults to `"markdown"`):
            `"markdown"` or `"html"`.

    Returns:
        `str`: with several benchmarks, first a table of the score of each model on each of them (the accuracy where there is
        no score), with its 95 % interval (bootstrap over the prompts). Then three tables for each benchmark: the metrics of its models, their accuracies by subset, and paired tests
        between models that were evaluated on the same rows. A test gives the difference of the scores (of the
        accuracies where there is no score) with its 95 % interval (bootstrap over the prompts, within each part of the
        benchmark), the number of prompts on which each model is better, and the p-value of [`sign_test`] on these
        numbers. The p-values are not corrected for the number of tests.
    """
    if format not in ("markdown", "html"):
        raise ValueError(f"`format` must be 'markdown' or 'html', got {format!r}.")
    by_benchmark: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        by_benchmark.setdefault(evaluation.benchmark, []).append(evaluation)
    blocks: list[str | list[list[str]]] = [_table_of_scores(by_benchmark)] if len(by_benchmark) > 1 else []
    for own in by_benchmark.values():
        blocks += [_table_of_metrics(own), *_tables_of_subsets(own), *_tests_of_pairs(own)]
    if format == "html":
        return "\n".join(map(_html, blocks))
    return "\n\n".join(block if isinstance(block, str) else _markdown(block) for block in blocks)


def sign_test(won: int, lost: int) -> float:
    """
    Two-sided p-value of the exact sign test. Where outcomes are right or wrong, it is McNemar's exact test
    ([McNemar](https://doi.org/10.1007/BF02295996)).

    Args:
        won (`int`):
            Number of prompts on which the first model is better.
        lost (`int`):
            Number of prompts on which the second model is better.

    Returns:
        `float`: probability of a result at least this uneven if the two models are equally good.
    """
    number = won + lost
    # Computed by logarithms: the binomial coefficients of a thousand prompts are larger than any float.
    total = sum(
        math.exp(math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1) - number * math.log(2))
        for k in range(min(won, lost) + 1)
    )
    return min(1.0, 2 * total)


def _table_of_scores(by_benchmark: dict[str, list[Evaluation]]) -> list[list[str]]:
    """The score of each model on each benchmark."""
    models = dict.fromkeys(evaluation.model for own in by_benchmark.values() for evaluation in own)
    lines = [["Model", *by_benchmark]]
    for model in models:
        cells = []
        for own in by_benchmark.values():
            found = [evaluation for evaluation in own if evaluation.model == model]
            cells.append(" / ".join(map(_score_in_cell, found)) or "–")
        lines.append([model, *cells])
    return lines


def _score_in_cell(evaluation: Evaluation) -> str:
    overall = evaluation.metrics[ALL]
    samples = _weighted_means(np.array(evaluation.outcomes), evaluation)[1]
    value = overall.get("score", overall["accuracy"])
    # What a score has besides its parts, as that of RewardBench 2 has, moves the interval with it.
    low, high = np.quantile(samples, [0.025, 0.975]) - samples.mean() + value
    return f"{value:.3f} ({low:.3f}–{high:.3f})"


def _weighted_means(values: np.ndarray, evaluation: Evaluation) -> tuple[float, np.ndarray]:
    """Weighted mean over the parts of a benchmark, of values by row, and the same for prompts that are drawn again."""
    prompts, strata = np.array(evaluation.prompts), np.array(evaluation.strata)
    draw = np.random.default_rng(0)
    mean, samples = 0.0, np.zeros(NUM_BOOTSTRAP_SAMPLES)
    for stratum, weight in evaluation.stratum_weights.items():
        is_in = strata == stratum
        if not is_in.any():
            continue
        _, group = np.unique(prompts[is_in], return_inverse=True)
        if group.max() == 0:
            # With one prompt for all, rows are what is left to draw.
            group = np.arange(len(group))
        sums, counts = np.bincount(group, weights=values[is_in]), np.bincount(group)
        mean += weight * sums.sum() / counts.sum()
        for number in range(NUM_BOOTSTRAP_SAMPLES):
            drawn = draw.integers(len(sums), size=len(sums))
            samples[number] += weight * sums[drawn].sum() / counts[drawn].sum()
    return float(mean), samples


def _table_of_metrics(evaluations: list[Evaluation]) -> list[list[str]]:
    overall = [evaluation.metrics[ALL] for evaluation in evaluations]
    names = [name for name in _COLUMNS if any(name in metrics for metrics in overall)]
    if not any(metrics["not_judged"] for metrics in overall):
        names.remove("not_judged")
    lines = [["Model", _UNITS[evaluations[0].benchmark], *(_COLUMNS[name] for name in names)]]
    for evaluation, metrics in zip(evaluations, overall, strict=True):
        lines.append([evaluation.model, str(metrics["num_rows"]), *(_in_cell(metrics, name) for name in names)])
    return lines


def _tables_of_subsets(evaluations: list[Evaluation]) -> list[list[list[str]]]:
    """One table of accuracies by subset; none if there are no subsets."""
    subsets = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics if name != ALL))
    if not subsets:
        return []
    lines = [["Subset", _UNITS[evaluations[0].benchmark], *(evaluation.model for evaluation in evaluations)]]
    for subset in subsets:
        cells = [evaluation.metrics.get(subset, {}) for evaluation in evaluations]
        numbers = {str(cell["num_rows"]) for cell in cells if "num_rows" in cell}
        # The part Ties of RewardBench 2 has a score of its own.
        shown = [_in_cell(cell, "score" if "score" in cell else "accuracy") for cell in cells]
        lines.append([subset, " / ".join(sorted(numbers)) or "–", *shown])
    return [lines]


def _tests_of_pairs(evaluations: list[Evaluation]) -> list[str | list[list[str]]]:
    """A sentence for each pair of models that were evaluated on different rows, and a table of tests of the others."""
    sentences = []
    lines = [["Models", "Difference", "95 % interval", "Better on", "Worse on", "p"]]
    for one, other in itertools.combinations(evaluations, 2):
        if one.rows_hash != other.rows_hash:
            sentences.append(
                f"{one.model} and {other.model} were evaluated on different rows, so no test compares them."
            )
            continue
        test = _paired_test(one, other)
        interval = f"{test.low:+.3f} to {test.high:+.3f}"
        counts = [f"{test.won} prompts", f"{test.lost} prompts"]
        models = f"{one.model} over {other.model}"
        lines.append([models, f"{test.difference:+.3f}", interval, *counts, f"{test.p_value:.2g}"])
    return [*sentences, lines] if len(lines) > 1 else [*sentences]


@dataclass(frozen=True)
class _PairedTest:
    """Two models on the same rows: difference of their scores, its 95 % interval, prompts won and lost, p-value."""

    difference: float
    low: float
    high: float
    won: int
    lost: int
    p_value: float


def _paired_test(one: Evaluation, other: Evaluation) -> _PairedTest:
    margins = np.array(one.outcomes) - np.array(other.outcomes)
    prompts = np.array(one.prompts)
    # Rows with the same prompt are not independent, so the sign test counts prompts and the bootstrap draws prompts.
    # Rounded, since ninths that cancel leave a sum of 1e-17.
    of_prompts = np.round(np.bincount(prompts, weights=margins), 9)
    won, lost = int((of_prompts > 0).sum()), int((of_prompts < 0).sum())
    difference, samples = _weighted_means(margins, one)
    low, high = np.quantile(samples, [0.025, 0.975])
    return _PairedTest(difference, float(low), float(high), won, lost, sign_test(won, lost))


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


def _html(block: str | list[list[str]]) -> str:
    """A sentence or a table as HTML."""
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    head, *rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in block)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head.replace('td>', 'th>')}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
