"""
Pretraining on the texts of the pool: the model learns to prefer a prompt's own completion to that of another prompt.

No label is read. In its simplest form this is the unsupervised reward modeling of Fan et al. (arXiv 2603.02225): one negative
for each prompt instead of the whole batch. Where people prefer what fits the prompt it teaches much; elsewhere it can teach the
opposite of what they prefer. So the labels decide whether a run starts from these weights.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.build_pool import written_out
from ..data.pool import Pool
from ..data.prompts import prompt_groups
from ..scoring.metrics import standard_error
from .calibrate import at_best_temperature
from .folds import Folds
from .linear import LinearModel
from .round_trainer import RoundTrainer
from .run_directory import INITIAL, PRETRAINED


logger = logging.getLogger(__name__)

# Nats of evidence by linear models that pretraining needs, odds of 7 to 1. In 18 draws of 50 labels (quality.py, upper two layers) it was
# 2.7 to 14 where pretraining helped, once .5; and at most 1.6 where it harmed, once 2.3.
LEAST_EVIDENCE = 2.0
# Draws of another row for each row, until it has another prompt.
_DRAWS = 20


class Pretraining:
    """
    Trains a model on the texts of the pool before the labels, and asks the labels whether that helps.

    Args:
        trainer ([`~trl_ssrm.rounds.round_trainer.RoundTrainer`]):
            The trainer, whose model, pool and run directory are used.
        folds ([`~trl_ssrm.rounds.folds.Folds`]):
            Fold models of the run.
        linear_model ([`~trl_ssrm.rounds.linear.LinearModel`]):
            Linear model that compares the two starts. Where it can't, the fold models do.
    """

    def __init__(self, trainer: RoundTrainer, folds: Folds, linear_model: LinearModel):
        self.trainer, self.folds, self.linear_model = trainer, folds, linear_model

    def choose_start(self, ignore_keys_for_eval: list[str] | None) -> tuple[int, dict[str, Any]]:
        """
        Choose the weights that the rounds start from, and train the fold models from them.

        Pretrained weights are chosen if two things hold. Without having seen a label, they rank more than half of the labeled
        pairs but ties right. And that, with the log-loss of linear models on the hidden states under either weights, on labels that
        these have not seen, is evidence of `LEAST_EVIDENCE` nats (see [`gain`]). Where linear models can't be fitted, fold models that
        start from either weights take their place.

        Args:
            ignore_keys_for_eval (`list[str]`, *optional*):
                As in [`~transformers.Trainer.train`].

        Returns:
            `tuple[int, dict[str, Any]]`: `INITIAL` or `PRETRAINED`, and the facts that decided it.
        """
        start, facts = self._choose(ignore_keys_for_eval)
        self.folds.train(start, ignore_keys_for_eval)
        return start, facts

    def _choose(self, ignore_keys_for_eval: list[str] | None) -> tuple[int, dict[str, Any]]:
        trainer, pretrains = self.trainer, self.trainer.settings.pretrains
        if pretrains == "never" or (pairs := self._pairs()) is None:
            return INITIAL, {}
        if pretrains == "if_better" and not self._can_judge():
            logger.warning(
                "Neither linear models nor fold models can judge pretraining on the texts of the pool, so the model is not "
                "pretrained. For fold models, set `num_folds=3`."
            )
            return INITIAL, {}
        self._train(pairs, ignore_keys_for_eval)
        logits = trainer.score_pairs(trainer.data.labeled_pairs, "train_dataset").logits[~trainer.data.is_tie]
        facts = {"pretraining_pairs": len(pairs), "pretraining_share_right": float((logits > 0).mean())}
        if pretrains == "always":
            return PRETRAINED, {**facts, "is_pretrained": True}
        if facts["pretraining_share_right"] <= 0.5:
            return INITIAL, {**facts, "is_pretrained": False}
        facts |= self._judged(logits, ignore_keys_for_eval)
        facts["is_pretrained"] = facts["pretraining_evidence"] >= LEAST_EVIDENCE
        return PRETRAINED if facts["is_pretrained"] else INITIAL, facts

    def _can_judge(self) -> bool:
        """Whether there are fold models, or linear models can be fitted, which is tried."""
        return self.folds.num_folds > 0 or self.linear_model.held_out_logits(INITIAL) is not None

    def _judged(self, logits: np.ndarray, ignore_keys_for_eval: list[str] | None) -> dict[str, float]:
        """What linear models, or else fold models, say about pretraining by their predictions on labels that they have not seen."""
        starts, prompts = (INITIAL, PRETRAINED), self.trainer.data.prompts[~self.trainer.data.is_tie]
        without, with_pretraining = (self.linear_model.held_out_logits(start) for start in starts)
        if without is None or with_pretraining is None:
            for start in starts:
                self.folds.train(start, ignore_keys_for_eval)
            without, with_pretraining = (self.folds.held_out_logits(start) for start in starts)
        return {**gain(logits, without, with_pretraining, prompts), "pretraining_least_evidence": LEAST_EVIDENCE}

    def _pairs(self) -> Dataset | None:
        """The pairs to pretrain on, tokenized; `None` if there are none."""
        trainer = self.trainer
        rows = pretraining_pairs(trainer.data.pool, trainer.args.seed)
        if (first := next(rows, None)) is not None:
            directory, features = trainer.run.round_dir(PRETRAINED) / "pairs", trainer.data.pool.text_features
            texts = written_out(itertools.chain([first], rows), directory, features)
            pairs = trainer.tokenize(texts, "unlabeled", trainer.args.max_length)
            if len(pairs):
                return pairs.select_columns(["chosen_ids", "rejected_ids"])
        logger.warning(
            "The pool has no two different prompts with completions that fit into `max_length`, so the model is not "
            "pretrained."
        )
        return None

    def _train(self, pairs: Dataset, ignore_keys_for_eval: list[str] | None) -> None:
        """Pretrain the model in memory, or load what an interrupted run has pretrained."""
        trainer, run, weights = self.trainer, self.trainer.run, self.trainer.run.weights_path(PRETRAINED)
        if trainer.on_main_process(lambda: run.has_weights(weights)):
            run.read_weights(weights, trainer.unwrapped_model)
            return
        trainer.accelerator.print(f"Pretraining on {len(pairs)} pairs of texts of the pool, without labels.")
        trainer.round, trainer.train_dataset = PRETRAINED, pairs
        run.read_weights(run.weights_path(INITIAL), trainer.unwrapped_model)
        checkpoint = trainer.on_main_process(lambda: run.last_checkpoint(PRETRAINED))
        with trainer.in_silence(with_checkpoints=True):
            trainer.train_once(checkpoint, ignore_keys_for_eval)
        trainer.write_weights(weights)
        trainer.round, trainer.train_dataset = 0, trainer.data.labeled


def pretraining_pairs(pool: Pool, seed: int) -> Iterator[dict[str, Any]]:
    """
    One pair for each row of the pool that has a prompt: one of its completions, and a completion of another prompt.

    Args:
        pool ([`Pool`]):
            The pool. Which of its completions is taken says nothing about a label.
        seed (`int`):
            Draws the other prompts.

    Yields:
        `dict[str, Any]`: `prompt`, `chosen` (the completion of this prompt) and `rejected` (that of another one), as text or
        messages.
    """
    rows, own = np.unique(pool.rows, return_index=True)
    groups = prompt_groups(pool.source)[rows]
    draw = np.random.default_rng(seed)
    other = draw.integers(len(rows), size=len(rows))
    for _ in range(_DRAWS):
        same = groups[other] == groups
        other[same] = draw.integers(len(rows), size=int(same.sum()))
    is_other = groups[other] != groups
    own, other = own[is_other], own[other[is_other]]
    is_first = np.ones(len(own), dtype=bool)
    for here, there in zip(pool.iterate_texts(own, is_first), pool.iterate_texts(other, is_first), strict=True):
        for one, another in zip(here, there, strict=True):
            if one["prompt"] and one["chosen"] != another["chosen"]:
                yield {"prompt": one["prompt"], "chosen": one["chosen"], "rejected": another["chosen"]}


def gain(
    zero_shot: np.ndarray, without: np.ndarray, with_pretraining: np.ndarray, prompts: np.ndarray
) -> dict[str, float]:
    """
    What the labels say for pretraining. Each prompt counts once, however many pairs it has, since pairs of one prompt tell much
    the same.

    Two things are evidence, in nats of log-likelihood over all prompts: how much better than by chance the pretrained model ranks the
    pairs; and by how much pretraining lowers the log-loss on pairs that the models compared have not seen. For the latter, each
    has the temperature that is best for it: how well pairs are ranked counts, and not how sure the model is, which the temperature
    mends later.

    Args:
        zero_shot (`np.ndarray` of shape `(num_pairs,)`):
            Pair logits `z = r(chosen) - r(rejected)` of the pretrained model, which has seen no label.
        without, with_pretraining (`np.ndarray` of shape `(num_pairs,)`):
            Those of linear models or fold models that have not seen the pair and start from either weights.
        prompts (`np.ndarray` of shape `(num_pairs,)`, int64):
            Number of the prompt of each pair; there are two prompts or more.

    Returns:
        `dict[str, float]`: `accuracy` and `log_loss`, `_without_pretraining` and `_with_pretraining`, the standard errors of
        their differences, `pretraining_accuracy_change_error` and `pretraining_log_loss_change_error`,
        and `pretraining_evidence`.
    """
    _, prompts, num_pairs = np.unique(prompts, return_inverse=True, return_counts=True)

    def by_prompt(values: np.ndarray) -> np.ndarray:
        return np.bincount(prompts, weights=values) / num_pairs

    facts: dict[str, float] = {}
    logits_of = {"without": at_best_temperature(without), "with": at_best_temperature(with_pretraining)}
    for metric, function in (("accuracy", lambda z: z > 0), ("log_loss", lambda z: np.logaddexp(0.0, -z))):
        of = {kind: by_prompt(function(logits)) for kind, logits in logits_of.items()}
        facts |= {f"{metric}_{kind}_pretraining": float(values.mean()) for kind, values in of.items()}
        difference = of["with"] - of["without"]
        facts[f"pretraining_{metric}_change_error"] = standard_error(difference, np.arange(len(difference)))
    right = float(np.clip(by_prompt(zero_shot > 0).mean(), 1e-9, 1 - 1e-9))
    unlike_chance = np.log(2) + right * np.log(right) + (1 - right) * np.log(1 - right)
    lower = facts["log_loss_without_pretraining"] - facts["log_loss_with_pretraining"]
    return {**facts, "pretraining_evidence": float(len(num_pairs) * (np.sign(right - 0.5) * unlike_chance + lower))}
