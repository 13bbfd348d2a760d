"""Labels from people: choose the pairs whose labels would help most, and read the answers."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..data.checks import check_row
from ..data.formats import report_dropped
from ..data.pool import Pool
from ..data.prompts import prompt_groups
from ..data.ties import TIE
from ..io.files import written_aside
from ..scoring.pair_scores import PairScores


logger = logging.getLogger(__name__)

# Number of candidates for each pair that is asked for.
NUM_CANDIDATES = 10
NUM_BUCKETS = 1024


def most_useful(scores: PairScores, pool: Pool, num_pairs: int) -> np.ndarray:
    """
    Choose the pairs whose labels would help most: uncertain ones, of different prompts, and unlike one another.

    Candidates are the least certain pair of each prompt, at most ten times as many as asked for. The least certain one is
    taken first. Each further one is the candidate whose tokens have the least in common with the pairs taken so far ([A
    Geometric Approach](https://huggingface.co/papers/1708.00489) to the choice of a subset, on counts of tokens).

    Args:
        scores ([`PairScores`]):
            Scores of the pairs.
        pool ([`Pool`]):
            The pairs.
        num_pairs (`int`):
            Number of pairs to choose.

    Returns:
        `np.ndarray` of shape `(at most num_pairs,)`, int64: positions in the pool, the first one taken first.
    """
    prompts = prompt_groups(pool.source)[pool.rows]
    by_uncertainty = np.argsort(scores.confidence, kind="stable")
    _, first_of_prompt = np.unique(prompts[by_uncertainty], return_index=True)
    candidates = by_uncertainty[np.sort(first_of_prompt)][: NUM_CANDIDATES * num_pairs]
    counts = np.stack([_token_counts(pool, pair) for pair in candidates.tolist()])
    taken = [0]
    similarity = counts @ counts[0]
    while len(taken) < min(num_pairs, len(candidates)):
        similarity[taken] = np.inf
        taken.append(int(similarity.argmin()))
        similarity = np.maximum(similarity, counts @ counts[taken[-1]])
    return candidates[taken]


def _token_counts(pool: Pool, pair: int) -> np.ndarray:
    """Which tokens the two sequences hold, as a vector of length 1."""
    pairs = pool.pairs
    both = (int(pairs.first[pair]), int(pairs.second[pair]))
    ids = np.concatenate([np.asarray(pairs.sequences[position]["input_ids"], dtype=np.int64) for position in both])
    counts = np.sqrt(np.bincount(ids % NUM_BUCKETS, minlength=NUM_BUCKETS))
    return counts / np.linalg.norm(counts)


def write_for_labeling(pool: Pool, pairs: np.ndarray, scores: PairScores, path: str) -> None:
    """
    Write pairs for a labeling tool, one JSON object a line.

    Args:
        pool ([`Pool`]):
            The pairs.
        pairs (`np.ndarray` of shape `(n,)`, int64):
            Which of them.
        scores ([`PairScores`]):
            Scores of the pool.
        path (`str`):
            File to write: `prompt`, `completion_a` and `completion_b`, `probability` (that the first is preferred, as the
            model predicts it), and `label`, which is `null` until `"a"`, `"b"` or `"tie"` is written there.
    """
    with written_aside(Path(path)) as aside, aside.open("w", encoding="utf-8") as file:
        for pair in pairs.tolist():
            texts = pool.texts(pair, first_is_chosen=True)
            row = {
                "prompt": texts.get("prompt"),
                "completion_a": texts["chosen"],
                "completion_b": texts["rejected"],
                "probability": round(float(scores.probability[pair]), 6),
                "label": None,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def load_labels(path: str) -> Dataset:
    """
    Read pairs that people have labeled. Add them to `train_dataset`; these pairs are then left out of the pool.

    Args:
        path (`str`):
            File that [`SSRMTrainer.export_for_labeling`] wrote, with `label` filled in: `"a"` or `"b"` for the preferred
            completion, `"tie"` if neither is better, `null` for a pair that is not labeled.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen` and `rejected`, and `tie` (bool) if there is a tie, whose two completions stand
        in any order. Pairs without a label are left out, and counted in the log.

    Raises:
        ValueError: If a line is no such object or has another label, a pair has no text, or no pair is labeled. The
            message names the line.
    """
    rows: list[dict[str, Any]] = []
    num_left_out, is_tie = 0, []
    for where, row in _rows_of(path):
        if row["label"] is None:
            num_left_out += 1
            continue
        pair = _oriented(row, where)
        first = rows[0] if rows else pair
        check_row(pair, where, isinstance(first["chosen"], list))
        if pair.keys() != first.keys():
            raise ValueError(
                f"{where} has {'a' if 'prompt' in pair else 'no'} `prompt`, unlike the lines before; give it to all or none."
            )
        rows.append(pair)
        is_tie.append(row["label"] == "tie")
    report_dropped(path, {"without a label": num_left_out})
    if not rows:
        raise ValueError(f"{path} has no pair with a label; write 'a', 'b' or 'tie' into `label`.")
    try:
        labels = Dataset.from_list(rows)
        return labels.add_column(TIE, is_tie) if any(is_tie) else labels
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(
            f"The messages in {path} have fields of different types ({error}); give all the same."
        ) from error


def _rows_of(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of labels, each with its place for messages."""
    try:
        # `splitlines` would split at line ends within a text, too.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = json.loads(line)
        # A thousand nested brackets are valid JSON, but too deep for the parser.
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}); correct it, or delete the line.") from error
        if not isinstance(row, dict) or not {"completion_a", "completion_b", "label"} <= row.keys():
            raise ValueError(
                f"{where} needs `completion_a`, `completion_b` and `label`; add them, or delete the line."
            )
        yield where, row


def _oriented(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A labeled row as a preference pair."""
    if row["label"] not in ("a", "b", TIE):
        raise ValueError(f"{where} has the label {row['label']!r}; make it 'a', 'b', 'tie' or null.")
    chosen, rejected = ("b", "a") if row["label"] == "b" else ("a", "b")
    prompt = {} if row.get("prompt") is None else {"prompt": row["prompt"]}
    return {**prompt, "chosen": row[f"completion_{chosen}"], "rejected": row[f"completion_{rejected}"]}
