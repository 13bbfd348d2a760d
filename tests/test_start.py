"""What a run may start from, and what it saves: models, tokenizers and inherited settings."""

from dataclasses import fields

import pytest
import torch
from conftest import llama_config, preference_rows
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    TrainingArguments,
    pipeline,
    set_seed,
)
from trl import RewardConfig

from trl_ssrm import SSRMRewardFunction, SSRMTrainer
from trl_ssrm.rounds.settings import _WITHOUT_EFFECT


@pytest.fixture
def with_two_labels(tokenizer, tmp_path) -> str:
    directory = str(tmp_path / "two")
    LlamaForSequenceClassification(llama_config(tokenizer, num_labels=2)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "settings", [{}, {"unlabeled_dataset": None}, {"preference_model": "pairwise", "max_length": 256}]
)
def test_classifier_with_two_labels_is_refused_in_a_sentence(make_trainer, with_two_labels, settings):
    with pytest.raises(
        ValueError, match="^.*/two has 2 labels, but a reward model has one; start from its base model"
    ):
        make_trainer(with_two_labels, **settings)


def test_head_of_a_classifier_with_two_labels_can_be_replaced(make_trainer, with_two_labels):
    trainer = make_trainer(with_two_labels, model_init_kwargs={"ignore_mismatched_sizes": True})
    assert trainer.model.score.out_features == 1


def test_padding_token_without_an_embedding_is_refused_before_any_work(llama, config, labeled, unlabeled):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    data = {"train_dataset": labeled, "unlabeled_dataset": unlabeled, "processing_class": tokenizer}
    said = "^The padding token has the ID 262, but the model has embeddings for 262 tokens"
    with pytest.raises(ValueError, match=said):
        SSRMTrainer(llama, config(), **data)
    with pytest.raises(ValueError, match=said):
        SSRMRewardFunction(llama, processing_class=tokenizer)


@pytest.mark.parametrize("name", ["train_dataset", "unlabeled_dataset", "eval_dataset", "calibration_dataset"])
def test_token_without_an_embedding_is_refused_before_any_work(llama, config, name):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<|new|>"])
    rows = {"train_dataset": preference_rows(8, seed=1), "unlabeled_dataset": preference_rows(8, seed=2)}
    rows |= {"eval_dataset": preference_rows(8, seed=3), "calibration_dataset": preference_rows(8, seed=4)}
    rows[name][3]["chosen"] += "<|new|>"
    data = {each: Dataset.from_list(value) for each, value in rows.items()}
    with pytest.raises(
        ValueError, match=f"^`{name}` has the token ID 262, but the model has embeddings for 262 tokens"
    ):
        SSRMTrainer(llama, config(), processing_class=tokenizer, **data)


