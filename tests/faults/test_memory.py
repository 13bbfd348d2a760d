"""Memory: what does not fit ends with advice, and many rounds in one process leave nothing behind."""

import gc
import os

import psutil
import pytest
import torch
from conftest import preference_rows
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from trl_ssrm import SSRMTrainer
from trl_ssrm.rounds.callback import RoundCallback


# The first rounds fill caches; what is kept by each round shows after them.
SETTLED_ROUND = 4


@pytest.fixture
def train_with(llama, config, labeled, unlabeled):
    """Trains a model that raises an error in training, not in scoring, in one round."""

    def train(error: Exception, round: int, num_folds: int) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
        trainer = SSRMTrainer(
            model,
            config(num_folds=num_folds, num_train_epochs=1),
            train_dataset=labeled,
            unlabeled_dataset=unlabeled,
        )

        def refuse(module, args):
            if model.training and trainer.round == round:
                raise error

        model.get_input_embeddings().register_forward_pre_hook(refuse)
        trainer.train()

    return train


@pytest.mark.parametrize(("round", "num_folds"), [(0, 0), (1, 0), (0, 2)])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["gpu", "cpu"],
)
def test_training_that_does_not_fit_into_memory_ends_with_advice(train_with, error, round, num_folds):
    with pytest.raises(torch.OutOfMemoryError, match=f"^Round {round} does not fit into memory") as raised:
        train_with(error, round, num_folds)
    message = str(raised.value)
    assert "batches of 4 pairs" in message and "`gradient_accumulation_steps`" in message and "\n" not in message
    assert raised.value.__cause__ is error


def test_other_errors_of_training_stay_what_they_are(train_with):
    error = RuntimeError("The device is gone.")
    with pytest.raises(RuntimeError) as raised:
        train_with(error, 0, 0)
    assert raised.value is error


def test_many_rounds_leave_neither_memory_nor_open_files(llama, config, labeled):
    """Eight rounds; fifty where `SSRM_LONG_FAULTS` is set."""
    num_rounds = 50 if os.environ.get("SSRM_LONG_FAULTS") else 8
    measured = {}

    class Measure(RoundCallback):
        def on_labeling_end(self, args, state, control, round, **kwargs):
            gc.collect()
            process = psutil.Process()
            measured[round - 1] = process.memory_info().rss, len(os.listdir("/proc/self/fd")), process.num_threads()

    # A share of the pool for each round, so that no round keeps the pairs of the round before.
    pool = Dataset.from_list(preference_rows(8 * num_rounds, seed=2))
    trainer = SSRMTrainer(
        llama,
        config(
            num_rounds=num_rounds, num_train_epochs=1, confidence_threshold=0.5, pool_per_round="shard", num_folds=0
        ),
        train_dataset=labeled,
        unlabeled_dataset=pool,
        callbacks=[Measure()],
    )
    trainer.train()
    assert trainer.termination_reason == "max_rounds" and len(measured) == num_rounds
    first, last = measured[SETTLED_ROUND], measured[num_rounds - 1]
    weights = sum(parameter.nbytes for parameter in trainer.model.parameters())
    # Not even a copy of the weights in every fourth round.
    grown = last[0] - first[0]
    print(f"rounds {SETTLED_ROUND} to {num_rounds - 1}: {grown} bytes, weights {weights}, {first[1:]} to {last[1:]}")
    assert grown < weights * (num_rounds - SETTLED_ROUND) / 4 + 4_000_000
    assert last[1:] == first[1:]
