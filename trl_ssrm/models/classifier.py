"""Facts about a sequence classifier."""

from typing import Any

from torch import nn


def classifier_of(model: Any) -> Any:
    """The sequence classifier itself, of which a PEFT model is a shell."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def num_positions(model: Any) -> int | None:
    """
    Number of tokens that a model has learned positions for, as BERT has 512.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Sequence classifier.

    Returns:
        `int` or `None`: `None` where positions are computed, as in nearly every decoder: no sequence is too long then.
    """
    for name, module in classifier_of(model).named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "embed_positions", ".wpe")):
            # Some begin to count behind the padding token, some at an offset of their own.
            padding = module.padding_idx
            return module.num_embeddings - (getattr(module, "offset", 0) if padding is None else padding + 1)
    return None


def windows_of_layers(config: Any) -> dict[str, int | None]:
    """
    How many tokens, itself included, a token sees at most in each kind of layer that a model has.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            That of the text model.

    Returns:
        `dict[str, int | None]`: `None` for all. The kinds are those of `layer_types`; a model without has one,
        `"full_attention"`, whose window is that of every layer.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
