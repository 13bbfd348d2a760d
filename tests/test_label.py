import numpy as np
import pytest
from datasets import Dataset

from trl_ssrm import PairScores
from trl_ssrm.rounds.label import are_the_same, join, label


def test_kept_pairs_are_labeled_by_the_sign_at_their_place_in_the_pool():
    scores = PairScores(np.array([2.0, -1.0, 0.5]))
    labels = label(scores, np.array([3, 7, 9]), np.array([True, True, False]))
    assert labels["pair"].tolist() == [3, 7] and labels["first_is_chosen"].tolist() == [True, False]
    assert labels["confidence"].tolist() == scores.confidence[:2].tolist()


def test_labels_are_the_same_if_pairs_and_signs_are_and_if_soft_probabilities_too():
    share, kept = np.arange(2), np.ones(2, dtype=bool)
    one = label(PairScores(np.array([2.0, -1.0])), share, kept)
    surer = label(PairScores(np.array([5.0, -0.1])), share, kept)
    assert are_the_same(one, surer, are_soft=False) and not are_the_same(one, surer, are_soft=True)
    assert are_the_same(one, label(PairScores(np.array([2.0, -1.0])), share, kept), are_soft=True)
    for other, mask in (([2.0, 1.0], kept), ([2.0, -1.0], np.array([True, False]))):
        assert not are_the_same(one, label(PairScores(np.array(other)), share, mask), are_soft=False)


@pytest.mark.parametrize("with_margin", [False, True])
def test_training_data_is_the_labeled_rows_and_the_pseudo_labeled_ones(with_margin):
    labeled = Dataset.from_dict({"prompt": ["p"], "chosen_ids": [[1, 2]], "rejected_ids": [[3]]})
    if with_margin:
        labeled = labeled.add_column("margin", [2.0])
    pseudo_labeled = Dataset.from_dict(
        {"chosen_ids": [[5], [6]], "rejected_ids": [[8], [9]], "probability": [0.05, 0.95]}
    )
    dataset = join(labeled, pseudo_labeled)
    assert dataset["chosen_ids"][:] == [[1, 2], [5], [6]]
    assert dataset["probability"][:] == [None, 0.05, 0.95]
    assert ("margin" in dataset.column_names) == with_margin
    if with_margin:
        assert dataset["margin"][:] == [2.0, 0.0, 0.0]
