"""What the datasets of a run become: labeled and held-out pairs with their sequences indexed, and the pool."""

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from datasets import Dataset

from ..data.build_pool import build_pool
from ..data.formats import report_dropped
from ..data.pool import Pool
from ..data.sequences import PairedSequences
from ..io.storage import BATCH_ROWS, content_hash
from ..models.classifier import num_positions
from .run_directory import RunDirectory


if TYPE_CHECKING:
    from ..trainer import SSRMTrainer


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """
    The data of a run.

    Args:
        labeled ([`~datasets.Dataset`]):
            Labeled pairs, tokenized, as [`~trl.RewardTrainer`] prepared them.
        labeled_pairs ([`PairedSequences`]):
            Their sequences.
        margins (`list[float]`, *optional*):
            Their margins.
        held_out (`dict[str, PairedSequences]`):
            Held-out labeled pairs by name: `"eval"`, or `"eval_..."` for each of several, and `"calibration"`.
        pool ([`Pool`]):
            Unlabeled pairs.
    """

    labeled: Dataset
    labeled_pairs: PairedSequences
    margins: list[float] | None
    held_out: dict[str, PairedSequences]
    pool: Pool

    @property
    def all_pairs(self) -> dict[str, PairedSequences]:
        """`dict[str, PairedSequences]`: the pairs of each dataset by its name."""
        held_out = {f"{name}_dataset": pairs for name, pairs in self.held_out.items()}
        return {"train_dataset": self.labeled_pairs, **held_out, "unlabeled_dataset": self.pool.pairs}

    @property
    def fingerprints(self) -> dict[str, str]:
        """`dict[str, str]`: hash of each dataset by its name."""
        return {
            "train_dataset": content_hash(self.labeled_pairs.fingerprint, self.margins),
            "unlabeled_dataset": self.pool.pairs.fingerprint,
            **{f"{name}_dataset": pairs.fingerprint for name, pairs in self.held_out.items()},
        }


def prepare_run_data(
    trainer: "SSRMTrainer",
    train_dataset: Dataset,
    eval_dataset: Any,
    unlabeled_dataset: Any,
    calibration_dataset: Dataset | None,
    is_conversational: bool | None,
) -> RunData:
    """
    Index the labeled and held-out pairs, and make the pool of those that are in none of them.

    Args:
        trainer ([`SSRMTrainer`]):
            The trainer, which has tokenized `train_dataset` and `eval_dataset` by now.
        train_dataset, eval_dataset, unlabeled_dataset, calibration_dataset:
            The datasets as they were given to it.
        is_conversational (`bool`, *optional*):
            Whether the labeled data is conversational.

    Returns:
        [`RunData`]

    Raises:
        ValueError: If every row of a dataset is too long, `calibration_dataset` shares pairs with `train_dataset`, or
            token IDs are beyond the vocabulary of the model, or sequences beyond its positions.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    without_filter = copy.copy(args)
    without_filter.max_length = None
    labeled = trainer.train_dataset
    report_too_long("train_dataset", len(train_dataset), len(labeled), args.max_length)
    raw = by_name(eval_dataset, "eval")
    prepared_of = {name: (raw[name], prepared) for name, prepared in by_name(trainer.eval_dataset, "eval").items()}
    # `_prepare_dataset` is private in `RewardTrainer`: the pool has to be tokenized exactly as the labeled pairs.
    if calibration_dataset is not None:
        prepared = trainer._prepare_dataset(calibration_dataset, tokenizer, args, "calibration")
        prepared_of["calibration"] = (calibration_dataset, prepared)
    held_out: dict[str, PairedSequences] = {}
    for name, (given, prepared) in prepared_of.items():
        if not isinstance(prepared, Dataset):
            logger.warning(f"`{name}` is a stream, so the metrics of a round leave it out.")
            continue
        report_too_long(name, len(given), len(prepared), args.max_length)
        check_vocabulary(prepared, f"{name}_dataset", trainer.model)
        held_out[name] = PairedSequences.from_tokenized(prepared)
        check_positions(held_out[name], f"{name}_dataset", trainer.model)
    check_vocabulary(labeled, "train_dataset", trainer.model)
    labeled_pairs = PairedSequences.from_tokenized(labeled)
    check_positions(labeled_pairs, "train_dataset", trainer.model)
    known_pairs = {"the labeled pairs": set(labeled_pairs.pair_keys())}
    known_pairs |= {name: set(pairs.pair_keys()) for name, pairs in held_out.items()}
    if common := known_pairs["the labeled pairs"] & known_pairs.get("calibration", set()):
        raise ValueError(
            f"`calibration_dataset` shares {len(common)} pairs with `train_dataset`, of which the model is surer than of "
            "others; leave them out of one of the two."
        )
    pool = build_pool(
        unlabeled_dataset,
        lambda dataset: trainer._prepare_dataset(dataset, tokenizer, without_filter, "unlabeled"),
        seed=args.seed,
        max_length=args.max_length,
        max_samples=args.max_unlabeled_samples,
        is_conversational=is_conversational,
        with_gold=args.track_pseudo_label_accuracy,
        known_pairs=known_pairs,
        by_pair=trainer.comparison is not None,
        stream_dir=RunDirectory(str(args.output_dir)).root / "pool",
    )
    check_positions(pool.pairs, "unlabeled_dataset", trainer.model)
    margins = list(labeled["margin"]) if "margin" in labeled.column_names else None
    return RunData(labeled, labeled_pairs, margins, held_out, pool)


def report_too_long(name: str, num_given: int, num_left: int, max_length: int | None) -> None:
    """Count what `RewardTrainer` leaves out without a word, and refuse to go on with nothing."""
    reason = f"longer than max_length={max_length}"
    report_dropped(name, {reason: num_given - num_left})
    if num_left == 0:
        raise ValueError(f"Every row of `{name}` is {reason}; raise it, or shorten the texts.")


def check_vocabulary(dataset: Dataset, name: str, model: Any) -> None:
    """Refuse token IDs that the model has no embedding for, such as those of another tokenizer."""
    vocab_size = model.config.get_text_config().vocab_size
    for batch in dataset.select_columns(["chosen_ids", "rejected_ids"]).with_format("arrow").iter(BATCH_ROWS):
        largest = max(pc.max(pc.list_flatten(column)).as_py() for column in batch.columns)
        if largest >= vocab_size:
            raise ValueError(
                f"`{name}` has the token ID {largest}, but the model has {vocab_size} tokens; tokenize it with the "
                "tokenizer of the model."
            )


def check_positions(pairs: PairedSequences, name: str, model: Any) -> None:
    """Refuse sequences that the model has no positions for, which would end training with an index out of range."""
    longest, positions = int(pairs.lengths.max(initial=0)), num_positions(model)
    if positions is not None and longest > positions:
        raise ValueError(
            f"`{name}` has a sequence of {longest} tokens, but the model has positions for {positions}; set "
            f"`max_length={positions}`, which leaves such pairs out."
        )


def by_name(dataset: Any, name: str) -> dict[str, Any]:
    """One dataset, several by their names, or none, as a dictionary."""
    if dataset is None:
        return {}
    return {f"{name}_{key}": value for key, value in dataset.items()} if isinstance(dataset, dict) else {name: dataset}
