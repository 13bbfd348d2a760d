"""How the sequences of a batch lie before a model: padded, with what they have in common computed once, or packed."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GenericForSequenceClassification

from ..models.classifier import classifier_of, windows_of_layers


logger = logging.getLogger(__name__)

# Sharing costs a mask of its own, so a batch has to lose at least this part of its tokens by it.
LEAST_SAVED = 0.25
# Attention over a row with several sequences is computed for all pairs of its tokens, so such a row has an end.
LONGEST_SHARED_ROW = 4096
# How far the rewards of a layout may be from those of padded sequences, relative to their size, on the probe.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Number of tokens of a sequence of the probe.
PROBE_LENGTH = 24
# Name under which the attention over rows with several sequences is known to transformers.
SHARED_ROWS_ATTENTION = "sdpa_shared_rows"


@dataclass(frozen=True)
class SharedRow:
    """
    Sequences that lie in one row: what they have in common at their start, then the rest of each.

    Args:
        sequences (`tuple[int, ...]`):
            Their positions in the batch.
        prefix (`int`):
            Number of tokens that they have in common and that are computed once.
        length (`int`):
            Number of tokens of the row.
    """

    sequences: tuple[int, ...]
    prefix: int
    length: int


def choose_layout(model: nn.Module) -> str:
    """
    The layout that a model can read and that saves most, found by trying it on a few tokens.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier with one label, or a PEFT model of one. Not wrapped for several processes.

    Returns:
        `str`: `"shared"` for a decoder that takes a mask of its own, `"packed"` for one with flash attention, whose
        kernels read rows without padding but take no such mask, and `"padded"` for every other model.
    """
    classifier = classifier_of(model)
    if not isinstance(classifier, GenericForSequenceClassification) or hasattr(classifier, "frozen_backbone"):
        return "padded"
    config = classifier.config.get_text_config()  # type: ignore[attr-defined]
    attention = config._attn_implementation or ""  # private, and the only place that says it
    if not windows_of_layers(config).keys() <= {"full_attention", "sliding_attention"}:
        return "padded"
    if getattr(config, "pad_token_id", None) is None:
        return "padded"
    layout = "packed" if "flash" in attention else "shared" if attention in ("sdpa", "eager") else "padded"
    if layout == "padded":
        return layout
    is_right = _is_right(model, layout, config.vocab_size, config.pad_token_id)
    window = getattr(config, "sliding_window", None)
    if is_right and layout == "shared" and window is not None:
        # Again with one that the few tokens are longer than: a model may have it in its configuration alone.
        config.sliding_window = min(window, PROBE_LENGTH // 2)
        try:
            is_right = _is_right(model, layout, config.vocab_size, config.pad_token_id)
        finally:
            config.sliding_window = window
    if not is_right:
        logger.warning(f"{type(classifier).__name__} does not read sequences laid out as {layout!r}; they are padded.")
        return "padded"
    return layout


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """`int`: number of tokens that two sequences have in common at their start, less than the shorter one has."""
    shortest = min(len(one), len(other)) - 1
    differs = one[:shortest] != other[:shortest]
    place = int(differs.argmax()) if shortest > 0 else 0
    return place if shortest > 0 and differs[place] else shortest


def shared_rows(sequences: Sequence[np.ndarray], longest: int = LONGEST_SHARED_ROW) -> list[SharedRow]:
    """
    Lay sequences into rows, those with the same start together as far as that saves something.

    Args:
        sequences (`Sequence[np.ndarray]`):
            Token IDs of each, int64.
        longest (`int`, *optional*, defaults to `4096`):
            Number of tokens that a row with more than one sequence may have.

    Returns:
        `list[SharedRow]`: each sequence lies in one of them.
    """
    rows: list[SharedRow] = []
    group: list[int] = []
    prefix = 0
    # In the order of their tokens, in which those with the same start are neighbours.
    content = [ids.astype(">i8").tobytes() for ids in sequences]
    for position in sorted(range(len(sequences)), key=content.__getitem__):
        if group:
            first, own = sequences[group[0]], sequences[position]
            common = common_prefix(first, own)
            common = min(prefix, common) if len(group) > 1 else common
            is_much = common >= LEAST_SAVED * min(len(first), len(own))
            if is_much and common * len(group) >= prefix * (len(group) - 1):
                group.append(position)
                prefix = common
                continue
            rows += _rows_of(group, prefix, sequences, longest)
        group, prefix = [position], 0
    return rows + _rows_of(group, prefix, sequences, longest)


def paired_rows(sequences: Sequence[np.ndarray]) -> list[SharedRow]:
    """
    Lay the two halves of a batch into rows, two by two, as pairs of completions lie there.

    Args:
        sequences (`Sequence[np.ndarray]`):
            Token IDs of each, int64.

    Returns:
        `list[SharedRow]`: none, for a batch that is better left as it is.
    """
    half = len(sequences) // 2
    rows: list[SharedRow] = []
    for pair in ([first, half + first] for first in range(half)):
        prefix = common_prefix(*(sequences[position] for position in pair))
        rows += _rows_of(pair, prefix, sequences, LONGEST_SHARED_ROW)
    num_tokens = sum(map(len, sequences))
    return rows if sum(row.length for row in rows) <= (1 - LEAST_SAVED) * num_tokens else []


def _rows_of(group: list[int], prefix: int, sequences: Sequence[np.ndarray], longest: int) -> list[SharedRow]:
    """A group as one row, as several if it is long, or as one for each of its sequences if it saves too little."""
    # The longest first: up to its end, a row is like any other.
    group = sorted(group, key=lambda position: -len(sequences[position]))
    lengths = [len(sequences[position]) for position in group]
    if len(group) < 2 or prefix * (len(group) - 1) < LEAST_SAVED * sum(lengths):
        return [SharedRow((position,), 0, length) for position, length in zip(group, lengths, strict=True)]
    rows: list[SharedRow] = []
    members: list[int] = []
    size = prefix
    for position, length in zip(group, lengths, strict=True):
        if members and size + length - prefix > longest:
            rows.append(SharedRow(tuple(members), prefix, size))
            members, size = [], prefix
        members.append(position)
        size += length - prefix
    return [*rows, SharedRow(tuple(members), prefix, size)]


@contextlib.contextmanager
def laid_out(
    model: nn.Module, layout: str, rows_of: Callable[[Sequence[np.ndarray]], list[SharedRow]]
) -> Iterator[None]:
    """
    Let a sequence classifier compute padded batches in another layout. Who calls it sees no difference but in time and in
    the last digits: it gets the logits of every sequence of the batch.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier, or a PEFT model of one; also where it is wrapped for several processes by now.
        layout (`str`):
            As from [`choose_layout`].
        rows_of (`Callable[[Sequence[np.ndarray]], list[SharedRow]]`):
            Lays the sequences of a batch into rows, for `"shared"`, or gives none.
    """
    if layout == "padded":
        yield
        return
    classifier = classifier_of(model)
    config = classifier.config.get_text_config()
    attention = config._attn_implementation
    windows = windows_of_layers(config)
    laid: dict[str, Any] = {}

    def rearrange(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        laid.clear()
        device = next(classifier.parameters()).device
        input_ids = kwargs["input_ids"]
        on_cpu = input_ids.cpu().numpy()
        # As transformers finds the token that the score is read from; what is behind it has no influence.
        is_token = on_cpu != config.pad_token_id
        lengths = (np.arange(on_cpu.shape[1]) * is_token).argmax(axis=1) + 1
        if layout == "packed":
            rows = [SharedRow(tuple(range(len(lengths))), 0, int(lengths.sum()))]
        else:
            rows = rows_of([ids[:length] for ids, length in zip(on_cpu, lengths, strict=True)])
        if all(len(row.sequences) < 2 for row in rows):
            # No token sees one behind it, so without a mask those that count don't see the padding either.
            padding = to_device(kwargs["attention_mask"], device) if layout == "packed" else None
            return args, {**kwargs, "input_ids": to_device(input_ids, device), "attention_mask": padding}
        source, branch, positions, ends = _arrange(rows, lengths, on_cpu.shape[1])
        laid["ends"] = tuple(to_device(torch.from_numpy(each), device) for each in ends)
        mask: torch.Tensor | dict[str, torch.Tensor] | None = None
        if layout == "shared":
            # A window that no sequence is longer than hides nothing.
            longest = int(lengths.max())
            narrow = {kind: window if window and window < longest else None for kind, window in windows.items()}
            # What is computed again in the backward pass is so with the attention that the model has by then.
            is_split = attention == "sdpa" and not (torch.is_grad_enabled() and _is_checkpointed(classifier))
            is_split &= not any(narrow.values())
            ends_of_first = [int(lengths[row.sequences[0]]) for row in rows if len(row.sequences) > 1]
            start = min(ends_of_first) if is_split else 0
            mask = _masks(
                to_device(torch.from_numpy(branch), device),
                to_device(torch.from_numpy(positions), device),
                start,
                narrow,
                attention,
                next(classifier.parameters()),
            )
            config._attn_implementation = SHARED_ROWS_ATTENTION if is_split else attention
        kwargs = {
            **kwargs,
            "input_ids": to_device(torch.from_numpy(on_cpu.reshape(-1)[source]), device),
            "position_ids": to_device(torch.from_numpy(positions), device),
            # With a cache, transformers would not look for several sequences in a row.
            "use_cache": False,
            # Attention kernels that pack read the sequences off the positions, which start anew with each.
            "attention_mask": mask,
        }
        return args, kwargs

    def keep_scores(head: nn.Module, args: tuple, output: torch.Tensor) -> None:
        laid["scores"] = output

    def gather(module: nn.Module, args: tuple, output: Any) -> Any:
        if "ends" in laid:
            output.logits = laid["scores"][laid["ends"]]
        laid.clear()
        config._attn_implementation = attention
        return output

    handles = [
        classifier.register_forward_pre_hook(rearrange, with_kwargs=True),
        classifier.score.register_forward_hook(keep_scores),
        # Before the hooks of a launcher, which look at what comes out.
        classifier.register_forward_hook(gather, prepend=True),
    ]
    try:
        yield
    finally:
        # Private, like above: a forward pass that fails does not come to its end.
        config._attn_implementation = attention
        for handle in handles:
            handle.remove()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[`~torch.Tensor`]: a tensor on a device, from the CPU without waiting for what the device computes by now."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _arrange(rows: list[SharedRow], lengths: np.ndarray, width: int) -> tuple[np.ndarray, ...]:
    """Where each token of the rows comes from in the padded batch, its sequence in the row, its position, and the ends."""
    longest = max(row.length for row in rows)
    # Filled up with the last place of the padded batch: any token does, nobody looks at it.
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


def _masks(
    branch: torch.Tensor,
    positions: torch.Tensor,
    start: int,
    windows: dict[str, int | None],
    attention: str,
    parameter: torch.Tensor,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    Which token sees which, of shape `(rows, 1, length - start, length)`, for the tokens from `start` on: what is before
    it, in its own sequence and in its window. One for all layers or, where some have a window and some may not, as
    transformers takes them: one for each kind.
    """
    length = branch.shape[1]
    before = torch.ones(length - start, length, dtype=torch.bool, device=branch.device).tril(start)
    own = branch[:, start:, None] == branch[:, None, :]
    own |= (branch[:, None, :] == 0) & (branch[:, start:, None] >= 0)

    def mask(window: int | None) -> torch.Tensor:
        seen = before & own
        if window is not None:
            # Rows are long: numbers of four bytes, and only where they are needed.
            seen &= positions[:, start:, None].int() - positions[:, None, :].int() < window
        seen = seen[:, None]
        if attention != "eager":
            return seen
        least = torch.finfo(parameter.dtype).min
        return torch.zeros(seen.shape, dtype=parameter.dtype, device=branch.device).masked_fill_(~seen, least)

    masks = {window: mask(window) for window in set(windows.values())}
    of_kind = {kind: masks[window] for kind, window in windows.items()}
    return of_kind if "sliding_attention" in of_kind else of_kind["full_attention"]


