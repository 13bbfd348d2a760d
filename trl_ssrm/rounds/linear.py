"""A linear model on the hidden states, fitted to the labels: it judges the weights to start from, and helps to label the pool."""

import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.pool import Pool
from ..io.storage import content_hash
from ..models.linear import NoStatesError
from ..scoring.pair_scores import PairScores
from ..scoring.preference import pairwise_logits
from .calibrate import fit_temperature, has_learned
from .round_trainer import RoundTrainer
from .run_directory import INITIAL, PRETRAINED
from .settings import fold_of_pairs


logger = logging.getLogger(__name__)

# On the squared weights, where the features of a pair have length 1: from no model to one that fits most labels.
PENALTIES = np.geomspace(1e2, 1e-3, 11)
# Parts of the labels that choose among them, and that show what a linear model knows of labels that it has not seen.
NUM_PARTS = 5
# Nats of evidence for pretraining (see [`~trl_ssrm.rounds.pretraining.gain`]) from which on the linear model does not label: then it adds
# no accuracy, and raised the log-loss by up to .03. With less, labels of few prompts may have favored pretraining by chance, as twice on
# RMB, and the linear model makes up for some of that. 5 are odds of 150 to 1.
SURE_EVIDENCE = 5.0


class LinearModel:
    """
    Fits a linear model to the labels: logistic regression on the differences of the two completions'
    [`~trl_ssrm.models.linear.mean_states`] under the weights that the rounds may start from.

    It costs a forward pass over the labels, and is there for two things. Its predictions on labels that it has not seen say which weights
    are the better start. And with few labels it often ranks as well as the model whose weights were trained, and errs on other pairs: so
    the mean of their probabilities labels the pool for round 1, and the model of that round learns what both know. The one that labels
    always reads the initial weights, so that it does not repeat errors of pretraining. Where pretraining is clearly better it does not
    label.

    Args:
        trainer ([`~trl_ssrm.rounds.round_trainer.RoundTrainer`]):
            The trainer, whose model, labels and run directory are used.
    """

    def __init__(self, trainer: RoundTrainer):
        self.trainer = trainer
        self.has_states, self.labels_pool = True, False
        self.weights = torch.empty(0)
        self.temperature = 1.0

    def held_out_logits(self, start: int) -> np.ndarray | None:
        """
        Predictions for all labeled pairs but ties, each by a linear model that was fitted without it. The model of the trainer may have
        other weights afterwards.

        Args:
            start (`int`):
                Weights under which the model is read, `INITIAL` or `PRETRAINED`.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`, float64, or `None`: pair logits `z = r(chosen) - r(rejected)`; `None` if there can be
            no linear model.
        """
        fitted = self._fit(start)
        return None if fitted is None else fitted[1].numpy()[~self.trainer.data.is_tie]

    def prepare(self, start: int, facts: dict[str, Any]) -> dict[str, Any]:
        """
        Get ready to help to label the pool. The model of the trainer may have other weights afterwards.

        Args:
            start (`int`):
                Weights that the rounds start from, `INITIAL` or `PRETRAINED`.
            facts (`dict[str, Any]`):
                Facts that decided it. If they are sure evidence for pretraining, the linear model does not label.

        Returns:
            `dict[str, Any]`: `accuracy_of_linear_model` and `log_loss_of_linear_model` on the labels, each predicted by a model that was fitted without
            it; and `linear_model_has_learned` (see [`~trl_ssrm.rounds.calibrate.has_learned`]). Empty if it does not label.
        """
        data = self.trainer.data
        # It labels for round 1 alone, after which its weights may be deleted, and so may be the initial ones if it does not.
        history = self.trainer.round_history
        is_over = len(history) > 1 or len(history) == 1 and "linear_model_has_learned" not in history[0]
        if not self.trainer.settings.linear_model_labels_pool or is_over:
            return {}
        if start == PRETRAINED and facts["pretraining_evidence"] >= SURE_EVIDENCE:
            return {}
        if (fitted := self._fit(INITIAL)) is None:
            return {}
        self.labels_pool, self.weights = True, fitted[0]
        logits = fitted[1].numpy()[~data.is_tie]
        self.temperature = fit_temperature(logits, data.prompts[~data.is_tie])
        return {
            "accuracy_of_linear_model": float((logits > 0).mean()),
            "log_loss_of_linear_model": float(np.logaddexp(0.0, -logits / self.temperature).mean()),
            "linear_model_has_learned": has_learned(logits),
        }

    def _fit(self, start: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Weights and held-out predictions, or what an interrupted run has kept of them; `None` if there can be no linear model."""
        trainer, run = self.trainer, self.trainer.run
        if not trainer.settings.fits_linear_model or not self.has_states:
            return None
        if (kept := trainer.on_main_process(lambda: run.read_linear(start))) is None:
            trainer.shard()
            run.read_weights(run.weights_path(start), trainer.unwrapped_model)
            try:
                differences = trainer.state_differences(
                    trainer.data.labeled_pairs, "train_dataset", lambda states: states
                )
            except NoStatesError:
                self.has_states = False
                kind = type(trainer.unwrapped_model).__name__
                logger.warning(f"No linear model is fitted, since {kind} gives no hidden state for each token.")
                return None
            kept = trainer.on_main_process(lambda: self._fitted(differences))
            if trainer.accelerator.is_main_process:
                run.write_linear(start, *kept)
        return kept

    def _fitted(self, differences: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights, and predictions for each pair by weights that were fitted without its part of the labels."""
        data = self.trainer.data
        projection = projection_of(differences)
        features, target = differences @ projection, np.where(data.is_tie, 0.5, 1.0)
        held_out = np.empty(len(features))
        part_of = fold_of_pairs(data.prompts, min(NUM_PARTS, data.num_prompts), self.trainer.args.seed)
        for part in np.unique(part_of):
            rest = part_of != part
            held_out[~rest] = features[~rest] @ fit_to_labels(features[rest], target[rest], data.prompts[rest])
        weights = projection @ fit_to_labels(features, target, data.prompts)
        return torch.from_numpy(weights).float(), torch.from_numpy(held_out)

    def join(self, scores: PairScores, pool: Pool, round: int) -> PairScores:
        """
        Let the linear model help to label the pool. The model of the trainer has the weights of the round before and afterwards.

        Args:
            scores ([`PairScores`]):
                What the model of the round says of the pairs.
            pool ([`Pool`]):
                The pairs.
            round (`int`):
                The round that has ended.

        Returns:
            [`PairScores`]: the mean of both probabilities at temperature 1; that of the linear model alone, if the model has not
            learned (see [`~trl_ssrm.rounds.calibrate.has_learned`]); or the scores as they are, if there is no linear model or it
            has not.
        """
        trainer, run = self.trainer, self.trainer.run
        first = trainer.round_history[0]
        if not self.labels_pool or round > 0 or not first.get("linear_model_has_learned"):
            return scores
        weights = run.weights_path(INITIAL)
        run.read_weights(weights, trainer.unwrapped_model)
        key = content_hash(run.weights_hash(weights), pool.pairs.fingerprint, self.weights.tolist())
        differences = trainer.state_differences(
            pool.pairs,
            "unlabeled_dataset",
            lambda states: states @ self.weights.to(states)[:, None],
            rows=pool.rows,
            directory=run.round_dir(round + 1) / "scores" / "linear",
            key=key,
        )
        run.read_weights(run.weights_path(round), trainer.unwrapped_model)
        linear, own = differences / self.temperature, scores.logits / scores.temperature
        # As for a comparison in two orders, whose second logit is turned round.
        mean = pairwise_logits(np.stack([linear, -own], axis=1))
        return PairScores(mean if first["has_learned"] else linear, rows=scores.rows, lengths=scores.lengths)


def projection_of(differences: np.ndarray) -> np.ndarray:
    """
    The space in which a linear model is fitted: of as many dimensions as there are pairs, and with a mean squared length of 1.

    The more the pairs differ along a dimension, the longer it is made, so the less a weight on it is penalized. In quality.py that
    lowered the log-loss on unseen pairs by .005 to .012, and raised the accuracy by up to .008.

    Args:
        differences (`np.ndarray` of shape `(num_pairs, num_features)`, float64):
            Differences of the features of the two completions.

    Returns:
        `np.ndarray` of shape `(num_features, min(num_pairs, num_features))`, float64: `differences @ projection` are the features to fit.
    """
    _, sizes, axes = np.linalg.svd(differences, full_matrices=False)
    length = np.sqrt((sizes**3).sum() / len(differences))
    return axes.T * np.sqrt(sizes) / max(float(length), np.finfo(np.float32).tiny)


def fit_to_labels(features: np.ndarray, target: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """
    Fit logistic regression with the penalty that predicts parts of the labels best, each from the others.

    Args:
        features (`np.ndarray` of shape `(num_pairs, num_features)`, float64):
            Differences of the features of the two completions.
        target (`np.ndarray` of shape `(num_pairs,)`, float64):
            Probability that the first completion is preferred.
        prompts (`np.ndarray` of shape `(num_pairs,)`, int64):
            Number of the prompt of each pair; pairs with the same prompt are in one part.

    Returns:
        `np.ndarray` of shape `(num_features,)`, float64: weights.
    """
    _, prompts = np.unique(prompts, return_inverse=True)
    num_parts = min(NUM_PARTS, int(prompts.max()) + 1)
    losses = np.zeros(len(PENALTIES))
    part_of = fold_of_pairs(prompts, num_parts, seed=0)
    for part in range(num_parts) if num_parts > 1 else ():
        rest = part_of != part
        for number, weights in enumerate(_path(features[rest], target[rest], PENALTIES)):
            logits = features[~rest] @ weights
            losses[number] += (np.logaddexp(0.0, logits) - target[~rest] * logits).sum()
    # From the largest penalty on: of equal ones, the most careful.
    return _path(features, target, PENALTIES[: int(np.argmin(losses)) + 1])[-1]


def _path(features: np.ndarray, target: np.ndarray, penalties: np.ndarray) -> list[np.ndarray]:
    """Weights for each penalty, each fit starting from the one before."""
    inputs, due = torch.from_numpy(features), torch.from_numpy(target)
    weights, found = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True), []
    for penalty in penalties.tolist():
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def loss(penalty: float = penalty, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            fit = nn.functional.binary_cross_entropy_with_logits(inputs @ weights, due, reduction="sum")
            value = fit + penalty / 2 * (weights**2).sum()
            value.backward()
            return value

        optimizer.step(loss)
        found.append(weights.detach().numpy().copy())
    return found
