import pytest
import torch
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
    collator = ConfidenceFilteredDataCollator(0, confidence_threshold=0.8)
    with_row, without = collator([GOLD, row]), collator([GOLD])
    assert all(torch.equal(with_row[name], without[name]) for name in without)


def test_batch_of_doubtful_rows_weighs_nothing():
    collator = ConfidenceFilteredDataCollator(0, confidence_threshold=0.8)
    batch = collator([{"chosen_ids": [1], "rejected_ids": [2], "probability": 0.6}] * 2)
    assert batch["weight"].tolist() == [0.0]


def test_example_of_the_docstring():
    collator = ConfidenceFilteredDataCollator(pad_token_id=0, confidence_threshold=0.8, pseudo_label_type="soft")
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


def test_both_orders_are_each_other_turned_round():
    rows = [{**GOLD, "margin": 0.5}, {"chosen_ids": [6], "rejected_ids": [8], "probability": 0.1, "margin": 0.0}]
    collator = ConfidenceFilteredDataCollator(0, pseudo_label_type="soft", comparison_seed=0, comparison_orders="both")
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [8, 0, 0], [4, 5, 0], [6, 0, 0]]
    torch.testing.assert_close(batch["label"], torch.tensor([1.0, 0.9, 0.0, 0.1]))
    assert batch["weight"].tolist() == [1.0] * 4 and batch["margin"].tolist() == [0.5, 0.0, -0.5, 0.0]
