"""Benchmarks of reward models: the rows that each of them takes, and how its scores are computed."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.checks import (
    check_characters,
    check_columns,
    check_is_dataset,
    check_not_empty,
    check_preference_dataset,
    check_row,
    check_template_columns,
)
from ..data.formats import TEMPLATE_COLUMNS
from ..data.prompts import with_prompt
from ..scoring.preference import mean_win_probability
from .published import PUBLISHED, REWARDBENCH_2_PARTS


BENCHMARKS = ("preferences", "best_of_n", "rewardbench", "rm_bench", *PUBLISHED)
ALL = "all"
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completions", "labels", *TEMPLATE_COLUMNS)

PRIOR_SETS = "Prior Sets"
# Subsets of RewardBench by section, with the number of examples that each is weighted by
# (https://huggingface.co/papers/2403.13787 and `rewardbench/constants.py` in https://github.com/allenai/reward-bench).
# math-prm has 447 examples and is weighted as 984, the size of the six subsets of code together.
REWARDBENCH_SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
    },
    # Four older preference sets beside the 23 subsets, with equal weights.
    PRIOR_SETS: {"anthropic_helpful": 1, "anthropic_hhh": 1, "shp": 1, "summarize": 1},
}
# Half for the prior sets, since many models are trained on their training parts
# (https://huggingface.co/spaces/allenai/reward-bench).
SECTION_WEIGHTS = {"Chat": 1.0, "Chat Hard": 1.0, "Safety": 1.0, "Reasoning": 1.0, PRIOR_SETS: 0.5}
# The data has `safety-refuse` and `safety-response` in place of `safety`.
RM_BENCH_DOMAINS = ("chat", "code", "math", "safety")
LEVELS = ("easy", "normal", "hard")


@dataclass(frozen=True)
class BenchmarkRow:
    """
    A row of any benchmark in one form.

    Args:
        prompt (`str` or `list[dict[str, Any]]`):
            Text or conversation.
        completions (`list`):
            Completions of the prompt, as text or messages.
        pairs (`list[tuple[int, int]]`):
            Positions of the completions to compare. Except for `"best_of_n"`, the first one of a pair is the better.
        is_right (`list[bool]`):
            Whether each completion is right. Only used for `"best_of_n"`.
        template (`list`):
            Values of `TEMPLATE_COLUMNS`, `None` where the row has none.
    """

    prompt: Any
    completions: list
    pairs: list[tuple[int, int]]
    is_right: list[bool]
    template: list


def check_rows(dataset: Dataset, benchmark: str, subset_column: str | None) -> None:
    """
    Check that a dataset has the form of a benchmark. This needs no model.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of the benchmark.
        benchmark (`str`):
            One of `BENCHMARKS`.
        subset_column (`str`, *optional*):
            Column with the subset of each row.

    Raises:
        TypeError: If it is not a dataset.
        ValueError: If it has no rows, lacks a column, or has a row of another form.
    """
    check_is_dataset(dataset, "dataset")
    check_not_empty(dataset, "dataset")
    if subset_column is not None:
        check_columns(dataset, (subset_column,), "dataset")
    if benchmark == "preferences":
        if check_preference_dataset(dataset, "dataset") is None:
            raise ValueError("`dataset` is tokenized; give it with the texts in `chosen` and `rejected`.")
        return
    has_labels = benchmark.startswith("best") and "completions" in dataset.column_names
    columns = ("completions", "labels") if has_labels else ("chosen", "rejected")
    check_columns(dataset, ("prompt", *columns), "dataset")
    shown = [column for column in TEMPLATE_COLUMNS if column in dataset.column_names]
    for number, row in enumerate(dataset.select_columns(["prompt", *columns, *shown])):
        where = f"row {number} of `dataset`"
        check_template_columns(row, where)
        row = {name: row[name] for name in ("prompt", *columns)}
        _check_texts(row, where)
        if benchmark == "rewardbench":
            _check_rewardbench_row(row, where)
        elif benchmark == "rm_bench":
            _check_rm_bench_row(row, where)
        else:
            _check_best_of_n_row(row, columns, where)


def strata_of(benchmark: str, subsets: list[str], num_rows: int) -> tuple[list[str], dict[str, float]]:
    """
    Parts of a benchmark, over whose accuracies its score is a weighted mean.

    Args:
        benchmark (`str`):
            One of `BENCHMARKS`.
        subsets (`list[str]` of length `num_rows`):
            Subset of each row; empty if there is no column of subsets.
        num_rows (`int`):
            Number of rows.

    Returns:
        `tuple[list[str], dict[str, float]]`: the part that each row belongs to, and the weight of each part. The
        weights sum to 1.

    Raises:
        ValueError: If a subset is unknown to the published benchmark, or named as all rows together are.
    """
    if benchmark == "rewardbench":
        section_of = {subset: section for section, counts in REWARDBENCH_SECTIONS.items() for subset in counts}
        if unknown := sorted(set(subsets) - section_of.keys()):
            raise ValueError(
                f"`dataset` has rows of the subset {', '.join(map(repr, unknown))}, which RewardBench does not have; "
                "drop these rows, or use `benchmark='preferences'` with `subset_column`."
            )
        # The final score is linear in the accuracies: the weight of a subset is the score if it alone were all right.
        present = sorted(set(subsets))
        return subsets, {
            subset: final_score(section_scores({other: float(other == subset) for other in present}))
            for subset in present
        }
    if benchmark == "rewardbench_2":
        parts = [part for part in REWARDBENCH_2_PARTS if part in subsets]
        return subsets, dict.fromkeys(parts, 1 / len(parts))
    if benchmark == "rm_bench":
        domains = [subset.split("-")[0] for subset in subsets]
        present = sorted(set(domains))
        if unknown := sorted(set(present) - set(RM_BENCH_DOMAINS)):
            raise ValueError(
                f"`dataset` has rows of the domain {', '.join(map(repr, unknown))}, but RM-Bench has only "
                f"{list(RM_BENCH_DOMAINS)}; drop these rows."
            )
        return domains, {domain: 1 / len(present) for domain in present}
    if ALL in subsets:
        raise ValueError(f"A subset is named {ALL!r}, the name of the metrics over all rows; rename the subset.")
    return [ALL] * num_rows, {ALL: 1.0}


def missing_strata(benchmark: str, strata: list[str]) -> list[str]:
    """
    Parts of a published benchmark that have no row. Without them there is no final score.

    Args:
        benchmark (`str`):
            One of `BENCHMARKS`.
        strata (`list[str]` of length `num_rows`):
            Part that each row belongs to, as from [`strata_of`].

    Returns:
        `list[str]`: their names, sorted.
    """
    due: set[str] = set()
    if benchmark == "rewardbench":
        due = {
            subset
            for section, counts in REWARDBENCH_SECTIONS.items()
            # The prior sets are optional, but only all four together.
            if section != PRIOR_SETS or not set(strata).isdisjoint(counts)
            for subset in counts
        }
    if benchmark == "rm_bench":
        due = set(RM_BENCH_DOMAINS)
    if benchmark == "rewardbench_2":
        due = set(REWARDBENCH_2_PARTS)
    return sorted(due - set(strata))


def read_row(row: dict[str, Any], benchmark: str, as_messages: bool) -> BenchmarkRow:
    """
    Bring a row of a benchmark into the form that all of them share.

    Args:
        row (`dict[str, Any]`):
            Row of a dataset that passed [`check_rows`].
        benchmark (`str`):
            Form of the row: one of `BENCHMARKS`, or what [`as_known_rows`] has made of it.
        as_messages (`bool`):
            Whether to make a conversation of a text prompt.

    Returns:
        [`BenchmarkRow`]: the row.
    """
    template = [row.get(name) for name in TEMPLATE_COLUMNS]
    is_right: list[bool] = []
    if benchmark == "preferences":
        row = with_prompt(row)
        completions, pairs, is_right = [row["chosen"], row["rejected"]], [(0, 1)], [True, False]
    elif benchmark.startswith("best"):
        completions = row["completions"] if "completions" in row else row["chosen"] + row["rejected"]
        pairs, is_right = list(itertools.combinations(range(len(completions)), 2)), _is_right(row)
    elif benchmark == "rewardbench":
        completions, pairs = [row["chosen"], row["rejected"]], [(0, 1)]
    else:
        completions = row["chosen"] + row["rejected"]
        pairs = [(chosen, 3 + rejected) for chosen in range(3) for rejected in range(3)]
    prompt = row["prompt"]
    if isinstance(prompt, str) and as_messages:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and isinstance(completions[0], str):
        completions = [[{"role": "assistant", "content": completion}] for completion in completions]
    return BenchmarkRow(prompt, completions, pairs, is_right, template)


def section_scores(accuracies: dict[str, float]) -> dict[str, float]:
    """
    Scores of the sections of RewardBench, as published ([RewardBench](https://huggingface.co/papers/2403.13787)).

    Args:
        accuracies (`dict[str, float]`):
            Accuracy by subset.

    Returns:
        `dict[str, float]`: mean of the accuracies of each section, weighted by the published numbers of examples.
        Sections and subsets without an accuracy are left out.
    """
    scores = {}
    for section, counts in REWARDBENCH_SECTIONS.items():
        present = {subset: count for subset, count in counts.items() if subset in accuracies}
        if present:
            total = sum(accuracies[subset] * count for subset, count in present.items())
            scores[section] = total / sum(present.values())
    return scores


def final_score(sections: dict[str, float]) -> float:
    """
    Final score of RewardBench, as published on its [leaderboard](https://huggingface.co/spaces/allenai/reward-bench).

    Args:
        sections (`dict[str, float]`):
            Scores of the sections, as from [`section_scores`].

    Returns:
        `float`: their mean. The prior sets, if present, have half the weight of another section.
    """
    total = sum(score * SECTION_WEIGHTS[section] for section, score in sections.items())
    return total / sum(SECTION_WEIGHTS[section] for section in sections)


def rm_bench_levels(cells: np.ndarray) -> dict[str, float]:
    """
    Accuracies of RM-Bench by level of difficulty ([RM-Bench](https://huggingface.co/papers/2410.16184)).

    Args:
        cells (`np.ndarray` of shape `(num_rows, 9)`, float64):
            Logits of the nine comparisons: three chosen completions, from the plainest to the most ornate style, each
            against three rejected ones in the same order.

    Returns:
        `dict[str, float]`: `easy` (the chosen completion has the more ornate style), `normal` (equal styles) and
        `hard` (the chosen completion has the plainer style).
    """
    wins = (cells > 0).mean(axis=0).reshape(3, 3)
    above = np.triu_indices(3, 1)
    # Rows are styles of the chosen completion, columns those of the rejected one.
    return {
        "easy": float(wins.T[above].mean()),
        "normal": float(wins.diagonal().mean()),
        "hard": float(wins[above].mean()),
    }


def best_is_right(logits: np.ndarray, is_right: list[bool]) -> tuple[float, bool]:
    """
    Whether the completion that a model finds best is right.

    Args:
        logits (`np.ndarray` of shape `(n * (n - 1) / 2,)`, float64):
            Logits of all pairs of the `n` completions, in the order of `itertools.combinations`; NaN where a pair was
            not compared.
        is_right (`list[bool]` of length `n`):
            Whether each completion is right.

    Returns:
        `tuple[float, bool]`: share of right ones among the best completions, and whether several share the first
        place.
    """
    number = len(is_right)
    matrix = np.zeros((number, number))
    above = np.triu_indices(number, 1)
    matrix[above] = logits
    matrix -= matrix.T
    is_compared = ~np.isnan(matrix) & ~np.eye(number, dtype=bool)
    wins = mean_win_probability(matrix)
    if is_compared.any():
        wins = np.where(is_compared.any(axis=1), wins, -np.inf)
    # The same probabilities, summed in another order, may differ in their last bits.
    is_best = np.isclose(wins, wins.max(), rtol=0, atol=1e-12)
    return float(np.array(is_right)[is_best].mean()), bool(is_best.sum() > 1)


def _check_texts(row: dict[str, Any], where: str) -> None:
    """Check the cells of a row for missing values and broken characters, and a conversation for its messages."""
    for name, value in row.items():
        if value is None:
            raise ValueError(f"`{name}` of {where} is missing; fill it in or drop the row.")
        # Empty text is allowed: published benchmarks have some.
        check_characters(value, f"`{name}` of {where}")
    if not isinstance(row["prompt"], str):
        check_row({"prompt": row["prompt"]}, where, is_conversational=True)


def _check_rewardbench_row(row: dict[str, Any], where: str) -> None:
    if not (isinstance(row["chosen"], str) and isinstance(row["rejected"], str)):
        raise ValueError(
            f"`chosen` and `rejected` of {where} must be text, as in RewardBench; give each one completion."
        )


def _check_rm_bench_row(row: dict[str, Any], where: str) -> None:
    for texts in (row["chosen"], row["rejected"]):
        if not isinstance(texts, list) or list(map(type, texts)) != [str] * 3:
            raise ValueError(
                f"`chosen` and `rejected` of {where} must be lists of three texts, as in RM-Bench; give each three "
                "completions."
            )


def _check_best_of_n_row(row: dict[str, Any], columns: tuple[str, str], where: str) -> None:
    one, other = (row[name] for name in columns)
    # A dictionary is a message: the column then holds one conversation in place of a list of them.
    if not (isinstance(one, list) and isinstance(other, list)) or any(isinstance(each, dict) for each in one):
        raise ValueError(
            f"`{columns[0]}` and `{columns[1]}` of {where} must be lists with one entry per completion; put a single "
            "completion into a list."
        )
    if "labels" in row and len(one) != len(other):
        raise ValueError(
            f"`completions` of {where} has {len(one)} entries and `labels` has {len(other)}; give each completion one "
            "label."
        )
    is_right = _is_right(row)
    if all(is_right) or not any(is_right):
        raise ValueError(
            f"The completions of {where} are all right or all wrong, so there is nothing to choose; drop the row."
        )
    texts = {f"{columns[0]}[{place}]": text for place, text in enumerate(one)}
    if "labels" not in row:
        texts |= {f"{columns[1]}[{place}]": text for place, text in enumerate(other)}
    check_row(texts, where, isinstance(row["prompt"], list))


def _is_right(row: dict[str, Any]) -> list[bool]:
    if "completions" in row:
        return [bool(label) for label in row["labels"]]
    return [True] * len(row["chosen"]) + [False] * len(row["rejected"])
