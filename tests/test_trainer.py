import numpy as np
import pytest
import torch
from conftest import as_messages, assert_same_weights, preference_rows, weights_of
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig

from trl_ssrm import ConfidenceFilteredDataCollator, SSRMConfig, SSRMTrainer


def losses_of(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_rounds_train_on_labeled_and_kept_pairs(llama, config, labeled, unlabeled, held_out):
    args = config(track_pseudo_label_accuracy=True, num_train_epochs=2)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, eval_dataset=held_out, unlabeled_dataset=unlabeled)
    output = trainer.train()
    assert [facts["round"] for facts in trainer.round_history] == list(range(len(trainer.round_history)))
    assert len(trainer.round_history) > 1
    for facts in trainer.round_history[1:]:
        assert facts["num_train_pairs"] == len(labeled) + facts["kept"]
        assert facts["coverage"] == facts["kept"] / facts["pool_size"]
        assert 0.6 < facts["mean_confidence"] <= 1
        assert 0 <= facts["pseudo_label_accuracy"] <= 1
    for facts in trainer.round_history:
        assert {f"eval_{name}" for name in ("accuracy", "log_loss", "ece", "brier")} <= facts.keys()
    assert output.metrics["termination_reason"] in ("max_rounds", "no_change")
    assert len(trainer.train_dataset) == len(labeled)


def test_pool_teaches_more_than_as_many_steps_on_the_labels_alone(make_trainer, held_out, tmp_path):
    settings = {"num_train_epochs": 2, "eval_dataset": held_out}
    rounds = make_trainer(**settings, output_dir=str(tmp_path / "rounds"))
    rounds.train()
    labels_alone = make_trainer(
        **settings,
        num_rounds=0,
        max_steps=rounds.round_history[-1]["global_step"],
        output_dir=str(tmp_path / "labels"),
    )
    labels_alone.train()
    losses = [trainer.round_history[-1]["eval_log_loss"] for trainer in (rounds, labels_alone)]
    assert labels_alone.round_history[-1]["global_step"] == rounds.round_history[-1]["global_step"]
    assert losses[0] < losses[1] and losses[0] < rounds.round_history[0]["eval_log_loss"]


@pytest.mark.parametrize("pseudo_label_type", ["hard", "soft"])
@pytest.mark.parametrize("round_init", ["continue", "base"])
def test_labels_of_the_pool_never_reach_training(llama, config, labeled, tmp_path, pseudo_label_type, round_init):
    rows = preference_rows(40, seed=2)
    swapped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if number % 2 else row
        for number, row in enumerate(rows)
    ]
    results = []
    for number, pool in enumerate((rows, swapped)):
        args = config(
            output_dir=str(tmp_path / str(number)),
            pseudo_label_type=pseudo_label_type,
            round_init=round_init,
            track_pseudo_label_accuracy=True,
        )
        trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=Dataset.from_list(pool))
        trainer.train()
        kept = trainer.run.read_pseudo_labels(1)[0].to_dict()
        results.append((weights_of(trainer.model), kept, trainer.round_history[1]["pseudo_label_accuracy"]))
    assert len(results[0][1]["pair"]) > 10
    assert results[0][1] == results[1][1]
    assert_same_weights(results[0][0], results[1][0])
    # The labels were swapped indeed: the metric, and it alone, sees it.
    assert results[0][2] != results[1][2]


def test_pool_in_other_formats_gives_the_same_run(llama, config, labeled, tmp_path):
    rows = preference_rows(40, seed=2)
    formats = [
        rows,
        [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in rows],
        [{"prompt": row["prompt"], "completion_a": row["rejected"], "completion_b": row["chosen"]} for row in rows],
        [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows],
    ]
    weights = []
    for number, pool in enumerate(formats):
        args = config(output_dir=str(tmp_path / str(number)), num_rounds=1)
        trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=Dataset.from_list(pool))
        trainer.train()
        weights.append(weights_of(trainer.model))
    for other in weights[1:]:
        assert_same_weights(weights[0], other)


def test_conversations_with_tools_are_tokenized_as_the_labeled_pairs(llama, config):
    tools = '[{"name": "search"}]'
    rows = [{**as_messages(row), "tools": tools} for row in preference_rows(8)]
    pool = [{**as_messages(row), "tools": tools} for row in preference_rows(8, seed=2)]
    trainer = SSRMTrainer(
        llama, config(), train_dataset=Dataset.from_list(rows), unlabeled_dataset=Dataset.from_list(pool)
    )
    ids = trainer.data.pool.pairs.sequences["input_ids"]
    expected = trainer._prepare_dataset(Dataset.from_list(pool), trainer.processing_class, trainer.args, "expected")
    assert sorted(ids) == sorted(expected["chosen_ids"][:] + expected["rejected_ids"][:])
    assert "search" in trainer.processing_class.decode(ids[0])


