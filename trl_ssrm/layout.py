"""How the sequences of a batch lie before a model: padded, with what they have in common computed once, or packed."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification


logger = logging.getLogger(__name__)

# Sharing costs a mask of its own, so a batch has to lose at least this part of its tokens by it.
LEAST_SAVED = 0.25
# Attention over a row with several sequences is computed for all pairs of its tokens, so such a row has an end.
LONGEST_SHARED_ROW = 4096
# How far the rewards of a layout may be from those of padded sequences, relative to their size, on the probe.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"} or getattr(config, "pad_token_id", None) is None:
        return "padded"
    # Without `layer_types`, a window is that of every layer.
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None:
        return "padded"
    layout = "packed" if "flash" in attention else "shared" if attention in ("sdpa", "eager") else "padded"
    if layout != "padded" and not _is_right(model, layout, config.vocab_size, config.pad_token_id):
        logger.warning(f"{type(classifier).__name__} does not read sequences laid out as {layout!r}; they are padded.")
        return "padded"
    return layout


def classifier_of(model: Any) -> Any:
    """The sequence classifier itself, of which a PEFT model is a shell."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def common_prefix(sequences: list[list[int]]) -> int:
    """`int`: number of tokens that sequences have in common at their start, less than the shortest has."""
    shortest = min(map(len, sequences)) - 1
    columns = np.array([ids[:shortest] for ids in sequences])
    differs = (columns != columns[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def shared_rows(sequences: list[list[int]], longest: int = LONGEST_SHARED_ROW) -> list[SharedRow]:
    """
    Lay sequences into rows, those with the same start together as far as that saves something.

    Args:
        sequences (`list[list[int]]`):
            Token IDs.
        longest (`int`, *optional*, defaults to `4096`):
            Number of tokens that a row with more than one sequence may have.

    Returns:
        `list[SharedRow]`: each sequence lies in one of them.
    """
    rows: list[SharedRow] = []
    group: list[int] = []
    prefix = 0
    # In this order, those with the same start are neighbours.
    for position in sorted(range(len(sequences)), key=sequences.__getitem__):
        if group:
            first, own = sequences[group[0]], sequences[position]
            common = min(prefix, common_prefix([first, own])) if len(group) > 1 else common_prefix([first, own])
            is_much = common >= LEAST_SAVED * min(len(first), len(own))
            if is_much and common * len(group) >= prefix * (len(group) - 1):
                group.append(position)
                prefix = common
                continue
            rows += _rows_of(group, prefix, sequences, longest)
        group, prefix = [position], 0
    return rows + _rows_of(group, prefix, sequences, longest)


def paired_rows(sequences: list[list[int]]) -> list[SharedRow]:
    """
    Lay the two halves of a batch into rows, two by two, as pairs of completions lie there.

    Args:
        sequences (`list[list[int]]`):
            Token IDs.

    Returns:
        `list[SharedRow]`: none, for a batch that is better left as it is.
    """
    half = len(sequences) // 2
    rows: list[SharedRow] = []
    for pair in ([first, half + first] for first in range(half)):
        prefix = common_prefix([sequences[position] for position in pair])
        rows += _rows_of(pair, prefix, sequences, LONGEST_SHARED_ROW)
    num_tokens = sum(map(len, sequences))
    return rows if sum(row.length for row in rows) <= (1 - LEAST_SAVED) * num_tokens else []


def _rows_of(group: list[int], prefix: int, sequences: list[list[int]], longest: int) -> list[SharedRow]:
    """A group as one row, as several if it is long, or as one for each of its sequences if it saves too little."""
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
def laid_out(model: nn.Module, layout: str, rows_of: Callable[[list[list[int]]], list[SharedRow]]) -> Iterator[None]:
    """
    Let a sequence classifier compute padded batches in another layout. Who calls it sees no difference but in time and in
    the last digits: it gets the logits of every sequence of the batch.

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier, or a PEFT model of one; also where it is wrapped for several processes by now.
        layout (`str`):
            As from [`choose_layout`].
        rows_of (`Callable[[list[list[int]]], list[SharedRow]]`):
            Lays the sequences of a batch into rows, for `"shared"`, or gives none.
    """
    if layout == "padded":
        yield
        return
    classifier = classifier_of(model)
    laid: dict[str, Any] = {}

    def rearrange(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        laid.clear()
        device = next(classifier.parameters()).device
        input_ids = kwargs["input_ids"]
        on_cpu = input_ids.cpu().numpy()
        # As transformers finds the token that the score is read from; what is behind it has no influence.
        is_token = on_cpu != classifier.config.get_text_config().pad_token_id
        lengths = (np.arange(on_cpu.shape[1]) * is_token).argmax(axis=1) + 1
        sequences = [ids[:length].tolist() for ids, length in zip(on_cpu, lengths, strict=True)]
        if layout == "packed":
            row = SharedRow(tuple(range(len(sequences))), 0, int(lengths.sum()))
            rows = [row]
        else:
            rows = rows_of(sequences)
        if all(len(row.sequences) < 2 for row in rows):
            # Token IDs that are still on the CPU spare an accelerator the way back.
            inputs = ("input_ids", "attention_mask")
            return args, {**kwargs, **{name: kwargs[name].to(device) for name in inputs}}
        source, branch, positions, ends = _arrange(rows, lengths, on_cpu.shape[1])
        laid["ends"] = tuple(torch.from_numpy(each).to(device) for each in ends)
        branch_ids = torch.from_numpy(branch).to(device)
        kwargs = {
            **kwargs,
            "input_ids": torch.from_numpy(on_cpu.reshape(-1)[source]).to(device),
            "position_ids": torch.from_numpy(positions).to(device),
            # With a cache, transformers would not look for several sequences in a row.
            "use_cache": False,
            # Attention kernels that pack read the sequences off the positions, which start anew with each.
            "attention_mask": None if layout == "packed" else _mask(branch_ids, classifier),
        }
        return args, kwargs

    def keep_scores(head: nn.Module, args: tuple, output: torch.Tensor) -> None:
        laid["scores"] = output

    def gather(module: nn.Module, args: tuple, output: Any) -> Any:
        if "ends" in laid:
            output.logits = laid["scores"][laid["ends"]]
        laid.clear()
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
        for handle in handles:
            handle.remove()


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


def _mask(branch: torch.Tensor, classifier: Any) -> torch.Tensor:
    """Which token sees which, of shape `(rows, 1, length, length)`: what is before it, in its own sequence."""
    length = branch.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    own = (branch[:, :, None] == branch[:, None, :]) | ((branch[:, None, :] == 0) & (branch[:, :, None] >= 0))
    seen = (before & own)[:, None]
    if classifier.config.get_text_config()._attn_implementation != "eager":
        return seen
    dtype = next(classifier.parameters()).dtype
    return torch.zeros(seen.shape, dtype=dtype, device=branch.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _is_right(model: nn.Module, layout: str, vocab_size: int, pad_token_id: int) -> bool:
    """Whether the rewards of a few made-up sequences are the same in a layout."""
    parameter = next(model.parameters())
    # No padding token among them, and none that could be special: far from both ends of the vocabulary.
    draw = np.random.default_rng(0).integers(vocab_size // 4, vocab_size // 2 + 1, size=(4, 24))
    draw[draw == pad_token_id] += 1
    draw[1:, :16] = draw[0, :16]
    input_ids = torch.from_numpy(draw).to(parameter.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    was_training = model.training
    model.eval()
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
        model.train(was_training)
    if not expected.isfinite().all():
        # Nothing can be told from it, and who scores with such a model finds out soon.
        return True
    tolerance = TOLERANCE.get(parameter.dtype, TOLERANCE[torch.bfloat16])
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
