"""What a run would cost, counted on its tokenized data, before a step is made."""

import itertools
import time
from dataclasses import astuple, dataclass
from math import ceil

import numpy as np

from ..data.sequences import PairedSequences
from ..trainer import SSRMTrainer


@dataclass(frozen=True)
class Work:
    """
    What models read.

    Args:
        pairs (`int`, *optional*, defaults to `0`):
            Number of pairs.
        sequences (`int`, *optional*, defaults to `0`):
            Number of distinct sequences among them, counted for each model that reads them.
        tokens (`int`, *optional*, defaults to `0`):
            Number of tokens read, without padding.
    """

    pairs: int = 0
    sequences: int = 0
    tokens: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class RoundCost:
    """
    Cost of a round: the models of its folds are in it, evaluations and padding are not.

    Args:
        round (`int`):
            The round.
        num_models (`int`):
            Number of models that are trained.
        num_epochs (`float` or `None`):
            Number of times that each of them goes over its data; `None` if `max_steps` decides.
        training (`Work`):
            What they train on, once over.
        training_tokens (`int`):
            Tokens that training reads in all.
        is_exact (`bool`):
            Whether these two are exact; otherwise they are upper bounds, since the selection decides.
        scoring (`Work`):
            What is scored after the training: held-out pairs, parts left out by the folds, the next round's pool; in round 0
            labels and pool once more, if a linear model reads them.
    """

    round: int
    num_models: int
    num_epochs: float | None
    training: Work
    training_tokens: int
    is_exact: bool
    scoring: Work


NUM_TIMED_BATCHES = 3


def round_costs(trainer: SSRMTrainer) -> list[RoundCost]:
    """
    What each round of a run would cost.

    Args:
        trainer ([`SSRMTrainer`]):
            A trainer with a pool, which need not be trained. Its model labels the pool.

    Returns:
        `list[RoundCost]`: a cost a round. Scoring is exact if the rounds go on to the last one.
    """
    args, data, num_folds = trainer.args, trainer.data, trainer.folds.num_folds
    parts = [np.flatnonzero(trainer.folds.fold_of == fold) for fold in range(num_folds)]
    labeled = _reading_to_train(trainer, data.labeled_pairs)
    without = [np.setdiff1d(np.arange(len(data.labeled_pairs.first)), part) for part in parts]
    own_labels = [labeled, *(_reading_to_train(trainer, data.labeled_pairs.take(rest)) for rest in without)]
    shares = {round: data.pool.pairs.take(trainer.share_of_pool(round)) for round in range(1, args.num_rounds + 1)}
    costs = []
    for round in range(args.num_rounds + 1):
        # Fold models are trained before round 0, on labels alone.
        num_models = 1 + num_folds if round == 0 else 1
        training = sum(own_labels, Work()) if round == 0 else labeled
        if round > 0:
            training += _reading_to_train(trainer, shares[round])
        num_epochs = trainer.settings.num_train_epochs
        if round == 0:
            num_epochs = None if args.max_steps > 0 else args.num_train_epochs
        if num_epochs is None:
            longest = max(_pair_tokens(trainer, pairs).max() for pairs in [data.labeled_pairs, *shares.values()])
            tokens = args.max_steps * _batch(trainer) * int(longest) * num_models
        else:
            tokens = ceil(num_epochs * training.tokens)
        scoring = sum(map(_reading_to_score, data.held_out.values()), Work())
        if round == 0:
            scoring += sum((_reading_to_score(data.labeled_pairs.take(part)) for part in parts), Work())
        if round < args.num_rounds:
            scoring += _reading_to_score(shares[round + 1])
        if round == 0:
            scoring += _reading_for_linear_models(trainer, shares)
        # Which order of a comparison is read, and how long the pairs of a batch are, is not counted out.
        reads_one_order = trainer.comparison is not None and args.comparison_orders == "random"
        is_exact = round == 0 and num_epochs is not None and not reads_one_order
        costs.append(RoundCost(round, num_models, num_epochs, training, tokens, is_exact, scoring))
    return costs


