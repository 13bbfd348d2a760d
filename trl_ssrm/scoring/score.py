"""The only place that runs a reward model over a pool: unique sequences, longest first, in batches of tokens."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from tqdm.auto import tqdm

from ..data.sequences import PairedSequences, index_type
from ..io.storage import read_tensors, write_tensors
from ..models.sharding import is_sharded, whole
from .layout import LONGEST_SHARED_ROW, SharedRow, laid_out, shared_rows, to_device


if TYPE_CHECKING:
    from .vllm_scoring import VLLMScorer


logger = logging.getLogger(__name__)

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


class NonFiniteWeightError(ValueError):
    """
    Training has made weights NaN or infinite.

    Args:
        round (`int`):
            The round.
        names (`list[str]`):
            Its weights that are so.
    """

    def __init__(self, round: int, names: list[str]):
        super().__init__(
            f"The weights of round {round} are NaN or infinite ({names[0]}, {len(names)} in all); lower `learning_rate`, "
            "or train or load the model in another precision."
        )


def score_pairs(
    model: nn.Module,
    pairs: PairedSequences,
    pad_token_id: int,
    accelerator: Accelerator,
    layout: str,
    batch_tokens: int | None = None,
    engine: "VLLMScorer | None" = None,
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
            Sequence classifier with one label, the same in every process, or sharded over all of them.
        pairs ([`PairedSequences`]):
            What to score.
        pad_token_id (`int`):
            Token ID to use for padding, on the right.
        accelerator ([`~accelerate.Accelerator`]):
            Its device, mixed precision and processes are used.
        layout (`str`):
            How sequences lie in a batch, as from [`~trl_ssrm.scoring.layout.choose_layout`].
        batch_tokens (`int`, *optional*):
            Size of a batch in tokens, padding included. If `None`, [`BatchBudget`] finds it.
        engine ([`~trl_ssrm.scoring.vllm_scoring.VLLMScorer`], *optional*):
            Scores instead of the model, in batches and a layout of its own. It is started if there is something to score,
            and ended with it.
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
    layout = layout if engine is None else engine.layout
    was_training = model.training
    model.eval()
    order = _work_order(pairs, layout)
    shards = _shards(pairs.lengths[order])
    paths = [
        directory / f"shard-{number:05d}-of-{len(shards):05d}.safetensors" if directory else None
        for number in range(len(shards))
    ]
    # A shard that lies at the place of another one, or was cut elsewhere, is not taken for it.
    keys = [f"{key} {layout} {shard.start}:{shard.stop}" for shard in shards]
    scored: list[tuple[int, np.ndarray]] = []
    missing = list(range(len(shards)))
    if directory is not None:
        # By one process, so that all of them agree on what is left, and each takes the same share of it.
        if accelerator.is_main_process:
            for number, path in enumerate(paths):
                if path and (stored := read_tensors(path, keys[number])) is not None:
                    scored.append((number, stored["scores"].numpy()))
        found = broadcast_object_list([[number for number, _ in scored]])[0]
        missing = sorted(set(missing) - set(found))
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    budget = BatchBudget(batch_tokens, accelerator.device)
    scorer = engine or Scorer(model, pad_token_id, accelerator, budget, layout)
    try:
        with (
            contextlib.ExitStack() as stack,
            ThreadPoolExecutor(max_workers=1) as reader,
            tqdm(
                total=int(sum(pairs.lengths[order[shards[number]]].sum() for number in mine)),
                desc=f"Scoring {name}",
                unit="token",
                unit_scale=True,
                disable=disable_tqdm or not accelerator.is_main_process,
            ) as progress,
        ):
            if engine is not None and missing:
                stack.enter_context(engine)
            # The next shard is read while the model works on this one.
            turns = -(-len(missing) // accelerator.num_processes)
            read = [reader.submit(_read, pairs, order[shards[number]]) for number in mine[:1]]
            for turn in range(turns):
                sequences = read.pop().result() if read else []
                read += [reader.submit(_read, pairs, order[shards[number]]) for number in mine[turn + 1 : turn + 2]]
                scores = scorer.score(sequences, progress)
                if not sequences:
                    continue
                number = mine[turn]
                if (path := paths[number]) and np.isfinite(scores).all():
                    write_tensors(path, {"scores": torch.from_numpy(scores)}, keys[number])
                scored.append((number, scores))
    finally:
        model.train(was_training)
    rewards = np.empty(len(pairs.lengths), dtype=np.float32)
    for number, scores in gather_object(scored):
        rewards[order[shards[number]]] = scores
    del order, scored
    # Raised only now, in every process: one that stopped alone would leave the others waiting for its scores.
    both = np.empty((len(pairs.first), 2), dtype=np.float64)
    both[:, 0], both[:, 1] = rewards[pairs.first], rewards[pairs.second]
    is_finite = np.isfinite(both).all(axis=1)
    if not is_finite.all():
        rows = np.arange(len(both)) if rows is None else rows
        raise NonFiniteScoreError(name, np.unique(rows[~is_finite]).tolist())
    return both


def score_sequences(
    model: nn.Module, sequences: list[list[int]], pad_token_id: int, layout: str, batch_tokens: int | None = None
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
        layout (`str`):
            How sequences lie in a batch, as from [`~trl_ssrm.scoring.layout.choose_layout`].
        batch_tokens (`int`, *optional*):
            Size of a batch in tokens, padding included. If `None`, [`BatchBudget`] finds it.

    Returns:
        `np.ndarray` of shape `(num_sequences,)`, float32: the rewards.
    """
    distinct = sorted({tuple(ids) for ids in sequences}, key=lambda ids: (-len(ids), ids))
    device = next(model.parameters()).device
    scorer = Scorer(model, pad_token_id, None, BatchBudget(batch_tokens, device), layout)
    with torch.autocast(device.type, enabled=False):
        rewards = scorer.score([np.array(ids, dtype=np.int64) for ids in distinct])
    position_of = {ids: position for position, ids in enumerate(distinct)}
    return rewards[[position_of[tuple(ids)] for ids in sequences]]


