import re

import numpy as np
import pytest
import torch
from conftest import as_messages, assert_same_weights, make_tokenizer, preference_rows, weights_of
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer

from trl_ssrm import ConfidenceFilteredDataCollator, PseudoLabelingCallback, SSRMConfig, SSRMTrainer
from trl_ssrm.rounds.pair_trainer import weighted_loss


def losses_of(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


# ---- `RewardTrainer`, where there is no pool ----


@pytest.mark.parametrize("kind", ["text", "conversation", "margin", "centered"])
def test_without_a_pool_it_is_reward_trainer_bit_for_bit(llama, tmp_path, kind):
    rows = preference_rows(16)
    if kind == "conversation":
        rows = [as_messages(row) for row in rows]
    if kind == "margin":
        rows = [{**row, "margin": 0.1 * number} for number, row in enumerate(rows)]
    settings = dict(
        output_dir=str(tmp_path),
        report_to="none",
        per_device_train_batch_size=4,
        num_train_epochs=2,
        logging_steps=1,
        center_rewards_coefficient=0.1 if kind == "centered" else None,
        save_strategy="no",
        bf16=False,
    )
    trainers = []
    for trainer_class, config_class in (
        (RewardTrainer, RewardConfig),
        (SSRMTrainer, RewardConfig),
        (SSRMTrainer, SSRMConfig),
    ):
        trainer = trainer_class(llama, config_class(**settings), train_dataset=Dataset.from_list(rows))
        trainer.train()
        trainers.append(trainer)
    for trainer in trainers[1:]:
        assert losses_of(trainer) == losses_of(trainers[0])
        assert_same_weights(weights_of(trainer.model), weights_of(trainers[0].model))


# What TRL sets where nothing is said, which most tests leave out since it is slow on a CPU.
TRL_DEFAULTS = {"bf16": True, "gradient_checkpointing": True, "use_cpu": True}


@pytest.mark.parametrize("kind", ["text", "margin", "centered", "mixed precision"])
def test_round_0_is_reward_trainer_bit_for_bit(llama, config, unlabeled, tmp_path, kind):
    rows = preference_rows(16)
    if kind == "margin":
        rows = [{**row, "margin": 0.1 * number} for number, row in enumerate(rows)]
    # In bfloat16 the kernels of shared prompts round in another way.
    settings = {**TRL_DEFAULTS, "share_prompts": False} if kind == "mixed precision" else {}
    args = config(num_rounds=0, center_rewards_coefficient=0.1 if kind == "centered" else None, **settings)
    ours = SSRMTrainer(llama, args, train_dataset=Dataset.from_list(rows), unlabeled_dataset=unlabeled)
    theirs = RewardTrainer(llama, args, train_dataset=Dataset.from_list(rows))
    ours.train()
    theirs.train()
    assert_same_weights(weights_of(ours.model), weights_of(theirs.model))


def test_gold_rows_have_the_loss_of_reward_trainer_bit_for_bit(llama, config, labeled, unlabeled):
    rows = labeled.add_column("margin", np.linspace(0, 1, len(labeled)))
    args = config(center_rewards_coefficient=0.1)
    trainer = SSRMTrainer(llama, args, train_dataset=rows, unlabeled_dataset=unlabeled)
    examples = list(trainer.train_dataset)
    plain = trainer.data_collator(examples)
    weighted = trainer.data_collator([{**example, "probability": None} for example in examples])
    assert "weight" in weighted and "weight" not in plain
    assert torch.equal(trainer.compute_loss(trainer.model, plain), trainer.compute_loss(trainer.model, weighted))


def test_soft_label_and_weight_enter_the_loss():
    label, weight = torch.tensor([1.0, 0.7]), torch.tensor([1.0, 0.25])
    # -[log sigmoid(1.5)] for the first pair; for the second, z = -1.5.
    first = np.log1p(np.exp(-1.5))
    second = 0.25 * (0.7 * np.log1p(np.exp(1.5)) + 0.3 * np.log1p(np.exp(-1.5)))
    loss = weighted_loss(torch.tensor([1.5, -1.5]), label, weight)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


# ---- The rounds ----


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


def test_pool_teaches(llama, config, labeled, unlabeled, held_out):
    trainer = SSRMTrainer(
        llama, config(num_train_epochs=2), train_dataset=labeled, eval_dataset=held_out, unlabeled_dataset=unlabeled
    )
    trainer.train()
    assert trainer.round_history[-1]["eval_log_loss"] < trainer.round_history[0]["eval_log_loss"]


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
    assert (trainer.args.learning_rate, trainer.args.max_length, trainer.args.num_rounds) == (3e-4, 77, 3)


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


# ---- What comes out ----


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
    plain = SSRMTrainer(
        llama, RewardConfig(str(tmp_path / "plain"), report_to="none", bf16=False), train_dataset=labeled
    )
    plain.create_model_card("plain")
    assert "SSRM" not in (tmp_path / "plain" / "README.md").read_text()


# ---- What is refused, before any training ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_dataset": []}, "`train_dataset` is empty"),
        ({"unlabeled_dataset": []}, "`unlabeled_dataset` is empty"),
        (
            {"train_dataset": [{"prompt": "p", "choosen": "a", "rejected": "b"}]},
            "`train_dataset` has no column `chosen`",
        ),
        ({"eval_dataset": [{"prompt": "p", "chosen": "a"}]}, "`eval_dataset` has no column `rejected`"),
        ({"eval_dataset": {"one": [{"chosen": "a", "rejected": ""}]}}, "row 0 of `eval_dataset_one` is empty"),
        (
            {"calibration_dataset": [as_messages(preference_rows(1)[0])]},
            "`train_dataset` holds text and `calibration_",
        ),
        (
            {"unlabeled_dataset": [as_messages(preference_rows(1)[0])]},
            "is a conversation, but the data starts",
        ),
        (
            {"train_dataset": [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")}]},
            "`margin` of row 0 of `train_dataset` is nan; give it a finite number",
        ),
        (
            {"train_dataset": [{"chosen_ids": [1], "rejected_ids": [2], "margin": None}]},
            "`margin` of row 0 of `train_dataset` is None; give it a finite number",
        ),
        ({"unlabeled_dataset": preference_rows(16, seed=1)}, "16 (overlap with the labeled pairs)"),
        ({"args": {"max_length": 5}}, "Every row of `train_dataset` is longer than max_length=5"),
        ({"args": {"keep_best_round": True}}, "`keep_best_round` needs"),
        (
            {
                "args": {"track_pseudo_label_accuracy": True},
                "unlabeled_dataset": [{"prompt": "p", "completions": ["a", "b"]}],
            },
            "needs gold labels",
        ),
        ({"calibration_dataset": preference_rows(16, seed=1)[:3]}, "shares 3 pairs with `train_dataset`"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "`optimizers` can't be used"),
        ({"data_collator": lambda rows: rows}, "`data_collator` must be a `ConfidenceFilteredDataCollator`"),
        ({"callbacks": [PseudoLabelingCallback(), PseudoLabelingCallback()]}, "has 2 callbacks that label the pool"),
        ({"unlabeled_dataset": None, "callbacks": [PseudoLabelingCallback()]}, "so it needs `unlabeled_dataset`"),
        ({"unlabeled_dataset": None, "calibration_dataset": preference_rows(3)}, "it needs `unlabeled_dataset`"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(llama, config, labeled, unlabeled, change, message):
    def as_dataset(value):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return Dataset.from_list(value)
        if value == []:
            return Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})
        return {name: as_dataset(part) for name, part in value.items()} if isinstance(value, dict) else value

    arguments = {"train_dataset": labeled, "unlabeled_dataset": unlabeled}
    arguments |= {name: as_dataset(value) for name, value in change.items() if name != "args"}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as raised:
        SSRMTrainer(llama, config(**change.get("args", {})), **arguments)
    assert "\n" not in str(raised.value)


def test_stream_of_labeled_pairs_is_refused_beside_a_pool(llama, config, labeled, unlabeled):
    with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset`"):
        SSRMTrainer(llama, config(), train_dataset=labeled.to_iterable_dataset(), unlabeled_dataset=unlabeled)


def test_model_with_two_labels_is_refused(llama, config, labeled, unlabeled):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="`num_labels=1`"):
        SSRMTrainer(model, config(), train_dataset=labeled, unlabeled_dataset=unlabeled)


@pytest.mark.parametrize(
    ("special_tokens", "conversational", "message"),
    [
        ({"pad_token": "<|pad|>", "eos_token": "<|eos|>"}, True, "the tokenizer has no chat template"),
        ({"pad_token": "<|pad|>"}, False, "set `eos_token`"),
        ({}, True, "no chat template"),
    ],
)
def test_tokenizer_that_can_not_do_it_is_refused(llama, config, special_tokens, conversational, message):
    rows = preference_rows(4)
    rows = [as_messages(row) for row in rows] if conversational else rows
    with pytest.raises(ValueError, match=message):
        SSRMTrainer(
            llama,
            config(),
            train_dataset=Dataset.from_list(rows),
            unlabeled_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(**special_tokens),
        )


def test_tokenizer_without_any_padding_token_is_refused(llama, config):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    rows = Dataset.from_list([as_messages(row) for row in preference_rows(4)])
    with pytest.raises(ValueError, match="no padding token"):
        SSRMTrainer(llama, config(), train_dataset=rows, unlabeled_dataset=rows, processing_class=tokenizer)


def test_output_directory_that_can_not_be_written_is_refused(llama, config, labeled, unlabeled, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`output_dir` can't be written"):
        SSRMTrainer(
            llama,
            config(output_dir=str(tmp_path / "file" / "run")),
            train_dataset=labeled,
            unlabeled_dataset=unlabeled,
        )


def test_long_rows_are_counted(llama, config, labeled, unlabeled, caplog):
    long = Dataset.from_list([{"prompt": "p ", "chosen": "x" * 100, "rejected": "y"}])
    from trl_ssrm import pool

    pool.logger.propagate = True
    trainer = SSRMTrainer(
        llama, config(max_length=60), train_dataset=concatenate_datasets([labeled, long]), unlabeled_dataset=unlabeled
    )
    assert len(trainer.train_dataset) == len(labeled)
    assert "Left out of `train_dataset`: 1 (longer than max_length=60)" in caplog.text


@pytest.mark.parametrize("name", ["train_dataset", "unlabeled_dataset", "eval_dataset"])
def test_sequence_that_the_model_has_no_positions_for_is_refused_before_training(
    bert, config, labeled, unlabeled, held_out, name
):
    data = {"train_dataset": labeled, "unlabeled_dataset": unlabeled, "eval_dataset": held_out}
    data[name] = concatenate_datasets([data[name], data[name].select([0]).map(lambda row: {"chosen": "x" * 600})])
    args = config(max_length=None, eos_token="<|eos|>", num_rounds=0, num_train_epochs=1)
    with pytest.raises(ValueError, match=rf"`{name}` has a sequence of 6\d\d tokens, .* set `max_length=512`"):
        SSRMTrainer(bert, args, **data)
    args.max_length = 512
    assert SSRMTrainer(bert, args, **data).train().metrics["termination_reason"] == "max_rounds"


# ---- Speed ----


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
