"""
What a run leaves on disk, and how it is resumed from it.

```
output_dir/_rounds/
    run.json                   settings and data that the run was started with
    initial.safetensors        trainable weights before round 0
    pool/                      rows of a pool that is a stream, and the cache of what was made of them
    round_1/
        scores/                rewards of the pool under the weights of round 0
        pseudo_labels.parquet  kept pairs: what round 1 trains on beside the labeled pairs
        labeling.json          histograms of how the pool was labeled and a few pairs, for the report
        fold_0/                what the model without the first part of the labels says, and its weights
        checkpoint-*/          as of any trainer
        weights.safetensors    trainable weights after round 1
        trainer_state.json     written after the weights: the round is trained
        round.json             facts of the round and logs up to here, written last: the round is over
    end.json                   why the rounds ended and which of them is kept: the run is over
```

Every file is written aside and renamed, and files of numbers and pairs carry a checksum.
"""

import importlib.metadata
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features
from safetensors import safe_open
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import __version__
from .config import SSRMConfig
from .sharding import fill, shape_of, trainable_parameters
from .storage import (
    changed_facts,
    content_hash,
    read_facts,
    read_numbers,
    read_table,
    read_tensors,
    write_json,
    write_table,
    write_tensors,
    written_aside,
)


# Written into a checkpoint when all of it is on disk. `Trainer` itself gives no sign of that, and would resume from
# half a checkpoint.
CHECKPOINT_MARKER = "checkpoint_complete"

# Told in the report, whatever they were when the round ended.
_REPORTED_PACKAGES = ("trl", "transformers", "torch", "accelerate", "datasets", "peft")

# Settings that decide the result besides the data and the model. A run is resumed with the same ones only.
_DECISIVE_SETTINGS = (
    *(
        name
        for name in SSRMConfig.__annotations__
        if name not in ("score_batch_tokens", "track_pseudo_label_accuracy")
    ),
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "max_grad_norm"),
    *("seed", "data_seed", "bf16", "fp16", "max_length", "center_rewards_coefficient", "disable_dropout"),
    *("load_best_model_at_end", "metric_for_best_model", "neftune_noise_alpha", "train_sampling_strategy"),
)


def run_identity(args: SSRMConfig, model: nn.Module, data: dict[str, Any]) -> dict[str, Any]:
    """
    What decides the result of a run.

    Args:
        args ([`SSRMConfig`]):
            Settings of the run.
        model ([`~torch.nn.Module`]):
            Model of the run; its class and the shapes of its parameters count.
        data (`dict[str, Any]`):
            Fingerprints of the datasets, by their names.

    Returns:
        `dict[str, Any]`: JSON values by the names of what they stand for.
    """
    settings = args.to_dict()
    shapes = sorted((name, shape_of(parameter)) for name, parameter in model.named_parameters())
    return {
        **{name: settings[name] for name in _DECISIVE_SETTINGS},
        "total_train_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "model": f"{type(model).__name__} {content_hash(shapes)}",
        **data,
    }


