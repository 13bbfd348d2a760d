import pytest
from conftest import preference_rows
from datasets import Dataset

from trl_ssrm.cli.main import main
from trl_ssrm.cli.train import make_parser, make_trainer
from trl_ssrm.io.shapes import with_known_columns


NO_MAP = {"prompt": None, "chosen": None, "rejected": None}
WANTED = {"prompt": ["p", "q"], "chosen": ["good", "fine"], "rejected": ["bad", "poor"]}


def columns_of(dataset: Dataset) -> dict:
    return {name: dataset[name][:] for name in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize(
    ("names", "winners"),
    [
        (("prompt", "response_a", "response_b", "winner"), ("response_a", "response_b")),
        (("prompt", "response_a", "response_b", "winner"), ("A", "B")),
        (("prompt", "completion_a", "completion_b", "preference"), ("a", "b")),
        (("question", "answer_1", "answer_2", "preferred"), (1, 2)),
        (("question", "answer_1", "answer_2", "preferred"), ("answer_1", "2")),
        (("instruction", "response_0", "response_1", "label"), (0, 1)),
        (("query", "output_1", "output_2", "better"), ("1", "output_2")),
    ],
)
def test_better_completion_is_the_chosen_one(names, winners, caplog):
    prompt, first, second, winner = names
    rows = {prompt: ["p", "q"], first: ["good", "poor"], second: ["bad", "fine"], winner: [*winners]}
    if all(isinstance(each, int) for each in winners) is False:
        rows[winner] = [str(each) for each in winners]
    found = with_known_columns(Dataset.from_dict(rows), "labels.csv", False, NO_MAP)
    assert columns_of(found) == WANTED and "are read as `prompt`, `chosen` and `rejected`" in caplog.text
    hidden = with_known_columns(Dataset.from_dict(rows), "pool.csv", True, NO_MAP)
    assert {*hidden.column_names} == {"prompt", "completion_a", "completion_b"}
    assert hidden["completion_a"][:] == ["good", "poor"]


@pytest.mark.parametrize("tie", ["tie", "Tie (bothbad)", "both_bad", "winner_tie", "neither"])
def test_ties_keep_their_pair_and_rows_without_a_label_are_left_out(tie, caplog):
    rows = {"prompt": ["p", "t", "q", "n"], "answer_a": ["good", "x", "poor", "?"]}
    rows["answer_b"] = ["bad", "y", "fine", "!"]
    data = Dataset.from_dict({**rows, "winner": ["winner_model_a", tie, "b", None]})
    found = with_known_columns(data, "f.csv", False, NO_MAP)
    assert found["tie"][:] == [False, True, False] and {found[1]["chosen"], found[1]["rejected"]} == {"x", "y"}
    assert columns_of(found.select([0, 2])) == WANTED
    assert "1 ties have `tie`. 1 rows without a label are left out." in caplog.text


def test_tie_may_have_a_column_of_its_own_beside_the_winner():
    rows = {"prompt": ["p", "t"], "answer_a": ["good", "x"], "answer_b": ["bad", "y"], "winner": ["a", None]}
    found = with_known_columns(Dataset.from_dict({**rows, "tie": ["", "TRUE"]}), "f.csv", False, NO_MAP)
    assert found["tie"][:] == [False, True]


@pytest.mark.parametrize(
    ("winners", "message"),
    [
        (["a", "left"], "Row 1 of f.csv has 'left' in the column `winner`, which names neither completion"),
        (["1", "1"], "has no number but 1, which may be the first or the second"),
        (["0", "2"], "Row 1 of f.csv has '2'"),
        (["tie", ""], "No row of f.csv has a better completion"),
    ],
)
def test_value_that_may_mean_something_else_is_refused(winners, message):
    data = Dataset.from_dict(
        {"prompt": ["p", "q"], "response_a": ["x", "y"], "response_b": ["z", "w"], "winner": winners}
    )
    with pytest.raises(ValueError, match=message):
        with_known_columns(data, "f.csv", False, NO_MAP)


def test_rated_completions():
    rated = [
        [("bad", 1.0), ("good", 4.5), ("so-so", 2.0)],
        [("fine", 3.0), ("poor", 2.0)],
        [("same", 1.0), ("as", 1.0)],
    ]
    completions = [[{"response": text, "overall_score": score} for text, score in row] for row in rated]
    data = Dataset.from_dict({"instruction": ["p", "q", "t"], "completions": completions})
    assert columns_of(with_known_columns(data, "f.jsonl", False, NO_MAP)) == WANTED
    pool = with_known_columns(data, "f.jsonl", True, NO_MAP)
    assert pool["completions"][:][0] == ["bad", "good", "so-so"] and pool["prompt"][:] == ["p", "q", "t"]


def test_dialogues_become_conversations():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2 + 2?"
    data = Dataset.from_dict(
        {"chosen": [f"{start}\n\nAssistant: 4"], "rejected": [f"{start}\n\nAssistant: 5\n\nSure."]}
    )
    row = with_known_columns(data, "hh", False, NO_MAP)[0]
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    assert row["chosen"] == [{"role": "assistant", "content": "4"}]
    assert row["rejected"] == [{"role": "assistant", "content": "5\n\nSure."}]


def test_columns_can_be_named():
    data = Dataset.from_dict({"ask": ["p", "q"], "good": ["good", "fine"], "bad": ["bad", "poor"]})
    named = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    assert columns_of(with_known_columns(data, "f.csv", False, named)) == WANTED
    with pytest.raises(
        ValueError, match="f.csv has no column `asked` to take for `prompt`; its columns are ask, good, bad"
    ):
        with_known_columns(data, "f.csv", False, {**named, "prompt": "asked"})
    with pytest.raises(ValueError, match="has a column `chosen` already"):
        with_known_columns(Dataset.from_dict(WANTED), "f.csv", False, {**NO_MAP, "chosen": "rejected"})


def test_rows_that_trl_reads_stay_as_they_are():
    for rows in (
        WANTED,
        {"prompt": ["p"], "completions": [["a", "b"]]},
        {"chosen": ["a"], "rejected": ["b"], "winner": ["a"]},
    ):
        data = Dataset.from_dict(rows)
        assert with_known_columns(data, "f.csv", "completions" in rows, NO_MAP) is data


def test_commands_read_files_of_other_shapes(llama, tmp_path, capsys):
    # Two labels of each kind: the same texts as files of TRL's shape and of others.
    rows = preference_rows(12, seed=1)
    plain, other, pool = (tmp_path / name for name in ("plain.jsonl", "other.jsonl", "pool.jsonl"))
    Dataset.from_list(rows).to_json(plain)
    turned = [number % 2 for number in range(12)]
    shaped = [
        {
            "question": row["prompt"],
            "answer_1": row["rejected"] if is_turned else row["chosen"],
            "answer_2": row["chosen"] if is_turned else row["rejected"],
            "preferred": "answer_2" if is_turned else "answer_1",
        }
        for row, is_turned in zip(rows, turned, strict=True)
    ]
    Dataset.from_list(shaped).to_json(other)
    Dataset.from_list([{"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows]).to_json(
        pool
    )
    model = ["--model_name_or_path", llama]
    tables = []
    named = ["--prompt_column", "ask", "--chosen_column", "good", "--rejected_column", "bad"]
    for file, further in ((plain, []), (other, []), (pool, named)):
        assert main(["evaluate", *model, "--dataset_name", str(file), "--disable_tqdm", *further]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] == tables[2]
    argv = [
        *model,
        "--dataset_name",
        str(other),
        "--unlabeled_dataset_name",
        str(plain),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(ValueError, match="No pair of `unlabeled_dataset` is left"):
        make_trainer(*make_parser().parse(argv)[0])
