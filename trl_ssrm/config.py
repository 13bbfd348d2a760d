from dataclasses import dataclass, field
from typing import Any

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
        keep_best_round (`bool`, *optional*):
            Whether to end with the weights of the round that has the lowest log-loss, at the fitted temperature, on
            `calibration_dataset` or else on the parts left out by `num_folds` or else on `eval_dataset`, the first if
            there are several. Otherwise the last round is kept. If `None`, it is done where one of the first two is
            there, so that rounds which make the model worse do no harm.
        round_patience (`int`, *optional*):
            Number of rounds without a lower log-loss, measured as for `keep_best_round`, after which the rounds end. If
            `None`, they go on.
        num_folds (`int`, *optional*):
            Number of parts into which the labeled pairs are split, by prompt. The rounds are then done as many times
            more, each time without one part; what these models say of the part left out calibrates the confidence,
            chooses the best round and finds the threshold for `target_precision`, and no label is lost to it. `0`, or
            at least 2. Training and scoring cost as many times more. If `None`, it is 5, or the number of prompts if
            that is less, where nothing else calibrates: with `calibration_dataset` it is 0, and also where the models of
            the folds can't do what that of the round does (a teacher, or a callback with a `score` of its own, labels
            the pool, or `load_best_model_at_end` evaluates it).

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
        comparison_orders (`str`, *optional*, defaults to `"random"`):
            Order in which a pairwise model is trained on a pair: `"random"` is one of the two, drawn from the seed, as
            in the paper, `"both"` shows the pair twice, which costs twice the tokens and teaches that the order says
            nothing.
        require_order_agreement (`bool`, *optional*, defaults to `False`):
            Whether a pair is kept only if a pairwise model prefers the same completion in both orders.
        freeze_backbone (`bool`, *optional*, defaults to `False`):
            Whether to train the score head alone. What the rest of the model makes of a sequence is computed once and
            kept in memory, hidden size times 4 bytes a sequence, so that rounds take seconds.

        > Parameters that control the unlabeled pool

        pool_per_round (`str`, *optional*, defaults to `"full"`):
            Part of the pool that a round labels: `"full"` is all of it every time, `"shard"` is a fresh share, one of
            `num_rounds` disjoint ones split by row.
        max_unlabeled_samples (`int`, *optional*):
            Number of rows taken from the head of `unlabeled_dataset`. Required for an [`~datasets.IterableDataset`].

        > Parameters that control the speed

        score_batch_tokens (`int`, *optional*):
            Size of a scoring batch in tokens, padding included. A longer sequence is a batch of its own. It does not
            change the scores. If `None`, it is 4,096 on a CPU, and on an accelerator 16,384 to begin with and more where
            that fits into its memory; in any case it is halved where a batch does not fit.
        share_prompts (`bool`, *optional*):
            Whether what two completions have in common, their prompt, is computed once, in scoring and in training, where
            the model allows it (a decoder with `attn_implementation` `"sdpa"` or `"eager"`) and a quarter of the tokens
            is saved. With flash attention batches are packed without padding instead. Rewards and losses are the same
            but for rounding. If `None`, scoring does it, and training does with a pool.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to score the pool with vLLM, which has to be installed. An engine is started over the weights of each
            model that scores it, and ended before training goes on. Rewards are the same but for rounding.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU memory that vLLM may take beside what training holds, in `(0, 1]`; without a GPU, of the
            memory.

        > Parameters that control the selection

        confidence_threshold (`float`, *optional*):
            A pair is kept if the confidence in its pseudo-label, `sigmoid(|z| / temperature)` with `z` the pair logit
            (of a scalar model the difference of the two rewards), is strictly greater. In `[0.5, 1)`; 0.5 keeps all. If
            `None`, and none of the next three is set either, it is as with `target_precision=0.9` where there are enough
            held-out labels to vouch for that, 25 at least, and 0.8 otherwise.
        target_precision (`float`, *optional*):
            Share of right pseudo-labels to reach, instead of `confidence_threshold`: the threshold is the lowest one
            above which the held-out labels, those of `calibration_dataset` or of the parts left out by `num_folds`, are
            predicted right that often, at the lower end of a one-sided 95 % interval. In `(0.5, 1)`.
        selected_fraction (`float`, *optional*):
            Share of the pairs to keep, instead of `confidence_threshold`: the most confident ones of those that agreement
            and `max_pairs_per_prompt` leave. In `(0, 1]`.
        adaptive_threshold (`bool`, *optional*, defaults to `False`):
            Whether the threshold is, instead of `confidence_threshold`, the mean confidence on the pool, averaged over
            the rounds, as in [FreeMatch](https://huggingface.co/papers/2205.07246).
        second_opinion (`str`, *optional*):
            Who labels the pool beside the model of the round: `"first_round"` is the labeled-only model, `"folds"` are
            the models of `num_folds`, `"none"` is nobody. The probability of a pseudo-label is the mean of theirs. If
            `None`, the models of the folds are asked where there are any, since they label the pool in any case; not with
            `debias_pseudo_labels`.
        require_agreement (`bool`, *optional*, defaults to `True`):
            Whether a pair is kept only if everyone in `second_opinion` prefers the same completion.
        max_pairs_per_prompt (`int`, *optional*):
            Number of pairs of a prompt that are considered, the most confident ones. With `1` and several completions a
            prompt it is the best against the worst, as in [West-of-N](https://huggingface.co/papers/2401.12086), with
            `selected_fraction` as its quantile.
        balance_by (`list[str]`, *optional*):
            What the kept pairs should look like the pool in: `"length"` is the difference in length between the
            preferred and the other completion, `"prompt"` the prompt, anything else a column of `unlabeled_dataset`.
            No group gets more than its share of what was selected; its least confident pairs are left out.

        > Parameters that control the pseudo-labels

        pseudo_label_type (`str`, *optional*, defaults to `"hard"`):
            Target that a kept pair is trained on: `"hard"` is 1 for the preferred completion, `"soft"` is the
            confidence itself.
        pseudo_label_smoothing (`float`, *optional*, defaults to `0.0`):
            How far the target of a kept pair is drawn to one half, in `[0, 1)`: a target `p` becomes
            `(1 - smoothing) * p + smoothing / 2`.
        pseudo_label_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a kept pair in the loss; a labeled pair weighs 1. At least 0. With `debias_pseudo_labels` the
            weight of all of them together, the labeled pairs together weighing 1; in `[0, 1]` then.
        pseudo_label_warmup_rounds (`int`, *optional*, defaults to `0`):
            Number of rounds over which `pseudo_label_weight` rises to its full value, in equal steps.
        debias_pseudo_labels (`bool`, *optional*, defaults to `False`):
            Whether to subtract the loss that pseudo-labels have on the labeled pairs, so that what is wrong with them
            on average cancels, as in [prediction-powered
            inference](https://huggingface.co/papers/2301.09633): the loss is that of the labels, plus that of the
            pseudo-labels of the pool, minus that of the pseudo-labels of the labeled pairs. Those have to come from models
            that have not seen their labels, so it needs `num_folds`, whose own models go without the last term; and what
            is subtracted has to be chosen as what is added is, so it takes a threshold alone.
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
    keep_best_round: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to end with the weights of the round that has the lowest held-out log-loss. If `None`, "
            "where `calibration_dataset` or `num_folds` is there to choose by."
        },
    )
    round_patience: int | None = field(
        default=None,
        metadata={"help": "Number of rounds without a lower held-out log-loss after which the rounds end."},
    )
    num_folds: int | None = field(
        default=None,
        metadata={
            "help": "Number of parts of the labeled pairs; the rounds are done as many times more, each time without one "
            "part, which calibrates the confidence. If `None`, 5 where there is no `calibration_dataset`."
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
    comparison_orders: str = field(
        default="random",
        metadata={
            "help": "Order in which a pairwise model is trained on a pair: one of the two, drawn from the seed, or both.",
            "choices": ["random", "both"],
        },
    )
    require_order_agreement: bool = field(
        default=False,
        metadata={"help": "Whether a pairwise model has to prefer the same completion in both orders."},
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
            "help": "Whether the prompt of two completions is computed once. If `None`, in scoring and, with a pool, in "
            "training."
        },
    )
    use_vllm: bool = field(
        default=False,
        metadata={"help": "Whether to score the pool with vLLM, which has to be installed."},
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={"help": "Share of the GPU memory that vLLM may take beside what training holds."},
    )

    # Parameters that control the selection
    confidence_threshold: float | None = field(
        default=None,
        metadata={
            "help": "A pair is kept if the confidence in its pseudo-label is strictly greater. In [0.5, 1). If `None`, as "
            "with `target_precision=0.9` where enough labels are held out, 0.8 otherwise."
        },
    )
    target_precision: float | None = field(
        default=None,
        metadata={
            "help": "Share of right pseudo-labels to reach, instead of `confidence_threshold`, as far as held-out labels "
            "can tell. In (0.5, 1)."
        },
    )
    selected_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of the pool to keep, instead of `confidence_threshold`. In (0, 1]."},
    )
    adaptive_threshold: bool = field(
        default=False,
        metadata={"help": "Whether the threshold is, instead of `confidence_threshold`, the mean confidence."},
    )
    second_opinion: str | None = field(
        default=None,
        metadata={
            "help": "Who labels the pool beside the model of the round: the labeled-only model, or those of `num_folds`.",
            "choices": ["none", "first_round", "folds"],
        },
    )
    require_agreement: bool = field(
        default=True,
        metadata={"help": "Whether a pair is kept only if everyone in `second_opinion` prefers the same completion."},
    )
    max_pairs_per_prompt: int | None = field(
        default=None,
        metadata={"help": "Number of pairs of a prompt that are considered, the most confident ones."},
    )
    balance_by: list[str] | None = field(
        default=None,
        metadata={
            "help": "What the kept pairs should look like the pool in: `length`, `prompt`, or columns of the pool."
        },
    )

    # Parameters that control the pseudo-labels
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
    pseudo_label_smoothing: float = field(
        default=0.0,
        metadata={"help": "How far the target of a kept pair is drawn to one half, in [0, 1)."},
    )
    pseudo_label_warmup_rounds: int = field(
        default=0,
        metadata={"help": "Number of rounds over which `pseudo_label_weight` rises to its full value."},
    )
    debias_pseudo_labels: bool = field(
        default=False,
        metadata={"help": "Whether to subtract the loss that pseudo-labels have on the labeled pairs."},
    )
    track_pseudo_label_accuracy: bool = field(
        default=False,
        metadata={
            "help": "Whether to compare the pseudo-labels with the gold labels in `unlabeled_dataset`, for metrics only."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in (
            *("round_init", "preference_model", "comparison_orders", "pool_per_round"),
            *("second_opinion", "pseudo_label_type"),
        ):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices and (name, getattr(self, name)) != ("second_opinion", None):
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")
        # Each row: parameter, its range as a test (NaN passes none), and in words. `None` is checked by its type alone.
        for name, is_valid, words in (
            ("num_rounds", lambda value: value >= 0, "at least 0"),
            ("round_num_train_epochs", lambda value: value > 0, "positive"),
            ("max_unlabeled_samples", lambda value: value > 0, "positive"),
            ("score_batch_tokens", lambda value: value > 0, "positive"),
            ("vllm_gpu_memory_utilization", lambda value: 0 < value <= 1, "in (0, 1]"),
            ("round_patience", lambda value: value > 0, "positive"),
            ("num_folds", lambda value: value == 0 or value >= 2, "0 or at least 2"),
            ("confidence_threshold", lambda value: 0.5 <= value < 1, "in [0.5, 1)"),
            ("target_precision", lambda value: 0.5 < value < 1, "in (0.5, 1)"),
            ("selected_fraction", lambda value: 0 < value <= 1, "in (0, 1]"),
            ("max_pairs_per_prompt", lambda value: value > 0, "positive"),
            ("pseudo_label_smoothing", lambda value: 0 <= value < 1, "in [0, 1)"),
            ("pseudo_label_warmup_rounds", lambda value: value >= 0, "at least 0"),
            ("pseudo_label_weight", lambda value: 0 <= value < float("inf"), "at least 0 and finite"),
        ):
            value = getattr(self, name)
            if value is not None and not is_valid(value):
                raise ValueError(f"`{name}` must be {words}, got {value}.")
        thresholds = {
            "target_precision": self.target_precision is not None,
            "selected_fraction": self.selected_fraction is not None,
            "adaptive_threshold": self.adaptive_threshold,
        }
        if len(chosen := [name for name, is_set in thresholds.items() if is_set]) > 1:
            raise ValueError(f"`{chosen[0]}` and `{chosen[1]}` both choose the threshold; set one of them.")
        if self.second_opinion == "folds" and self.num_folds == 0:
            raise ValueError("`second_opinion='folds'` needs `num_folds`, the number of models to ask.")
        if self.debias_pseudo_labels and self.num_folds == 0:
            raise ValueError(
                "`debias_pseudo_labels` needs `num_folds`: what a model says of pairs that it was trained on has no bias."
            )
        beside = ("max_pairs_per_prompt", "balance_by", "require_order_agreement")
        if self.debias_pseudo_labels and (
            self.second_opinion in ("first_round", "folds") or any(getattr(self, name) for name in beside)
        ):
            raise ValueError(
                "`debias_pseudo_labels` selects by a threshold alone; leave out `second_opinion`, "
                f"{', '.join(f'`{name}`' for name in beside)}."
            )
        if self.num_folds and self.load_best_model_at_end:
            raise ValueError(
                "`num_folds` trains models that nothing is evaluated on, and `load_best_model_at_end` needs that; set one."
            )
        if self.preference_model == "pairwise" and "length" in (self.balance_by or []):
            raise ValueError(
                "`balance_by` can't tell the lengths of the two answers in a comparison; leave 'length' out."
            )
        if self.freeze_backbone and self.neftune_noise_alpha is not None:
            raise ValueError(
                "`neftune_noise_alpha` adds noise to what `freeze_backbone` computes once; leave one out."
            )
        if self.use_vllm and self.freeze_backbone:
            raise ValueError(
                "`use_vllm` runs the whole model, of which `freeze_backbone` keeps the outcome; leave one out."
            )
        if self.debias_pseudo_labels and self.pseudo_label_weight > 1:
            raise ValueError(
                f"`pseudo_label_weight` must be in [0, 1] with `debias_pseudo_labels`, got {self.pseudo_label_weight}."
            )
        if len(self.comparison_labels) != 2 or not all(self.comparison_labels):
            raise ValueError(f"`comparison_labels` must be two labels, got {self.comparison_labels}.")
        if self.require_order_agreement and self.preference_model != "pairwise":
            raise ValueError("`require_order_agreement` needs `preference_model='pairwise'`, which has two orders.")
        if self.preference_model == "pairwise" and self.center_rewards_coefficient is not None:
            raise ValueError(
                "`center_rewards_coefficient` centers rewards, and a pairwise model has none; leave it out."
            )

    @classmethod
    def paper(cls, *args: Any, **kwargs: Any) -> "SSRMConfig":
        """
        The settings of [Semi-Supervised Reward Modeling](https://huggingface.co/papers/2409.06903) in its released code:
        every round labels the whole pool with the model of the round before, keeps the pairs with a confidence above 0.8
        as they are, and goes on from its weights.

        Args:
            args, kwargs (`Any`):
                As for [`SSRMConfig`]; what is given here wins.

        Returns:
            [`SSRMConfig`]
        """
        return cls(*args, **{**_PAPER, **kwargs})


_PAPER: dict[str, Any] = {
    "num_rounds": 3,
    "round_init": "continue",
    "keep_best_round": False,
    "num_folds": 0,
    "pool_per_round": "full",
    "confidence_threshold": 0.8,
    "second_opinion": "none",
    "pseudo_label_type": "hard",
    "pseudo_label_weight": 1.0,
}
