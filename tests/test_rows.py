"""Every place that reads preference rows reads a row alike, or refuses it alike."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from conftest import as_messages, preference_rows
from datasets import Dataset
from faults.outcomes import refusal_of, result_or_refusal
from hypothesis import given
from hypothesis import strategies as st
from trl import RewardConfig, RewardTrainer

from trl_ssrm import (
    Comparison,
    PairwiseJudge,
    SSRMRewardFunction,
    SSRMTrainer,
    best_of_n,
    evaluate,
    generate_completions,
    label_preferences,
)
from trl_ssrm.data.checks import check_labeled_data, check_preference_dataset
from trl_ssrm.data.formats import TEMPLATE_COLUMNS
from trl_ssrm.data.prompt_columns import check_same_form
from trl_ssrm.data.prompts import with_prompt


class Spy(SSRMRewardFunction):
    """Keeps the tokens that it is to score, and gives rewards without a model."""

    def score_tokenized(self, sequences):
        self.read = [tuple(ids) for ids in sequences]
        return np.arange(len(sequences), dtype=float)


class SilentJudge(PairwiseJudge):
    """Tokenizes all pairs, and gives logits without a model."""

    def logits(self, prompts, pairs):
        for prompt, pair in zip(prompts, pairs, strict=True):
            self.comparison.tokenize(self.processing_class, prompt, *pair)
        return np.ones(len(pairs))


@pytest.fixture(scope="module")
def spy(llama) -> Spy:
    return Spy(llama)


@pytest.fixture(scope="module")
def judge(policy) -> SilentJudge:
    return SilentJudge(policy, comparison=Comparison(labels=["a", "b"]))


def pairs_of(tokens) -> list[tuple]:
    """Tokens of the pairs, chosen before rejected."""
    return list(zip(map(tuple, tokens["chosen_ids"]), map(tuple, tokens["rejected_ids"]), strict=True))


# ---- Each row in each place ----


def in_parts(value):
    if isinstance(value, str):
        return value
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in value]


def in_columns(row: dict, change) -> dict:
    return {name: change(value) if name in ("prompt", "chosen", "rejected") else value for name, value in row.items()}


def in_chosen(value):
    """Changes the completion, as text or as the content of its last message."""

    def change(row: dict) -> dict:
        if isinstance(row["chosen"], str):
            return {**row, "chosen": value}
        return {**row, "chosen": [*row["chosen"][:-1], {**row["chosen"][-1], "content": value}]}

    return change


def in_column(name, value):
    return lambda row: {**row, name: value}


# Changes of a row that every place takes.
GOOD = {
    "as it is": lambda row: row,
    "text in parts": lambda row: in_columns(row, in_parts),
    "tools of an empty cell": in_column("tools", ""),
    "no tools": in_column("tools", None),
    "tools as JSON": in_column("tools", '[{"name": "f<|end|>"}]'),
    "no arguments of the template": in_column("chat_template_kwargs", None),
    "arguments of the template": in_column("chat_template_kwargs", {"x": 1, "add_generation_prompt": True}),
    "special tokens": in_chosen("a<|end|><|user|>b<|eos|>"),
}
# Changes that every place refuses.
BAD = {
    "tools that are no JSON": in_column("tools", "["),
    "tools that are no list": in_column("tools", "5"),
    "argument that is not the template's": in_column("chat_template_kwargs", {"tokenize": False}),
    "prompt of another kind": lambda row: {
        **row,
        "prompt": "Say a." if isinstance(row["chosen"], list) else [{"role": "user", "content": "Say a."}],
    },
    "completion of another kind": lambda row: {
        **row,
        "chosen": "Say a." if isinstance(row["chosen"], list) else [{"role": "user", "content": "Say a."}],
    },
    "no completion": in_column("chosen", None),
    "no prompt": in_column("prompt", None),
    "picture": lambda row: {**row, "chosen": [{"role": "assistant", "content": [{"type": "image", "image": "a"}]}]},
    "prompt in the completions": lambda row: (
        in_columns(row, lambda value: value if value is row["prompt"] else row["prompt"] + value)
        if isinstance(row["chosen"], list)
        else {**row, "prompt": None}
    ),
}
# Rows of data sets only: a policy may write anything, and gets a reward for it.
NEVER_WRITTEN = {
    "empty completion": in_chosen(""),
    "broken character": in_chosen("\ud800"),
    "message without a role": lambda row: {**row, "rejected": [{"content": "a"}]},
}
CHANGES = {**GOOD, **BAD, **NEVER_WRITTEN}


@pytest.fixture
def places(llama, config, spy, judge, tmp_path_factory):
    """Every place that reads rows: functions of a dataset that give the tokens of its pairs. A judge reads others."""
    usual = {}

    def trainer(dataset: Dataset, name: str) -> SSRMTrainer:
        is_conversational = isinstance(dataset[0]["rejected"], list)
        if is_conversational not in usual:
            rows = [preference_rows(3, seed) for seed in (11, 12)]
            usual[is_conversational] = [
                Dataset.from_list([as_messages(row) if is_conversational else row for row in own]) for own in rows
            ]
        train, pool = usual[is_conversational]
        return SSRMTrainer(llama, config(), **{"train_dataset": train, "unlabeled_dataset": pool, name: dataset})

    def tokens_of(pairs) -> list[tuple]:
        ids = pairs.sequences["input_ids"][:]
        return [(tuple(ids[one]), tuple(ids[other])) for one, other in zip(pairs.first, pairs.second, strict=True)]

    def scored(function) -> list[tuple]:
        function()
        return list(zip(spy.read[0::2], spy.read[1::2], strict=True))

    def rewarded(dataset: Dataset) -> list[tuple]:
        # As TRL calls it: each completion with its prompt and the columns of its row.
        rows = [{**row, **with_prompt(row)} for row in dataset for _ in range(2)]
        template = {name: [row[name] for row in rows] for name in TEMPLATE_COLUMNS if name in dataset.column_names}
        completions = [row[("chosen", "rejected")[number % 2]] for number, row in enumerate(rows)]
        return scored(lambda: spy([row["prompt"] for row in rows], completions, **template))

    def in_new(function, model):
        return lambda dataset: function(model, dataset, str(tmp_path_factory.mktemp("new")), disable_tqdm=True)

    return {
        "train": lambda rows: pairs_of(trainer(rows, "train_dataset").data.labeled),
        "calibration": lambda rows: tokens_of(trainer(rows, "calibration_dataset").data.held_out["calibration"]),
        "pool": lambda rows: tokens_of(trainer(rows, "unlabeled_dataset").data.pool.pairs),
        "evaluate": lambda rows: scored(lambda: evaluate(spy, rows, disable_tqdm=True)),
        "judge in evaluate": lambda rows: evaluate(judge, rows, disable_tqdm=True) and None,
        "label_preferences": lambda rows: scored(lambda: in_new(label_preferences, spy)(rows)),
        "best_of_n": lambda rows: scored(lambda: in_new(best_of_n, spy)(rows)),
        "judge in label_preferences": lambda rows: in_new(label_preferences, judge)(rows) and None,
        "reward function": rewarded,
    }


def made_of(names: list[str], is_conversational: bool, has_prompt: bool) -> list[dict]:
    """Rows, each with its change."""
    rows = [as_messages(row) if is_conversational else row for row in preference_rows(len(names), seed=9)]
    rows = [CHANGES[name](copy.deepcopy(row)) for name, row in zip(names, rows, strict=True)]
    if not has_prompt:
        whole = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
        rows = [{**row, **texts, "prompt": None} for row, texts in zip(rows, whole, strict=True)]
    columns = sorted({name for row in rows for name in row if name != "prompt" or has_prompt})
    return [{name: row.get(name) for name in columns} for row in rows]


@given(
    is_conversational=st.booleans(),
    has_prompt=st.booleans(),
    names=st.lists(st.sampled_from(list(GOOD)), min_size=3, max_size=3),
    bad=st.none() | st.tuples(st.integers(0, 2), st.sampled_from([*BAD, *NEVER_WRITTEN])),
)
def test_every_place_reads_a_row_alike_or_refuses_it_alike(places, is_conversational, has_prompt, names, bad):
    has_prompt, left_out = has_prompt or bad is not None, set()
    if bad is not None:
        names[bad[0]] = bad[1]
    if not has_prompt:
        left_out = {"label_preferences", "best_of_n", "judge in label_preferences"}
    if bad is not None and bad[1] in NEVER_WRITTEN:
        left_out = {"reward function"}
    try:
        dataset = Dataset.from_list(made_of(names, is_conversational, has_prompt), on_mixed_types="use_json")
    except UnicodeEncodeError:
        # No dataset can hold such text.
        return
    found = {
        place: result_or_refusal(lambda read=read: read(dataset))
        for place, read in places.items()
        if place not in left_out
    }
    if bad is not None:
        assert all(isinstance(result, str) for result in found.values()), found
        for place, words in found.items():
            assert re.search(r"[Rr]ow \d|have different fields or types", words), (place, words)
        return
    expected = found["train"]
    assert len(expected) == 3 and not isinstance(expected, str), expected
    # Which completion of a pair comes first does not tell its label.
    found["pool"] = [max(pair, pair[::-1], key=expected.count) for pair in found["pool"]]
    assert {place for place, tokens in found.items() if tokens not in (expected, None)} == set(), found


# ---- What each kind of row is read as ----


def conversations(num_rows: int, seed: int) -> list[dict]:
    return [as_messages(row) for row in preference_rows(num_rows, seed)]


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("make", [dict, as_messages])
def test_rows_with_a_format_are_read_as_those_without(make_trainer, spy, policy, tmp_path, kind, make):
    rows = [{**make(row), "margin": 0.5 + number} for number, row in enumerate(preference_rows(4, seed=1))]
    plain = Dataset.from_list(rows)
    pool, held_out = (Dataset.from_list([make(row) for row in preference_rows(4, seed)]) for seed in (2, 3))
    own, expected = (
        make_trainer(
            train_dataset=plain.with_format(each),
            unlabeled_dataset=pool.with_format(each),
            calibration_dataset=held_out.with_format(each),
        )
        for each in (kind, None)
    )
    assert pairs_of(own.data.labeled) == pairs_of(expected.data.labeled)
    assert own.data.margins == expected.data.margins == [0.5, 1.5, 2.5, 3.5]
    assert own.data.pool.pairs.fingerprint == expected.data.pool.pairs.fingerprint
    assert own.data.held_out["calibration"].fingerprint == expected.data.held_out["calibration"].fingerprint
    with_format = plain.with_format(kind)
    assert evaluate(spy, with_format, disable_tqdm=True) == evaluate(spy, plain, disable_tqdm=True)
    labels = [
        label_preferences(spy, each, str(tmp_path / str(number)), disable_tqdm=True).to_list()
        for number, each in enumerate((with_format, plain))
    ]
    assert labels[0] == labels[1]
    made = [
        generate_completions(
            policy, each, str(tmp_path / f"made{number}"), max_new_tokens=2, temperature=2.0, disable_tqdm=True
        ).to_list()
        for number, each in enumerate((with_format, plain))
    ]
    assert made[0] == made[1]


def test_margins_that_are_tensors_are_numbers():
    rows = [{**row, "margin": 0.5} for row in preference_rows(3)]
    check_preference_dataset(Dataset.from_list(rows).with_format("torch"), "train_dataset")
    assert isinstance(Dataset.from_list(rows).with_format("torch")[0]["margin"], torch.Tensor)


@pytest.mark.parametrize("kind", [None, "torch"])
def test_tokens_under_the_names_of_older_versions_are_trained_on(make_trainer, llama, tmp_path, kind):
    names = {"chosen_ids": "chosen_input_ids", "rejected_ids": "rejected_input_ids"}
    tokenized = make_trainer().data.labeled.select_columns(list(names))
    old = tokenized.rename_columns(names).with_format(kind)
    settings = {"report_to": "none", "bf16": False, "gradient_checkpointing": False}
    theirs = RewardTrainer(llama, RewardConfig(str(tmp_path / "trl"), **settings), train_dataset=old)
    ours = make_trainer(train_dataset=old, eval_dataset=old.select([0]))
    assert pairs_of(ours.data.labeled) == pairs_of(tokenized) == pairs_of(theirs.train_dataset.with_format(None))
    with pytest.raises(ValueError, match="`chosen_input_ids` of row 1 of `train_dataset` is not a list of token IDs"):
        make_trainer(train_dataset=[{"chosen_input_ids": ids, "rejected_input_ids": [1]} for ids in ([2], [])])


def test_prompt_beside_whole_conversations_is_refused_with_the_advice_that_fits(make_trainer, spy):
    rows = conversations(3, 1)
    whole = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    expected = pairs_of(make_trainer(train_dataset=whole, unlabeled_dataset=conversations(3, 2)).data.labeled)
    for prompts, words in (
        (
            [row["prompt"][0]["content"] for row in rows],
            "is text, but `chosen` is a conversation that has the prompt in",
        ),
        ([row["prompt"] for row in rows], "begins with the messages of `prompt`, which would be read twice"),
    ):
        both = [{"prompt": prompt, **row} for prompt, row in zip(prompts, whole, strict=True)]
        for read in (
            lambda both=both: make_trainer(train_dataset=both, unlabeled_dataset=conversations(3, 2)),
            lambda both=both: make_trainer(train_dataset=conversations(3, 2), unlabeled_dataset=both),
            lambda both=both: evaluate(spy, Dataset.from_list(both), disable_tqdm=True),
        ):
            with pytest.raises(ValueError, match=rf"of row 0 of `\w+` {words}.*drop the column\s+`prompt`\."):
                read()
        # What the message says to do is right.
        done = [{name: value for name, value in row.items() if name != "prompt"} for row in both]
        made = make_trainer(train_dataset=done, unlabeled_dataset=conversations(3, 2))
        assert pairs_of(made.data.labeled) == expected
    one = [{**row, "prompt": row["prompt"][0]["content"]} for row in rows]
    with pytest.raises(
        ValueError, match="`prompt` of row 0 of `train_dataset` is text, but `chosen` is a conver.*make it"
    ):
        make_trainer(train_dataset=one, unlabeled_dataset=conversations(3, 2))


def test_prompts_that_all_texts_repeat_are_said(caplog):
    rows = preference_rows(3)
    for row in rows:
        row["chosen"] = row["prompt"] + row["chosen"]
    check_preference_dataset(Dataset.from_list(rows), "train_dataset")
    assert not caplog.text
    for row in rows:
        row["rejected"] = row["prompt"] + row["rejected"]
    check_preference_dataset(Dataset.from_list(rows), "train_dataset")
    assert "In every row of `train_dataset`, the completions begin with the text of `prompt`" in caplog.text


def test_arguments_of_the_template_that_some_rows_lack_are_as_if_not_given(make_trainer, tokenizer):
    rows = [{**row, "chat_template_kwargs": None} for row in conversations(3, 1)]
    rows[1]["chat_template_kwargs"] = {"add_generation_prompt": True}
    made = make_trainer(train_dataset=rows, unlabeled_dataset=conversations(3, 2)).data.labeled
    for number, (row, ids) in enumerate(zip(rows, made["chosen_ids"], strict=True)):
        own = {"add_generation_prompt": True} if number == 1 else {}
        messages = row["prompt"] + row["chosen"]
        assert ids == tokenizer.apply_chat_template(messages, return_dict=True, **own)["input_ids"]


@pytest.mark.parametrize("as_text", [json.dumps, str])
def test_conversation_in_a_cell_is_refused(make_trainer, spy, as_text):
    rows = [{name: as_text(value) for name, value in row.items()} for row in conversations(3, 1)]
    words = "`chosen` of row 0 of `{}` is a conversation that was written as text.*write the rows as JSON lines"
    with pytest.raises(ValueError, match=words.format("train_dataset")):
        make_trainer(train_dataset=rows)
    with pytest.raises(ValueError, match=words.format("unlabeled_dataset")):
        make_trainer(unlabeled_dataset=rows)
    with pytest.raises(ValueError, match=words.format("dataset")):
        evaluate(spy, Dataset.from_list(rows), disable_tqdm=True)
    # An answer may well be JSON.
    rows = [{**row, "chosen": as_text([{"role": "user"}])} for row in preference_rows(3)]
    check_preference_dataset(Dataset.from_list(rows), "train_dataset")


def test_labels_without_the_prompts_that_other_data_has_are_refused(caplog):
    rows = preference_rows(5)
    asked = Dataset.from_list([{"question": row.pop("prompt"), **row} for row in copy.deepcopy(rows)])
    given_rows = Dataset.from_list(rows)
    for one, other in (("train_dataset", "unlabeled_dataset"), ("calibration_dataset", "train_dataset")):
        with pytest.raises(ValueError, match=f"`{one}` has no prompts.*but `{other}` has; rename the col.*question"):
            check_same_form({one: asked, other: given_rows})
    with pytest.raises(ValueError, match=r"rename the column that holds them \(question\) to `prompt`"):
        check_labeled_data({"train_dataset": given_rows, "eval_dataset": asked})
    # Completions that begin with their prompts have them too.
    whole = Dataset.from_list([{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows])
    check_same_form({"train_dataset": whole, "unlabeled_dataset": given_rows})
    turns = [as_messages(row) for row in rows]
    whole = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in turns]
    check_same_form({"train_dataset": Dataset.from_list(whole), "unlabeled_dataset": Dataset.from_list(turns)})
    assert not caplog.text
    check_same_form({"train_dataset": asked.remove_columns("question"), "unlabeled_dataset": given_rows})
    assert "`train_dataset` has no prompts" in caplog.text


def test_refusals_are_sentences_of_the_package(make_trainer):
    with pytest.raises(ValueError) as raised:
        make_trainer(train_dataset=[{**row, "tools": "["} for row in preference_rows(3)])
    refusal_of(raised.value)
