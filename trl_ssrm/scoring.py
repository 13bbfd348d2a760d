"""The only place that runs a reward model over a pool: unique sequences, longest first, in batches of tokens."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .sequences import PairedSequences
from .storage import read_tensors, write_tensors


# What is lost when scoring is interrupted: a minute on a laptop, less than a second on a GPU.
SHARD_TOKENS = 1 << 18


class NonFiniteScoreError(ValueError):
    """
    A reward model gave NaN or infinity.

    Args:
        name (`str`):
            Dataset that was scored.
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


def score_pairs(
    model: nn.Module,
    pairs: PairedSequences,
    pad_token_id: int,
    accelerator: Accelerator,
    batch_tokens: int,
    directory: Path | None = None,
    key: str = "",
    name: str = "dataset",
    rows: np.ndarray | None = None,
    disable_tqdm: bool = False,
) -> np.ndarray:
    """
    Scores of the two sequences of each pair under a model.

    The sequences are cut into shards, always at the same places, and the processes take turns with them. A shard that
    lies in `directory` under the same `key` is read, not scored.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier with one label, the same in every process.
        pairs ([`PairedSequences`]):
            What to score.
        pad_token_id (`int`):
            Token ID to use for padding, on the right.
        accelerator ([`~accelerate.Accelerator`]):
            Its device, mixed precision and processes are used.
        batch_tokens (`int`):
            Size of a batch in tokens, padding included.
        directory (`Path`, *optional*):
            Where finished shards are kept.
        key (`str`, *optional*, defaults to `""`):
            Names the model and the sequences; a shard with another key is scored again.
        name (`str`, *optional*, defaults to `"dataset"`):
            What the pairs are called on the progress bar and in an error.
        rows (`np.ndarray` of shape `(num_pairs,)`, int64, *optional*):
            Row that each pair comes from, for an error. If `None`, each pair is a row.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to leave out the progress bar.

    Returns:
        `np.ndarray` of shape `(num_pairs, 2)`, float64: the scores of the first and of the second sequence, the same in
        every process.

    Raises:
        NonFiniteScoreError: If a score is NaN or infinite, after every other shard was scored and kept.
    """
    shards = list(_split(pairs.lengths, SHARD_TOKENS))
    mine = range(accelerator.process_index, len(shards), accelerator.num_processes)
    scored: list[tuple[int, np.ndarray]] = []
    was_training = model.training
    model.eval()
    try:
        with tqdm(
            total=sum(int(pairs.lengths[shards[number]].sum()) for number in mine),
            desc=f"Scoring {name}",
            unit="token",
            unit_scale=True,
            disable=disable_tqdm or not accelerator.is_main_process,
        ) as progress:
            for number in mine:
                shard = shards[number]
                path = directory / f"shard-{number:05d}-of-{len(shards):05d}.safetensors" if directory else None
                stored = read_tensors(path, key) if path else None
                if stored is not None:
                    scores = stored["scores"].numpy()
                    progress.update(int(pairs.lengths[shard].sum()))
                else:
                    scores = _score_shard(model, pairs, shard, pad_token_id, accelerator, batch_tokens, progress)
                    if path and np.isfinite(scores).all():
                        write_tensors(path, {"scores": torch.from_numpy(scores)}, key)
                scored.append((shard.start, scores))
    finally:
        model.train(was_training)
    rewards = np.empty(len(pairs.lengths), dtype=np.float64)
    for start, scores in gather_object(scored):
        rewards[start : start + len(scores)] = scores
    # Raised only now, in every process: one that stopped alone would leave the others waiting for its scores.
    both = np.stack([rewards[pairs.first], rewards[pairs.second]], axis=1)
    is_finite = np.isfinite(both).all(axis=1)
    if not is_finite.all():
        rows = np.arange(len(both)) if rows is None else rows
        raise NonFiniteScoreError(name, np.unique(rows[~is_finite]).tolist())
    return both


def score_sequences(
    model: nn.Module, sequences: list[list[int]], pad_token_id: int, batch_tokens: int = 16384
) -> np.ndarray:
    """
    Rewards of tokenized sequences, in this process, in the precision of the model and without autocast.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier with one label, in evaluation mode.
        sequences (`list[list[int]]` of length `num_sequences`):
            Token IDs. A sequence that occurs again is scored once.
        pad_token_id (`int`):
            Token ID to use for padding, on the right.
        batch_tokens (`int`, *optional*, defaults to `16384`):
            Size of a batch in tokens, padding included.

    Returns:
        `np.ndarray` of shape `(num_sequences,)`, float32: the rewards.
    """
    distinct = sorted({tuple(ids) for ids in sequences}, key=lambda ids: (-len(ids), ids))
    rewards = np.empty(len(distinct), dtype=np.float32)
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        for batch in _split(np.array([len(ids) for ids in distinct], dtype=np.int64), batch_tokens):
            rewards[batch] = _score_batch(model, distinct[batch], pad_token_id, device)
    position_of = {ids: position for position, ids in enumerate(distinct)}
    return rewards[[position_of[tuple(ids)] for ids in sequences]]


def _score_shard(model, pairs, shard, pad_token_id, accelerator, batch_tokens, progress) -> np.ndarray:
    scores = np.empty(shard.stop - shard.start, dtype=np.float32)
    for batch in _split(pairs.lengths[shard], batch_tokens):
        rows = pairs.sequences[shard.start + batch.start : shard.start + batch.stop]["input_ids"]
        with accelerator.autocast():
            scores[batch] = _score_batch(model, rows, pad_token_id, accelerator.device)
        progress.update(sum(map(len, rows)))
    return scores


def _score_batch(model, rows, pad_token_id, device) -> np.ndarray:
    ids = [torch.tensor(row) for row in rows]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id).to(device)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device)
    with torch.inference_mode(), _float32_logits(model):
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return logits.squeeze(-1).float().cpu().numpy()


def _split(lengths: np.ndarray, tokens: int) -> Iterator[slice]:
    """Cut sequences that are sorted from long to short into runs of at most `tokens` tokens with padding."""
    start = 0
    while start < len(lengths):
        stop = min(start + max(1, tokens // max(1, int(lengths[start]))), len(lengths))
        yield slice(start, stop)
        start = stop


@contextlib.contextmanager
def _float32_logits(model: nn.Module) -> Iterator[None]:
    """
    Compute the last layer in float32 under autocast: in bfloat16, rewards near 5 are 0.03 apart, and pairs tie.
    """

    def in_float32(head: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        with torch.autocast(output.device.type, enabled=False):
            return nn.functional.linear(
                args[0].float(), head.weight.float(), None if head.bias is None else head.bias.float()
            )

    # By exact type: a quantized layer is a subclass, but its weight is packed.
    heads = [module for module in model.modules() if type(module) is nn.Linear and module.out_features == 1]
    handles = [head.register_forward_hook(in_float32) for head in heads]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
