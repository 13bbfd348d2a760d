from dataclasses import dataclass, field
from typing import Any

from trl import RewardConfig


@dataclass
class SSRMConfig(RewardConfig):
    r"""
    Configuration class for the [`SSRMTrainer`].

    This class includes only the parameters that are specific to semi-supervised reward modeling. For the others, see
    [`~trl.RewardConfig`] and [`~transformers.TrainingArguments`]. They apply to every round.

    Parameters:
        > Parameters that control the rounds

        num_rounds (`int`, *optional*, defaults to `1`):
            Number of rounds after round 0. Round 0 trains on the labeled pairs alone. With `0`, no pair of the pool is labeled.
        round_init (`str`, *optional*, defaults to `"base"`):
            Weights that a round starts from. `"continue"` takes the weights of the round before. `"base"` starts where round 0
            has started: from the pretrained weights if pretraining is used, otherwise from those that the trainer was given.
        round_num_train_epochs (`float`, *optional*):
            Number of epochs of each round after round 0, over labeled and kept pairs together. `max_steps` then bounds
            round 0 only. If `None`, it is 2, or `num_train_epochs` if that is less; with `max_steps`, each round has that
            many steps.
        round_learning_rate (`float`, *optional*):
            Learning rate of each round after round 0. A round that starts where round 0 started, on soft labels of the
            whole pool, can be trained faster than a hundred labels: five times the learning rate for one epoch was best in
            first experiments, which no benchmark repeats yet. If `None`, it is `learning_rate`.
        pretrain_on_pool (`bool`, *optional*):
            Whether the weights that all rounds start from are first trained on the texts of the pool, to prefer a completion
            of a prompt to one of another prompt (arXiv 2603.02225): for one epoch, or for `max_steps`, if that is set and
            `round_num_train_epochs` is not. No label is read. If `None`, it is done and the labels decide: its weights are used
            if they rank more than half of the labeled pairs right before they have seen a label, and if the labels favor them
            by 2 nats (odds of 7 to 1); see [`~trl_ssrm.rounds.pretraining.Pretraining.choose_start`]. `None` is `False` with
            `num_folds=0` or `freeze_backbone`, and, unless `num_folds` is set, with `load_best_model_at_end`, a teacher, or a
            callback with a `score` of its own.
        keep_best_round (`bool`, *optional*):
            Whether to end with the weights of the round with the lowest log-loss at the fitted temperature on
            `calibration_dataset`. `eval_dataset` never chooses the round. If `False`, the last round is kept. If `None`, it
            is `True` with `calibration_dataset`.
        num_folds (`int`, *optional*):
            Number of parts into which the labeled pairs are split, by prompt. For each part one more model is trained on
            the labels without it, before round 0; the pool is not read. The predictions of these models on the parts that
            they have not seen calibrate the confidence of round 0 and find the threshold for `target_precision`;
            `calibration_dataset` takes their place if it is given. With one of the two, and soft labels, a linear model on the hidden
            states helps to label the pool, unless pretraining is clearly better. Round 0 costs `num_folds` times as much. Where linear
            models can't judge `pretrain_on_pool` (a pairwise model; more than 2,000 labels), fold models do, and round 0 costs
            `2 * num_folds - 1` times as much. `0`, or at least 2. If `None`, it is 3 (or the number of prompts, if lower),
            and 0 if nothing needs them, or with `load_best_model_at_end`, a teacher, or a callback with a `score` of its own.

        > Parameters that control the model

        preference_model (`str`, *optional*, defaults to `"scalar"`):
            What the model reads. A `"scalar"` model reads one completion and gives it a reward. A `"pairwise"` model
            reads a prompt with two completions and says which is better, as in the paper. It starts from a causal
            language model and is asked in both orders.
        comparison (`str`, *optional*):
            Path of a `comparison.json`, or of a directory that holds one, with the text that a pairwise model reads; see
            [`Comparison`]. If `None`, it is the one saved with the model, or else that of the paper's released code.
        comparison_orders (`str`, *optional*, defaults to `"random"`):
            Order in which a pairwise model is trained on a pair. `"random"` is one of the two, drawn from the seed, as in
            the paper. `"both"` trains on both, at twice the tokens; with few labels it is needed to unlearn a preference
            for one position.
        freeze_backbone (`bool`, *optional*, defaults to `False`):
            Whether to train the score head alone. The features of each sequence are computed once and kept in memory,
            hidden size times 4 bytes a sequence, so that rounds take seconds.

        > Parameters that control the unlabeled pool

        pool_per_round (`str`, *optional*, defaults to `"full"`):
            Part of the pool that a round labels. `"full"` is all of it. `"shard"` is one of `num_rounds` disjoint shares,
            split by row, a new one each round.
        max_unlabeled_samples (`int`, *optional*):
            Number of rows taken from the head of `unlabeled_dataset`. Required for an [`~datasets.IterableDataset`]. If
            `None`, all rows are taken.

        > Parameters that control the speed

        score_batch_tokens (`int`, *optional*):
            Size of a scoring batch in tokens, padding included. It does not change the scores. A longer sequence is a
            batch of its own. If `None`, it is 4,096 on a CPU; on an accelerator it starts at 16,384 and grows while it
            fits. A batch that does not fit into memory is halved.
        share_prompts (`bool`, *optional*):
            Whether the prompt of two completions is computed once, in scoring and in training. It is done where the model
            allows it (a decoder with `attn_implementation` `"sdpa"` or `"eager"`) and saves a quarter of the tokens; with
            flash attention batches are packed instead. Rewards and losses differ by rounding only. If `None`, scoring
            does it, and training does with a pool.

        > Parameters that control the selection. One of the two thresholds can be set. If neither is, all pairs
        but ties are kept with soft labels, and pairs with a confidence above 0.8 with hard ones.

        confidence_threshold (`float`, *optional*):
            A pair is kept if the confidence in its pseudo-label, `sigmoid(|z| / temperature)`, is strictly greater. `z`
            is the pair logit: for a scalar model, the difference of the two rewards. In `[0.5, 1)`; 0.5 keeps all but
            ties.
        target_precision (`float`, *optional*):
            Share of pseudo-labels that should be right. The threshold is the lowest one above which the held-out labels
            (`calibration_dataset`, or the parts left out by `num_folds`) are predicted right that often, by the lower end
            of a one-sided 95 % interval, each prompt counted once. Fold models find it after round 0 alone, and later rounds
            keep it. In `(0.5, 1)`.

        > Parameters that control the pseudo-labels

        pseudo_label_type (`str`, *optional*, defaults to `"soft"`):
            Target of a kept pair in training. `"hard"` is 1 for the preferred completion. `"soft"` is the confidence.
        pseudo_label_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a kept pair in the loss; a labeled pair weighs 1. At least 0.
        track_pseudo_label_accuracy (`bool`, *optional*, defaults to `False`):
            Whether to compare the pseudo-labels with the labels in `unlabeled_dataset` and log their accuracy. These
            labels are used for nothing else.
    """

    # Parameters that control the rounds
    num_rounds: int = field(
        default=1,
        metadata={"help": "Number of rounds after round 0, which trains on the labeled pairs alone."},
    )
    round_init: str = field(
        default="base",
        metadata={
            "help": "Weights that a round starts from: those of the round before, or those that round 0 has started from.",
            "choices": ["continue", "base"],
        },
    )
    round_num_train_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Number of epochs of each round after round 0, over labeled and kept pairs together. Default: 2, or "
            "`num_train_epochs` if that is less."
        },
    )
    round_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of each round after round 0. If `None`, `learning_rate`."},
    )
    pretrain_on_pool: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the model is first trained, without labels, to prefer a completion of a prompt to one of another "
            "prompt. Default: it is tried, and used if the labels confirm that it helps."
        },
    )
    keep_best_round: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to end with the round that has the lowest log-loss on `calibration_dataset`. Default: true if that "
            "is given."
        },
    )
    num_folds: int | None = field(
        default=None,
        metadata={
            "help": "Number of parts of the labeled pairs. One more model for each part is trained on the labels without "
            "it; these models calibrate the confidence. Default: 3, and 0 where nothing needs them."
        },
    )

    # Parameters that control the model
    preference_model: str = field(
        default="scalar",
        metadata={
            "help": "What the model reads: one completion, to which it gives a reward, or two, of which it says which "
            "is better.",
            "choices": ["scalar", "pairwise"],
        },
    )
    comparison: str | None = field(
        default=None,
        metadata={
            "help": "Path of a `comparison.json` with the text that a pairwise model reads. Default: the one saved with "
            "the model, or the paper's."
        },
    )
    comparison_orders: str = field(
        default="random",
        metadata={
            "help": "Order in which a pairwise model is trained on a pair: one of the two, drawn from the seed, or both.",
            "choices": ["random", "both"],
        },
    )
    freeze_backbone: bool = field(
        default=False,
        metadata={"help": "Whether to train the score head alone; the rest of the model runs once a sequence."},
    )

    # Parameters that control the unlabeled pool
    pool_per_round: str = field(
        default="full",
        metadata={
            "help": "Part of the pool that a round labels: all of it, or one of `num_rounds` disjoint shares.",
            "choices": ["full", "shard"],
        },
    )
    max_unlabeled_samples: int | None = field(
        default=None,
        metadata={"help": "Number of rows taken from the head of `unlabeled_dataset`. Required for a stream."},
    )

    # Parameters that control the speed
    score_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Size of a scoring batch in tokens, padding included. If `None`, what fits into memory."},
    )
    share_prompts: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the prompt of two completions is computed once. Default: true, in training only with a pool."
        },
    )

    # Parameters that control the selection
    confidence_threshold: float | None = field(
        default=None,
        metadata={"help": "A pair is kept if the confidence in its pseudo-label is strictly greater. In [0.5, 1)."},
    )
    target_precision: float | None = field(
        default=None,
        metadata={
            "help": "Share of pseudo-labels that should be right; held-out labels find the threshold. In (0.5, 1)."
        },
    )

    # Parameters that control the pseudo-labels
    pseudo_label_type: str = field(
        default="soft",
        metadata={
            "help": "Target of a kept pair: 1 for the preferred completion, or the confidence.",
            "choices": ["hard", "soft"],
        },
    )
    pseudo_label_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of a kept pair in the loss; a labeled pair weighs 1."},
    )
    track_pseudo_label_accuracy: bool = field(
        default=False,
        metadata={
            "help": "Whether to compare the pseudo-labels with the labels in `unlabeled_dataset`, for metrics only."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name, own in type(self).__dataclass_fields__.items():
            choices = own.metadata.get("choices")
            if name in SSRMConfig.__annotations__ and choices and getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        for name, (is_valid, words) in _RANGES.items():
            value = getattr(self, name)
            # NaN passes none of the tests. `None` is allowed where the type says so.
            if value is not None and not is_valid(value):
                raise ValueError(f"`{name}` must be {words}, got {value}.")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.confidence_threshold is not None and self.target_precision is not None:
            raise ValueError(
                "`confidence_threshold` and `target_precision` both choose the threshold; set one of them."
            )
        if self.num_folds and self.load_best_model_at_end:
            raise ValueError(
                "`num_folds` and `load_best_model_at_end` can't be combined: fold models are not evaluated during "
                "training. Set one of them."
            )
        if self.freeze_backbone and self.pretrain_on_pool:
            raise ValueError(
                "`pretrain_on_pool` trains the whole model, and `freeze_backbone` its head; leave one out."
            )
        if self.freeze_backbone and self.neftune_noise_alpha is not None:
            raise ValueError(
                "`freeze_backbone` computes features once, but `neftune_noise_alpha` adds new noise to them in every "
                "step; leave one out."
            )
        if self.preference_model == "pairwise" and self.center_rewards_coefficient is not None:
            raise ValueError(
                "`center_rewards_coefficient` centers rewards, but a pairwise model gives none; leave it out."
            )
        if self.preference_model == "scalar" and self.comparison is not None:
            raise ValueError("`comparison` is what a pairwise model reads; set `preference_model='pairwise'` with it.")

    @classmethod
    def paper(cls, *args: Any, **kwargs: Any) -> "SSRMConfig":
        """
        The settings of [Semi-Supervised Reward Modeling](https://huggingface.co/papers/2409.06903) in its released code:
        each of three rounds labels the whole pool with the model of the round before, keeps the pairs with a confidence above
        0.8 as hard labels, and goes on from its weights for one epoch. The model of the paper is pairwise: add
        `preference_model="pairwise"`.

        Args:
            args, kwargs (`Any`):
                As for [`SSRMConfig`]. They replace the paper's values.

        Returns:
            [`SSRMConfig`]
        """
        settings = {**_PAPER, **kwargs}
        if settings.get("target_precision") is not None:
            settings["confidence_threshold"] = kwargs.get("confidence_threshold")
        return cls(*args, **settings)


# Setting: test, and the range in words.
_RANGES: dict[str, Any] = {
    "num_rounds": (lambda value: value >= 0, "at least 0"),
    "round_num_train_epochs": (lambda value: value > 0, "positive"),
    "round_learning_rate": (lambda value: 0 < value < float("inf"), "positive and finite"),
    "max_unlabeled_samples": (lambda value: value > 0, "positive"),
    "score_batch_tokens": (lambda value: value > 0, "positive"),
    "num_folds": (lambda value: value == 0 or value >= 2, "0 or at least 2"),
    "confidence_threshold": (lambda value: 0.5 <= value < 1, "in [0.5, 1)"),
    "target_precision": (lambda value: 0.5 < value < 1, "in (0.5, 1)"),
    "pseudo_label_weight": (lambda value: 0 <= value < float("inf"), "at least 0 and finite"),
}

_PAPER: dict[str, Any] = {
    "num_rounds": 3,
    "round_init": "continue",
    "num_train_epochs": 1,
    "round_num_train_epochs": 1,
    "pretrain_on_pool": False,
    "keep_best_round": False,
    "num_folds": 0,
    "pool_per_round": "full",
    "confidence_threshold": 0.8,
    "pseudo_label_type": "hard",
    "pseudo_label_weight": 1.0,
}
