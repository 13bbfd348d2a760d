import re

import numpy as np
import pytest
from conftest import as_messages, preference_rows
from datasets import Dataset

from trl_ssrm.checks import check_preference_dataset
from trl_ssrm.pool import build_pool
from trl_ssrm.sequences import PairedSequences


def tokenize(dataset: Dataset) -> Dataset:
    """Bytes of prompt and completion, as a stand-in for a tokenizer where only the pairing is looked at."""

    def to_ids(row):
        prompt = row.get("prompt") or ""
        return {f"{name}_ids": list(str(prompt + row[name]).encode()) for name in ("chosen", "rejected")}

    return dataset.map(to_ids)


def pool_of(rows, **settings):
    dataset = rows if not isinstance(rows, list) else Dataset.from_list(rows)
    return build_pool(dataset, tokenize, **{"seed": 0, "is_conversational": False, **settings})


def texts_of(pool) -> set[frozenset]:
    return {frozenset((text["chosen"], text["rejected"])) for text in (pool.texts(i, True) for i in range(len(pool)))}


def test_completions_give_all_their_pairs():
    pool = pool_of([{"prompt": "p ", "completions": ["a", "b", "c"]}, {"prompt": "q ", "completions": ["d", "e"]}])
    assert texts_of(pool) == {frozenset("ab"), frozenset("ac"), frozenset("bc"), frozenset("de")}
    assert len(pool.pairs.sequences) == 5


def test_two_columns_of_completions_are_a_pair():
    pool = pool_of([{"prompt": "p ", "completion_a": "a", "completion_b": "b"}])
    assert texts_of(pool) == {frozenset("ab")}


def test_implicit_prompt_is_found_for_the_text_of_a_pair():
    pool = pool_of([{"chosen": "The sky is blue.", "rejected": "The sky is green."}])
    assert pool.texts(0, True)["prompt"] == "The sky is"


def test_exchanging_chosen_and_rejected_changes_nothing_but_the_gold_labels():
    rows = preference_rows(30)
    swapped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if number % 2 else row
        for number, row in enumerate(rows)
    ]
    one, other = pool_of(rows, with_gold=True), pool_of(swapped, with_gold=True)
    assert one.pairs.fingerprint == other.pairs.fingerprint
    assert [one.texts(i, True) for i in range(30)] == [other.texts(i, True) for i in range(30)]
    assert (one.gold != other.gold).tolist() == [bool(number % 2) for number in range(30)]


def test_order_in_a_pair_does_not_tell_the_label():
    gold = pool_of(preference_rows(400), with_gold=True).gold
    assert 150 < gold.sum() < 250


def test_gold_labels_are_not_kept_unless_asked_for():
    assert pool_of(preference_rows(3)).gold is None


def test_identical_duplicate_long_and_known_pairs_are_left_out_and_counted():
    rows = [
        {"prompt": "p ", "chosen": "a", "rejected": "b"},
        {"prompt": "p ", "chosen": "b", "rejected": "a"},
        {"prompt": "p ", "chosen": "c", "rejected": "c"},
        {"prompt": "p ", "chosen": "d", "rejected": "e" * 50},
        {"prompt": "p ", "chosen": "f", "rejected": "g"},
    ]
    known = PairedSequences.from_tokenized(
        tokenize(Dataset.from_list([{"prompt": "p ", "chosen": "g", "rejected": "f"}]))
    )
    pool = pool_of(rows, max_length=20, known_pairs={"the labeled pairs": set(known.pair_keys())})
    assert pool.dropped == {
        "duplicate": 1,
        "identical completions": 1,
        "longer than max_length=20": 1,
        "overlap with the labeled pairs": 1,
    }
    assert texts_of(pool) == {frozenset("ab")}


def test_sequences_that_only_dropped_pairs_hold_are_not_scored():
    pool = pool_of([{"prompt": "p ", "completions": ["a", "b", "c" * 99]}], max_length=20)
    assert len(pool.pairs.sequences) == 2


def test_stream_is_cut_at_the_cap():
    stream = Dataset.from_list(preference_rows(9)).to_iterable_dataset()
    assert len(pool_of(stream, max_samples=4)) == 4
    with pytest.raises(ValueError, match="set `max_unlabeled_samples`"):
        pool_of(stream)


def test_order_of_the_sequences_depends_on_their_content_alone():
    rows = preference_rows(20)
    one = pool_of(rows).pairs
    assert one.digests == pool_of(rows[::-1]).pairs.digests
    assert (np.diff(one.lengths) <= 0).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "p", "completion_1": "a", "completion_2": "b"}],
            "has the columns ['completion_1', 'completion_2'",
        ),
        ([{"prompt": "p", "completions": ["a"]}], "Row 0 of `unlabeled_dataset` has 1 completions"),
        ([{"prompt": "p", "completions": ["a", "b"]}, {"prompt": "p", "completions": []}], "Row 1 of"),
        ([{"prompt": "p", "completions": ["a", None]}], "`completions[1]` of row 0 of `unlabeled_dataset` is missing"),
        ([{"prompt": "p", "completion_a": "a", "completion_b": " "}], "`completion_b` of row 0"),
        ([{"prompt": None, "chosen": "a", "rejected": "b"}], "`prompt` of row 0 of `unlabeled_dataset` is missing"),
        ([{"prompt": "p", "chosen": "a", "rejected": ""}], "`rejected` of row 0 of `unlabeled_dataset` is empty"),
        (
            [as_messages(preference_rows(1)[0])],
            "`prompt` of row 0 of `unlabeled_dataset` is a conversation, but the data starts with text",
        ),
        ([{"prompt": "p", "chosen": "a", "rejected": "a"}], "No pair of `unlabeled_dataset` is left (1 (identical"),
    ],
)
def test_bad_rows_are_refused_by_place(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pool_of(rows)


def test_empty_pool_is_refused():
    with pytest.raises(ValueError, match="`unlabeled_dataset` is empty"):
        pool_of(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}))


def test_accuracy_of_a_pool_without_labels_can_not_be_tracked():
    with pytest.raises(ValueError, match="`track_pseudo_label_accuracy` needs gold labels"):
        pool_of([{"prompt": "p", "completions": ["a", "b"]}], with_gold=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "p", "chosen": "a", "reject": "b"}],
            "has no column `rejected`, only ['chosen', 'prompt', 'reject']",
        ),
        (
            [{"chosen": "a", "rejected": "b"}, {"chosen": None, "rejected": "b"}],
            "`chosen` of row 1 of `train_dataset`",
        ),
        (
            [{"chosen": [{"role": "user", "content": ""}], "rejected": [{"role": "user", "content": "b"}]}],
            "`chosen` of row 0 of `train_dataset` has a message without `content`",
        ),
    ],
)
def test_bad_labeled_rows_are_refused_by_place(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_preference_dataset(Dataset.from_list(rows), "train_dataset")


def test_kind_of_labeled_data_is_told():
    rows = preference_rows(2)
    assert not check_preference_dataset(Dataset.from_list(rows), "train_dataset")
    assert check_preference_dataset(Dataset.from_list([as_messages(row) for row in rows]), "train_dataset")
