import itertools
import random
import re
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from conftest import as_messages, preference_rows
from datasets import Dataset, IterableDataset

from trl_ssrm.data.build_pool import build_pool
from trl_ssrm.data.checks import check_preference_dataset
from trl_ssrm.data.sequences import PairedSequences


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


def random_rows(num_rows: int) -> list[dict]:
    """Rows of two to five completions, many of them alike."""
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices("ab", k=draw.randint(1, 5)))

    return [
        {"prompt": f"{draw.choice('pq')} ", "completions": [text() for _ in range(draw.randint(2, 5))]}
        for _ in range(num_rows)
    ]


@pytest.mark.parametrize("max_length", [None, 6])
def test_every_pair_of_completions_is_kept_once_or_counted_under_its_first_reason(max_length):
    rows = random_rows(300)
    labeled, held_out = (
        {frozenset((prompt + "a", prompt + end)) for prompt in ("p ", "q ") for end in ends}
        for ends in (("b", "ab"), ("b", "bb"))
    )
    expected, dropped, seen = [], Counter(), set()
    for number, row in enumerate(rows):
        for positions in itertools.combinations(range(len(row["completions"])), 2):
            texts = [row["prompt"] + row["completions"][position] for position in positions]
            key = frozenset(texts)
            if len(key) == 1:
                dropped["identical completions"] += 1
            elif max_length is not None and max(map(len, texts)) > max_length:
                dropped[f"longer than max_length={max_length}"] += 1
            elif key in labeled:
                dropped["overlap with the labeled pairs"] += 1
            elif key in held_out:
                dropped["overlap with eval"] += 1
            elif key in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(key)
                expected.append((number, set(positions)))
    known = {
        name: set(
            PairedSequences.from_tokenized(
                Dataset.from_list(
                    [{"chosen_ids": list(one.encode()), "rejected_ids": list(other.encode())} for one, other in pairs]
                )
            ).pair_keys()
        )
        for name, pairs in (("the labeled pairs", labeled), ("eval", held_out))
    }
    pool = pool_of(rows, max_length=max_length, known_pairs=known)
    assert pool.dropped == dropped
    assert len(dropped) == (4 if max_length is None else 5)
    made = zip(pool.rows.tolist(), map(set, pool.completions.tolist()), strict=True)
    assert list(made) == expected
    # The tokens are those of the completions.
    ids = pool.pairs.sequences["input_ids"][:]
    for row, positions, *sequences in zip(
        pool.rows, pool.completions, pool.pairs.first, pool.pairs.second, strict=True
    ):
        for position, sequence in zip(positions, sequences, strict=True):
            text = rows[row]["prompt"] + rows[row]["completions"][position]
            assert bytes(ids[sequence]).decode() == text
            assert pool.pairs.lengths[sequence] == len(text)


def test_comparisons_make_the_same_pool_of_pairs_as_completions():
    rows = random_rows(100)
    one, other = pool_of(rows), pool_of(rows, by_pair=True)
    assert one.rows.tolist() == other.rows.tolist()
    assert one.completions.tolist() == other.completions.tolist()
    assert one.pairs.fingerprint == other.pairs.fingerprint


def test_share_of_a_pool_holds_its_own_sequences_alone():
    pool = pool_of(random_rows(100))
    share = np.arange(1, len(pool), 3)
    part = pool.take(share)
    ids, own = pool.pairs.sequences["input_ids"][:], part.pairs.sequences["input_ids"][:]
    for name in ("first", "second"):
        expected = [ids[position] for position in getattr(pool.pairs, name)[share]]
        assert [own[position] for position in getattr(part.pairs, name)] == expected
    assert len(own) == len({*part.pairs.first.tolist(), *part.pairs.second.tolist()}) < len(ids)
    assert (np.diff(part.pairs.lengths) <= 0).all()
    assert [part.texts(pair, True) for pair in range(3)] == [pool.texts(pair, True) for pair in share[:3]]
    batches = part.iterate_texts(np.array([2, 0]), np.array([True, False]))
    assert list(batches) == [[part.texts(2, True), part.texts(0, False)]]


def test_memory_of_a_pool_from_files_is_that_of_a_few_numbers_a_pair(tmp_path):
    def peak(num_rows: int) -> int:
        path = str(tmp_path / f"{num_rows}.parquet")
        Dataset.from_list(preference_rows(num_rows)).to_parquet(path)
        dataset = Dataset.from_parquet(path, cache_dir=str(tmp_path))
        tracemalloc.start()
        try:
            pool = pool_of(dataset, max_length=100)
            assert len(pool) == num_rows
            pool.pairs.fingerprint  # noqa: B018
            pool.take(np.arange(len(pool)))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(9000) - peak(3000) < 6000 * 250


def test_stream_is_cut_at_the_cap(tmp_path):
    stream = Dataset.from_list(preference_rows(9)).to_iterable_dataset()
    assert len(pool_of(stream, max_samples=4, stream_dir=tmp_path)) == 4
    with pytest.raises(ValueError, match="set `max_unlabeled_samples`"):
        pool_of(stream)


@pytest.mark.parametrize("is_conversational", [False, True])
def test_stream_makes_the_pool_that_its_rows_make(tmp_path, is_conversational):
    # Some rows, which are not the first ones, have what the others lack.
    rows = [{**row, "source": "web" if number % 100 else None} for number, row in enumerate(preference_rows(2100))]
    if is_conversational:
        rows = [{**as_messages({name: row[name] for name in ("prompt", "chosen", "rejected")})} for row in rows]
    dataset = Dataset.from_list(rows)
    settings = {"is_conversational": is_conversational, "max_samples": 2050, "stream_dir": tmp_path}
    streams = dataset.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(rows))
    expected = pool_of(dataset, is_conversational=is_conversational, max_samples=2050)
    for stream in streams:
        pool = pool_of(stream, **settings)
        assert pool.pairs.fingerprint == expected.pairs.fingerprint
        assert pool.source.to_list() == expected.source.to_list()
        assert pool.source.cache_files


def test_rows_of_a_stream_are_on_disk_once_and_never_those_of_another(tmp_path):
    def build(rows: list[dict]):
        return pool_of(
            IterableDataset.from_generator(lambda: iter(rows)), max_samples=9, stream_dir=tmp_path, with_gold=True
        )

    rows = preference_rows(5)
    first = build(rows)
    (written,) = tmp_path.glob("*/rows.arrow")
    time = written.stat().st_mtime_ns
    assert build(rows).pairs.fingerprint == first.pairs.fingerprint
    assert written.stat().st_mtime_ns == time
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert (build(swapped).gold == 1 - first.gold).all()
    assert len(list(tmp_path.glob("*/rows.arrow"))) == len(list(tmp_path.iterdir())) == 1
    # It is still there for who holds it.
    assert first.source[:]["chosen"] == [row["chosen"] for row in rows]


def test_stream_whose_later_rows_have_more_than_the_first_is_refused(tmp_path):
    rows = [*preference_rows(1000), {"prompt": "p", "chosen": "a", "rejected": "b", "tools": "[]"}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match=re.escape("Rows 1000 to 1000 of the stream have columns, fields or types")):
        pool_of(stream, max_samples=2000, stream_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_order_of_the_sequences_depends_on_their_content_alone():
    rows = preference_rows(20)
    one = pool_of(rows).pairs
    assert np.array_equal(one.digests, pool_of(rows[::-1]).pairs.digests)
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
