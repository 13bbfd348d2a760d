"""The published benchmarks of reward models: their rows, and how their figures are made."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from trl import maybe_extract_prompt

from ..data.checks import (
    check_characters,
    check_columns,
    check_is_dataset,
    check_not_empty,
    check_preference_dataset,
    check_row,
)
from ..data.formats import TEMPLATE_COLUMNS
from ..scoring.preference import mean_win_probability


BENCHMARKS = ("preferences", "rewardbench", "rm_bench", "best_of_n")
ALL = "all"
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completions", "labels", *TEMPLATE_COLUMNS)

PRIOR_SETS = "Prior Sets"
# Subsets of RewardBench by section, and the number of examples that each counts for (https://huggingface.co/papers/2403.13787
# and `rewardbench/constants.py` in https://github.com/allenai/reward-bench). math-prm has 447 examples and counts for
# 984, as many as the six subsets of code have together.
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
    # Not among the 23: preference sets from before RewardBench, each as much as the others.
    PRIOR_SETS: {"anthropic_helpful": 1, "anthropic_hhh": 1, "shp": 1, "summarize": 1},
}
# Half, so that training on the training parts of those sets pays less (https://huggingface.co/spaces/allenai/reward-bench).
SECTION_WEIGHTS = {"Chat": 1.0, "Chat Hard": 1.0, "Safety": 1.0, "Reasoning": 1.0, PRIOR_SETS: 0.5}
# The domain `safety` is written as `safety-refuse` and `safety-response` in the data.
RM_BENCH_DOMAINS = ("chat", "code", "math", "safety")
LEVELS = ("easy", "normal", "hard")


@dataclass(frozen=True)
class BenchmarkRow:
    """Completions of a prompt, the pairs of positions to compare, and which completions are right."""

    prompt: Any
    completions: list
    pairs: list[tuple[int, int]]
    is_right: list[bool]
    template: list


def check_rows(dataset: Dataset, benchmark: str, subset_column: str | None) -> None:
    """Refuse data that is not of the form of a benchmark, before a model is loaded."""
    check_is_dataset(dataset, "dataset")
    check_not_empty(dataset, "dataset")
    if subset_column is not None:
        check_columns(dataset, (subset_column,), "dataset")
    if benchmark == "preferences":
        if check_preference_dataset(dataset, "dataset") is None:
            raise ValueError("`dataset` is tokenized; give it with its texts, `chosen` and `rejected`.")
        return
    columns = ("chosen", "rejected")
    if benchmark == "best_of_n" and "completions" in dataset.column_names:
        columns = ("completions", "labels")
    check_columns(dataset, ("prompt", *columns), "dataset")
    for number, row in enumerate(dataset.select_columns(["prompt", *columns])):
        where = f"row {number} of `dataset`"
        for name, value in row.items():
            if value is None:
                raise ValueError(f"`{name}` of {where} is missing; fill it in or drop the row.")
            # Not whether it is empty, which rows of a published benchmark may be.
            check_characters(value, f"`{name}` of {where}")
        if not isinstance(row["prompt"], str):
            check_row({"prompt": row["prompt"]}, where, is_conversational=True)
        one, other = (row[name] for name in columns)
        if benchmark == "rewardbench":
            if not (isinstance(one, str) and isinstance(other, str)):
                raise ValueError(f"`chosen` and `rejected` of {where} are not text, as they are in RewardBench.")
        elif benchmark == "rm_bench":
            if not all(isinstance(value, list) and list(map(type, value)) == [str] * 3 for value in (one, other)):
                raise ValueError(
                    f"`chosen` and `rejected` of {where} are not three texts each, as they are in RM-Bench."
                )
        else:
            if not (isinstance(one, list) and isinstance(other, list)) or any(isinstance(each, dict) for each in one):
                raise ValueError(
                    f"`{columns[0]}` and `{columns[1]}` of {where} are not lists with one entry a completion."
                )
            if "labels" in row and len(one) != len(other):
                raise ValueError(
                    f"`completions` and `labels` of {where} differ in length; give each completion a label."
                )
            is_right = _is_right(row)
            if all(is_right) or not any(is_right):
                raise ValueError(
                    f"No choice is in {where}: it needs a completion that is right and one that is not; drop it."
                )
            texts = {f"{columns[0]}[{place}]": text for place, text in enumerate(one)}
            if "labels" not in row:
                texts |= {f"{columns[1]}[{place}]": text for place, text in enumerate(other)}
            check_row(texts, where, isinstance(row["prompt"], list))


def _is_right(row: dict[str, Any]) -> list[bool]:
    if "completions" in row:
        return [bool(label) for label in row["labels"]]
    return [True] * len(row["chosen"]) + [False] * len(row["rejected"])


def strata_of(benchmark: str, subsets: list[str], num_rows: int) -> tuple[list[str], dict[str, float]]:
    """The part of the benchmark that each row belongs to, and the weight of each part in the figure it goes by."""
    if benchmark == "rewardbench":
        section_of = {subset: section for section, counts in REWARDBENCH_SECTIONS.items() for subset in counts}
        if unknown := sorted(set(subsets) - section_of.keys()):
            raise ValueError(
                f"RewardBench has no subset {', '.join(map(repr, unknown))}; leave those rows out, or use "
                "`benchmark='preferences'` with `subset_column`."
            )
        # The final score is linear in the accuracies, so the weight of a subset is the score if it alone were right.
        present = sorted(set(subsets))
        return subsets, {
            subset: final_score(section_scores({other: float(other == subset) for other in present}))
            for subset in present
        }
    if benchmark == "rm_bench":
        domains = [subset.split("-")[0] for subset in subsets]
        present = sorted(set(domains))
        if unknown := sorted(set(present) - set(RM_BENCH_DOMAINS)):
            raise ValueError(f"RM-Bench has no domain {', '.join(map(repr, unknown))}, only {list(RM_BENCH_DOMAINS)}.")
        return domains, {domain: 1 / len(present) for domain in present}
    if ALL in subsets:
        raise ValueError(f"A subset is named {ALL!r}, which is what all rows together are called; rename it.")
    return [ALL] * num_rows, {ALL: 1.0}


def missing_strata(benchmark: str, strata: list[str]) -> list[str]:
    """`list[str]`: parts of a published benchmark that no row belongs to, without which there is no final score."""
    due: set[str] = set()
    if benchmark == "rewardbench":
        due = {
            subset
            for section, counts in REWARDBENCH_SECTIONS.items()
            # Optional as a whole; a part of them is no score of theirs.
            if section != PRIOR_SETS or not set(strata).isdisjoint(counts)
            for subset in counts
        }
    if benchmark == "rm_bench":
        due = set(RM_BENCH_DOMAINS)
    return sorted(due - set(strata))


def read_row(row: dict[str, Any], benchmark: str, as_messages: bool) -> BenchmarkRow:
    """A row of a dataset that [`check_rows`] has let pass; `as_messages` is for text of the published benchmarks."""
    template = [row.get(name) for name in TEMPLATE_COLUMNS]
    if benchmark == "preferences":
        row = maybe_extract_prompt(row)
        return BenchmarkRow(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1)], [True, False], template)
    prompt = row["prompt"]
    if benchmark == "best_of_n":
        completions = row["completions"] if "completions" in row else row["chosen"] + row["rejected"]
        pairs = list(itertools.combinations(range(len(completions)), 2))
        return BenchmarkRow(prompt, completions, pairs, _is_right(row), template)
    if benchmark == "rewardbench":
        completions, pairs = [row["chosen"], row["rejected"]], [(0, 1)]
    else:
        completions = row["chosen"] + row["rejected"]
        pairs = [(chosen, 3 + rejected) for chosen in range(3) for rejected in range(3)]
    if isinstance(prompt, str) and as_messages:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        completions = [[{"role": "assistant", "content": completion}] for completion in completions]
    return BenchmarkRow(prompt, completions, pairs, [], template)


def section_scores(accuracies: dict[str, float]) -> dict[str, float]:
    """
    Scores of the sections of RewardBench, as published ([RewardBench](https://huggingface.co/papers/2403.13787)).

    Args:
        accuracies (`dict[str, float]`):
            Accuracy by subset.

    Returns:
        `dict[str, float]`: mean of the accuracies of each section, weighted by the published numbers of examples.
        Sections and subsets that have no accuracy are left out.
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
        `float`: their mean, in which the prior sets, if they are there, have half the weight of another section.
    """
    total = sum(score * SECTION_WEIGHTS[section] for section, score in sections.items())
    return total / sum(SECTION_WEIGHTS[section] for section in sections)


def rm_bench_levels(cells: np.ndarray) -> dict[str, float]:
    """Accuracies of RM-Bench from the logits of the nine comparisons, of shape `(num_rows, 9)`."""
    wins = (cells > 0).mean(axis=0).reshape(3, 3)
    above = np.triu_indices(3, 1)
    # Rows are the style of the chosen completion, columns that of the rejected one, from plain to ornate.
    return {
        "easy": float(wins.T[above].mean()),
        "normal": float(wins.diagonal().mean()),
        "hard": float(wins[above].mean()),
    }


def best_is_right(logits: np.ndarray, is_right: list[bool]) -> tuple[float, bool]:
    """Share of the best completions of a row that are right, and whether there are several."""
    number = len(is_right)
    matrix = np.zeros((number, number))
    above = np.triu_indices(number, 1)
    matrix[above] = logits
    matrix -= matrix.T
    is_compared = ~np.isnan(matrix) & ~np.eye(number, dtype=bool)
    wins = mean_win_probability(matrix)
    if is_compared.any():
        wins = np.where(is_compared.any(axis=1), wins, -np.inf)
    # Sums of the same probabilities in another order may differ in their last bits.
    is_best = np.isclose(wins, wins.max(), rtol=0, atol=1e-12)
    return float(np.array(is_right)[is_best].mean()), bool(is_best.sum() > 1)
