"""
Choose and apply the layout of a batch: padded, with common starts computed once ("shared"), packed into one row, or
unpadded: sequences of one length only.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification

from ..models.classifier import classifier_of, windows_of_layers
from .inputs import check_padding_token, sees_padding
from .rows import SharedRow, shared_rows
from .shared_attention import SHARED_ROWS_ATTENTION, attention_masks, branches_of


logger = logging.getLogger(__name__)

# Largest difference between the rewards of a layout and of padded sequences in the probe, relative to their size.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Number of tokens of a sequence in the probe.
PROBE_LENGTH = 24


def choose_layout(model: nn.Module) -> str:
    """
    Find the layout that saves most among those that a model can read, by a probe with a few tokens.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier with one label, or a PEFT model of one. Not wrapped for several processes.

    Returns:
        `str`: `"shared"` for a decoder that accepts an attention mask, `"packed"` for a decoder with flash attention,
        whose kernels read rows without padding but accept no such mask, and `"padded"` for all other models;
        `"unpadded"` if padding changes the rewards.

    Raises:
        ValueError: If the model has no embedding for the padding token.
    """
    classifier = classifier_of(model)
    pad_token_id = classifier.config.get_text_config().pad_token_id
    check_padding_token(model, pad_token_id)
    # Frozen features, where the trainer has asked before, are no features of made-up sequences.
    is_frozen = hasattr(classifier, "frozen_backbone")
    if pad_token_id is not None and not is_frozen and sees_padding(model, pad_token_id):
        logger.warning(
            f"{type(classifier).__name__} gives a sequence another reward beside a longer one, so only sequences of one "
            "length are scored together."
        )
        return "unpadded"
    layout = _possible_layout(classifier)
    if layout == "padded":
        return layout
    config = classifier.config.get_text_config()
    is_right = _is_right(model, layout, config.vocab_size, config.pad_token_id)
    window = getattr(config, "sliding_window", None)
    if is_right and layout == "shared" and window is not None:
        # Probed again with a window shorter than the probe: a model may ignore the window in its configuration.
        config.sliding_window = min(window, PROBE_LENGTH // 2)
        try:
            is_right = _is_right(model, layout, config.vocab_size, config.pad_token_id)
        finally:
            config.sliding_window = window
    if not is_right:
        logger.warning(f"{type(classifier).__name__} does not read sequences laid out as {layout!r}; they are padded.")
        return "padded"
    return layout


@contextlib.contextmanager
def laid_out(
    model: nn.Module, layout: str, rows_of: Callable[[Sequence[np.ndarray]], list[SharedRow]]
) -> Iterator[None]:
    """
    Within this context, a sequence classifier computes padded batches in another layout. Its caller gets the logits of
    every sequence as before, faster and with differences in the last digits.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier, or a PEFT model of one; it may be wrapped for several processes.
        layout (`str`):
            Layout from [`choose_layout`]. `"padded"` and `"unpadded"` leave the batch as it is.
        rows_of (`Callable[[Sequence[np.ndarray]], list[SharedRow]]`):
            For `"shared"`: lays the sequences of a batch into rows, or returns an empty list to leave the batch
            padded.
    """
    if layout in ("padded", "unpadded"):
        yield
        return
    classifier = classifier_of(model)
    hooks = _Hooks(classifier, layout, rows_of)
    handles = [
        classifier.register_forward_pre_hook(hooks.rearrange, with_kwargs=True),
        classifier.score.register_forward_hook(hooks.keep_scores),
        # Before the hooks of a launcher, which read the output.
        classifier.register_forward_hook(hooks.gather, prepend=True),
    ]
    try:
        yield
    finally:
        # After a forward pass that failed, `gather` was not called.
        hooks.put_attention_back()
        for handle in handles:
            handle.remove()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[`~torch.Tensor`]: the tensor on a device; a copy from the CPU to a GPU does not wait for the GPU's work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class _Hooks:
    """
    Hooks on a classifier: before a forward pass they put the sequences of a padded batch into rows, after it they take
    the logit at the end of each sequence.

    Args:
        classifier ([`~transformers.PreTrainedModel`]):
            Sequence classifier, a decoder.
        layout (`str`):
            `"shared"` or `"packed"`.
        rows_of (`Callable[[Sequence[np.ndarray]], list[SharedRow]]`):
            As in [`laid_out`].
    """

    def __init__(self, classifier: Any, layout: str, rows_of: Callable[[Sequence[np.ndarray]], list[SharedRow]]):
        self.classifier = classifier
        self.layout = layout
        self.rows_of = rows_of
        self.config = classifier.config.get_text_config()
        # Private in transformers, which has no other way to switch the attention of a loaded model.
        self.attention = self.config._attn_implementation
        self.windows = windows_of_layers(self.config)
        # Row and place of the last token of each sequence, and the scores of all tokens; `None` for a padded batch.
        self.ends: tuple[torch.Tensor, ...] | None = None
        self.scores: torch.Tensor | None = None

    def rearrange(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.ends = self.scores = None
        parameter = next(self.classifier.parameters())
        device = parameter.device
        input_ids = kwargs["input_ids"]
        on_cpu = input_ids.cpu().numpy()
        # Transformers reads the score at the last token that is not the padding token; later tokens have no influence.
        is_token = on_cpu != self.config.pad_token_id
        lengths = (np.arange(on_cpu.shape[1]) * is_token).argmax(axis=1) + 1
        rows = self._rows(on_cpu, lengths)
        if all(len(row.sequences) < 2 for row in rows):
            # Attention is causal: without a mask, no token before the padding sees it.
            padding = to_device(kwargs["attention_mask"], device) if self.layout == "packed" else None
            return args, {**kwargs, "input_ids": to_device(input_ids, device), "attention_mask": padding}
        source, branch, positions, ends = _arrange(rows, lengths, on_cpu.shape[1])
        self.ends = tuple(to_device(torch.from_numpy(each), device) for each in ends)
        position_ids = to_device(torch.from_numpy(positions), device)
        # Kernels for packed rows need no mask: they find each sequence by its positions, which start at 0.
        seen: dict[str, Any] = {"attention_mask": None}
        if self.layout == "shared":
            on_device = to_device(torch.from_numpy(branch), device)
            seen = self._seen(rows, lengths, on_device, position_ids, parameter.dtype)
        return args, {
            **kwargs,
            **seen,
            "input_ids": to_device(torch.from_numpy(on_cpu.reshape(-1)[source]), device),
            "position_ids": position_ids,
            # With a cache, transformers does not look for several sequences in a row.
            "use_cache": False,
        }

    def keep_scores(self, head: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.scores = output

    def gather(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.ends is not None:
            assert self.scores is not None
            output.logits = self.scores[self.ends]
        self.ends = self.scores = None
        self.put_attention_back()
        return output

    def put_attention_back(self) -> None:
        self.config._attn_implementation = self.attention

    def _rows(self, on_cpu: np.ndarray, lengths: np.ndarray) -> list[SharedRow]:
        if self.layout == "packed":
            return [SharedRow(tuple(range(len(lengths))), 0, int(lengths.sum()))]
        return self.rows_of([ids[:length] for ids, length in zip(on_cpu, lengths, strict=True)])

    def _seen(
        self,
        rows: list[SharedRow],
        lengths: np.ndarray,
        branch: torch.Tensor,
        positions: torch.Tensor,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """What each token sees, as arguments of the model; switches to the attention that takes them."""
        # A window at least as long as all sequences hides nothing.
        longest = int(lengths.max())
        windows = {kind: window if window and window < longest else None for kind, window in self.windows.items()}
        # Checkpointed activations are computed again in the backward pass, after `gather` has put the attention back.
        computes_again = torch.is_grad_enabled() and _is_checkpointed(self.classifier)
        is_split = self.attention == "sdpa" and not computes_again and not any(windows.values())
        self.config._attn_implementation = SHARED_ROWS_ATTENTION if is_split else self.attention
        branches = branches_of(rows, lengths, branch.device) if is_split else None
        if branches is not None:
            # An empty mask, since transformers would make one of its own in the place of none.
            empty = torch.empty(len(rows), 1, 0, branch.shape[1], dtype=torch.bool, device=branch.device)
            masks = dict.fromkeys(self.windows, empty) if "sliding_attention" in self.windows else empty
            return {"attention_mask": masks, "branches": branches}
        ends_of_first = [int(lengths[row.sequences[0]]) for row in rows if len(row.sequences) > 1]
        start = min(ends_of_first) if is_split else 0
        return {"attention_mask": attention_masks(branch, positions, start, windows, self.attention, dtype)}


def _possible_layout(classifier: Any) -> str:
    """The layout that the type and configuration of a model allow."""
    if not isinstance(classifier, GenericForSequenceClassification) or hasattr(classifier, "frozen_backbone"):
        return "padded"
    config = classifier.config.get_text_config()  # type: ignore[attr-defined]
    if not windows_of_layers(config).keys() <= {"full_attention", "sliding_attention"}:
        return "padded"
    if getattr(config, "pad_token_id", None) is None:
        return "padded"
    attention = config._attn_implementation or ""  # private, and the only place that names it
    if "flash" in attention:
        return "packed"
    return "shared" if attention in ("sdpa", "eager") else "padded"


def _is_right(model: nn.Module, layout: str, vocab_size: int, pad_token_id: int) -> bool:
    """Whether a layout gives the rewards of padded sequences, tried with four made-up sequences."""
    parameter = next(model.parameters())
    # From the middle of the vocabulary, where no special tokens are; and never the padding token.
    draw = np.random.default_rng(0).integers(vocab_size // 4, vocab_size // 2 + 1, size=(4, PROBE_LENGTH))
    draw[draw == pad_token_id] += 1
    draw[1:, :16] = draw[0, :16]
    input_ids = torch.from_numpy(draw).to(parameter.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    was_training = model.training
    model.eval()
    # Under a launcher's autocast, the model computes in a lower precision than its parameters have.
    precision: list[torch.dtype] = []
    handle = classifier_of(model).score.register_forward_hook(lambda head, args, out: precision.append(out.dtype))
    try:
        # Not in inference mode, in which FSDP can't gather weights.
        with torch.no_grad():
            expected = model(**inputs).logits.float()
            with laid_out(model, layout, shared_rows):
                found = model(**inputs).logits.float()
    except (RuntimeError, TypeError, ValueError) as error:
        logger.info(f"{layout!r}: {error}")
        return False
    finally:
        handle.remove()
        model.train(was_training)
    if not expected.isfinite().all():
        # NaN says nothing about the layout; scoring with such a model raises `NonFiniteScoreError` later.
        return True
    tolerance = TOLERANCE.get(precision[0], TOLERANCE[torch.bfloat16])
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def _arrange(
    rows: list[SharedRow], lengths: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    Of each token in the rows: its place in the flattened padded batch, its branch (see [`attention_masks`]) and its
    position in the sequence; and of each sequence, row and place of its last token, of shape `(2, num_sequences)`.
    """
    longest = max(row.length for row in rows)
    # Short rows are filled up with the last token of the padded batch: any token will do, no other sees it.
    source = np.full((len(rows), longest), len(lengths) * width - 1, dtype=np.int64)
    branch = np.full((len(rows), longest), -1, dtype=np.int32)
    positions = np.zeros((len(rows), longest), dtype=np.int64)
    ends = np.zeros((2, len(lengths)), dtype=np.int64)
    for number, row in enumerate(rows):
        first = row.sequences[0] * width
        source[number, : row.prefix] = np.arange(first, first + row.prefix)
        positions[number, : row.prefix] = np.arange(row.prefix)
        branch[number, : row.prefix] = 0
        start = row.prefix
        for order, position in enumerate(row.sequences):
            stop = start + int(lengths[position]) - row.prefix
            own = np.arange(row.prefix, lengths[position])
            source[number, start:stop] = position * width + own
            positions[number, start:stop] = own
            branch[number, start:stop] = order + 1
            ends[:, position] = number, stop - 1
            start = stop
    return source, branch, positions, ends


def _is_checkpointed(model: nn.Module) -> bool:
    """Whether transformers or a launcher computes activations again in the backward pass."""
    names = ("gradient_checkpointing", "_checkpoint_wrapped_module")
    return any(getattr(module, name, False) for module in model.modules() for name in names)
