import json

import numpy as np
import pytest
from conftest import as_messages, preference_rows
from datasets import Dataset, concatenate_datasets

from trl_ssrm import PairScores, SSRMTrainer, load_labels
from trl_ssrm.rounds.annotation import most_useful


@pytest.fixture
def trainer(llama, config, labeled, unlabeled) -> SSRMTrainer:
    trainer = SSRMTrainer(llama, config(num_rounds=0), train_dataset=labeled, unlabeled_dataset=unlabeled)
    trainer.train()
    return trainer


def test_labels_that_people_gave_come_back_as_labeled_pairs(trainer, unlabeled, labeled, config, llama, tmp_path):
    path = tmp_path / "to_label.jsonl"
    trainer.export_for_labeling(str(path), 5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 5 and all(row["label"] is None for row in rows)
    gold = {row["prompt"]: row for row in unlabeled}
    answered = [
        {**row, "label": "a" if row["completion_a"] == gold[row["prompt"]]["chosen"] else "b"} for row in rows[:3]
    ]
    answered.append({**rows[3], "label": "tie"})
    answered.append(rows[4])
    path.write_text("\n".join(json.dumps(row) for row in answered))
    labels = load_labels(str(path))
    named = [{name: gold[row["prompt"]][name] for name in ("prompt", "chosen", "rejected")} for row in rows[:3]]
    assert labels.select(range(3)).to_list() == [{**row, "tie": False} for row in named]
    tie = {"prompt": rows[3]["prompt"], "chosen": rows[3]["completion_a"], "rejected": rows[3]["completion_b"]}
    assert labels[3] == {**tie, "tie": True} and len(labels) == 4
    # Beside the others they are no longer in the pool.
    more = concatenate_datasets([labeled, labels])
    again = SSRMTrainer(llama, config(num_rounds=1), train_dataset=more, unlabeled_dataset=unlabeled)
    assert again.data.pool.dropped == {"overlap with the labeled pairs": 4}
    assert again.data.is_tie.tolist() == [False] * 19 + [True]


def test_probability_is_that_at_the_temperature_of_the_model(trainer, tmp_path):
    written = []
    for temperature in (1.0, 2.0):
        trainer.round_history[-1]["temperature"] = temperature
        path = tmp_path / f"{temperature}.jsonl"
        trainer.export_for_labeling(str(path), 5)
        written.append(np.array([json.loads(line)["probability"] for line in path.read_text().splitlines()]))
    odds = [np.log(each / (1 - each)) for each in written]
    assert odds[1] == pytest.approx(odds[0] / 2, abs=1e-4) and np.abs(odds[0]).max() > 1e-3


def test_pairs_that_are_asked_for_are_uncertain_and_of_different_prompts(trainer):
    pool = trainer.data.pool
    logits = np.linspace(0.1, 8, len(pool))
    chosen = most_useful(PairScores(logits), pool, 3)
    assert chosen[0] == 0 and len(set(chosen.tolist())) == 3 and max(chosen) < 30


def test_near_duplicates_are_not_asked_for(llama, config, labeled):
    rows = [{**row, "chosen": "aaa bbb", "rejected": "aaa bbb ccc"} for row in preference_rows(6, seed=5)]
    rows += [{"prompt": "!?=%&: ", "chosen": "0123456789", "rejected": "#+~*^<>"}]
    trainer = SSRMTrainer(llama, config(), train_dataset=labeled, unlabeled_dataset=Dataset.from_list(rows))
    # The odd one is the surest.
    assert most_useful(PairScores(np.arange(1.0, 8.0)), trainer.data.pool, 2).tolist() == [0, 6]


def test_one_pair_of_a_prompt_is_asked_for(llama, config, labeled):
    rows = [{"prompt": "Say: ", "completions": ["one", "two", "three"]}, {"prompt": "Or: ", "completions": ["a", "b"]}]
    trainer = SSRMTrainer(llama, config(), train_dataset=labeled, unlabeled_dataset=Dataset.from_list(rows))
    chosen = most_useful(PairScores(np.array([3.0, 1.0, 2.0, 4.0])), trainer.data.pool, 4)
    assert chosen.tolist() == [1, 3]


def test_conversations_come_back_as_conversations(llama, config, tmp_path):
    rows = [as_messages(row) for row in preference_rows(24, seed=1)]
    trainer = SSRMTrainer(
        llama,
        config(),
        train_dataset=Dataset.from_list(rows[:12]),
        unlabeled_dataset=Dataset.from_list(rows[12:]),
    )
    path = tmp_path / "to_label.jsonl"
    trainer.export_for_labeling(str(path), 2)
    path.write_text(path.read_text().replace('"label": null', '"label": "a"'))
    labels = load_labels(str(path))
    assert len(labels) == 2 and labels[0]["prompt"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of .* is not JSON"),
        (
            '{"completion_a": "x", "completion_b": "y"}',
            "line 1 of .* needs `completion_a`, `completion_b` and `label`",
        ),
        ('{"completion_a": "x", "completion_b": "y", "label": "A"}', "line 1 of .* has the label 'A'; make it 'a'"),
        ('{"completion_a": "x", "completion_b": "y", "label": null}', "has no pair with a label"),
    ],
)
def test_file_that_cannot_be_used_is_refused(tmp_path, line, message):
    path = tmp_path / "labels.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        load_labels(str(path))


def test_line_ends_within_a_text_are_no_ends_of_lines(tmp_path):
    path = tmp_path / "labels.jsonl"
    row = {"prompt": "one\u2028two\x85", "completion_a": "x\nz", "completion_b": "y", "label": "b"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_labels(str(path)).to_list() == [{"prompt": row["prompt"], "chosen": "y", "rejected": "x\nz"}]


def test_answers_are_not_overwritten(trainer, tmp_path):
    path = tmp_path / "to_label.jsonl"
    path.write_text("answers")
    with pytest.raises(ValueError, match="exists, and may hold labels"):
        trainer.export_for_labeling(str(path), 1)
    assert path.read_text() == "answers"


def test_nothing_to_choose_from_is_refused(llama, config, labeled, trainer):
    with pytest.raises(ValueError, match="needs `unlabeled_dataset`"):
        SSRMTrainer(llama, config(), train_dataset=labeled).export_for_labeling("x", 1)
    with pytest.raises(ValueError, match="`num_pairs` must be positive"):
        trainer.export_for_labeling("x", 0)
