import numpy as np
import pytest
from datasets import Dataset

from trl_ssrm.data.sequences import PairedSequences, group_numbers, select_rows


def paired(*pairs: tuple[list[int], list[int]]) -> PairedSequences:
    return PairedSequences.from_tokenized(
        Dataset.from_dict({"chosen_ids": [one for one, _ in pairs], "rejected_ids": [other for _, other in pairs]})
    )


def test_each_sequence_is_there_once_and_the_longest_is_the_first():
    pairs = paired(([1], [2, 3]), ([4, 5, 6], [1]), ([2, 3], [4, 5, 6]))
    ids = pairs.sequences["input_ids"][:]
    assert ids == [[4, 5, 6], [2, 3], [1]]
    assert pairs.lengths.tolist() == [3, 2, 1]
    assert [(ids[one], ids[other]) for one, other in zip(pairs.first, pairs.second, strict=True)] == [
        ([1], [2, 3]),
        ([4, 5, 6], [1]),
        ([2, 3], [4, 5, 6]),
    ]


def test_sequences_of_one_length_are_in_the_order_of_their_hashes():
    pairs = paired(*(([number], [number + 500]) for number in range(500)))
    hashes = [digest.tobytes() for digest in pairs.digests]
    assert hashes == sorted(hashes) and len(set(hashes)) == 1000


def test_fingerprint_is_that_of_the_pairs_and_their_order():
    one, other = ([1], [2, 3]), ([4, 5, 6], [7])
    fingerprint = paired(one, other).fingerprint
    assert fingerprint == paired(one, other).fingerprint
    assert len({fingerprint, paired(other, one).fingerprint, paired(one[::-1], other).fingerprint}) == 3


def test_empty_sequence_and_other_widths_of_integers_are_taken():
    dataset = Dataset.from_dict({"chosen_ids": [[], [1]], "rejected_ids": [[1], [2]]})
    narrow = dataset.cast_column("rejected_ids", Dataset.from_dict({"x": [np.array([1], np.int32)]}).features["x"])
    assert narrow.features != dataset.features
    pairs = [PairedSequences.from_tokenized(each) for each in (dataset, narrow)]
    assert pairs[0].fingerprint == pairs[1].fingerprint
    assert pairs[0].lengths.tolist() == [1, 1, 0]


@pytest.mark.parametrize("rows", [[], [3, 4, 5], [5, 1, 1], [9]])
def test_rows_are_selected_as_by_a_dataset(rows):
    dataset = Dataset.from_dict({"a": list(range(10))})
    for own in (dataset, dataset.shuffle(seed=0), dataset.select(range(10))):
        assert select_rows(own, np.array(rows, dtype=np.int64))[:] == own.select(rows)[:]


def test_selections_of_other_rows_are_told_apart_by_the_cache():
    dataset = Dataset.from_dict({"a": list(range(10))})
    names = {select_rows(dataset, np.array(rows))._fingerprint for rows in ([1, 3], [3, 1], [1, 4])}
    assert len(names) == 3


def test_groups_are_numbered_as_they_come():
    keys = ["b", "a", "b", "c", "a", "d"]
    assert group_numbers(keys).tolist() == [0, 1, 0, 2, 1, 3]


def test_pairs_of_a_large_pool_are_left_out_in_place():
    rows = [([number, 1], [number, 2]) for number in range(3000)]
    few = np.array([0, 1, *range(5, 2000, 3), *range(2100, 2999)])
    expected, pairs = paired(*(rows[row] for row in few)), paired(*rows)
    for in_place in (False, True):
        made = pairs.pair_up(pairs.first[few], pairs.second[few], in_place)
        assert made.fingerprint == expected.fingerprint
        assert made.sequences[:] == expected.sequences[:]
        assert np.array_equal(made.lengths, expected.lengths)
