import pytest
from conftest import preference_rows


def same(row: dict) -> dict:
    return {**row, "rejected": row["chosen"]}


@pytest.mark.parametrize("name", ["train", "eval", "calibration"])
def test_pairs_without_a_difference_are_left_out_and_counted(make_trainer, caplog, name):
    rows = preference_rows(30, seed={"train": 1, "eval": 3, "calibration": 4}[name])
    trainer = make_trainer(**{f"{name}_dataset": [*rows, same(rows[0]), same(rows[1])]})
    pairs = trainer.data.labeled_pairs if name == "train" else trainer.data.held_out[name]
    assert len(pairs.first) == 30 and (pairs.first != pairs.second).all()
    assert f"Left out of `{name}_dataset`: 2 (identical completions)." in caplog.text
    if name == "train":
        assert len(trainer.data.labeled) == 30


def test_a_tie_changes_no_temperature(make_trainer, tmp_path):
    rows = preference_rows(30, seed=4)
    for row in rows[::3]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    temperatures = []
    for number, calibration in enumerate([rows, [*rows, *map(same, rows)]]):
        settings = {"num_rounds": 0, "output_dir": str(tmp_path / str(number))}
        trainer = make_trainer(calibration_dataset=calibration, **settings)
        trainer.train()
        temperatures.append(trainer.round_history[0]["temperature"])
    assert temperatures[0] == temperatures[1] != 1


def test_pairs_that_are_all_the_same_are_refused(make_trainer):
    with pytest.raises(
        ValueError, match="In every row of `train_dataset`, `chosen` and `rejected` have the same tokens"
    ):
        make_trainer(train_dataset=[same(row) for row in preference_rows(4)])


def test_opposite_labels_and_leaked_evaluation_pairs_are_counted_in_the_log(make_trainer, caplog):
    rows = preference_rows(16, seed=1)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:3]]
    make_trainer(train_dataset=[*rows, *turned], eval_dataset=[*preference_rows(20, seed=3), *rows[:5]])
    assert "3 pairs are in `train_dataset` twice, with opposite labels." in caplog.text
    assert "`eval_dataset` shares 5 of its 25 pairs with `train_dataset`" in caplog.text


def test_prompts_that_are_trained_on_are_counted_in_the_log(make_trainer, labeled, caplog):
    rows = [{**row, "chosen": f"{row['chosen']}!"} for row in labeled.select(range(3))] + preference_rows(4, seed=9)
    make_trainer(eval_dataset=rows)
    assert "3 of the 7 prompts of `eval_dataset` are also in `train_dataset`" in caplog.text
    caplog.clear()
    make_trainer(eval_dataset=preference_rows(4, seed=9))
    assert "prompts of" not in caplog.text