def test_reward_function_refuses_a_token_without_an_embedding(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(
        ValueError, match="^A sequence has the token ID 262, but the model has embeddings for 262 tokens"
    ):
        SSRMRewardFunction(llama, processing_class=tokenizer)(["Say it: "], ["a <|new|> word"])


@pytest.mark.parametrize("has_pool", [True, False])
def test_pipeline_on_a_saved_model_returns_the_reward(make_trainer, has_pool, tmp_path):
    trainer = make_trainer(num_rounds=0, max_steps=2, **({} if has_pool else {"unlabeled_dataset": None}))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    texts, tokenizer = ["Say 1: kind", "Say 2: rude words"], trainer.processing_class
    found = [each["score"] for each in pipeline("text-classification", str(tmp_path / "saved"))(texts)]
    with torch.no_grad():
        model = trainer.model.eval()
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert found == pytest.approx(expected, abs=1e-6)
    # Plain transformers reads the same weights.
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        again = [reloaded(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert again == pytest.approx(expected, abs=1e-6)


# ---- Inherited settings ----


def best_by(metric: str | None) -> dict:
    each = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 2}
    return {**each, "load_best_model_at_end": True, "metric_for_best_model": metric, "num_rounds": 0}


@pytest.mark.parametrize("metric", ["eval_log_loss", "log_loss", "ece", "num_tokens"])
def test_metric_that_no_evaluation_gives_is_refused_at_the_start(make_trainer, held_out, metric):
    with pytest.raises(
        ValueError, match=f"`metric_for_best_model` is '{metric}', .* choose one of eval_loss, eval_acc"
    ):
        make_trainer(eval_dataset=held_out, **best_by(metric))


@pytest.mark.parametrize("metric", [None, "loss", "eval_accuracy", "margin", "max_reward"])
def test_metrics_that_the_refusal_names_choose_a_model(make_trainer, held_out, metric):
    trainer = make_trainer(eval_dataset=held_out, **best_by(metric))
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None


def test_metrics_of_several_evaluations_have_their_names(make_trainer, held_out):
    for metric in (None, "accuracy"):
        with pytest.raises(ValueError, match="choose one of eval_near_loss, eval_far_loss"):
            make_trainer(eval_dataset={"near": held_out, "far": held_out}, **best_by(metric))
    trainer = make_trainer(eval_dataset={"near": held_out, "far": held_out}, **best_by("far_loss"))
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None


def test_last_batch_that_is_the_only_one_is_not_left_out(make_trainer):
    with pytest.raises(
        ValueError, match="leaves round 0 nothing to train on: its 16 labeled pairs fill no batch of 17"
    ):
        make_trainer(dataloader_drop_last=True, per_device_train_batch_size=17)
    with pytest.raises(
        ValueError, match="leaves a fold model nothing to train on: its 8 labeled pairs fill no batch of 9"
    ):
        make_trainer(dataloader_drop_last=True, per_device_train_batch_size=9, num_folds=2)
    make_trainer(dataloader_drop_last=True, per_device_train_batch_size=8, num_folds=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("label_names", ["labels"]),
        ("average_tokens_across_devices", False),
        ("use_cache", True),
        ("do_train", True),
        ("do_predict", True),
        ("resume_from_checkpoint", "somewhere"),
    ],
)
def test_settings_without_effect_are_named_once(make_trainer, caplog, name, value):
    make_trainer(**{name: value})
    assert caplog.text.count("Settings without effect") == 1 and f"`{name}` (" in caplog.text


def test_no_setting_is_named_without_a_reason(make_trainer, caplog):
    make_trainer()
    assert "Settings without effect" not in caplog.text


# Several at a time, since each run takes a second. What they do is tested by transformers and TRL; that a run with rounds
# goes through with them is tested here.
TRIED = (
    {
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 0.4},
        "warmup_steps": 1,
        "weight_decay": 0.1,
    },
    {"optim": "adafactor", "max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "seed": 3, "data_seed": 4},
    {"optim": "sgd", "optim_args": "momentum=0.9", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
    {
        "bf16": True,
        "use_cpu": True,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    {"neftune_noise_alpha": 5.0, "torch_empty_cache_steps": 1, "auto_find_batch_size": True, "disable_dropout": False},
    {"logging_strategy": "steps", "logging_steps": 1, "logging_first_step": True, "logging_nan_inf_filter": False},
    {"include_num_input_tokens_seen": "all", "log_level": "info", "log_level_replica": "error", "disable_tqdm": False},
    {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_delay": 1,
        "per_device_eval_batch_size": 2,
        "eval_on_start": True,
    },
    {"prediction_loss_only": True, "eval_do_concat_batches": False, "eval_accumulation_steps": 1, "do_eval": True},
    {"include_for_metrics": ["loss"], "batch_eval_metrics": False, "eval_use_gather_object": True},
    {
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "save_only_model": True,
        "save_on_each_node": True,
    },
    {
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "greater_is_better": True,
        **best_by("accuracy"),
    },
    {"dataloader_drop_last": True, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1, "dataloader_pin_memory": False},
    {"dataloader_in_order": False, "dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"},
    {"remove_unused_columns": False, "train_sampling_strategy": "group_by_length", "length_column_name": "size"},
    {"center_rewards_coefficient": 0.01, "max_length": 64, "pad_to_multiple_of": 8, "eos_token": "<|end|>"},
    {"pad_token": "<|eos|>", "dataset_num_proc": 2, "run_name": "a", "project": "b", "skip_memory_metrics": False},
    {"model_init_kwargs": {"dtype": "float32"}, "trust_remote_code": True, "debug": "underflow_overflow"},
    {"full_determinism": False, "ignore_data_skip": True, "restore_callback_states_from_checkpoint": True},
    {
        "optim_target_modules": "all-linear",
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 1,
        "num_train_epochs": 1,
    },
    {"learning_rate": 1e-4, "per_device_train_batch_size": 2, "save_strategy": "epoch", "log_on_each_node": False},
)
# Not with one process of a CPU, or with no hub; or in tests of their own.
ELSEWHERE = {
    *("output_dir", "parallelism_config", "chat_template_path", "torch_compile", "torch_compile_backend"),
    *("torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "activation_offloading", "fp16", "tf32"),
    *("bf16_full_eval", "fp16_full_eval", "enable_jit_checkpoint", "accelerator_config", "local_rank"),
    *(
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
    ),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "fsdp", "fsdp_config", "deepspeed"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    # Newer names of those in TRIED.
    *("ddp_timeout", "activation_checkpointing", "activation_checkpointing_kwargs"),
}


def test_each_inherited_setting_is_tried_named_or_known_to_need_another_machine():
    inherited = {each.name for config in (TrainingArguments, RewardConfig) for each in fields(config) if each.init}
    tried = {name for settings in TRIED for name in settings}
    assert inherited - tried - ELSEWHERE - _WITHOUT_EFFECT.keys() == set()


@pytest.mark.parametrize("settings", TRIED, ids=lambda each: "-".join(each)[:60])
def test_rounds_go_through_with_inherited_settings(make_trainer, held_out, settings):
    known = {each.name for each in fields(RewardConfig)}
    given = {name: value for name, value in settings.items() if name in known}
    set_seed(0)
    trainer = make_trainer(eval_dataset=held_out, **{"num_rounds": 1, "max_steps": 2, **given})
    trainer.train()
    assert trainer.round_history


def test_separator_ends_the_texts_of_an_encoder(bert, make_trainer, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.eos_token, tokenizer.sep_token = None, "<|end|>"
    model = str(tmp_path / "encoder")
    AutoModelForSequenceClassification.from_pretrained(bert).save_pretrained(model)
    tokenizer.save_pretrained(model)
    trainer = make_trainer(model)
    assert "'<|end|>', its separator, ends each text" in caplog.text
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert all(ids[-1] == end for ids in trainer.train_dataset["chosen_ids"])
