import pytest
from conftest import preference_rows
from datasets import Dataset

from trl_ssrm import SSRMTrainer


def make(llama, config, **datasets) -> SSRMTrainer:
    rows = {"train": preference_rows(16, seed=1), "unlabeled": preference_rows(40, seed=2), **datasets}
    return SSRMTrainer(
        llama, config(), **{f"{name}_dataset": Dataset.from_list(value) for name, value in rows.items()}
    )


def same(row: dict) -> dict:
    return {**row, "rejected": row["chosen"]}


@pytest.mark.parametrize("name", ["train", "eval", "calibration"])
def test_pairs_without_a_difference_are_left_out_and_counted(llama, config, caplog, name):
    rows = preference_rows(30, seed={"train": 1, "eval": 3, "calibration": 4}[name])
    trainer = make(llama, config, **{name: [*rows, same(rows[0]), same(rows[1])]})
    pairs = trainer.data.labeled_pairs if name == "train" else trainer.data.held_out[name]
    assert len(pairs.first) == 30 and (pairs.first != pairs.second).all()
    assert f"Left out of `{name}_dataset`: 2 (identical completions)." in caplog.text
    if name == "train":
        assert len(trainer.data.labeled) == 30


def test_a_tie_changes_no_temperature(llama, config):
    def temperature(rows) -> float:
        trainer = make(llama, config, calibration=rows)
        trainer.args.num_rounds = 0
        trainer.train()
        return trainer.round_history[0]["temperature"]

    rows = preference_rows(30, seed=4)
    config_of = config
    one = temperature(rows)
    config = lambda **settings: config_of(**{**settings, "output_dir": f"{config_of().output_dir}-ties"})  # noqa: E731
    assert temperature([*rows, *map(same, rows)]) == one


def test_pairs_that_are_all_the_same_are_refused(llama, config):
    with pytest.raises(ValueError, match="In every row of `train_dataset`, `chosen` and `rejected` have the same tokens"):
        make(llama, config, train=[same(row) for row in preference_rows(4)])


def test_opposite_labels_and_leaked_evaluation_pairs_are_counted_in_the_log(llama, config, caplog):
    rows = preference_rows(16, seed=1)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:3]]
    make(llama, config, train=[*rows, *turned], eval=[*preference_rows(20, seed=3), *rows[:5]])
    assert "3 pairs are in `train_dataset` twice, with opposite labels." in caplog.text
    assert "`eval_dataset` shares 5 of its 25 pairs with `train_dataset`" in caplog.text
