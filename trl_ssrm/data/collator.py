import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.trainer.reward_trainer import DataCollatorForPreference


@dataclass
class ConfidenceFilteredDataCollator(DataCollatorForPreference):
    """
    Data collator for labeled and pseudo-labeled pairs. A pseudo-label that is not confident enough never reaches a
    gradient.

    Besides `"chosen_ids"`, `"rejected_ids"` and, optionally, `"margin"`, an example can have the key `"probability"`:
    the probability that the sequence under `"chosen_ids"` is the preferred one, as a model predicts it. `None`, or no
    such key, marks a labeled pair. If the probability is below 0.5, the two sequences are exchanged. A pair is left out
    of the batch if its confidence, `max(probability, 1 - probability)`, does not exceed the threshold. If no example
    passes, the first one stays with weight 0, so that every process has a batch. A labeled pair whose key `"tie"` is true
    is one that people called a tie.

    If any example has the key `"probability"` or is a tie, the returned dictionary has, besides the keys of
    [`~trl.trainer.reward_trainer.DataCollatorForPreference`]:
    - `"label"`: Tensor of shape `(batch,)`, float32. Target probability that the first sequence of the pair is
        preferred: 1 for a labeled pair or a hard pseudo-label, the confidence for a soft one, 0.5 for a tie.
    - `"weight"`: Tensor of shape `(batch,)`, float32. Weight of the pair in the loss, 1 for a labeled pair.

    Args:
        pad_token_id (`int`):
            Token ID to use for padding.
        pad_to_multiple_of (`int`, *optional*):
            If set, the sequences will be padded to a multiple of this value.
        return_tensors (`str`, *optional*, defaults to `"pt"`):
            Type of Tensor to return. Only `"pt"` is currently supported.
        confidence_threshold (`float`, *optional*, defaults to `0.5`):
            Confidence that a pseudo-label has to exceed, in `[0.5, 1)`. 0.5 leaves out ties only: in a run, the selection
            of [`PseudoLabelingCallback`] has chosen the pairs already.
        pseudo_label_type (`str`, *optional*, defaults to `"hard"`):
            `"hard"` or `"soft"`.
        pseudo_label_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a pseudo-labeled pair.
        comparison_seed (`int`, *optional*):
            For a pairwise model: the two sequences of a pair are the two orders of a comparison, and a batch has one of
            them, drawn from this seed and the tokens. `"input_ids"` has shape `(batch, length)`, `"label"` is the target
            probability that the completion shown first is preferred, and a `"margin"` changes its sign with the order.
        comparison_orders (`str`, *optional*, defaults to `"random"`):
            `"random"` draws one order. `"both"` gives both orders of each pair: the second half of the batch is the first
            half with the completions exchanged.

    Examples:
    ```python
    >>> from trl_ssrm import ConfidenceFilteredDataCollator

    >>> collator = ConfidenceFilteredDataCollator(pad_token_id=0, confidence_threshold=0.8, pseudo_label_type="soft")
    >>> examples = [
    ...     {"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5], "probability": None},
    ...     {"chosen_ids": [6, 7], "rejected_ids": [8], "probability": 0.1},
    ...     {"chosen_ids": [9], "rejected_ids": [9, 9], "probability": 0.6},
    ... ]
    >>> collator(examples)
    {'input_ids': tensor([[1, 2, 3],
                          [8, 0, 0],
                          [4, 5, 0],
                          [6, 7, 0]]),
     'attention_mask': tensor([[1, 1, 1],
                               [1, 0, 0],
                               [1, 1, 0],
                               [1, 1, 0]]),
     'label': tensor([1.0000, 0.9000]),
     'weight': tensor([1., 1.])}
    ```
    """

    confidence_threshold: float = 0.5
    pseudo_label_type: str = "hard"
    pseudo_label_weight: float = 1.0
    comparison_seed: int | None = None
    comparison_orders: str = "random"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        is_tie = np.array([bool(example.get("tie")) for example in examples])
        is_plain = not is_tie.any() and not any("probability" in example for example in examples)
        if self.comparison_seed is None and is_plain:
            return super().torch_call(examples)
        given = [example.get("probability") for example in examples]
        is_labeled = np.array([value is None for value in given])
        probability = np.array([1.0 if value is None else value for value in given])
        confidence = np.maximum(probability, 1 - probability)
        weight = np.where(is_labeled, 1.0, self.pseudo_label_weight)
        passes = is_labeled | (confidence > self.confidence_threshold)
        if not passes.any():
            passes[0], weight[0] = True, 0.0
        label = confidence if self.pseudo_label_type == "soft" else np.ones(len(examples))
        label = np.where(is_labeled & is_tie, 0.5, label)
        kept = np.flatnonzero(passes)
        output = super().torch_call([_oriented(examples[place], probability[place]) for place in kept])
        output["label"] = torch.tensor(label[kept], dtype=torch.float)
        output["weight"] = torch.tensor(weight[kept], dtype=torch.float)
        if self.comparison_seed is None:
            return output
        return self._in_both_orders(output) if self.comparison_orders == "both" else self._in_one_order(output)

    def _in_one_order(self, pairs: dict[str, Any]) -> dict[str, Any]:
        """One of the two orders of each comparison. The first half of `pairs` shows the preferred completion first."""
        num_pairs = len(pairs["label"])
        rows = zip(pairs["input_ids"], pairs["attention_mask"], strict=True)
        draws = [_draw(self.comparison_seed, row[mask.bool()]) for row, mask in rows]
        # Drawn from the tokens of both, so that the label has no influence.
        is_turned = torch.tensor([draws[num_pairs + row] < draws[row] for row in range(num_pairs)])
        taken = torch.arange(num_pairs) + num_pairs * is_turned
        output = {name: pairs[name][taken] for name in ("input_ids", "attention_mask")}
        output["label"] = torch.where(is_turned, 1 - pairs["label"], pairs["label"])
        output["weight"] = pairs["weight"]
        if "margin" in pairs:
            output["margin"] = torch.where(is_turned, -pairs["margin"], pairs["margin"])
        return output

    @staticmethod
    def _in_both_orders(pairs: dict[str, Any]) -> dict[str, Any]:
        """Both orders of each comparison. The first half of the batch shows the preferred completion first."""
        output = {
            **pairs,
            "label": torch.cat([pairs["label"], 1 - pairs["label"]]),
            "weight": pairs["weight"].repeat(2),
        }
        if "margin" in pairs:
            output["margin"] = torch.cat([pairs["margin"], -pairs["margin"]])
        return output


def _oriented(example: dict[str, Any], probability: float) -> dict[str, Any]:
    """The pair with the sequence first that the probability prefers."""
    if probability >= 0.5:
        return example
    return {**example, "chosen_ids": example["rejected_ids"], "rejected_ids": example["chosen_ids"]}


def _draw(seed: int | None, input_ids: torch.Tensor) -> bytes:
    return hashlib.blake2b(f"{seed} {input_ids.tolist()}".encode(), digest_size=8).digest()
