import pytest
import torch
from datasets import Dataset
from trl.trainer.reward_trainer import DataCollatorForPreference

from trl_ssrm import ConfidenceFilteredDataCollator


GOLD = {"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5], "probability": None}


def test_rows_without_pseudo_labels_are_collated_as_by_trl():
    examples = [{"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5], "margin": 0.5}]
    ours, theirs = ConfidenceFilteredDataCollator(0)(examples), DataCollatorForPreference(0)(examples)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_pseudo_label_decides_the_orientation():
    batch = ConfidenceFilteredDataCollator(0)(
        [
            {"chosen_ids": [6, 7], "rejected_ids": [8], "probability": 0.1},
            {"chosen_ids": [6, 7], "rejected_ids": [8], "probability": 0.9},
        ]
    )
    assert batch["input_ids"].tolist() == [[8, 0], [6, 7], [6, 7], [8, 0]]
    assert batch["label"].tolist() == [1.0, 1.0]


def test_soft_label_is_the_confidence_and_weight_applies_to_pseudo_labels_only():
    collator = ConfidenceFilteredDataCollator(0, pseudo_label_type="soft", pseudo_label_weight=0.25)
    batch = collator([GOLD, {"chosen_ids": [6, 7], "rejected_ids": [8], "probability": 0.125}])
    assert batch["label"].tolist() == [1.0, 0.875]
    assert batch["weight"].tolist() == [1.0, 0.25]


@pytest.mark.parametrize("probability", [0.8, 0.3, 0.5])
def test_row_at_or_under_the_threshold_is_not_in_the_batch(probability):
    row = {"chosen_ids": [9] * 50, "rejected_ids": [9, 9], "probability": probability}
    with_row, without = ConfidenceFilteredDataCollator(0)([GOLD, row]), ConfidenceFilteredDataCollator(0)([GOLD])
    assert all(torch.equal(with_row[name], without[name]) for name in without)


def test_batch_of_doubtful_rows_weighs_nothing():
    batch = ConfidenceFilteredDataCollator(0)([{"chosen_ids": [1], "rejected_ids": [2], "probability": 0.6}] * 2)
    assert batch["weight"].tolist() == [0.0]


@pytest.mark.parametrize("with_margin", [False, True])
def test_training_data_is_the_labeled_rows_and_the_confident_ones(with_margin):
    labeled = Dataset.from_dict({"prompt": ["p"], "chosen_ids": [[1, 2]], "rejected_ids": [[3]]})
    if with_margin:
        labeled = labeled.add_column("margin", [2.0])
    pseudo_labeled = Dataset.from_dict(
        {"chosen_ids": [[4], [5], [6]], "rejected_ids": [[7], [8], [9]], "probability": [0.7, 0.05, 0.95]}
    )
    dataset = ConfidenceFilteredDataCollator(0).build_dataset(labeled, pseudo_labeled)
    assert dataset["chosen_ids"][:] == [[1, 2], [5], [6]]
    assert dataset["probability"][:] == [None, 0.05, 0.95]
    assert ("margin" in dataset.column_names) == with_margin
    if with_margin:
        assert dataset["margin"][:] == [2.0, 0.0, 0.0]


def test_example_of_the_docstring():
    collator = ConfidenceFilteredDataCollator(pad_token_id=0, pseudo_label_type="soft")
    batch = collator(
        [
            GOLD,
            {"chosen_ids": [6, 7], "rejected_ids": [8], "probability": 0.1},
            {"chosen_ids": [9], "rejected_ids": [9, 9], "probability": 0.6},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [8, 0, 0], [4, 5, 0], [6, 7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    torch.testing.assert_close(batch["label"], torch.tensor([1.0, 0.9]))
    assert batch["weight"].tolist() == [1.0, 1.0]


def test_smoothing_draws_pseudo_labels_to_one_half_and_leaves_gold_alone():
    rows = [GOLD, {"chosen_ids": [6], "rejected_ids": [8], "probability": 0.1}]
    hard = ConfidenceFilteredDataCollator(0, pseudo_label_smoothing=0.2)(rows)
    torch.testing.assert_close(hard["label"], torch.tensor([1.0, 0.9]))
    soft = ConfidenceFilteredDataCollator(0, pseudo_label_smoothing=0.2, pseudo_label_type="soft")(rows)
    torch.testing.assert_close(soft["label"], torch.tensor([1.0, 0.82]))


def test_row_with_a_weight_of_its_own_has_that():
    labeled = Dataset.from_dict({"chosen_ids": [[1, 2]], "rejected_ids": [[3]], "weight": [7.0]})
    pseudo_labeled = Dataset.from_dict(
        {"chosen_ids": [[4], [5]], "rejected_ids": [[7], [8]], "probability": [0.9, 0.95], "weight": [0.25, -0.5]}
    )
    collator = ConfidenceFilteredDataCollator(0, pseudo_label_weight=0.1)
    # A column of the labeled data that happens to have the name means something else.
    batch = collator(collator.build_dataset(labeled, pseudo_labeled).to_list())
    assert batch["weight"].tolist() == [1.0, 0.25, -0.5]


def test_both_orders_are_each_other_turned_round():
    rows = [{**GOLD, "margin": 0.5}, {"chosen_ids": [6], "rejected_ids": [8], "probability": 0.1, "margin": 0.0}]
    collator = ConfidenceFilteredDataCollator(0, pseudo_label_type="soft", comparison_seed=0, comparison_orders="both")
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [8, 0, 0], [4, 5, 0], [6, 0, 0]]
    torch.testing.assert_close(batch["label"], torch.tensor([1.0, 0.9, 0.0, 0.1]))
    assert batch["weight"].tolist() == [1.0] * 4 and batch["margin"].tolist() == [0.5, 0.0, -0.5, 0.0]
