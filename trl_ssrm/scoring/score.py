"""Score the pairs of a pool, each distinct sequence once, in shards that are kept on disk."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm.auto import tqdm

from ..data.sequences import PairedSequences, index_type
from ..io.storage import read_tensors, write_tensors
from .batches import BatchBudget, Scorer


# Tokens that are scored again after an interruption: a minute on a laptop, less than a second on a GPU.
SHARD_TOKENS = 1 << 18


class NonFiniteScoreError(ValueError):
    """
    A reward model gave NaN or infinite rewards.

    Args:
        name (`str`):
            Name of the dataset.
        rows (`list[int]`):
            Its rows with such a reward.
    """

    def __init__(self, name: str, rows: list[int]):
        named = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        super().__init__(
            f"The model gives NaN or infinite rewards to rows {named} of `{name}`; lower `learning_rate`, or train or "
            "load it in another precision."
        )
        self.rows = rows


class NonFiniteWeightError(ValueError):
    """
    Training made weights NaN or infinite.

    Args:
        round (`int`):
            Round after which the weights were checked.
        names (`list[str]`):
            Names of these weights.
    """

    def __init__(self, round: int, names: list[str]):
        super().__init__(
            f"The weights of round {round} are NaN or infinite ({names[0]}, {len(names)} in all); lower "
            "`learning_rate`, or train or load the model in another precision."
        )


def score_pairs(
    model: nn.Module,
    pairs: PairedSequences,
    pad_token_id: int,
    accelerator: Accelerator,
    layout: str,
    batch_tokens: int | None = None,
    directory: Path | None = None,
    key: str = "",
    name: str = "dataset",
    rows: np.ndarray | None = None,
    disable_tqdm: bool = False,
) -> np.ndarray:
    """
    Score the two sequences of each pair with a model.

    The distinct sequences are cut into shards, always at the same places, and the processes take turns in scoring
    them. A shard that is in `directory` under the same `key` is read instead.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier with one label, the same in every process, or sharded over all of them.
        pairs ([`PairedSequences`]):
            Pairs to score.
        pad_token_id (`int`):
            Token ID to use for padding, on the right.
        accelerator ([`~accelerate.Accelerator`]):
            Its device, mixed precision and processes are used.
        layout (`str`):
            Layout of a batch, from [`~trl_ssrm.scoring.layout.choose_layout`].
        batch_tokens (`int`, *optional*):
            Size of a batch in tokens, padding included. If `None`, [`~trl_ssrm.scoring.batches.BatchBudget`] decides.
        directory (`Path`, *optional*):
            Where finished shards are kept. If `None`, they are not kept.
        key (`str`, *optional*, defaults to `""`):
            Name of the model and the sequences; shards with another key are scored again.
        name (`str`, *optional*, defaults to `"dataset"`):
            Name of the pairs for the progress bar and errors.
        rows (`np.ndarray` of shape `(num_pairs,)`, int64, *optional*):
            Row that each pair comes from, for an error. If `None`, each pair is a row.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to show no progress bar.

    Returns:
        `np.ndarray` of shape `(num_pairs, 2)`, float64: the scores of the first and of the second sequence, the same
        in every process. Where the model gives a sequence several numbers, they come in a third dimension.

    Raises:
        NonFiniteScoreError: If a score is NaN or infinite. All other shards are scored and kept before.
    """
    was_training = model.training
    model.eval()
    shards = _cut(pairs, layout, directory, key)
    scored, missing = _read_scored(shards, accelerator)
    scorer = Scorer(model, pad_token_id, accelerator, BatchBudget(batch_tokens, accelerator.device), layout)
    try:
        scored += _score_missing(scorer, pairs, shards, missing, accelerator, name, disable_tqdm)
    finally:
        model.train(was_training)
    scored = gather_object(scored)
    width = scored[0][1].shape[1:]
    rewards = np.empty((len(pairs.lengths), *width), dtype=np.float32)
    for number, scores in scored:
        rewards[shards[number].positions] = scores
    # Large, and not needed any more.
    del shards, scored
    both = np.empty((len(pairs.first), 2, *width), dtype=np.float64)
    both[:, 0], both[:, 1] = rewards[pairs.first], rewards[pairs.second]
    # Raised here, in every process at once: a process that stopped earlier would leave the others waiting.
    is_finite = np.isfinite(both).reshape(len(both), -1).all(axis=1)
    if not is_finite.all():
        rows = np.arange(len(both)) if rows is None else rows
        raise NonFiniteScoreError(name, np.unique(rows[~is_finite]).tolist())
    return both


def score_sequences(
    model: nn.Module, sequences: list[list[int]], pad_token_id: int, layout: str, batch_tokens: int | None = None
) -> np.ndarray:
    """
    Score tokenized sequences in this process, in the precision of the model and without autocast.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier with one label, in evaluation mode.
        sequences (`list[list[int]]` of length `num_sequences`):
            Token IDs. Equal sequences are scored once.
        pad_token_id (`int`):
            Token ID to use for padding, on the right.
        layout (`str`):
            Layout of a batch, from [`~trl_ssrm.scoring.layout.choose_layout`].
        batch_tokens (`int`, *optional*):
            Size of a batch in tokens, padding included. If `None`, [`~trl_ssrm.scoring.batches.BatchBudget`] decides.

    Returns:
        `np.ndarray` of shape `(num_sequences,)`, float32: the scores.
    """
    distinct = sorted({tuple(ids) for ids in sequences}, key=lambda ids: (-len(ids), ids))
    device = next(model.parameters()).device
    scorer = Scorer(model, pad_token_id, None, BatchBudget(batch_tokens, device), layout)
    with torch.autocast(device.type, enabled=False):
        rewards = scorer.score([np.array(ids, dtype=np.int64) for ids in distinct])
    position_of = {ids: position for position, ids in enumerate(distinct)}
    return rewards[[position_of[tuple(ids)] for ids in sequences]]


@dataclass(frozen=True)
class _Shard:
    """Positions of the sequences in a shard, the file that keeps their scores, and the key of the file."""

    positions: np.ndarray
    path: Path | None
    key: str


def _cut(pairs: PairedSequences, layout: str, directory: Path | None, key: str) -> list[_Shard]:
    """Cut the sequences into shards of about [`SHARD_TOKENS`] tokens, in the order in which they are scored."""
    order = _work_order(pairs, layout)
    lengths = pairs.lengths[order]
    number = (np.cumsum(lengths) - lengths) // SHARD_TOKENS
    starts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    return [
        _Shard(
            order[start:stop],
            directory / f"shard-{index:05d}-of-{len(starts):05d}.safetensors" if directory else None,
            # With its place, so that a shard that was cut or copied from elsewhere is not used.
            f"{key} {layout} {start}:{stop}",
        )
        for index, (start, stop) in enumerate(zip(starts, [*starts[1:], len(lengths)], strict=True))
    ]


def _work_order(pairs: PairedSequences, layout: str) -> np.ndarray:
    """
    Positions of the sequences in the order in which they are scored: from long to short. For `"shared"`, sequences
    that pairs connect come together, since they have a prompt in common.
    """
    position = index_type(len(pairs.lengths))
    first_of = np.arange(len(pairs.lengths), dtype=position)
    if layout != "shared":
        return first_of
    # Find the first of all sequences that each is connected with, directly or by several pairs.
    while True:
        before = first_of.copy()
        lower = np.minimum(first_of[pairs.first], first_of[pairs.second])
        np.minimum.at(first_of, pairs.first, lower)
        np.minimum.at(first_of, pairs.second, lower)
        first_of = first_of[first_of]
        if (first_of == before).all():
            return np.argsort(first_of, kind="stable").astype(position)


def _read_scored(shards: list[_Shard], accelerator: Accelerator) -> tuple[list[tuple[int, np.ndarray]], list[int]]:
    """Numbers and scores of the shards on disk (in the main process only), and the numbers of the missing shards."""
    scored: list[tuple[int, np.ndarray]] = []
    if accelerator.is_main_process:
        for number, shard in enumerate(shards):
            if shard.path and (stored := read_tensors(shard.path, shard.key)) is not None:
                scored.append((number, stored["scores"].numpy()))
    # One process decides, so that all processes agree on the shards that are left.
    found = broadcast_object_list([[number for number, _ in scored]])[0]
    return scored, sorted(set(range(len(shards))) - set(found))


def _score_missing(
    scorer: Scorer,
    pairs: PairedSequences,
    shards: list[_Shard],
    missing: list[int],
    accelerator: Accelerator,
    name: str,
    disable_tqdm: bool,
) -> list[tuple[int, np.ndarray]]:
    """Score this process's share of the missing shards, and keep them on disk."""
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    scored: list[tuple[int, np.ndarray]] = []
    with (
        ThreadPoolExecutor(max_workers=1) as reader,
        tqdm(
            total=int(sum(pairs.lengths[shards[number].positions].sum() for number in mine)),
            desc=f"Scoring {name}",
            unit="token",
            unit_scale=True,
            disable=disable_tqdm or not accelerator.is_main_process,
        ) as progress,
    ):
        read = [reader.submit(_read, pairs, shards[number].positions) for number in mine[:1]]
        # As many turns in every process, also without a shard: a sharded model needs all processes.
        for turn in range(-(-len(missing) // accelerator.num_processes)):
            sequences = read.pop().result() if read else []
            # The next shard is read while the model works on this one.
            read += [reader.submit(_read, pairs, shards[number].positions) for number in mine[turn + 1 : turn + 2]]
            scores = scorer.score(sequences, progress)
            if not sequences:
                continue
            shard = shards[mine[turn]]
            if shard.path and np.isfinite(scores).all():
                write_tensors(shard.path, {"scores": torch.from_numpy(scores)}, shard.key)
            scored.append((mine[turn], scores))
    return scored


def _read(pairs: PairedSequences, positions: np.ndarray) -> list[np.ndarray]:
    """Token IDs of some sequences, int64."""
    column = pairs.sequences.with_format("arrow")[positions].column("input_ids")
    tokens = pc.list_flatten(column).to_numpy().astype(np.int64)
    return np.split(tokens, np.cumsum(pairs.lengths[positions])[:-1])
