"""A linear reward on what the layers of a model say of a sequence, in place of the model's own score."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .classifier import classifier_of


# Number of layers that are read, evenly over the depth, the last one included.
NUM_LAYERS_READ = 3


def mean_states(hidden_states: tuple[torch.Tensor, ...], is_token: torch.Tensor) -> torch.Tensor:
    """
    What some of the layers say of each sequence: the mean over its tokens of their hidden states, each of length 1, so that no
    token and no layer outweighs the others.

    Args:
        hidden_states (`tuple[torch.Tensor, ...]` of shape `(num_sequences, num_tokens, hidden_size)` each):
            Hidden states before the first layer and after each.
        is_token (`torch.Tensor` of shape `(num_sequences, num_tokens)`):
            1 for a token, 0 for padding.

    Returns:
        `torch.Tensor` of shape `(num_sequences, NUM_LAYERS_READ * hidden_size)`, float32.
    """
    deepest, weight = len(hidden_states) - 1, is_token.float()[..., None]
    means = []
    for layer in (deepest * third // NUM_LAYERS_READ for third in range(1, NUM_LAYERS_READ + 1)):
        states = nn.functional.normalize(hidden_states[layer].float(), dim=-1)
        means.append((states * weight).sum(1) / weight.sum(1))
    return torch.cat(means, dim=1)


class NoStatesError(ValueError):
    """A model gives no hidden state of each token, as some encoders that shorten their sequences."""


@contextlib.contextmanager
def scoring_by_states(model: Any, score: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """
    Within this context, the logits of a classifier are a function of its [`mean_states`], or all 0 if it gives no hidden state of each
    token.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Sequence classifier.
        score (`Callable[[torch.Tensor], torch.Tensor]`):
            Gets the mean states of a batch, and returns one row of logits for each sequence.

    Yields:
        `list[torch.Tensor]`: the logits for which there were no hidden states. One process may see them and the next one, which has
        nothing to score, not.
    """
    without_states: list[torch.Tensor] = []

    def ask_for_states(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "output_hidden_states": True}

    def replace_logits(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        is_token, states = kwargs["attention_mask"], getattr(output, "hidden_states", None) or ()
        if not states or any(each.shape[:2] != is_token.shape for each in states):
            output.logits = torch.zeros_like(is_token[:, :1], dtype=torch.float32)
            without_states.append(output.logits)
            return output
        output.logits = score(mean_states(states, is_token))
        output.hidden_states = None
        return output

    classifier = classifier_of(model)
    handles = [
        classifier.register_forward_pre_hook(ask_for_states, with_kwargs=True),
        # Before the hooks of a launcher, which read the output.
        classifier.register_forward_hook(replace_logits, with_kwargs=True, prepend=True),
    ]
    try:
        yield without_states
    finally:
        for handle in handles:
            handle.remove()
