"""Run a reward model over sequences in batches of tokens, from long to short."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from tqdm.auto import tqdm

from ..models.classifier import num_embeddings
from ..models.sharding import is_sharded, whole
from .inputs import check_token_ids
from .layout import laid_out, to_device
from .rows import LONGEST_SHARED_ROW, SharedRow, shared_rows


logger = logging.getLogger(__name__)

# In tokens: a shard of the pool, which is scored by itself, is about as large.
LARGEST_BATCH = 1 << 18


class BatchBudget:
    """
    Size of a scoring batch in tokens, padding included.

    It is halved whenever a batch does not fit into memory. If no size is given: on an accelerator it starts with
    16,384 and doubles while a batch of twice the size would use less than 80 % of the free memory. On a CPU it is
    4,096 and does not change: larger batches are slower there, and with a fixed size scores are equal to the last bit
    in every run.

    A batch also ends where padding its next rows would take longer than starting another batch. That is the time of 64
    tokens on a CPU (`recipes/benchmark/speed.py`: 5 ms, at 7,000 tokens a second 35 tokens) and of 2,048 tokens on an
    accelerator.

    Args:
        tokens (`int`, *optional*):
            Size to use.
        device ([`~torch.device`]):
            Device of the model.
    """

    def __init__(self, tokens: int | None, device: torch.device):
        is_cpu = device.type == "cpu"
        self.tokens = tokens or (4096 if is_cpu else 16384)
        self.padding = 64 if is_cpu else 2048
        self.may_grow = tokens is None and device.type == "cuda"
        self.device = device

    def halve(self) -> None:
        """Make batches smaller after one that did not fit."""
        self.tokens = max(1, self.tokens // 2)
        self.may_grow = False
        clear_device_cache(garbage_collection=True)
        logger.warning(f"A scoring batch does not fit into memory; going on with {self.tokens} tokens a batch.")

    def start(self) -> None:
        """Measure the memory before a batch."""
        if self.may_grow:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    def end(self) -> None:
        """Measure the memory after a full batch, and grow if there is room."""
        if self.may_grow:
            used = torch.cuda.max_memory_allocated(self.device) - self.before
            free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - self.before
            self.may_grow = 2 * used < 0.8 * free and 2 * self.tokens <= LARGEST_BATCH
            self.tokens *= 2 if self.may_grow else 1


class Scorer:
    """
    Runs a model over sequences in batches of tokens, from long to short.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier with one label, in evaluation mode.
        pad_token_id (`int`):
            Token ID to use for padding, on the right.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Its mixed precision is used. If the weights of the model are sharded over its processes, all processes call
            the model equally often. If `None`, the model runs in this process, without autocast.
        budget ([`BatchBudget`]):
            Size of a batch.
        layout (`str`):
            Layout from [`~trl_ssrm.scoring.layout.choose_layout`].
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
        self.num_embeddings = num_embeddings(model)

    def score(self, sequences: Sequence[np.ndarray], progress: tqdm | None = None) -> np.ndarray:
        """
        Score sequences. If the weights are sharded, all processes have to call this at the same time, each with any
        number of sequences.

        Args:
            sequences (`Sequence[np.ndarray]`):
                Token IDs of each, int64.
            progress ([`~tqdm.tqdm`], *optional*):
                Progress bar, updated with the number of tokens.

        Returns:
            `np.ndarray` of shape `(num_sequences,)`, float32: the scores. Where the model gives several numbers, they come in a
            second dimension.

        Raises:
            ValueError: If the model has no embedding for a token ID.
        """
        check_token_ids(max((int(ids.max()) for ids in sequences), default=0), self.num_embeddings, "A sequence")
        rows = self._lay(sequences, range(len(sequences)))
        scored: list[tuple[list[int], torch.Tensor]] = []
        batches = self._num_batches_of_all(rows)
        while rows or batches > 0:
            batch = rows[: self._num_rows(rows)]
            members = [position for row in batch for position in row.sequences]
            batches -= 1
            if not members:
                # The other processes wait for this process's part of the weights.
                self._forward([np.array([1 if self.pad_token_id == 0 else 0])], [])
                continue
            try:
                self.budget.start()
                # The result stays on the device, so that the next batch is prepared while the device works.
                scored.append((members, self._forward([sequences[position] for position in members], batch)))
                if len(batch) < len(rows):
                    self.budget.end()
            except RuntimeError as error:
                # If the weights are sharded, the other processes would not know that this one tries again.
                if not should_reduce_batch_size(error) or len(members) == 1 or self.is_sharded:
                    raise
                self.budget.halve()
                rows = self._lay(sequences, [position for row in rows for position in row.sequences])
                continue
            rows = rows[len(batch) :]
            if progress is not None:
                progress.update(sum(len(sequences[position]) for position in members))
        scores = np.empty((len(sequences), *(scored[0][1].shape[1:] if scored else ())), dtype=np.float32)
        for members, logits in scored:
            scores[members] = logits.cpu().numpy()
        self._score_failed_alone(sequences, scores)
        return scores

    def _score_failed_alone(self, sequences: Sequence[np.ndarray], scores: np.ndarray) -> None:
        """Score sequences again whose score is NaN or infinite: one such sequence spoils all others in its row."""
        if self.layout not in ("shared", "packed") or self.is_sharded:
            return
        if failed := np.flatnonzero(~np.isfinite(scores)).tolist():
            alone = Scorer(self.model, self.pad_token_id, self.accelerator, self.budget, "padded")
            scores[failed] = alone.score([sequences[position] for position in failed])

    def _lay(self, sequences: Sequence[np.ndarray], positions: Sequence[int]) -> list[SharedRow]:
        """Lay some sequences into rows, from long to short, so that a batch that is too large fails at once."""
        if self.layout == "shared":
            own = shared_rows(
                [sequences[position] for position in positions], min(LONGEST_SHARED_ROW, self.budget.tokens)
            )
            rows = [replace(row, sequences=tuple(positions[member] for member in row.sequences)) for row in own]
        else:
            rows = [SharedRow((position,), 0, len(sequences[position])) for position in positions]
        return sorted(rows, key=lambda row: -row.length)

    def _num_rows(self, rows: list[SharedRow]) -> int:
        """Number of rows in the next batch: at least one, if there are any. The rows are sorted from long to short."""
        if not rows:
            return 0
        lengths = np.array([row.length for row in rows])
        if self.layout == "packed":
            return max(1, int(np.searchsorted(np.cumsum(lengths), self.budget.tokens, side="right")))
        lengths = lengths[: max(1, self.budget.tokens // lengths[0])]
        padding = np.cumsum(lengths[0] - lengths)
        most = 0 if self.layout == "unpadded" else self.budget.padding
        return int(np.searchsorted(padding, most, side="right"))

    def _num_batches_of_all(self, rows: list[SharedRow]) -> int:
        """If the weights are sharded, the largest number of batches of any process, otherwise 0."""
        if not self.is_sharded:
            return 0
        assert self.accelerator is not None
        self.budget.may_grow = False
        number = 0
        while rows:
            rows, number = rows[self._num_rows(rows) :], number + 1
        return max(gather_object([number]))

    def _forward(self, sequences: list[np.ndarray], rows: list[SharedRow]) -> torch.Tensor:
        """Score a batch. The sequences are in the order in which the rows hold them."""
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
        if self.layout in ("padded", "unpadded"):
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


@contextlib.contextmanager
def _float32_logits(model: nn.Module) -> Iterator[None]:
    """
    Within this context, the last layer computes in float32 under autocast too. In bfloat16, neighboring rewards near 5
    are 0.03 apart, and pairs tie.
    """

    def in_float32(head: nn.Linear, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if output.dtype == torch.float32:
            return output
        with torch.autocast(output.device.type, enabled=False), whole([head.weight]):
            return nn.functional.linear(
                args[0].float(), head.weight.float(), None if head.bias is None else head.bias.float()
            )

    # By exact type: quantized layers are subclasses, and their weight is packed.
    heads = [module for module in model.modules() if type(module) is nn.Linear and module.out_features == 1]
    handles = [head.register_forward_hook(in_float32) for head in heads]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