def dry_run(trainer: SSRMTrainer) -> str:
    """
    What a run would do, for a person, after everything was checked that can be checked before it.

    Args:
        trainer ([`SSRMTrainer`]):
            A trainer with a pool.

    Returns:
        `str`: data, model, output directory, and a line of costs for each round.

    Raises:
        ValueError: If the output directory holds another run.
    """
    model, run, data = trainer.unwrapped_model, trainer.run, trainer.data
    state = "empty so far"
    if run.has_run:
        run.start(trainer.identity, resume=True)
        state = f"holds this run, with {run.num_finished} rounds over, round 0 included; the run would be resumed"
    sizes = {"labeled": len(data.labeled_pairs.first), "in the pool": len(data.pool)}
    sizes |= {name.replace("_", " "): len(pairs.first) for name, pairs in data.held_out.items()}
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    costs = round_costs(trainer)
    words, more_costs = _pretraining(trainer, costs[0])
    lines = [
        f"Pairs:  {', '.join(f'{count:,} {name}' for name, count in sizes.items())}",
        f"Model:  {type(model).__name__}, {trained:,} of {sum(each.numel() for each in parameters):,} parameters trained",
        f"Output: {trainer.args.output_dir}, {state}",
        "",
        *_table(costs, trainer.args.max_steps),
        "",
        f"Tokens of the rounds: {_mark(all(cost.is_exact for cost in costs))}"
        f"{sum(cost.training_tokens for cost in costs):,} to train, {sum(cost.scoring.tokens for cost in costs):,} to score.",
        *words,
        _duration(trainer, costs + more_costs),
        "Training columns: what all models of a round read in one epoch. ≤ marks an upper bound; the selection decides. Models: the "
        "model of the round and its fold models.",
    ]
    if trainer.args.freeze_backbone:
        every = [_reading_to_score(pairs) for pairs in data.all_pairs.values()]
        total = sum(every, Work())
        lines.append(
            f"The backbone is frozen: it reads {total.sequences:,} sequences ({total.tokens:,} tokens) once, and all else is "
            "the score head's."
        )
    lines.append("Data, model and settings are in order; nothing was trained.")
    return "\n".join(lines)


def _pretraining(trainer: SSRMTrainer, first: RoundCost) -> tuple[list[str], list[RoundCost]]:
    """
    What pretraining adds, in words, and as costs: its own, and that of fold models where they alone judge it. Which texts it pairs is
    not known before.
    """
    settings, args, pool = trainer.settings, trainer.args, trainer.data.pool
    if settings.pretrains == "never":
        return [], []
    num_pairs, mean = len(np.unique(pool.rows)), float(_pair_tokens(trainer, pool.pairs).mean())
    tokens = round(num_pairs * mean)
    line = f"Pretraining comes before: up to {num_pairs:,} pairs of texts, about {tokens:,} tokens."
    epochs = None if settings.num_train_epochs is None else 1
    if epochs is None:
        tokens = round(args.max_steps * _batch(trainer) * mean)
    costs = [RoundCost(first.round, 1, epochs, Work(pairs=num_pairs), tokens, False, Work())]
    num_folds = first.num_models - 1
    if settings.pretrains == "if_better" and not settings.fits_linear_model:
        line += f" If it may help, the {num_folds} fold models are trained a second time, from its weights."
    if settings.pretrains == "if_better" and not settings.fits_linear_model:
        pairs = first.training.pairs - len(trainer.data.labeled)
        tokens = round(first.training_tokens * pairs / first.training.pairs)
        costs.append(RoundCost(first.round, num_folds, first.num_epochs, Work(pairs=pairs), tokens, False, Work()))
    return [line], costs


