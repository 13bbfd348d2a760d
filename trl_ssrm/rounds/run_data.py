"""What the datasets of a run become: labeled and held-out pairs with their sequences indexed, and the pool."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..config import SSRMConfig
from ..data.build_pool import build_pool
from ..data.formats import argument_name, report_dropped
from ..data.pool import Pool
from ..data.prompt_columns import check_same_form
from ..data.prompts import prompt_groups, prompt_keys
from ..data.sequences import PairedSequences, select_rows
from ..data.ties import ties_of
from ..io.storage import content_hash
from ..models.classifier import num_positions
from ..scoring.inputs import check_vocabulary
from .run_directory import RunDirectory


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
            Held-out labeled pairs but ties by name: `"eval"`, or `"eval_..."` for each of several, and `"calibration"`.
        held_out_prompts (`dict[str, np.ndarray]` of shape `(num_pairs,)` each, int64):
            Number of the prompt of each held-out pair.
        pool ([`Pool`]):
            Unlabeled pairs.
    """

    labeled: Dataset
    labeled_pairs: PairedSequences
    margins: list[float] | None
    held_out: dict[str, PairedSequences]
    held_out_prompts: dict[str, np.ndarray]
    pool: Pool

    @functools.cached_property
    def prompts(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_labeled,)`, int64: number of the prompt of each labeled pair."""
        return prompt_groups(self.labeled)

    @functools.cached_property
    def is_tie(self) -> np.ndarray:
        """`np.ndarray` of shape `(num_labeled,)`, bool: which labeled pairs are ties."""
        return ties_of(self.labeled, "train_dataset")

    @property
    def num_prompts(self) -> int:
        """`int`: number of prompts of the labeled pairs."""
        return int(self.prompts.max()) + 1

    @property
    def all_pairs(self) -> dict[str, PairedSequences]:
        """`dict[str, PairedSequences]`: the pairs of each dataset by its name."""
        held_out = {f"{name}_dataset": pairs for name, pairs in self.held_out.items()}
        return {"train_dataset": self.labeled_pairs, **held_out, "unlabeled_dataset": self.pool.pairs}

    @property
    def fingerprints(self) -> dict[str, str]:
        """`dict[str, str]`: hash of each dataset by its name."""
        ties = [np.flatnonzero(self.is_tie).tolist()] if self.is_tie.any() else []
        return {
            "train_dataset": content_hash(self.labeled_pairs.fingerprint, self.margins, *ties),
            "unlabeled_dataset": self.pool.pairs.fingerprint,
            **{f"{name}_dataset": pairs.fingerprint for name, pairs in self.held_out.items()},
        }


def prepare_run_data(
    given: dict[str, Any],
    prepared: dict[str, Any],
    unlabeled_dataset: Any,
    tokenize: Callable[[Any, str, int | None], Any],
    model: Any,
    args: SSRMConfig,
    is_conversational: bool | None,
    by_pair: bool,
) -> RunData:
    """
    Index the labeled and held-out pairs, and make the pool of the pairs that are in none of them.

    Args:
        given (`dict[str, Any]`):
            The labeled datasets as they were given to the trainer: `"train"`, `"eval"`, or `"eval_..."` for each of
            several, and `"calibration"`.
        prepared (`dict[str, Any]`):
            The same, tokenized, without `"calibration"`.
        unlabeled_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The pool as it was given.
        tokenize (`Callable`):
            Function of a dataset, the name it has in errors, and the longest sequence in tokens (`None` for any), which
            tokenizes it as [`~trl.RewardTrainer`] does.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, whose vocabulary and positions have to be enough.
        args ([`SSRMConfig`]):
            Configuration of the trainer.
        is_conversational (`bool`, *optional*):
            Whether the labeled data is conversational.
        by_pair (`bool`):
            Whether a sequence depends on both completions of a pair, as for a pairwise model.

    Returns:
        [`RunData`]

    Raises:
        ValueError: If every row of a dataset is too long, `calibration_dataset` shares pairs with `train_dataset`, or
            token IDs are beyond the vocabulary of the model, or sequences beyond its positions.
    """
    check_same_form(
        {**{argument_name(name): data for name, data in given.items()}, "unlabeled_dataset": unlabeled_dataset}
    )
    prepared = dict(prepared)
    if "calibration" in given:
        prepared["calibration"] = tokenize(given["calibration"], "calibration", args.max_length)
    pairs_of: dict[str, PairedSequences] = {}
    for name, dataset in list(prepared.items()):
        argument = argument_name(name)
        if not isinstance(dataset, Dataset):
            logger.warning(f"`{argument}` is a stream, so the metrics of a round leave it out.")
            continue
        report_too_long(argument, given[name], len(dataset), args.max_length)
        pairs_of[name] = PairedSequences.from_tokenized(dataset)
        check_vocabulary(pairs_of[name], argument, model)
        check_positions(pairs_of[name], argument, model)
        told_apart = two_completions(pairs_of[name], argument)
        prepared[name], pairs_of[name] = select_rows(dataset, told_apart), pairs_of[name].take(told_apart)
        # A tie has no opposite label.
        is_tie = ties_of(prepared[name], argument)
        report_contradictions(pairs_of[name].take(np.flatnonzero(~is_tie)), argument)
    known_pairs = {name: set(pairs.pair_keys()) for name, pairs in pairs_of.items()}
    check_overlap(known_pairs)
    report_shared_prompts({name: prepared[name] for name in pairs_of})
    pool = build_pool(
        unlabeled_dataset,
        lambda dataset: tokenize(dataset, "unlabeled", None),
        seed=args.seed,
        max_length=args.max_length,
        max_samples=args.max_unlabeled_samples,
        is_conversational=is_conversational,
        with_gold=args.track_pseudo_label_accuracy,
        known_pairs={"the labeled pairs" if name == "train" else name: keys for name, keys in known_pairs.items()},
        by_pair=by_pair,
        stream_dir=RunDirectory(str(args.output_dir)).root / "pool",
    )
    check_vocabulary(pool.pairs, "unlabeled_dataset", model)
    check_positions(pool.pairs, "unlabeled_dataset", model)
    labeled, labeled_pairs = prepared["train"], pairs_of.pop("train")
    margins = list(labeled["margin"]) if "margin" in labeled.column_names else None
    held_out_prompts = {name: prompt_groups(prepared[name]) for name in pairs_of}
    return RunData(labeled, labeled_pairs, margins, pairs_of, held_out_prompts, pool)


def report_too_long(name: str, given: Dataset, num_left: int, max_length: int | None) -> None:
    """Log how many rows `RewardTrainer` has left out, and refuse to go on with none. Held-out ties are left out besides."""
    num_given = len(given) if name == "train_dataset" else int((~ties_of(given, name)).sum())
    reason = f"longer than max_length={max_length}"
    report_dropped(name, {reason: num_given - num_left})
    if num_left == 0:
        raise ValueError(f"Every row of `{name}` is {reason}; raise it, or shorten the texts.")


def two_completions(pairs: PairedSequences, name: str) -> np.ndarray:
    """
    Find the labeled pairs that say something: those whose two sequences differ. The others are counted in the log.

    Args:
        pairs ([`PairedSequences`]):
            Labeled pairs.
        name (`str`):
            Argument that they were given as.

    Returns:
        `np.ndarray` of shape `(n,)`, int64: positions of the pairs with two different sequences.

    Raises:
        ValueError: If there is none.
    """
    told_apart = np.flatnonzero(pairs.first != pairs.second)
    report_dropped(name, {"identical completions": len(pairs.first) - len(told_apart)})
    if not len(told_apart):
        raise ValueError(
            f"In every row of `{name}`, `chosen` and `rejected` have the same tokens. A chat template may drop what differs, "
            "such as reasoning, or `max_length` may cut it off."
        )
    return told_apart


def report_contradictions(pairs: PairedSequences, name: str) -> None:
    """Log how many pairs are there twice, with opposite labels."""
    both_ways = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    if count := sum((second, first) in both_ways for first, second in both_ways) // 2:
        logger.warning(
            f"{count} pairs are in `{name}` twice, with opposite labels. Nothing is learned from them; check where they come "
            "from."
        )


def check_overlap(pair_keys: dict[str, set]) -> None:
    """Refuse calibration pairs that are trained on, and log evaluation pairs that are."""
    for name in sorted(pair_keys.keys() - {"train"}):
        count = len(pair_keys["train"] & pair_keys[name])
        if count and name == "calibration":
            raise ValueError(
                f"`calibration_dataset` shares {count} pairs with `train_dataset`. The model is surer of pairs that it was "
                "trained on, so they can't calibrate it; leave them out of one of the two."
            )
        if count:
            logger.warning(
                f"`{argument_name(name)}` shares {count} of its {len(pair_keys[name])} pairs with `train_dataset`, so its metrics are "
                "too good; leave these pairs out of one of the two."
            )


def report_shared_prompts(prepared: dict[str, Dataset]) -> None:
    """Log how many prompts of the evaluation and calibration pairs are trained on, with whatever completions."""
    keys = {name: set(prompt_keys(dataset)) - {""} for name, dataset in prepared.items()}
    for name in sorted(keys.keys() - {"train"}):
        if count := len(keys["train"] & keys[name]):
            logger.warning(
                f"{count} of the {len(keys[name])} prompts of `{argument_name(name)}` are also in `train_dataset`. A model does better on "
                "prompts that it was trained on, so split the pairs by prompt."
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
