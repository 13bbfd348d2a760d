"""
What a run leaves on disk, and how it is resumed from it.

```
output_dir/_rounds/
    run.json                   settings and data that the run was started with
    initial.safetensors        trainable weights that the trainer was given
    pretraining/               pairs of texts, checkpoints, weights, and fold models that start from these weights
    start.json                 which of these weights the rounds start from, and why
    linear_*.safetensors       linear models on the hidden states under either of them
    round_0/fold_0/            predictions of the fold model without the first part of the labels
    pool/                      rows of a pool that is a stream, and the cache of what was made of them
    round_0/held_out.safetensors  predictions on the held-out pairs, which later rounds are compared with
    round_1/
        scores/                rewards of the pool under the weights of round 0
        pseudo_labels.parquet  kept pairs: what round 1 trains on beside the labeled pairs
        labeling.json          histograms of how the pool was labeled and a few pairs, for the report
        checkpoint-*/          as of any trainer
        weights.safetensors    trainable weights after round 1
        trainer_state.json     written after the weights: the round is trained
        round.json             facts of the round and logs up to here, written last: the round is over
    end.json                   why the rounds ended and which of them is kept: the run is over
```

When the run is over, checkpoints, scores, the pretraining and all weights but those of the last and of the kept round are deleted.

Every file is written aside and renamed, and carries a checksum and a key that names the run and the place in it, so that
a damaged file, and one of another run or round, is not taken for what it should be.
"""

import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features
from safetensors import safe_open
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import __version__
from ..io.files import read_record, telling_where, write_record
from ..io.storage import (
    read_facts,
    read_numbers,
    read_table,
    read_tensors,
    write_table,
    write_tensors,
)
from ..models.sharding import fill, shape_of, trainable_parameters
from .checkpoints import CHECKPOINT_MARKER, damage_of, mark_checkpoint
from .label import LABEL_FEATURES
from .run_root import RunRoot


logger = logging.getLogger(__name__)

# Stand in for a round where weights are asked for: those that the trainer was given, and those after pretraining.
INITIAL, PRETRAINED = -2, -1

# Versions that the report tells.
_REPORTED_PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "peft")