def _shared_rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Scaled dot product attention with a mask for the last tokens of each row alone. Those before see all that is before
    them, for which kernels need no mask and compute half as much.
    """
    start = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if start == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    first, _ = sdpa_attention_forward(
        module, query[:, :, :start], key[:, :, :start], value[:, :, :start], None, **kwargs
    )
    rest, _ = sdpa_attention_forward(module, query[:, :, start:], key, value, attention_mask, **kwargs)
    return torch.cat([first, rest], dim=1), None


AttentionInterface.register(SHARED_ROWS_ATTENTION, _shared_rows_attention)


def _is_right(model: nn.Module, layout: str, vocab_size: int, pad_token_id: int) -> bool:
    """Whether the rewards of a few made-up sequences are the same in a layout."""
    parameter = next(model.parameters())
    # No padding token among them, and none that could be special: far from both ends of the vocabulary.
    draw = np.random.default_rng(0).integers(vocab_size // 4, vocab_size // 2 + 1, size=(4, PROBE_LENGTH))
    draw[draw == pad_token_id] += 1
    draw[1:, :16] = draw[0, :16]
    input_ids = torch.from_numpy(draw).to(parameter.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    was_training = model.training
    model.eval()
    # Under autocast, which a launcher puts around the model, it computes in less than its parameters have.
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
        # Nothing can be told from it, and who scores with such a model finds out soon.
        return True
    tolerance = TOLERANCE.get(precision[0], TOLERANCE[torch.bfloat16])
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
