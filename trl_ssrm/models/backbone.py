"""A frozen backbone: its features of each sequence are computed once, then training and scoring look them up."""

import functools
import hashlib
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions


# Largest difference between scores from stored features and scores of the whole model, which pads batches differently.
TOLERANCE = 1e-2


def freeze_backbone(model: PreTrainedModel) -> "FrozenBackbone":
    """
    Freeze a sequence classifier except for its head; see [`FrozenBackbone`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Sequence classifier with one label.

    Returns:
        [`FrozenBackbone`]: a new one, or the existing one if the model was frozen before.
    """
    return getattr(model, "frozen_backbone", None) or FrozenBackbone(model)


class FrozenBackbone:
    """
    Freezes a sequence classifier except for its head, and stores the features that the head reads.

    The features of a sequence (one vector, for some encoders two) are computed in its first forward pass and kept in
    memory in float32. Every later pass feeds them to the head in place of the backbone's hidden states. The class of
    the model, its weights and its saved checkpoints do not change.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Sequence classifier with one label. Its head reads the last token (decoders), or the first token or the
            pooled output (encoders).

    Raises:
        ValueError: In the first forward pass, if the scores from the features differ from the scores of the model.
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
        # Patched on the object, so that its class and `save_pretrained` stay as they are. A `partial`, since
        # accelerate would bind the function of a bound method to the model.
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
        # To the head, each sequence is one token, which must not be the padding token.
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
        # The last token that is not the padding token, found by its ID as in transformers; or the first token.
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
                f"`freeze_backbone` can't tell which features the score head of {type(self.model).__name__} reads; "
                "leave it out."
            )
        self.is_checked = True