class BatchBudget:
    """
    Size of a scoring batch in tokens.

    It is halved where a batch does not fit into memory. Left open, it begins with 16,384 on an accelerator and doubles
    for as long as a batch of twice the size would fit into what is free. On a CPU, where larger batches are slower, it is
    4,096 and stays, so that scores are the same to the bit every time.

    A batch also ends where more padding would be computed in it than it costs to begin the next one, which is taken as
    the time of 64 tokens on a CPU (`recipes/benchmark/speed.py`: 5 ms at 7,000 tokens a second are 35) and of 2,048 on an
    accelerator.

    Args:
        tokens (`int`, *optional*):
            Size to use, padding included.
        device ([`~torch.device`]):
            Where the model is.
    """

    def __init__(self, tokens: int | None, device: torch.device):
        is_cpu = device.type == "cpu"
        self.tokens = tokens or (4096 if is_cpu else 16384)
        self.padding = 64 if is_cpu else 2048
        self.may_grow = tokens is None and device.type == "cuda"
        self.device = device

    def halve(self) -> None:
        """Make the batches smaller, after one that did not fit."""
        self.tokens = max(1, self.tokens // 2)
        self.may_grow = False
        clear_device_cache(garbage_collection=True)
        logger.warning(f"A scoring batch does not fit into memory; going on with {self.tokens} tokens a batch.")

    def start(self) -> None:
        """Look at the memory before a batch."""
        if self.may_grow:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    def end(self) -> None:
        """Look at the memory after a batch that was full."""
        if self.may_grow:
            used = torch.cuda.max_memory_allocated(self.device) - self.before
            free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - self.before
            self.may_grow = 2 * used < 0.8 * free and 2 * self.tokens <= SHARD_TOKENS
            self.tokens *= 2 if self.may_grow else 1


class Scorer:
    """
    Runs a model over sequences, the longest first, in batches of tokens.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier with one label, in evaluation mode.
        pad_token_id (`int`):
            Token ID to use for padding, on the right.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Its mixed precision is used and, where the weights of the model are sharded, its processes: all of them call
            the model equally often then. If `None`, neither is.
        budget ([`BatchBudget`]):
            Size of a batch.
        layout (`str`):
            As from [`~trl_ssrm.scoring.layout.choose_layout`].
    """

    def __init__(
        self, model: nn.Module, pad_token_id: int, accelerator: Accelerator | None, budget: BatchBudget, layout: str
    ):
        self.model = model
        self.pad_token_id = pad_token_id
        self.accelerator = accelerator
        self.budget = budget
        self.layout = layout
        self.device = next(model.parameters()).device if accelerator is None else accelerator.device
        self.is_sharded = accelerator is not None and is_sharded(accelerator)

    def score(self, sequences: Sequence[np.ndarray], progress: tqdm | None = None) -> np.ndarray:
        """
        Score sequences. Where the weights are sharded, every process has to call this at the same time, with any number
        of sequences.

        Args:
            sequences (`Sequence[np.ndarray]`):
                Token IDs of each, int64.
            progress ([`~tqdm.tqdm`], *optional*):
                Told of the tokens that are done.

        Returns:
            `np.ndarray` of shape `(num_sequences,)`, float32: the scores.
        """
        rows = self._lay(sequences, range(len(sequences)))
        scored: list[tuple[list[int], torch.Tensor]] = []
        batches = self._num_batches_of_all(rows)
        while rows or batches > 0:
            batch = rows[: self._num_rows(rows)]
            members = [position for row in batch for position in row.sequences]
            batches -= 1
            if not members:
                # The other processes wait for this one's part of the weights.
                self._forward([np.array([1 if self.pad_token_id == 0 else 0])], [])
                continue
            try:
                self.budget.start()
                # What it computes stays on the device, so that the next batch is made while it works.
                scored.append((members, self._forward([sequences[position] for position in members], batch)))
                if len(batch) < len(rows):
                    self.budget.end()
            except RuntimeError as error:
                # Where the weights are sharded, another process would not know that this one tries again.
                if not should_reduce_batch_size(error) or len(members) == 1 or self.is_sharded:
                    raise
                self.budget.halve()
                rows = self._lay(sequences, [position for row in rows for position in row.sequences])
                continue
            rows = rows[len(batch) :]
            if progress is not None:
                progress.update(sum(len(sequences[position]) for position in members))
        scores = np.empty(len(sequences), dtype=np.float32)
        for members, logits in scored:
            scores[members] = logits.cpu().numpy()
        failed = np.flatnonzero(~np.isfinite(scores)).tolist()
        if failed and self.layout != "padded" and not self.is_sharded:
            # In a row with others, one that is not finite spoils them all.
            alone = Scorer(self.model, self.pad_token_id, self.accelerator, self.budget, "padded")
            scores[failed] = alone.score([sequences[position] for position in failed])
        return scores

    def _lay(self, sequences: Sequence[np.ndarray], positions: Sequence[int]) -> list[SharedRow]:
        """Some of the sequences in rows, the longest first: what does not fit into memory shows at once."""
        if self.layout == "shared":
            own = shared_rows(
                [sequences[position] for position in positions], min(LONGEST_SHARED_ROW, self.budget.tokens)
            )
            rows = [replace(row, sequences=tuple(positions[member] for member in row.sequences)) for row in own]
        else:
            rows = [SharedRow((position,), 0, len(sequences[position])) for position in positions]
        return sorted(rows, key=lambda row: -row.length)

    def _num_rows(self, rows: list[SharedRow]) -> int:
        """Number of rows, from long to short, that make the next batch: one at least."""
        if not rows:
            return 0
        lengths = np.array([row.length for row in rows])
        if self.layout == "packed":
            return max(1, int(np.searchsorted(np.cumsum(lengths), self.budget.tokens, side="right")))
        lengths = lengths[: max(1, self.budget.tokens // lengths[0])]
        padding = np.cumsum(lengths[0] - lengths)
        return int(np.searchsorted(padding, self.budget.padding, side="right"))

    def _num_batches_of_all(self, rows: list[SharedRow]) -> int:
        """How often the process with the most work calls the model, where all of them have to call it equally often."""
        if not self.is_sharded:
            return 0
        assert self.accelerator is not None
        self.budget.may_grow = False
        number = 0
        while rows:
            rows, number = rows[self._num_rows(rows) :], number + 1
        return max(gather_object([number]))

    def _forward(self, sequences: list[np.ndarray], rows: list[SharedRow]) -> torch.Tensor:
        """Scores of a batch whose sequences lie in these rows, one row behind the other."""
        starts = np.cumsum([0, *(len(row.sequences) for row in rows)]).tolist()
        own = [
            replace(row, sequences=tuple(range(start, start + len(row.sequences))))
            for start, row in zip(starts, rows, strict=False)
        ]
        lengths = np.array([len(ids) for ids in sequences])
        is_token = np.arange(lengths.max()) < lengths[:, None]
        padded = np.full(is_token.shape, self.pad_token_id, dtype=np.int64)
        padded[is_token] = np.concatenate(sequences)
        input_ids, mask = torch.from_numpy(padded), torch.from_numpy(is_token.astype(np.int64))
        if self.layout == "padded":
            input_ids, mask = to_device(input_ids, self.device), to_device(mask, self.device)
        autocast = contextlib.nullcontext() if self.accelerator is None else self.accelerator.autocast()
        # FSDP can't gather weights in inference mode.
        without_gradients = torch.no_grad() if self.is_sharded else torch.inference_mode()
        with (
            autocast,
            without_gradients,
            _float32_logits(self.model),
            laid_out(self.model, self.layout, lambda _: own),
        ):
            logits = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        return logits.squeeze(-1).float()


def _read(pairs: PairedSequences, positions: np.ndarray) -> list[np.ndarray]:
    column = pairs.sequences.with_format("arrow")[positions].column("input_ids")
    tokens = pc.list_flatten(column).to_numpy().astype(np.int64)
    return np.split(tokens, np.cumsum(pairs.lengths[positions])[:-1])


def _work_order(pairs: PairedSequences, layout: str) -> np.ndarray:
    """
    Positions of the sequences, in the order in which they are scored: from long to short; sequences that are compared
    with one another, so that they have their prompt in common, together.
    """
    position = index_type(len(pairs.lengths))
    first_of = np.arange(len(pairs.lengths), dtype=position)
    if layout not in ("shared", "vllm"):
        return first_of
    # The first sequence that each is connected with, by whatever pairs.
    while True:
        before = first_of.copy()
        lower = np.minimum(first_of[pairs.first], first_of[pairs.second])
        np.minimum.at(first_of, pairs.first, lower)
        np.minimum.at(first_of, pairs.second, lower)
        first_of = first_of[first_of]
        if (first_of == before).all():
            return np.argsort(first_of, kind="stable").astype(position)


def _shards(lengths: np.ndarray) -> list[slice]:
    """Cut sequences into runs of about [`SHARD_TOKENS`] tokens."""
    number = (np.cumsum(lengths) - lengths) // SHARD_TOKENS
    starts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True)]


@contextlib.contextmanager
def _float32_logits(model: nn.Module) -> Iterator[None]:
    """
    Compute the last layer in float32 under autocast: in bfloat16, rewards near 5 are 0.03 apart, and pairs tie.
    """

    def in_float32(head: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if output.dtype == torch.float32:
            return output
        with torch.autocast(output.device.type, enabled=False), whole([head.weight]):
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
