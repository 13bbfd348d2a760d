"""What a model can read: token IDs that it has embeddings for, and padding that it does not see."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from torch import nn

from ..data.sequences import PairedSequences
from ..io.storage import BATCH_ROWS
from ..models.classifier import classifier_of, num_embeddings
from ..models.sharding import is_sharded


# Largest difference between the rewards of sequences alone and beside longer ones, relative to their size. In the smaller
# types, rounding is as large as in a deep model; what sees padding is wrong by as much as rewards differ.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-1, torch.bfloat16: 3e-1}
# Numbers of tokens of the made-up sequences.
PROBE_LENGTHS = (7, 24, 12)


def check_padding(model: Any, pad_token_id: int, accelerator: Accelerator) -> None:
    """
    Refuse a model whose rewards depend on the batch, before it is trained on padded batches.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Sequence classifier with one label. Not wrapped for several processes.
        pad_token_id (`int`):
            Token ID to use for padding, on the right.
        accelerator ([`~accelerate.Accelerator`]):
            Its processes train the model.

    Raises:
        ValueError: If padding changes rewards, or if the padding token has no embedding.
    """
    check_padding_token(model, pad_token_id)
    # A part of the weights gives no rewards; a sharded model is tried when it scores.
    if not is_sharded(accelerator) and sees_padding(model, pad_token_id):
        raise ValueError(
            f"{type(classifier_of(model)).__name__} gives a sequence another reward beside a longer one than alone, so its "
            "rewards depend on the batch; start from another model."
        )


def check_vocabulary(pairs: PairedSequences, name: str, model: Any) -> None:
    """
    Refuse token IDs that a model has no embedding for, such as those of another tokenizer.

    Args:
        pairs ([`PairedSequences`]):
            Pairs of the dataset.
        name (`str`):
            Argument that it was given as.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Sequence classifier.

    Raises:
        ValueError: If there is such a token ID.
    """
    batches = pairs.sequences.with_format("arrow").iter(batch_size=BATCH_ROWS)
    highest = [pc.max(pc.list_flatten(batch.column("input_ids"))).as_py() for batch in batches]
    check_token_ids(max((each for each in highest if each is not None), default=0), num_embeddings(model), f"`{name}`")


def check_padding_token(model: Any, pad_token_id: int | None) -> None:
    """
    Refuse a padding token without an embedding.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Sequence classifier.
        pad_token_id (`int`, *optional*):
            Token ID to use for padding.

    Raises:
        ValueError: If the token ID is as large as the number of embeddings, or larger.
    """
    limit = num_embeddings(model)
    if limit is not None and pad_token_id is not None and pad_token_id >= limit:
        raise ValueError(
            f"The padding token has the ID {pad_token_id}, but the model has embeddings for {limit} tokens; call "
            "`model.resize_token_embeddings(len(tokenizer))`, or pad with a token that the model has."
        )


def check_token_ids(highest: int, limit: int | None, name: str) -> None:
    """Refuse a dataset whose highest token ID has no embedding in a model with `limit` of them (`None`: any will do)."""
    if limit is not None and highest >= limit:
        raise ValueError(
            f"{name} has the token ID {highest}, but the model has embeddings for {limit} tokens; use the model's own "
            "tokenizer, or call `model.resize_token_embeddings(len(tokenizer))`."
        )


def sees_padding(model: nn.Module, pad_token_id: int) -> bool:
    """
    Whether a model gives a sequence another reward beside a longer one than alone, tried with made-up sequences.

    Some models read the last token of the batch, padding or not (XLNet), ignore the attention mask (FNet), or mix
    neighboring tokens (ConvBERT).

    Args:
        model ([`~torch.nn.Module`]):
            Sequence classifier with one label, or a PEFT model of one. Not wrapped for several processes.
        pad_token_id (`int`):
            Token ID to use for padding, on the right.

    Returns:
        `bool`: `False` also if the model raises an error, which says nothing about padding.
    """
    config = classifier_of(model).config.get_text_config()
    device = next(model.parameters()).device
    sequences = _made_up(config, num_embeddings(model) or config.vocab_size, pad_token_id)
    precisions, sizes = {torch.float32}, [0.0]

    def look(layer: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        # Under a launcher's autocast, the model computes in a lower precision than its parameters have.
        precisions.add(output.dtype)
        # By exact type: the weight of a quantized layer is packed.
        if type(layer) is nn.Linear and layer.out_features == 1:
            # As large as rewards are, unless the terms of their sums happen to cancel.
            hidden, weight = args[0].float().norm(dim=-1).max(), layer.weight.float().norm()
            sizes.append(float(hidden * weight) / layer.in_features**0.5)

    handles = [each.register_forward_hook(look) for each in model.modules() if isinstance(each, nn.Linear)]
    was_training = model.training
    model.eval()
    try:
        # Not in inference mode, in which FSDP can't gather weights.
        with torch.no_grad():
            alone = torch.cat([_rewards(model, [ids], pad_token_id, device) for ids in sequences])
            together = _rewards(model, sequences, pad_token_id, device)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    # NaN is reported where the rewards are used.
    if not (alone.isfinite().all() and together.isfinite().all()):
        return False
    tolerance = max(TOLERANCE.get(precision, 0.0) for precision in precisions)
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        tolerance = max(tolerance, TOLERANCE[torch.float16])
    size = max(float(alone.abs().max()), *sizes)
    return not torch.allclose(alone, together, rtol=tolerance, atol=tolerance * size)


def _made_up(config: Any, num_tokens: int, pad_token_id: int) -> list[np.ndarray]:
    # From the middle of the vocabulary, where no special tokens are; and never the padding token.
    draw = np.random.default_rng(0)
    sequences = [draw.integers(num_tokens // 4, num_tokens // 2 + 1, size=length) for length in PROBE_LENGTHS]
    for ids in sequences:
        ids[ids == pad_token_id] += 1
        # Models such as BART read the reward there.
        if isinstance(config.eos_token_id, int) and config.eos_token_id != pad_token_id:
            ids[ids == config.eos_token_id] -= 1
            ids[-1] = config.eos_token_id
    return sequences


def _rewards(
    model: nn.Module, sequences: Iterable[np.ndarray], pad_token_id: int, device: torch.device
) -> torch.Tensor:
    """Rewards of a batch padded on the right: `(num_sequences,)`, float32."""
    rows = [torch.from_numpy(ids) for ids in sequences]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(ids) for ids in rows])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return logits.float().reshape(-1)
