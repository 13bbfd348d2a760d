"""
Published benchmarks whose rows become preference pairs, or prompts with several completions: RewardBench 2, JudgeBench, LLMBar
and RMB.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.checks import check_characters, check_columns, check_not_empty


# Parts of RewardBench 2 (https://huggingface.co/papers/2506.01937). The final score is the mean over them.
REWARDBENCH_2_PARTS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
TIES = "Ties"
# Domains of JudgeBench (https://huggingface.co/papers/2410.12784), by the beginning of `source`.
JUDGEBENCH_DOMAINS = {
    **{"mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math"},
    "livecodebench": "coding",
}


def as_known_rows(dataset: Dataset, benchmark: str, subset_column: str | None) -> tuple[Dataset, str, str | None]:
    """
    Bring the rows of a published benchmark into a form that [`evaluate`] knows. A text may be empty: some published ones are.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows in the published form of one of [`PUBLISHED`].
        benchmark (`str`):
            Its name; any other is given back with its dataset as they are.
        subset_column (`str`, *optional*):
            Column with the subset of each row, in place of the published subsets.

    Returns:
        `tuple[Dataset, str, str | None]`: the rows; their form (`"preferences"`, `"best_of_n"`, or `"best_beats_all"`: as
        `"best_of_n"`, and the first completion has to win every comparison); and the column with their subsets.

    Raises:
        ValueError: If there is no row, a column is missing, or a row has another form.
    """
    if benchmark not in PUBLISHED:
        return dataset, benchmark, subset_column
    check_not_empty(dataset, "dataset")
    columns, convert, form = PUBLISHED[benchmark]
    if benchmark == "rmb" and "bon_best" in dataset.column_names:
        columns, convert, form = ("conversation_input", "bon_best", "loser_list"), _of_rmb_best, "best_beats_all"
    check_columns(dataset, columns if subset_column is None else (*columns, subset_column), "dataset")
    rows = []
    for number, row in enumerate(dataset):
        where = f"row {number} of `dataset`"
        converted = convert(row, where)
        check_characters(converted, where)
        if subset_column is not None:
            converted["subset"] = row[subset_column]
        rows.append(converted)
    has_subsets = all(row.get("subset") is not None for row in rows)
    return Dataset.from_list(rows), form, "subset" if has_subsets else None


def ties_score(ids: list[str], logits: list[np.ndarray], is_right: list[list[bool]]) -> float:
    """
    Score of the part Ties of RewardBench 2, as in its published code: three tenths each for the prompts with one right answer and
    with several on which all right answers beat all wrong ones; two tenths each for the prompts with several whose right
    answers differ by less from one another than from the best wrong one, there and also for the same prompt with one right
    answer; and a hundredth for how much less.

    Args:
        ids (`list[str]`):
            ID of each row: `"ref:N"` for prompt `N` with one right answer, `"tied:N"` with several.
        logits (`list[np.ndarray]`):
            For each row the differences of rewards of all pairs of completions, in the order of `itertools.combinations`.
        is_right (`list[list[bool]]`):
            For each row, whether each completion is right.

    Returns:
        `float`: the score, at most 1.01.
    """
    stats: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for row_id, own, right in zip(ids, logits, is_right, strict=True):
        kind, prompt = row_id.split(":")
        stats[kind][prompt] = _margins(own, np.array(right))
    accuracy = {
        kind: float(np.mean([gap > 0 for _, gap in own.values()])) if own else 0.0 for kind, own in stats.items()
    }
    shared = [prompt for prompt in stats["tied"] if prompt in stats["ref"]]
    if not shared:
        return 0.3 * (accuracy["ref"] + accuracy["tied"])
    spread, gap = np.array([stats["tied"][prompt] for prompt in shared]).T
    least = np.minimum(gap, [stats["ref"][prompt][1] for prompt in shared])
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.nan_to_num(np.tanh(least / spread - 1))
    parts = 0.3 * (accuracy["ref"] + accuracy["tied"]) + 0.2 * (np.mean(gap > spread) + np.mean(least > spread))
    return float(parts + 0.01 * distance.mean())


def _margins(logits: np.ndarray, is_right: np.ndarray) -> tuple[float, float]:
    """How far the right answers are apart, and how far the worst of them is above the best wrong one."""
    number = len(is_right)
    matrix = np.zeros((number, number))
    matrix[np.triu_indices(number, 1)] = logits
    matrix -= matrix.T
    return float(matrix[np.ix_(is_right, is_right)].max()), float(matrix[np.ix_(is_right, ~is_right)].min())


def _text(row: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"`{name}` of {where} must be text, got {type(row[name]).__name__}.")
    return row[name]


def _pair(row: dict[str, Any], columns: tuple[str, str, str], label: str, first: Any, second: Any, where: str) -> dict:
    """A pair of two columns whose better one a third column names by one of two values."""
    prompt, *completions = (_text(row, name, where) for name in columns)
    if row[label] not in (first, second):
        raise ValueError(f"`{label}` of {where} must be {first!r} or {second!r}, got {row[label]!r}.")
    chosen, rejected = completions if row[label] == first else reversed(completions)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _of_judgebench(row: dict[str, Any], where: str) -> dict[str, Any]:
    domain = next((name for start, name in JUDGEBENCH_DOMAINS.items() if str(row["source"]).startswith(start)), None)
    if domain is None:
        raise ValueError(
            f"`source` of {where} is {row['source']!r}, which JudgeBench does not have; it begins with "
            f"{', '.join(JUDGEBENCH_DOMAINS)}."
        )
    columns = ("question", "response_A", "response_B")
    return {**_pair(row, columns, "label", "A>B", "B>A", where), "subset": domain}


def _of_llmbar(row: dict[str, Any], where: str) -> dict[str, Any]:
    return _pair(row, ("input", "output_1", "output_2"), "label", 1, 2, where)


def _of_rewardbench_2(row: dict[str, Any], where: str) -> dict[str, Any]:
    if row["subset"] not in REWARDBENCH_2_PARTS:
        raise ValueError(
            f"`subset` of {where} is {row['subset']!r}, which RewardBench 2 does not have; it has "
            f"{', '.join(REWARDBENCH_2_PARTS)}."
        )
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], list) or not row[name] or not all(isinstance(text, str) for text in row[name]):
            raise ValueError(f"`{name}` of {where} must be a list of texts, as in RewardBench 2.")
    if row["subset"] != TIES and len(row["chosen"]) != 1:
        raise ValueError(f"`chosen` of {where} has {len(row['chosen'])} texts; only the part Ties has more than one.")
    kind, _, number = str(row["id"]).partition(":")
    if row["subset"] == TIES and (kind not in ("ref", "tied") or not number):
        raise ValueError(f"`id` of {where} must be 'ref:N' or 'tied:N' in the part Ties, got {row['id']!r}.")
    labels = [True] * len(row["chosen"]) + [False] * len(row["rejected"])
    completions = {"completions": row["chosen"] + row["rejected"], "labels": labels}
    return {"prompt": _text(row, "prompt", where), **completions, "subset": row["subset"], "id": str(row["id"])}


def _of_rmb(row: dict[str, Any], where: str) -> dict[str, Any]:
    answers = {name: _answer(row[name], name, where) for name in ("chosen", "reject")}
    prompt, goal = _conversation(row, where), _goal(row)
    return {"prompt": prompt, "chosen": answers["chosen"], "rejected": answers["reject"], "subset": goal}


def _of_rmb_best(row: dict[str, Any], where: str) -> dict[str, Any]:
    best = _answer(row["bon_best"], "bon_best", where)
    others = [_answer(each, "loser_list", where) for each in row["loser_list"] or []]
    if not others:
        raise ValueError(
            f"`loser_list` of {where} is empty, so the best completion has nothing to beat; drop the row."
        )
    labels = [True] + [False] * len(others)
    return {
        "prompt": _conversation(row, where),
        "completions": [best, *others],
        "labels": labels,
        "subset": _goal(row),
    }


def _answer(value: Any, name: str, where: str) -> list[dict[str, str]]:
    if not isinstance(value, dict) or not isinstance(value.get("answer"), str):
        raise ValueError(f"`{name}` of {where} must hold an `answer` as text, as in RMB.")
    return [{"role": "assistant", "content": value["answer"]}]


def _conversation(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    turns = row["conversation_input"]
    are_messages = isinstance(turns, list) and all(
        isinstance(turn, dict) and turn.get("role") and isinstance(turn.get("content"), str | None) for turn in turns
    )
    if not turns or not are_messages:
        raise ValueError(
            f"`conversation_input` of {where} must be a list of messages with `role` and `content`, as in RMB."
        )
    return [{"role": turn["role"], "content": turn.get("content") or ""} for turn in turns]


def _goal(row: dict[str, Any]) -> str | None:
    """The goal, which is the second part of a path such as `Pairwise_set/Harmlessness/S1`."""
    parts = str(row.get("category_path") or "").split("/")
    return parts[1] if len(parts) > 1 else None


Convert = Callable[[dict[str, Any], str], dict[str, Any]]
PUBLISHED: dict[str, tuple[tuple[str, ...], Convert, str]] = {
    "rewardbench_2": (("id", "prompt", "chosen", "rejected", "subset"), _of_rewardbench_2, "best_of_n"),
    "judgebench": (("question", "response_A", "response_B", "label", "source"), _of_judgebench, "preferences"),
    "llmbar": (("input", "output_1", "output_2", "label"), _of_llmbar, "preferences"),
    # Rows of its pairs, or of its best-of-n set.
    "rmb": (("conversation_input", "chosen", "reject"), _of_rmb, "preferences"),
}