def test_base_rounds_start_from_the_initial_weights(llama, config, labeled, unlabeled):
    started = []

    class FirstWeights(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            started.append(weights_of(model))

    for round_init in ("base", "continue"):
        started.clear()
        args = config(round_init=round_init, num_rounds=1, output_dir=config().output_dir + round_init)
        SSRMTrainer(
            llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled, callbacks=[FirstWeights()]
        ).train()
        is_same = all(torch.equal(started[0][name], started[1][name]) for name in started[0])
        assert is_same == (round_init == "base")


def test_shards_are_disjoint_and_are_the_whole_pool(llama, config, labeled, unlabeled):
    args = config(pool_per_round="shard", num_rounds=3)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    shares = [trainer.share_of_pool(round) for round in (1, 2, 3)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(40))
    trainer.train()
    assert [facts["pool_size"] for facts in trainer.round_history[1:]] == [len(share) for share in shares]


def test_later_rounds_have_their_own_length(llama, config, labeled, unlabeled):
    args = config(max_steps=6, round_num_train_epochs=1, num_rounds=1, confidence_threshold=0.5)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    trainer.train()
    steps = [facts["global_step"] for facts in trainer.round_history]
    pairs = trainer.round_history[1]["num_train_pairs"]
    assert steps == [6, 6 + -(-pairs // 4)]


def test_charts_go_on_across_rounds(llama, config, labeled, unlabeled, held_out, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = config(report_to="tensorboard")
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, eval_dataset=held_out, unlabeled_dataset=unlabeled)
    trainer.train()
    steps = [log["step"] for log in trainer.state.log_history if "loss" in log]
    assert steps == sorted(set(steps))
    assert steps[-1] > trainer.round_history[0]["global_step"]
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    assert len(list(events.iterdir())) == 1
    charts = EventAccumulator(str(events)).Reload()
    assert [event.step for event in charts.Scalars("train/loss")] == steps
    assert {"train/kept", "train/coverage", "train/mean_confidence", "eval/log_loss"} <= set(charts.Tags()["scalars"])


def test_nothing_selected_ends_the_rounds_with_the_model_so_far(llama, config, labeled, unlabeled, caplog):
    args = config(confidence_threshold=0.999999)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    after_round_0 = []

    class Weights(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            after_round_0.append(weights_of(model))

    trainer.add_callback(Weights())
    trainer.train()
    assert trainer.termination_reason == "nothing_selected"
    assert len(trainer.round_history) == len(after_round_0) == 1
    assert_same_weights(weights_of(trainer.model), after_round_0[0])


def test_unchanged_selection_ends_the_rounds(llama, config, labeled, unlabeled):
    args = config(num_rounds=5, confidence_threshold=0.5)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    trainer.train()
    assert trainer.termination_reason == "no_change"
    assert len(trainer.round_history) < 6


def test_round_with_the_lowest_log_loss_on_the_calibration_pairs_is_kept(llama, config, labeled, unlabeled, held_out):
    # Labels turned round in the held-out pairs: every round is worse than the one before.
    turned = held_out.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    args = config(keep_best_round=True, num_train_epochs=2, confidence_threshold=0.5)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled, calibration_dataset=turned)
    output = trainer.train()
    log_losses = [facts["calibration_calibrated_log_loss"] for facts in trainer.round_history]
    kept = int(np.argmin(log_losses))
    assert output.metrics["kept_round"] == kept < len(log_losses) - 1
    logits = trainer.score_pairs(trainer.data.held_out["calibration"], "calibration").logits
    expected = trainer.round_history[kept]["calibration_log_loss"]
    assert np.mean(np.logaddexp(0, -logits)) == pytest.approx(expected, abs=1e-6)


def test_evaluation_pairs_choose_no_round(llama, config, labeled, unlabeled, held_out):
    turned = held_out.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    args = config(num_train_epochs=2, confidence_threshold=0.5)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled, eval_dataset=turned)
    output = trainer.train()
    losses = [facts["eval_log_loss"] for facts in trainer.round_history]
    assert np.argmin(losses) < output.metrics["kept_round"] == len(losses) - 1


def test_temperature_is_fitted_on_the_calibration_pairs(llama, config, labeled, unlabeled, held_out):
    rows = list(held_out)
    noisy = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i % 3 == 0 else row
        for i, row in enumerate(rows)
    ]
    trainer = SSRMTrainer(
        llama,
        config(num_rounds=1),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        calibration_dataset=Dataset.from_list(noisy),
    )
    trainer.train()
    # The model is surer than a third of wrong labels allows.
    assert trainer.round_history[0]["temperature"] > 1
    assert trainer.run.read_pseudo_labels(1)[1]["temperature"] == trainer.round_history[0]["temperature"]


def test_labels_weigh_what_the_config_says(llama, config, labeled, unlabeled):
    collators = [
        SSRMTrainer(llama, config(**settings), train_dataset=labeled, unlabeled_dataset=unlabeled).data_collator
        for settings in ({}, {"pseudo_label_type": "soft", "pseudo_label_weight": 0.3, "confidence_threshold": 0.7})
    ]
    assert collators[0] == ConfidenceFilteredDataCollator(collators[0].pad_token_id)
    assert collators[1] == ConfidenceFilteredDataCollator(
        collators[0].pad_token_id, pseudo_label_type="soft", pseudo_label_weight=0.3
    )


def test_plain_reward_config_is_completed(llama, tmp_path, labeled, unlabeled):
    args = RewardConfig(str(tmp_path), report_to="none", bf16=False, learning_rate=3e-4, max_length=77)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    assert isinstance(trainer.args, SSRMConfig)
    assert (trainer.args.learning_rate, trainer.args.max_length, trainer.args.num_rounds) == (3e-4, 77, 1)


def test_run_that_was_interrupted_is_resumed_in_the_same_process(llama, config, labeled, unlabeled):
    class Interrupt(TrainerCallback):
        is_armed = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.is_armed and trainer.round == 1 and state.global_step == 4:
                raise KeyboardInterrupt

    undisturbed = SSRMTrainer(
        llama,
        config(output_dir=config().output_dir + "-undisturbed"),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
    )
    undisturbed.train()
    callback = Interrupt()
    trainer = SSRMTrainer(llama, config(), train_dataset=labeled, unlabeled_dataset=unlabeled, callbacks=[callback])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    callback.is_armed = False
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(trainer.model), weights_of(undisturbed.model))
    assert trainer.state.log_history[0].keys() == undisturbed.state.log_history[0].keys()
    assert len(trainer.state.log_history) == len(undisturbed.state.log_history)


