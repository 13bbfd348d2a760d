import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from trl.trainer.reward_trainer import DataCollatorForPreference

from .sequences import column_of, select_rows


# Columns that a training row has for the collator, the last three being optional.
TRAINING_COLUMNS = ("chosen_ids", "rejected_ids", "probability", "weight", "margin")


@dataclass
class ConfidenceFilteredDataCollator(DataCollatorForPreference):
    """
    Data collator for labeled and pseudo-labeled pairs. A pair with a pseudo-label that is not confident enough never
    influences a gradient.

    Besides `"chosen_ids"`, `"rejected_ids"` and, optionally, `"margin"`, an example can have the key `"probability"`:
    the probability that the sequence under `"chosen_ids"` is the preferred one, as a model sees it. `None`, or no such
    key, stands for a gold label. With the key `"weight"` it has a weight of its own. A pseudo-labeled pair is turned
    round if the other sequence is the preferred one, and
    left out of the batch if its confidence, `max(probability, 1 - probability)`, does not exceed the threshold. If no
    example passes, the first one stays, with weight 0, so that every process has a batch.

    If any example has the key `"probability"`, the returned dictionary has, besides the keys of
    [`~trl.trainer.reward_trainer.DataCollatorForPreference`]:
    - `"label"`: Tensor of shape `(batch,)`, float32. Target probability that the first sequence of the pair is
        preferred: 1 for a gold or hard label, the confidence for a soft one.
    - `"weight"`: Tensor of shape `(batch,)`, float32. Weight of the pair in the loss, 1 for a gold label.

    Args:
        pad_token_id (`int`):
            Token ID to use for padding.
        pad_to_multiple_of (`int`, *optional*):
            If set, the sequences will be padded to a multiple of this value.
        return_tensors (`str`, *optional*, defaults to `"pt"`):
            Type of Tensor to return. Only `"pt"` is currently supported.
        confidence_threshold (`float`, *optional*, defaults to `0.8`):
            Confidence that a pseudo-label has to exceed, in `[0.5, 1)`.
        pseudo_label_type (`str`, *optional*, defaults to `"hard"`):
            `"hard"` or `"soft"`.
        pseudo_label_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a pseudo-labeled pair that has none of its own.
        pseudo_label_smoothing (`float`, *optional*, defaults to `0.0`):
            How far the target of a pseudo-labeled pair is drawn to one half, in `[0, 1)`.
        comparison_seed (`int`, *optional*):
            If set, the two sequences of a pair are the two orders of a comparison, and a batch has one of them, drawn
            from the seed and the tokens: `"input_ids"` has shape `(batch, length)`, `"label"` is the target probability
            that the answer shown first is preferred, and a `"margin"` is turned round with the order.
        comparison_orders (`str`, *optional*, defaults to `"random"`):
            `"random"` for that; `"both"` gives both orders of each pair, the second half of the batch being the first
            half with the answers exchanged.

    Examples:
    ```python
    >>> from trl_ssrm import ConfidenceFilteredDataCollator

    >>> collator = ConfidenceFilteredDataCollator(pad_token_id=0, pseudo_label_type="soft")
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

    confidence_threshold: float = 0.8
    pseudo_label_type: str = "hard"
    pseudo_label_weight: float = 1.0
    pseudo_label_smoothing: float = 0.0
    comparison_seed: int | None = None
    comparison_orders: str = "random"

    def build_dataset(self, labeled: Dataset, pseudo_labeled: Dataset) -> Dataset:
        """
        Training data of a round: the labeled pairs, then the pseudo-labeled ones above the threshold.

        Args:
            labeled ([`~datasets.Dataset`]):
                Columns `chosen_ids`, `rejected_ids` and, optionally, `margin`.
            pseudo_labeled ([`~datasets.Dataset`]):
                Columns `chosen_ids`, `rejected_ids`, `probability` and, optionally, `weight`. Their margin is 0.

        Returns:
            [`~datasets.Dataset`]: rows for this collator, with a `probability` of `None` for the labeled ones.
        """
        probability = column_of(pseudo_labeled, "probability").astype(np.float64, copy=False)
        kept = select_rows(pseudo_labeled, np.flatnonzero(self._is_confident(probability)))
        own = ("chosen_ids", "rejected_ids", "margin")
        labeled = labeled.select_columns([name for name in own if name in labeled.column_names])
        features = Features({**labeled.features, "probability": Value("float64")})
        if "margin" in features:
            kept = kept.add_column("margin", np.zeros(len(kept)))
        if "weight" in kept.column_names:
            features = Features({**features, "weight": Value("float64")})
            labeled = labeled.add_column("weight", [1.0] * len(labeled))
        labeled = labeled.add_column("probability", [None] * len(labeled))
        parts = [part.select_columns(list(features)) for part in (labeled, kept)]
        return concatenate_datasets([part if part.features == features else part.cast(features) for part in parts])

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.comparison_seed is None and not any("probability" in example for example in examples):
            return super().torch_call(examples)
        probability = np.array(
            [1.0 if (value := example.get("probability")) is None else value for example in examples]
        )
        is_gold = np.array([example.get("probability") is None for example in examples])
        passes = is_gold | self._is_confident(probability)
        weight = np.where(is_gold, 1.0, self.pseudo_label_weight)
        for position, example in enumerate(examples):
            if example.get("weight") is not None:
                weight[position] = example["weight"]
        if not passes.any():
            passes[0], weight[0] = True, 0.0
        oriented = [
            {**example, "chosen_ids": example["rejected_ids"], "rejected_ids": example["chosen_ids"]}
            if probability[position] < 0.5
            else example
            for position, example in enumerate(examples)
            if passes[position]
        ]
        confidence = np.maximum(probability, 1 - probability)
        label = confidence if self.pseudo_label_type == "soft" else np.ones(len(examples))
        smoothing = np.where(is_gold, 0.0, self.pseudo_label_smoothing)
        label = (1 - smoothing) * label + smoothing / 2
        output = super().torch_call(oriented)
        output["label"] = torch.tensor(label[passes], dtype=torch.float)
        output["weight"] = torch.tensor(weight[passes], dtype=torch.float)
        if self.comparison_seed is None:
            return output
        return self._in_both_orders(output) if self.comparison_orders == "both" else self._in_one_order(output)

    def _in_one_order(self, pairs: dict[str, Any]) -> dict[str, Any]:
        """One of the two orders of each comparison; the first half of a batch shows the preferred answer first."""
        num_pairs = len(pairs["label"])
        rows = zip(pairs["input_ids"], pairs["attention_mask"], strict=True)
        draws = [_draw(self.comparison_seed, row[mask.bool()]) for row, mask in rows]
        # Drawn from the tokens of both, not from which of them is preferred.
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
        """Both orders of each comparison, all of those that show the preferred answer first before the others."""
        output = {
            **pairs,
            "label": torch.cat([pairs["label"], 1 - pairs["label"]]),
            "weight": pairs["weight"].repeat(2),
        }
        if "margin" in pairs:
            output["margin"] = torch.cat([pairs["margin"], -pairs["margin"]])
        return output

    def _is_confident(self, probability: np.ndarray) -> np.ndarray:
        return np.maximum(probability, 1 - probability) > self.confidence_threshold


def _draw(seed: int | None, input_ids: torch.Tensor) -> bytes:
    return hashlib.blake2b(f"{seed} {input_ids.tolist()}".encode(), digest_size=8).digest()
