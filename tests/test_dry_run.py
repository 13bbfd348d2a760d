import re
from pathlib import Path

import pytest
from cli_runs import error_line, finish_run, flags, settings_of_run, write_data
from conftest import letter_rows
from datasets import Dataset
from safetensors import safe_open

from trl_ssrm import Comparison, SSRMTrainer
from trl_ssrm.cli.dry_run import round_costs
from trl_ssrm.cli.main import main


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def key_of(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return file.metadata()["key"]


class Counting(SSRMTrainer):
    """Counts what is read, by round."""

    def __init__(self, *args, **kwargs):
        self.trained, self.scored = {}, {}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            pairs, tokens = self.trained.get(self.round, (0, 0))
            rows = len(inputs["input_ids"]) // (
                1 if self.comparison and self.args.comparison_orders == "random" else 2
            )
            self.trained[self.round] = pairs + rows, tokens + int(inputs["attention_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _scores(self, pairs, name, layout, **kwargs):
        stored = kwargs["directory"].glob("*.safetensors") if "directory" in kwargs else []
        # A shard with another key is scored again.
        if not any(key_of(path).startswith(kwargs["key"]) for path in stored):
            work = self.scored.get(self.round, (0, 0, 0))
            read = len(pairs.first), len(pairs.lengths), int(pairs.lengths.sum())
            self.scored[self.round] = tuple(one + two for one, two in zip(work, read, strict=True))
        return super()._scores(pairs, name, layout, **kwargs)


PAIRWISE = {"preference_model": "pairwise"}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_folds": 2},
        {"num_folds": 2, "pseudo_label_type": "soft", "round_init": "base"},
        {"pool_per_round": "shard"},
        {"num_folds": 2, "pool_per_round": "shard", "round_num_train_epochs": 1},
        {"max_steps": 5},
        {**PAIRWISE, "comparison_orders": "both"},
        {**PAIRWISE, "num_folds": 2},
    ],
    ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()),
)
def test_costs_are_what_a_run_reads(settings, llama, policy, config, labeled, unlabeled, held_out, tmp_path):
    is_pairwise = "preference_model" in settings
    given = {"train_dataset": labeled, "eval_dataset": held_out, "unlabeled_dataset": unlabeled}
    if is_pairwise:
        sizes = {"train_dataset": 16, "eval_dataset": 12, "unlabeled_dataset": 24}
        given = {name: Dataset.from_list(letter_rows(size, seed=size)) for name, size in sizes.items()}
        template = "{{ messages[0].content }} {{ responses[0] }} {{ responses[1] }}"
        comparison = Comparison(template, labels=["a", "b"], add_generation_prompt="num_folds" not in settings)
        comparison.save_pretrained(str(tmp_path))
        settings = {**settings, "comparison": str(tmp_path / "comparison.json")}
    trainer = Counting(
        policy if is_pairwise else llama,
        # Pretraining has a line of its own, since its cost is not known exactly.
        config(**{"confidence_threshold": 0.5, "num_train_epochs": 2, "pretrain_on_pool": False, **settings}),
        **given,
    )
    costs = round_costs(trainer)
    trainer.train()
    assert len(trainer.round_history) > 1
    for cost in costs[: len(trainer.round_history)]:
        pairs, tokens = trainer.trained[cost.round]
        scoring = cost.scoring.pairs, cost.scoring.sequences, cost.scoring.tokens
        assert trainer.scored[cost.round] == scoring, cost
        assert tokens <= cost.training_tokens
        if cost.is_exact:
            assert (pairs, tokens) == (cost.training.pairs * cost.num_epochs, cost.training_tokens)
        elif cost.num_epochs is not None:
            assert pairs <= cost.training.pairs * cost.num_epochs
    reads_one_order = is_pairwise and "comparison_orders" not in settings
    assert [cost.is_exact for cost in costs] == ["max_steps" not in settings and not reads_one_order, False, False]


def test_dry_run_says_what_each_round_costs_and_trains_nothing(llama, data, tmp_path, capsys, monkeypatch):
    settings = settings_of_run(llama, data, tmp_path / "run")
    settings |= {"num_rounds": 2, "num_folds": 2, "dataset_test_split": "none"}
    argv = ["train", "--dry-run", *flags(settings)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "Pairs:  16 labeled, 40 in the pool, 20 eval\n" in printed and "empty so far\n" in printed
    rows = [line.split() for line in printed.splitlines() if re.match(r" +\d", line)]
    # Round, models, epochs; pairs to train on, in round 0 by three models; pairs to score, in round 0 the parts of folds, and
    # the labels by the linear models under each of the two starts.
    assert [row[:4] for row in rows] == [["0", "3", "1", "32"], ["1", "1", "1", "≤"], ["2", "1", "1", "≤"]]
    assert rows[1][4] == str(16 + 40) and rows[0][6] == str(20 + 16 + 40 + 2 * 16) and rows[1][9] == str(20 + 40)
    assert rows[2][9] == str(20)
    # Batches of 8: fold models and round 0, two rounds of up to 56 pairs, and the pretraining.
    steps = 4 + 7 + 7 + 5
    assert re.search(
        rf"Steps: about {steps} in all. Time: about [\d.]+ minutes, by the speed of 3 batches here", printed
    )
    assert "Pretraining comes before: up to 40 pairs of texts, about " in printed
    again = "If it may help, the 2 fold models are trained a second time, from its weights."
    assert again not in printed
    assert not list(Path(settings["output_dir"]).rglob("*.safetensors"))
    # They judge it where there is no linear model.
    monkeypatch.setattr("trl_ssrm.rounds.settings.MOST_LINEAR_PAIRS", 10)
    assert main(argv) == 0 and again in capsys.readouterr().out


def test_dry_run_knows_the_run_in_the_output_directory(llama, data, tmp_path, capsys):
    finished = finish_run(llama, data, tmp_path / "run")
    capsys.readouterr()
    assert main(["train", "--dry_run", *flags(finished)]) == 0
    printed = capsys.readouterr().out
    assert "8 labeled, 5 in the pool, 3 calibration\n" in printed
    assert "holds this run, with 2 rounds over" in printed
    assert main(["train", "--dry_run", *flags({**finished, "seed": 7})]) == 2
    assert "was started with other settings or data" in error_line(capsys)