def test_saved_model_reloads_with_transformers_and_gives_the_same_scores(llama, config, labeled, unlabeled, tmp_path):
    trainer = SSRMTrainer(llama, config(num_rounds=1), train_dataset=labeled, unlabeled_dataset=unlabeled)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert_same_weights(weights_of(model), weights_of(trainer.model))
    text = "Say 1: kind"
    with torch.inference_mode():
        one = model.eval()(**tokenizer(text, return_tensors="pt")).logits
        other = trainer.model.eval()(**trainer.processing_class(text, return_tensors="pt")).logits
    assert torch.equal(one, other)


def test_model_card_names_the_method_and_holds_the_rounds(llama, config, labeled, unlabeled, held_out, tmp_path):
    trainer = SSRMTrainer(
        llama, config(num_rounds=1), train_dataset=labeled, eval_dataset=held_out, unlabeled_dataset=unlabeled
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for directory in (trainer.args.output_dir, tmp_path / "saved"):
        card = (type(tmp_path)(directory) / "README.md").read_text()
        assert "trained with SSRM" in card and "2409.06903" in card and "he2024semi" in card and "- ssrm" in card
        assert f"| 1 | 40 | {trainer.round_history[1]['kept']} |" in card
        assert f"Trained from {llama} on 16 labeled pairs and 40 unlabeled pairs." in card and "None" not in card
        assert card.index(" held-out pairs (`eval_dataset`)") < card.index("## Quick start")
    plain = SSRMTrainer(
        llama, RewardConfig(str(tmp_path / "plain"), report_to="none", bf16=False), train_dataset=labeled
    )
    plain.create_model_card("plain")
    assert "SSRM" not in (tmp_path / "plain" / "README.md").read_text()


def test_result_has_the_speed_of_all_rounds(make_trainer):
    trainer = make_trainer(num_rounds=1)
    output = trainer.train()
    ends = [log for log in trainer.state.log_history if "train_runtime" in log]
    assert len(ends) == 2 and output.metrics["train_loss"] == output.training_loss == ends[-1]["train_loss"]
    assert output.metrics["train_runtime"] == pytest.approx(sum(end["train_runtime"] for end in ends))
    steps = sum(end["train_runtime"] * end["train_steps_per_second"] for end in ends)
    assert output.metrics["train_steps_per_second"] * output.metrics["train_runtime"] == pytest.approx(steps)


def test_run_that_is_over_leaves_little_and_can_be_read_again(make_trainer, held_out, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_folds": 2, "pretrain_on_pool": True, "num_rounds": 2}
    trainer = make_trainer(**settings, eval_dataset=held_out)
    trainer.train()
    root = trainer.run.root
    left = {path.relative_to(root).as_posix() for path in root.rglob("*.safetensors")}
    folds = {f"round_0/fold_{fold}/logits.safetensors" for fold in range(2)} & left
    assert left == {"round_2/weights.safetensors", "round_0/held_out.safetensors"} | folds
    assert not list(root.glob("*/checkpoint-*")) and not list(root.glob("*/scores"))
    again = make_trainer(**settings, eval_dataset=held_out)
    again.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(again.model), weights_of(trainer.model))
    assert again.round_history == trainer.round_history
