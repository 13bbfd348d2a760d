import re

import pytest
import torch
from conftest import as_messages, make_tokenizer, preference_rows
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForSequenceClassification

from trl_ssrm import PseudoLabelingCallback, SSRMTrainer


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
        ({"eval_dataset": {"one": [{"chosen": "a", "rejected": ""}]}}, 'row 0 of `eval_dataset["one"]` is empty'),
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
        ({"args": {"keep_best_round": True}}, "`keep_best_round` compares the rounds on held-out labels"),
        (
            {
                "args": {"track_pseudo_label_accuracy": True},
                "unlabeled_dataset": [{"prompt": "p", "completions": ["a", "b"]}],
            },
            "needs gold labels",
        ),
        ({"calibration_dataset": preference_rows(16, seed=1)[:3]}, "shares 3 pairs with `train_dataset`"),
        (
            {"calibration_dataset": {"train": preference_rows(3)}},
            "must be a `Dataset`, got `dict`; of several, choose one",
        ),
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
    from trl_ssrm.data import formats

    formats.logger.propagate = True
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