class RunDirectory:
    """
    The files of one run.

    Args:
        output_dir (`str`):
            Output directory of the trainer.
    """

    def __init__(self, output_dir: str):
        self.output_dir = Path(output_dir)
        # `Trainer.push_to_hub` leaves out what starts with "_": the texts of the pool stay here.
        self.root = self.output_dir / "_rounds"

    def round_dir(self, round: int) -> Path:
        """`Path`: directory of a round."""
        return self.root / f"round_{round}"

    @property
    def has_run(self) -> bool:
        """`bool`: whether a run was started here."""
        return (self.root / "run.json").is_file()

    @property
    def num_finished(self) -> int:
        """`int`: number of rounds that are over, round 0 included."""
        round = 0
        while (self.round_dir(round) / "round.json").is_file():
            round += 1
        return round

    def start(self, identity: dict[str, Any], resume: bool) -> None:
        """
        Open the directory for a new run, or check that the run in it is the same.

        Args:
            identity (`dict[str, Any]`):
                Settings and data that decide the result, as JSON values.
            resume (`bool`):
                Whether to go on with the run in the directory.

        Raises:
            ValueError: If there is a run and `resume` is not set, if there is none and it is, or if the run was
                started with other settings or data.
        """
        if not self.has_run:
            if resume:
                raise ValueError(
                    f"There is no run to resume in {self.output_dir}; leave out `resume_from_checkpoint` to start one."
                )
            write_json(self.root / "run.json", identity)
            return
        if not resume:
            raise ValueError(
                f"{self.output_dir} already holds a run; pass `resume_from_checkpoint=True` to go on with it, choose "
                f"another `output_dir`, or delete {self.root}."
            )
        if changed := changed_facts(self.root / "run.json", identity):
            raise ValueError(
                f"The run in {self.output_dir} was started with other settings or data: {changed}. Resume it with what "
                "it was started with, or choose another `output_dir`."
            )

    def write_weights(self, path: Path, weights: dict[str, torch.Tensor]) -> None:
        """Keep the trainable weights of a model, as [`~trl_ssrm.sharding.whole_weights`] gives them."""
        write_tensors(path, weights)

    def read_weights(self, path: Path, model: nn.Module) -> None:
        """
        Put the trainable weights of a model back, in every process at the same time.

        Raises:
            ValueError: If the file is missing, damaged, or holds the weights of another model.
        """
        stored, current = read_tensors(path), trainable_parameters(model)
        if stored is None:
            raise ValueError(f"{path} is missing or damaged, so the run can't go on; start it anew elsewhere.")
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
        """End a round with its facts, the logs up to here and its reliability curves, all in one file or none."""
        versions = {package: importlib.metadata.version(package) for package in _REPORTED_PACKAGES}
        versions = {"python": platform.python_version(), "trl_ssrm": __version__, **versions}
        parts = {"facts": facts, "log_history": log_history, "reliability": reliability, "versions": versions}
        write_json(self.round_dir(round) / "round.json", parts)

    def read_round(self, round: int) -> dict[str, Any]:
        """
        `dict[str, Any]`: `facts` and `log_history` of a round that is over, and the curves of [`reliability_curve`]
        `before` and `after` the temperature for each held-out dataset, as `reliability`.
        """
        path = self.round_dir(round) / "round.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        # The round names the file that the weights are read from.
        if content["facts"]["round"] != round:
            raise ValueError(f"{path} is not of round {round}, so the run can't go on; start it anew elsewhere.")
        return content

    def write_labeling(self, round: int, summary: dict[str, Any]) -> None:
        """Keep what the report tells of how the pool was labeled for a round; see [`summarize_labeling`]."""
        write_json(self.round_dir(round) / "labeling.json", summary)

    def write_end(self, termination_reason: str | None, kept_round: int) -> None:
        """Say that the run is over, why, and which round the model is of."""
        write_json(self.root / "end.json", {"termination_reason": termination_reason, "kept_round": kept_round})

    def state_path(self, round: int) -> Path:
        """`Path`: state of the trainer at the end of a round, there once the round was trained."""
        return self.round_dir(round) / "trainer_state.json"

    def write_state(self, round: int, state: TrainerState) -> None:
        """Keep the state of the trainer at the end of a round, which is the sign that it was trained."""
        with written_aside(self.state_path(round)) as aside:
            state.save_to_json(str(aside))

    def write_pseudo_labels(
        self, round: int, features: Features, parts: Iterable[Dataset], facts: dict[str, Any]
    ) -> None:
        """Keep the pairs that a round will train on, part by part, and the facts of their selection."""
        write_table(self._pseudo_labels_path(round), features, parts, facts)

    def has_pseudo_labels(self, round: int) -> bool:
        """`bool`: whether the pairs that a round trains on are there and whole."""
        return read_facts(self._pseudo_labels_path(round)) is not None

    def read_pseudo_labels(self, round: int) -> tuple[Dataset, dict[str, Any]] | None:
        """
        The pairs that a round trains on, with their texts, and the facts of their selection.

        Returns:
            `tuple[Dataset, dict]` or `None`: `None` if there are none yet or the file is damaged, which is logged.
        """
        return read_table(self._pseudo_labels_path(round))

    def read_numbers_of_pseudo_labels(
        self, round: int, columns: list[str]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The same without the texts; see [`~trl_ssrm.storage.read_numbers`]."""
        return read_numbers(self._pseudo_labels_path(round), columns)

    def _pseudo_labels_path(self, round: int) -> Path:
        return self.round_dir(round) / "pseudo_labels.parquet"

    def last_checkpoint(self, round: int) -> str | None:
        """`str` or `None`: directory of the last checkpoint of a round that was written to its end."""
        whole = [
            marker.parent for marker in self.round_dir(round).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{CHECKPOINT_MARKER}")
        ]
        return str(max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if whole else None

    def weights_path(self, round: int) -> Path:
        """`Path`: trainable weights after a round; round -1 stands for the initial ones."""
        return self.root / "initial.safetensors" if round < 0 else self.round_dir(round) / "weights.safetensors"

    def fold_weights_path(self, round: int, fold: int) -> Path:
        """`Path`: trainable weights of a model that lacks a part of the labeled pairs, after a round."""
        return self.round_dir(round) / f"fold_{fold}" / "weights.safetensors"

    def write_fold(self, round: int, fold: int, logits: dict[str, np.ndarray]) -> None:
        """Keep the pair logits that such a model gives, by what they are of."""
        tensors = {name: torch.from_numpy(values) for name, values in logits.items()}
        write_tensors(self.round_dir(round) / f"fold_{fold}" / "logits.safetensors", tensors)

    def read_fold(self, round: int, fold: int) -> dict[str, np.ndarray] | None:
        """`dict[str, np.ndarray]` or `None`: the same; `None` if there are none yet or the file is damaged."""
        tensors = read_tensors(self.round_dir(round) / f"fold_{fold}" / "logits.safetensors")
        return None if tensors is None else {name: tensor.numpy() for name, tensor in tensors.items()}

    def prune_weights(self, needed: set[int]) -> None:
        """Delete the weights after rounds that are over, but for some."""
        for round in set(range(-1, self.num_finished)) - needed:
            self.weights_path(round).unlink(missing_ok=True)
            for weights in self.round_dir(round).glob("fold_*/weights.safetensors"):
                if round < self.num_finished - 1:
                    weights.unlink()
