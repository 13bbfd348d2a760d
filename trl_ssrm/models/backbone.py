"""A frozen backbone: what it makes of a sequence is computed once, and training and scoring read that."""

import functools
import hashlib
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions


# How far scores from the kept features may be from those of the whole model, whose batches are padded otherwise.
TOLERANCE = 1e-2


def freeze_backbone(model: PreTrainedModel) -> "FrozenBackbone":
    """
    Freeze all of a sequence classifier but its head; see [`FrozenBackbone`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Sequence classifier with one label.

    Returns:
        [`FrozenBackbone`]: the one that the model has already, or a new one.
    """
    return getattr(model, "frozen_backbone", None) or FrozenBackbone(model)


class FrozenBackbone:
    """
    Freezes all of a sequence classifier but its head, and lets it look up what the head reads.

    The features of a sequence, one vector, are computed when it is first seen and kept in memory in float32. They
    replace the hidden states of the backbone, as those of a sequence of one token, in every later call. The model's
    class, its weights and what is saved of it stay as they are.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Sequence classifier with one label, whose head reads the last token, as decoders do it, or the first token
            or the pooled output, as encoders do it.

    Raises:
        ValueError: In the first call, if the scores from the features are not those of the model.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.backbone = model.base_model
        self.backbone.requires_grad_(False)
        self.compute = self.backbone.forward
        self.score = model.forward
        self.features_of: dict[bytes, tuple[np.ndarray, ...]] = {}
        self.looked_up: tuple[torch.Tensor, ...] = ()
        self.is_checked = False
        self.pad_token_id = model.config.get_text_config().pad_token_id
        # A decoder's classifier calls its head `score`, here and in transformers, and reads the last token with it.
        self.reads_last_token = isinstance(getattr(model, "score", None), nn.Module)
        # On the objects: they stay of their class, and `save_pretrained` sees no difference. Not a bound method, whose
        # function accelerate would bind to the model instead.
        model.forward = functools.partial(self._forward)  # type: ignore[method-assign]
        model.frozen_backbone = self  # type: ignore[assignment]

    def _forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        on_cpu, is_token = input_ids.cpu(), mask.bool().cpu()
        digests = [
            hashlib.blake2b(ids[here].numpy().tobytes(), digest_size=16).digest()
            for ids, here in zip(on_cpu, is_token, strict=True)
        ]
        new = [row for row, digest in enumerate(digests) if digest not in self.features_of]
        if new:
            self._compute(input_ids[new], mask[new], [digests[row] for row in new])
        if not self.is_checked:
            self._check(input_ids, mask, digests)
        return self._from_features(digests, input_ids.device, **kwargs)

    def _from_features(self, digests: list[bytes], device: torch.device, **kwargs: Any) -> Any:
        features = zip(*(self.features_of[digest] for digest in digests), strict=True)
        dtype = next(self.model.parameters()).dtype
        self.looked_up = tuple(torch.from_numpy(np.stack(each)).to(device, dtype) for each in features)
        # A sequence of one token that is no padding.
        token = torch.full((len(digests), 1), 0 if self.pad_token_id != 0 else 1, device=device)
        self.backbone.forward = self._look_up  # type: ignore[method-assign]
        try:
            return self.score(input_ids=token, attention_mask=torch.ones_like(token), **kwargs)
        finally:
            self.backbone.forward = self.compute  # type: ignore[method-assign]

    def _look_up(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        hidden, *pooled = self.looked_up
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden[:, None],  # type: ignore[arg-type]
            pooler_output=pooled[0] if pooled else None,  # type: ignore[arg-type]
        )

    def _compute(self, input_ids: torch.Tensor, mask: torch.Tensor, digests: list[bytes]) -> None:
        is_training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            output = self.backbone(input_ids=input_ids, attention_mask=mask)
        self.backbone.train(is_training)
        # The last token that is no padding by its ID, as transformers finds it, or the first one.
        is_token = input_ids != self.pad_token_id if self.reads_last_token else mask.bool()
        place = torch.arange(mask.shape[1], device=mask.device)
        position = (place * is_token).argmax(1) if self.reads_last_token else is_token.long().argmax(1)
        features = [output.last_hidden_state[torch.arange(len(mask), device=mask.device), position]]
        if (pooled := getattr(output, "pooler_output", None)) is not None:
            features.append(pooled)
        kept = [each.float().cpu().numpy() for each in features]
        self.features_of.update(zip(digests, zip(*kept, strict=True), strict=True))

    def _check(self, input_ids: torch.Tensor, mask: torch.Tensor, digests: list[bytes]) -> None:
        is_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            expected = self.score(input_ids=input_ids, attention_mask=mask).logits.float()
            found = self._from_features(digests, input_ids.device).logits.float()
        self.model.train(is_training)
        if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise ValueError(
                f"`freeze_backbone` can't tell what the score head of {type(self.model).__name__} reads; leave it out."
            )
        self.is_checked = True
