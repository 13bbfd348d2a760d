import pytest
from conftest import as_messages, preference_rows
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import maybe_extract_prompt

from trl_ssrm.data.prompts import prompt_groups, split_by_prompt, with_prompt


def as_tokens(row: dict[str, str]) -> dict[str, list[int]]:
    return {f"{name}_ids": list(text.encode()) for name, text in row.items()}


def groups_of(rows: list[dict]) -> list[int]:
    return prompt_groups(Dataset.from_list(rows)).tolist()


@pytest.mark.parametrize("form", ["explicit", "implicit", "tokens"])
def test_prompts_are_told_apart_in_every_form(form):
    rows = [
        {"prompt": f"Question {number // 2}? ", "chosen": f"x{number}", "rejected": f"y{number}"}
        for number in range(6)
    ]
    if form != "explicit":
        rows = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    if form == "tokens":
        rows = [as_tokens(row) for row in rows]
    assert groups_of(rows) == [0, 0, 1, 1, 2, 2]


def test_half_a_word_in_common_is_not_part_of_the_prompt():
    starts = [("why? Sure", "why? Sorry"), ("why? Yes", "why? No"), ("when? a", "when? b"), ("x", "y"), ("v", "w")]
    # Pairs whose texts have nothing in common are told apart.
    assert groups_of([{"chosen": chosen, "rejected": rejected} for chosen, rejected in starts]) == [0, 0, 1, 2, 3]


def in_one(row: dict) -> dict:
    """A conversation without a prompt of its own."""
    return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}


def test_conversations_that_differ_from_the_first_turn_on_leave_the_others_alone():
    rows = [in_one(as_messages(row)) for row in preference_rows(60)]
    odd = {name: [{"role": "user", "content": name}, {"role": "assistant", "content": "a"}] for name in rows[0]}
    assert groups_of(rows) == list(range(60))
    assert groups_of([*rows, odd]) == list(range(61))


def test_parts_have_no_prompt_in_common():
    rows = [{"prompt": f"p{number // 3}", "chosen": f"a{number}", "rejected": "b"} for number in range(30)]
    data = Dataset.from_list(rows).shuffle(seed=0)
    first, second, rest = split_by_prompt(data, [4, 0])
    assert (len(first), len(second), len(rest)) == (6, 0, 24) and not set(first["prompt"]) & set(rest["prompt"])
    assert sorted([*first["chosen"], *rest["chosen"]]) == sorted(data["chosen"])
    # Less than asked for where no more is left; and rows with prompts of their own stay in their order.
    assert [len(part) for part in split_by_prompt(data, [28, 5])] == [30, 0, 0]
    own = data.map(lambda row: {"prompt": row["chosen"]})
    assert split_by_prompt(own, [7])[0]["chosen"] == data["chosen"][:7]


@pytest.mark.parametrize("nothing", ["", [], None])
def test_rows_with_an_empty_prompt_are_told_apart(nothing):
    rows = [{"prompt": nothing, "chosen": f"good {number}", "rejected": "bad"} for number in range(3)]
    assert groups_of(rows) == [0, 1, 2]


TEXTS = st.lists(st.tuples(*[st.text("ab ", min_size=1, max_size=6)] * 2), min_size=2, max_size=8)


@given(TEXTS, st.sampled_from(["text", "tokens", "conversation"]))
def test_one_row_never_changes_the_groups_of_the_others(texts, form):
    rows = [{"chosen": one, "rejected": other} for one, other in texts]
    if form == "tokens":
        rows = [as_tokens(row) for row in rows]
    if form == "conversation":
        rows = [
            {name: [{"role": "user", "content": letter} for letter in text] for name, text in row.items()}
            for row in rows
        ]
    with_last, without = groups_of(rows)[:-1], groups_of(rows[:-1])
    assert with_last == without


@given(TEXTS)
def test_prompt_and_completions_are_the_texts_of_the_row(texts):
    for chosen, rejected in texts:
        row = with_prompt({"chosen": chosen, "rejected": rejected})
        assert (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) == (chosen, rejected)
        assert row["chosen"] and row["rejected"]
        if chosen[0] == rejected[0]:
            assert row == maybe_extract_prompt({"chosen": chosen, "rejected": rejected})


def test_text_that_ends_with_a_space_is_no_prompt():
    assert with_prompt({"chosen": "yes ", "rejected": "no"}) == {"prompt": "", "chosen": "yes ", "rejected": "no"}
