"""Facts about a sequence classifier: its embeddings, its positions and the attention windows of its layers."""

from typing import Any

from torch import nn

from .sharding import shape_of


def classifier_of(model: Any) -> Any:
    """[`~transformers.PreTrainedModel`]: the sequence classifier itself, without a PEFT model around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def num_positions(model: Any) -> int | None:
    """
    Length of the longest sequence, in tokens, that a model has learned positions for, such as 512 for BERT.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Sequence classifier.

    Returns:
        `int` or `None`: `None` if positions are computed, as in nearly all decoders; then there is no limit.
    """
    for name, module in classifier_of(model).named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "embed_positions", ".wpe")):
            # RoBERTa counts positions from the padding token on, OPT from an offset.
            padding = module.padding_idx
            return module.num_embeddings - (getattr(module, "offset", 0) if padding is None else padding + 1)
    return None


def num_embeddings(model: Any) -> int | None:
    """`int` or `None`: number of token IDs that a model has embeddings for; `None` if it hashes them, as CANINE does."""
    try:
        embedding = classifier_of(model).get_input_embeddings()
    except NotImplementedError:
        return None
    return shape_of(embedding.weight)[0] if isinstance(embedding, nn.Embedding) else None


def padding_of_positions(model: Any) -> int | None:
    """
    Padding token that a model counts positions from, as RoBERTa does; it is fixed when the model is made.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Sequence classifier.

    Returns:
        `int` or `None`: `None` if positions do not depend on a padding token.
    """
    for name, module in classifier_of(model).named_modules():
        if name.endswith("position_embeddings"):
            # Also embeddings of other classes, such as I-BERT's.
            return getattr(module, "padding_idx", None)
    return None


def complete_config(model: Any) -> None:
    """
    Make the configuration of a trained sequence classifier say what gives the trained rewards when it is loaded.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Sequence classifier with one label, before it is saved.
    """
    config = classifier_of(model).config
    # Otherwise `pipeline("text-classification")` returns the sigmoid of the reward. Only a loss that is not used here asks
    # for it too.
    config.problem_type = "regression"
    # A model made with another padding token would count positions from another number. `Trainer` writes the tokenizer's into
    # the configuration whenever it starts to train.
    if (padding := padding_of_positions(model)) is not None:
        config.get_text_config().pad_token_id = padding


def windows_of_layers(config: Any) -> dict[str, int | None]:
    """
    Attention window of each kind of layer: the number of tokens that a token sees at most, itself included.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the text model.

    Returns:
        `dict[str, int | None]`: window by kind of layer, `None` without a limit. The kinds are those in `layer_types`.
        A model without `layer_types` has one kind, `"full_attention"`, with the window of all layers.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
