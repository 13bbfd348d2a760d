import pytest
from conftest import TRL_DEFAULTS, preference_rows
from datasets import Dataset
from trl import RewardTrainer

from trl_ssrm import SSRMTrainer


def losses_of(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.fixture
def long_prompts() -> Dataset:
    return Dataset.from_list([{**row, "prompt": row["prompt"] * 6} for row in preference_rows(16, seed=1)])


def test_shared_prompts_change_the_losses_in_the_last_digits_only(llama, config, long_prompts, tmp_path):
    losses, num_tokens = {}, {}
    for name, trainer_class, settings in (
        ("parent", RewardTrainer, {}),
        ("shared", SSRMTrainer, {"share_prompts": True}),
        ("padded", SSRMTrainer, {"share_prompts": False}),
    ):
        args = config(output_dir=str(tmp_path / name), logging_steps=1, **settings)
        trainer = trainer_class(llama, args, train_dataset=long_prompts)
        counted = []
        trainer.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, args, counted=counted: counted.append(args[0].numel())
        )
        trainer.train()
        losses[name] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        num_tokens[name] = sum(counted)
        # What is counted for the user stays the number of tokens of the pairs.
        num_tokens[f"{name}, logged"] = [log["num_tokens"] for log in trainer.state.log_history if "loss" in log]
    assert losses["padded"] == losses["parent"]
    assert losses["shared"] != losses["parent"]
    assert losses["shared"] == pytest.approx(losses["parent"], abs=1e-3)
    assert num_tokens["shared"] < 0.75 * num_tokens["parent"]
    assert num_tokens["shared, logged"] == num_tokens["parent, logged"]


def test_prompts_are_shared_in_mixed_precision(llama, config, long_prompts, unlabeled, tmp_path):
    num_tokens, losses = {}, {}
    for share in (None, False):
        settings = {"num_rounds": 0, "logging_steps": 1, "share_prompts": share, **TRL_DEFAULTS}
        args = config(output_dir=str(tmp_path / str(share)), **settings)
        trainer = SSRMTrainer(llama, args, train_dataset=long_prompts, unlabeled_dataset=unlabeled)
        counted = []
        trainer.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, args, counted=counted: counted.append(args[0].numel())
        )
        trainer.train()
        num_tokens[share], losses[share] = sum(counted), losses_of(trainer)
        # Prepared for training, the model computes in bfloat16.
        assert trainer.layout == ("padded" if share is False else "shared")
    assert num_tokens[None] < 0.75 * num_tokens[False]
    # Rounding at a learning rate like this one soon leads elsewhere.
    assert losses[None][:2] == pytest.approx(losses[False][:2], abs=1e-2)
    assert losses[None] != losses[False]


def test_batches_can_be_grouped_by_length(llama, config, labeled, unlabeled, held_out):
    rows = [{**row, "chosen": row["chosen"] + "z" * (7 * number % 61)} for number, row in enumerate(unlabeled)]
    args = config(train_sampling_strategy="group_by_length", num_rounds=1, confidence_threshold=0.5)
    trainer = SSRMTrainer(
        llama, args, train_dataset=labeled, eval_dataset=held_out, unlabeled_dataset=Dataset.from_list(rows)
    )
    trainer.train()
    assert len(trainer.round_history) == 2
    rows = 5 * rows_of(trainer)
    one, other = ([*trainer._get_train_sampler(Dataset.from_list(rows))] for _ in range(2))
    assert one != other
    lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    batches = [one[start : start + 4] for start in range(0, len(one), 4)]
    spread = sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches) / len(batches)
    assert spread < 0.25 * (max(lengths) - min(lengths))


def rows_of(trainer: SSRMTrainer) -> list[dict]:
    pairs = trainer.data.pool.pairs
    ids = pairs.sequences[:]["input_ids"]
    return [
        {"chosen_ids": ids[first], "rejected_ids": ids[second]}
        for first, second in zip(pairs.first, pairs.second, strict=True)
    ]
