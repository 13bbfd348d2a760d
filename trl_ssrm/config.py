from dataclasses import dataclass, field

from trl import RewardConfig


@dataclass
class SSRMConfig(RewardConfig):
    r"""
    Configuration class for the [`SSRMTrainer`].

    This class includes only the parameters that are specific to semi-supervised reward modeling. For the others, see
    [`~trl.RewardConfig`] and [`~transformers.TrainingArguments`]: they apply to every round alike, but for the length
    of a round.

    Parameters:
        > Parameters that control the rounds

        num_rounds (`int`, *optional*, defaults to `3`):
            Number of rounds after round 0, which trains on the labeled pairs alone. `0` is supervised training.
        round_init (`str`, *optional*, defaults to `"continue"`):
            Weights that a round starts from: `"continue"` goes on from the weights of the round before, `"base"`
            starts again from the weights that the trainer was given.
        round_num_train_epochs (`float`, *optional*):
            Number of epochs of each round after round 0, over labeled and kept pairs together. `num_train_epochs` is
            the length of round 0. If `None`, later rounds are as long as round 0 is told to be, in epochs or, with
            `max_steps`, in steps. If set, `max_steps` bounds round 0 only.
        keep_best_round (`bool`, *optional*, defaults to `False`):
            Whether to end with the weights of the round that has the lowest log-loss on `calibration_dataset` or,
            without one, on `eval_dataset`, the first if there are several. Otherwise the last round is kept.

        > Parameters that control the preference model

        preference_model (`str`, *optional*, defaults to `"scalar"`):
            What the model reads: `"scalar"` is one completion at a time, to which it gives a reward; `"pairwise"` is a
            prompt with two completions, of which it says which is better, as in the paper. A pairwise model is started
            from a causal language model and asked in both orders.
        comparison_template (`str`, *optional*):
            Jinja template of what a pairwise model reads, with `messages`, `responses` and `labels`; see
            [`Comparison`]. Default: that of the paper's released code.
        comparison_labels (`list[str]`, *optional*, defaults to `["A", "B"]`):
            What a pairwise model answers, each one token.
        comparison_add_generation_prompt (`bool`, *optional*, defaults to `True`):
            Whether a comparison ends with the start of the model's turn. The paper's released code leaves it out.
        require_order_agreement (`bool`, *optional*, defaults to `False`):
            Whether a pair is kept only if a pairwise model prefers the same completion in both orders.

        > Parameters that control the unlabeled pool

        pool_per_round (`str`, *optional*, defaults to `"full"`):
            Part of the pool that a round labels: `"full"` is all of it every time, `"shard"` is a fresh share, one of
            `num_rounds` disjoint ones split by row.
        max_unlabeled_samples (`int`, *optional*):
            Number of rows taken from the head of `unlabeled_dataset`. Required for an [`~datasets.IterableDataset`].
        score_batch_tokens (`int`, *optional*, defaults to `16384`):
            Size of a scoring batch in tokens, padding included. A longer sequence is a batch of its own. It does not
            change the scores.

        > Parameters that control the pseudo-labels

        confidence_threshold (`float`, *optional*, defaults to `0.8`):
            A pair is kept if the confidence in its pseudo-label, `sigmoid(|z| / temperature)` with `z` the pair logit
            (of a scalar model the difference of the two rewards), is strictly greater. In `[0.5, 1)`.
        pseudo_label_type (`str`, *optional*, defaults to `"hard"`):
            Target that a kept pair is trained on: `"hard"` is 1 for the preferred completion, `"soft"` is the
            confidence itself.
        pseudo_label_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a kept pair in the loss; a labeled pair weighs 1. At least 0.
        track_pseudo_label_accuracy (`bool`, *optional*, defaults to `False`):
            Whether to compare the pseudo-labels with the gold labels in `unlabeled_dataset` and log the accuracy. The
            gold labels reach nothing else.
    """

    # Parameters that control the rounds
    num_rounds: int = field(
        default=3,
        metadata={"help": "Number of rounds after round 0, which trains on the labeled pairs alone."},
    )
    round_init: str = field(
        default="continue",
        metadata={
            "help": "Weights that a round starts from: those of the round before, or the initial ones.",
            "choices": ["continue", "base"],
        },
    )
    round_num_train_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Number of epochs of each round after round 0, over labeled and kept pairs together. If `None`, "
            "later rounds are as long as round 0 is told to be."
        },
    )
    keep_best_round: bool = field(
        default=False,
        metadata={
            "help": "Whether to end with the weights of the round that has the lowest log-loss on "
            "`calibration_dataset` or, without one, on `eval_dataset`."
        },
    )

    # Parameters that control the preference model
    preference_model: str = field(
        default="scalar",
        metadata={
            "help": "What the model reads: one completion, to which it gives a reward, or two, of which it says which "
            "is better.",
            "choices": ["scalar", "pairwise"],
        },
    )
    comparison_template: str | None = field(
        default=None,
        metadata={
            "help": "Jinja template of what a pairwise model reads. Default: that of the paper's released code."
        },
    )
    comparison_labels: list[str] = field(
        default_factory=lambda: ["A", "B"],
        metadata={"help": "What a pairwise model answers, each one token."},
    )
    comparison_add_generation_prompt: bool = field(
        default=True,
        metadata={"help": "Whether a comparison ends with the start of the model's turn."},
    )
    require_order_agreement: bool = field(
        default=False,
        metadata={"help": "Whether a pairwise model has to prefer the same completion in both orders."},
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
    score_batch_tokens: int = field(
        default=16384,
        metadata={"help": "Size of a scoring batch in tokens, padding included."},
    )

    # Parameters that control the pseudo-labels
    confidence_threshold: float = field(
        default=0.8,
        metadata={"help": "A pair is kept if the confidence in its pseudo-label is strictly greater. In [0.5, 1)."},
    )
    pseudo_label_type: str = field(
        default="hard",
        metadata={
            "help": "Target that a kept pair is trained on: 1 for the preferred completion, or the confidence.",
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
            "help": "Whether to compare the pseudo-labels with the gold labels in `unlabeled_dataset`, for metrics only."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("round_init", "preference_model", "pool_per_round", "pseudo_label_type"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        # Each row: parameter, its range as a test (NaN passes none), and in words. `None` is checked by its type alone.
        for name, is_valid, words in (
            ("num_rounds", lambda value: value >= 0, "at least 0"),
            ("round_num_train_epochs", lambda value: value > 0, "positive"),
            ("max_unlabeled_samples", lambda value: value > 0, "positive"),
            ("score_batch_tokens", lambda value: value > 0, "positive"),
            ("confidence_threshold", lambda value: 0.5 <= value < 1, "in [0.5, 1)"),
            ("pseudo_label_weight", lambda value: 0 <= value < float("inf"), "at least 0 and finite"),
        ):
            value = getattr(self, name)
            if value is not None and not is_valid(value):
                raise ValueError(f"`{name}` must be {words}, got {value}.")
        if len(self.comparison_labels) != 2 or not all(self.comparison_labels):
            raise ValueError(f"`comparison_labels` must be two labels, got {self.comparison_labels}.")
        if self.require_order_agreement and self.preference_model != "pairwise":
            raise ValueError("`require_order_agreement` needs `preference_model='pairwise'`, which has two orders.")
        if self.preference_model == "pairwise" and self.center_rewards_coefficient is not None:
            raise ValueError(
                "`center_rewards_coefficient` centers rewards, and a pairwise model has none; leave it out."
            )