class RunDirectory(RunRoot):
    """
    The files of one run. It is made with the output directory of the trainer.
    """

    def round_dir(self, round: int) -> Path:
        """`Path`: directory of a round, or of the pretraining."""
        return self.root / ("pretraining" if round == PRETRAINED else f"round_{round}")

    @property
    def num_finished(self) -> int:
        """`int`: number of rounds that are over, round 0 included."""
        round = 0
        while (self.round_dir(round) / "round.json").is_file():
            round += 1
        return round

    def write_weights(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        """Keep the trainable weights of a model, as [`~trl_ssrm.models.sharding.whole_weights`] gives them."""
        write_tensors(path, weights, self.key(path))

    def has_weights(self, path: Path) -> bool:
        """`bool`: whether the file holds undamaged weights of this run."""
        return read_tensors(path, self.key(path)) is not None

    def read_weights(self, path: Path, model: nn.Module) -> None:
        """
        Load stored weights into the trainable parameters of a model. Every process has to call it at the same time.

        Raises:
            ValueError: If the file is missing, damaged, of another run, or holds the weights of another model.
        """
        stored, current = read_tensors(path, self.key(path)), trainable_parameters(model)
        if stored is None:
            raise ValueError(
                f"{path} is missing or damaged, or belongs to another run or round; put a copy in its place, or start the run "
                "anew in another `output_dir`."
            )
        if {name: list(tensor.shape) for name, tensor in stored.items()} != {
            name: shape_of(parameter) for name, parameter in current.items()
        }:
            raise ValueError(f"{path} holds the weights of another model; resume with the model of that run.")
        fill(model, stored)

    def weights_hash(self, path: Path) -> str:
        """`str`: hash of the weights in a file, which names them."""
        with safe_open(path, framework="pt") as file:
            return file.metadata()["sha256"]

    def write_round(
        self, round: int, facts: dict[str, Any], log_history: list[dict[str, float]], reliability: dict[str, Any]
    ) -> None:
        """
        Write the facts of a round, the logs so far and its reliability curves into one file, the sign that the round is
        over. NaN and infinite values become null, and `None` when they are read.
        """
        versions = {package: importlib.metadata.version(package) for package in _REPORTED_PACKAGES}
        versions = {"python": platform.python_version(), "trl_ssrm": __version__, **versions}
        parts = {"facts": facts, "log_history": log_history, "reliability": reliability, "versions": versions}
        self._write(self.round_dir(round) / "round.json", parts)

    def read_round(self, round: int) -> dict[str, Any]:
        """
        `dict[str, Any]`: `facts`, `log_history` and `reliability` of a round that is over; see
        [`RunDirectory.write_round`].

        Raises:
            ValueError: If the file is damaged or of another run.
        """
        return self._read(self.round_dir(round) / "round.json")

    def write_held_out(self, logits_of: dict[str, np.ndarray]) -> None:
        """Keep the pair logits of round 0 on the held-out pairs, which later rounds are compared with."""
        path = self._held_out_path
        write_tensors(path, {name: torch.from_numpy(logits) for name, logits in logits_of.items()}, self.key(path))

    def read_held_out(self) -> dict[str, np.ndarray]:
        """
        `dict[str, np.ndarray]`: what [`RunDirectory.write_held_out`] has kept.

        Raises:
            ValueError: If the file is missing, damaged or of another run.
        """
        tensors = read_tensors(self._held_out_path, self.key(self._held_out_path))
        if tensors is None:
            raise ValueError(
                f"{self._held_out_path} is missing or damaged; put a copy in its place, or start the run anew in another "
                "`output_dir`."
            )
        return {name: logits.numpy() for name, logits in tensors.items()}

    @property
    def _held_out_path(self) -> Path:
        return self.round_dir(0) / "held_out.safetensors"

    def write_labeling(self, round: int, summary: dict[str, Any]) -> None:
        """Keep the summary of a labeling for the report; see [`summarize_labeling`]."""
        self._write(self.round_dir(round) / "labeling.json", summary)

    def write_end(self, termination_reason: str | None, kept_round: int, trained_on: str) -> None:
        """Keep why the run has ended, the round that the model comes from, and what it was trained on, in words."""
        facts = {"termination_reason": termination_reason, "kept_round": kept_round, "trained_on": trained_on}
        self._write(self.root / "end.json", facts)

    def state_path(self, round: int) -> Path:
        """`Path`: file with the state of the trainer at the end of a round. It exists once the round is trained."""
        return self.round_dir(round) / "trainer_state.json"

    def write_state(self, round: int, state: TrainerState) -> None:
        """Keep the state of the trainer at the end of a round, the sign that the round is trained."""
        self._write(self.state_path(round), asdict(state))

    def read_state(self, round: int) -> TrainerState:
        """
        Read the state of the trainer at the end of a round.

        Raises:
            ValueError: If the file is missing, damaged or of another run.
        """
        return TrainerState(**self._read(self.state_path(round)))

    def is_trained(self, round: int) -> bool:
        """`bool`: whether state and weights of a round are there and undamaged. Damage is logged."""
        if not self.state_path(round).is_file():
            return False
        try:
            self.read_state(round)
        except ValueError as error:
            logger.warning(f"{error} Round {round} is trained again.")
            return False
        path = self.weights_path(round)
        if not self.has_weights(path):
            logger.warning(f"{path} is missing or damaged; round {round} is trained again.")
            return False
        return True

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        write_record(path, value, self.key(path))

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return read_record(path, self.key(path))
        except ValueError as error:
            raise ValueError(
                f"{error}; put a copy in its place, or start the run anew in another `output_dir`."
            ) from None

    def write_pseudo_labels(
        self, round: int, features: Features, parts: Iterable[Dataset], facts: dict[str, Any]
    ) -> None:
        """Keep the pseudo-labels that a round will train on, part by part, and the facts about them."""
        path = self._pseudo_labels_path(round)
        write_table(path, features, parts, facts, self.key(path))

    def has_pseudo_labels(self, round: int) -> bool:
        """`bool`: whether the pseudo-labels that a round trains on are there and undamaged."""
        path = self._pseudo_labels_path(round)
        return read_facts(path, self.key(path)) is not None

    def read_pseudo_labels(self, round: int) -> tuple[Dataset, dict[str, Any]] | None:
        """
        Read the pseudo-labels that a round trains on, with their texts, and the facts about them.

        Returns:
            `tuple[Dataset, dict]` or `None`: `None` if there are none yet.

        Raises:
            ValueError: If the file is damaged or of another run.
        """
        path = self._pseudo_labels_path(round)
        return read_table(path, self.key(path))

    def read_labels(self, round: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """
        Read the pseudo-labels that a round trains on, without their texts, and the facts about them.

        Raises:
            ValueError: If the file is missing, damaged or of another run.
        """
        path = self._pseudo_labels_path(round)
        stored = read_numbers(path, list(LABEL_FEATURES), self.key(path))
        if stored is None:
            raise ValueError(
                f"The pseudo-labels of round {round} in {self.round_dir(round)} are missing or damaged; put copies in their "
                "place, or start the run anew in another `output_dir`."
            )
        return stored

    def _pseudo_labels_path(self, round: int) -> Path:
        return self.round_dir(round) / "pseudo_labels.parquet"

    def end_checkpoint(self, checkpoint: Path) -> None:
        """Mark a checkpoint as whole."""
        mark_checkpoint(checkpoint, self.key(checkpoint / CHECKPOINT_MARKER))

    def last_checkpoint(self, round: int) -> str | None:
        """`str` or `None`: directory of the last whole checkpoint of a round. Damage is logged."""
        ended = [path.parent for path in self.round_dir(round).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{CHECKPOINT_MARKER}")]
        for checkpoint in sorted(ended, key=lambda path: -int(path.name.rsplit("-", 1)[1])):
            if (damage := self.damage_of(checkpoint)) is None:
                return str(checkpoint)
            logger.warning(f"{damage}; the round goes on from the checkpoint before it, or begins again.")
        return None

    def damage_of(self, checkpoint: Path) -> str | None:
        """`str` or `None`: what is wrong with a checkpoint that was marked as whole."""
        return damage_of(checkpoint, self.key(checkpoint / CHECKPOINT_MARKER))

    def weights_path(self, round: int) -> Path:
        """`Path`: file with the trainable weights after a round, after the pretraining, or before both (`INITIAL`)."""
        return self.root / "initial.safetensors" if round == INITIAL else self.round_dir(round) / "weights.safetensors"

    def write_start(self, start: int, facts: dict[str, Any]) -> None:
        """Keep which weights the rounds start from, `INITIAL` or `PRETRAINED`, and the facts that decided it."""
        self._write(self.root / "start.json", {"start": start, "facts": facts})

    def read_start(self) -> tuple[int, dict[str, Any]] | None:
        """
        `tuple[int, dict[str, Any]]` or `None`: what [`RunDirectory.write_start`] has kept; `None` before that.

        Raises:
            ValueError: If the file is damaged or of another run.
        """
        path = self.root / "start.json"
        if not path.is_file():
            return None
        kept = self._read(path)
        return kept["start"], kept["facts"]

    def write_linear(self, start: int, weights: torch.Tensor, held_out: torch.Tensor) -> None:
        """
        Keep the weights of the linear model on the hidden states under `INITIAL` or `PRETRAINED` weights, and its predictions on parts of
        the labels that it was not fitted to.
        """
        path = self.linear_path(start)
        write_tensors(path, {"weights": weights, "held_out": held_out}, self.key(path))

    def read_linear(self, start: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`tuple[torch.Tensor, torch.Tensor]` or `None`: these two; `None` if there are none yet, or if they are damaged."""
        path = self.linear_path(start)
        tensors = read_tensors(path, self.key(path))
        return None if tensors is None else (tensors["weights"], tensors["held_out"])

    def linear_path(self, start: int) -> Path:
        """`Path`: file with the linear model on the hidden states under `INITIAL` or `PRETRAINED` weights."""
        return self.root / f"linear_{'initial' if start == INITIAL else 'pretrained'}.safetensors"

    def fold_dir(self, fold: int, start: int) -> Path:
        """`Path`: directory of a fold model that starts from some weights, `INITIAL` or `PRETRAINED`."""
        return self.round_dir(0 if start == INITIAL else start) / f"fold_{fold}"

    def fold_weights_path(self, fold: int, start: int) -> Path:
        """`Path`: file with the trainable weights of a fold model."""
        return self.fold_dir(fold, start) / "weights.safetensors"

    def write_fold(self, fold: int, start: int, logits: np.ndarray) -> None:
        """Keep the pair logits of a fold model on the part that it has not seen."""
        path = self.fold_dir(fold, start) / "logits.safetensors"
        write_tensors(path, {"logits": torch.from_numpy(logits)}, self.key(path))

    def read_fold(self, fold: int, start: int) -> np.ndarray | None:
        """`np.ndarray` or `None`: these pair logits; `None` if there are none yet, or if they are damaged."""
        path = self.fold_dir(fold, start) / "logits.safetensors"
        tensors = read_tensors(path, self.key(path))
        return None if tensors is None else tensors["logits"].numpy()

    def has_fold(self, fold: int, start: int) -> bool:
        """`bool`: whether the predictions of a fold model are there and whole."""
        return self.read_fold(fold, start) is not None

    def prune_at_end(self, needed: set[int]) -> None:
        """Delete what a run that is over no longer needs: checkpoints, scores, and the weights of all but the needed rounds."""
        self.prune_weights(needed)
        with telling_where(self.root):
            for directory in (
                *self.root.glob(f"round_*/{PREFIX_CHECKPOINT_DIR}-*"),
                *self.root.glob("round_*/scores"),
                self.root / "teacher_scores",
                self.round_dir(PRETRAINED),
            ):
                shutil.rmtree(directory, ignore_errors=True)

    def prune_weights(self, needed: set[int]) -> None:
        """Delete the weights of all rounds that are over, except the needed ones."""
        with telling_where(self.root):
            for round in {INITIAL, PRETRAINED, *range(self.num_finished)} - needed:
                self.weights_path(round).unlink(missing_ok=True)
            # Their predictions are kept.
            for weights in self.root.glob("*/fold_*/weights.safetensors"):
                weights.unlink()
