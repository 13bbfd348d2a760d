"""
Other ways to choose pseudo-labels, a few lines each.

    python recipes/selection_policies.py --config recipes/selection_policies.yaml --policy quota_by_length

A policy is a function from the scores of the pool to a mask of the pairs to keep, given to
`PseudoLabelingCallback(selection_policy=...)`. The trainer then leaves out ties. Copy the policy
you want and change it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from datasets import Dataset, load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config, maybe_extract_prompt

from trl_ssrm import PairScores, PseudoLabelingCallback, SSRMConfig, SSRMTrainer
from trl_ssrm.cli.errors import running_script


def follows_the_model(momentum: float = 0.5) -> Callable[[PairScores], np.ndarray]:
    """
    The threshold is the mean confidence on the pool, averaged over the rounds, so it rises as the model becomes surer
    ([FreeMatch](https://huggingface.co/papers/2205.07246)).

    A resumed run starts the average anew.
    """
    thresholds: list[float] = []

    def policy(scores: PairScores) -> np.ndarray:
        mean = float(scores.confidence.mean())
        thresholds.append(momentum * thresholds[-1] + (1 - momentum) * mean if thresholds else mean)
        return scores.confidence > thresholds[-1]

    return policy


def quota_by_length(scores: PairScores, threshold: float = 0.8, num_groups: int = 5) -> np.ndarray:
    """
    Pairs above a threshold, of which no range of length differences has more than its share of the pool.

    A model that prefers long completions keeps pairs that teach it to prefer them more. The ranges are quantiles of
    the number of tokens by which the preferred completion is longer.
    """
    first, second = scores.lengths.astype(np.int64).T
    difference = np.where(scores.logits > 0, first - second, second - first)
    borders = np.quantile(difference, np.linspace(0, 1, num_groups + 1)[1:-1])
    return within_share(scores.confidence > threshold, scores.confidence, np.searchsorted(borders, difference))


def quota_by_source(scores: PairScores, source_of_row: np.ndarray, threshold: float = 0.8) -> np.ndarray:
    """
    Pairs above a threshold, of which no source has more than its share of the pool.

    `source_of_row` is a column of `unlabeled_dataset`, one value a row.
    """
    return within_share(scores.confidence > threshold, scores.confidence, source_of_row[scores.rows])


def within_share(mask: np.ndarray, confidence: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """
    The most confident pairs of each group, at most as large a share of the kept pairs as the group has of the pool.

    Groups with fewer pairs are not filled up.
    """
    kept = np.zeros_like(mask)
    for group in np.unique(groups):
        candidates = np.flatnonzero(mask & (groups == group))
        quota = int(np.ceil(mask.sum() * (groups == group).sum() / len(mask)))
        kept[candidates[np.argsort(-confidence[candidates], kind="stable")][:quota]] = True
    return kept


def best_against_worst(scores: PairScores, prompt_of_row: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """
    One pair a prompt, the most confident: of several completions it is the best against the worst, as in
    [West-of-N](https://huggingface.co/papers/2401.12086).

    `prompt_of_row` has the prompt of each row of `unlabeled_dataset`, as text or as a number.
    """
    prompts = prompt_of_row[scores.rows]
    # By prompt, and within a prompt the most confident pair first.
    order = np.lexsort((-scores.confidence, prompts))
    _, first_of_prompt = np.unique(prompts[order], return_index=True)
    is_best = np.zeros(len(order), dtype=bool)
    is_best[order[first_of_prompt]] = True
    return is_best & (scores.confidence > threshold)


POLICIES = ["follows_the_model", "quota_by_length", "quota_by_source", "best_against_worst"]


@dataclass
class PolicyArguments(ScriptArguments):
    """Arguments of the script, beside the arguments of the trainer."""

    policy: str = field(default="follows_the_model", metadata={"help": "Policy to train with.", "choices": POLICIES})
    source_column: str | None = field(default=None, metadata={"help": "Column of the pool for `quota_by_source`."})
    num_labeled: int = field(default=2000, metadata={"help": "Rows of the training split whose labels are used."})
    unlabeled_dataset_name: str | None = field(
        default=None, metadata={"help": "Pool of pairs. Default: the other rows of `dataset_name`, labels hidden."}
    )


def make_policy(script_args: PolicyArguments, pool: Dataset) -> Callable[[PairScores], np.ndarray]:
    """The policy that the arguments name."""
    if script_args.policy == "follows_the_model":
        return follows_the_model()
    if script_args.policy == "quota_by_length":
        return quota_by_length
    if script_args.policy == "quota_by_source":
        if script_args.source_column not in pool.column_names:
            raise ValueError(f"Set `source_column` to a column of the pool; it has {', '.join(pool.column_names)}.")
        return partial(quota_by_source, source_of_row=np.array(pool[script_args.source_column], dtype=str))
    prompts = [str(maybe_extract_prompt(row)["prompt"]) for row in pool]
    return partial(best_against_worst, prompt_of_row=np.unique(prompts, return_inverse=True)[1])


def main(script_args: PolicyArguments, training_args: SSRMConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    train = dataset[script_args.dataset_train_split].shuffle(seed=training_args.seed)
    if script_args.unlabeled_dataset_name is None:
        pool = train.select(range(script_args.num_labeled, len(train)))
    else:
        pool = load_dataset(script_args.unlabeled_dataset_name, split=script_args.dataset_train_split)
    trainer = SSRMTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train.select(range(script_args.num_labeled)),
        eval_dataset=dataset.get(script_args.dataset_test_split),
        unlabeled_dataset=pool,
        callbacks=[PseudoLabelingCallback(selection_policy=make_policy(script_args, pool))],
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    # Started again after an interruption, it continues.
    trainer.train(resume_from_checkpoint=trainer.run.has_run)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    parser = TrlParser((PolicyArguments, SSRMConfig, ModelConfig))
    with running_script():
        main(*parser.parse_args_and_config())