def _batch(trainer: SSRMTrainer) -> int:
    """Pairs of a step."""
    args = trainer.args
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _duration(trainer: SSRMTrainer, costs: list[RoundCost]) -> str:
    """How long the run takes, from the time of a few batches of the labeled pairs in this process."""
    model, seconds, tokens = trainer.model, 0.0, 0
    model.train()
    for number, inputs in enumerate(itertools.islice(trainer.get_train_dataloader(), 1 + NUM_TIMED_BATCHES)):
        start = time.perf_counter()
        # Private in `Trainer`: what moves a batch to the device, as a step of training does.
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(inputs)))
        loss.backward()
        model.zero_grad()
        # The first batch is slower than the others.
        if number > 0 or len(trainer.train_dataset) <= trainer.args.train_batch_size:
            seconds += time.perf_counter() - start
            tokens += int(inputs["attention_mask"].sum())
    steps = sum(
        trainer.args.max_steps * cost.num_models
        if cost.num_epochs is None
        else ceil(cost.num_epochs * cost.training.pairs / _batch(trainer))
        for cost in costs
    )
    # A step reads a token three times as long as scoring does.
    read = sum(cost.training_tokens + cost.scoring.tokens / 3 for cost in costs)
    minutes = read * seconds / max(tokens, 1) / trainer.args.world_size / 60
    return f"Steps: about {steps:,} in all. Time: about {max(minutes, 0.1):.1f} minutes, by the speed of {NUM_TIMED_BATCHES} batches here."


def _table(costs: list[RoundCost], max_steps: int) -> list[str]:
    groups = ["", "", "", "training", "", "", "scoring", "", ""]
    titles = ["round", "models", "epochs", "pairs", "sequences", "tokens", "pairs", "sequences", "tokens"]
    rows = [groups, titles]
    for cost in costs:
        length = f"{max_steps} steps" if cost.num_epochs is None else f"{cost.num_epochs:g}"
        # What is read once over is known but for the selection.
        mark = _mark(cost.round == 0)
        training = [f"{mark}{number:,}" for number in astuple(cost.training)]
        scoring = [f"{number:,}" for number in astuple(cost.scoring)]
        rows.append([str(cost.round), str(cost.num_models), length, *training, *scoring])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _mark(is_exact: bool) -> str:
    return "" if is_exact else "≤ "


def _reading_for_linear_models(trainer: SSRMTrainer, shares: dict[int, PairedSequences]) -> Work:
    """They read the labels under each start, and the pool if one of them helps to label it."""
    settings = trainer.settings
    num_starts = 2 if settings.pretrains == "if_better" else int(settings.linear_model_labels_pool)
    if not settings.fits_linear_model or not num_starts:
        return Work()
    work = sum([_reading_to_score(trainer.data.labeled_pairs)] * num_starts, Work())
    return work + _reading_to_score(shares[1]) if settings.linear_model_labels_pool else work


def _reading_to_score(pairs: PairedSequences) -> Work:
    # Scoring reads a sequence once.
    return Work(len(pairs.first), len(pairs.lengths), int(pairs.lengths.sum()))


def _reading_to_train(trainer: SSRMTrainer, pairs: PairedSequences) -> Work:
    tokens = _pair_tokens(trainer, pairs)
    reads_one = trainer.comparison is not None and trainer.args.comparison_orders == "random"
    sequences = min(len(pairs.lengths), len(tokens) * (1 if reads_one else 2))
    return Work(len(tokens), sequences, int(tokens.sum()))


def _pair_tokens(trainer: SSRMTrainer, pairs: PairedSequences) -> np.ndarray:
    """`np.ndarray` of shape `(num_pairs,)`, int64: tokens that training reads of each pair, at most."""
    both = np.stack([pairs.lengths[pairs.first], pairs.lengths[pairs.second]])
    reads_one = trainer.comparison is not None and trainer.args.comparison_orders == "random"
    return both.max(axis=0) if reads_one else both.sum(axis=0)
