import random

import numpy as np
import pytest
from conftest import SOFT_ROUND, as_messages, assert_same_weights, weights_of
from datasets import Dataset
from peft import LoraConfig

from trl_ssrm import SSRMTrainer
from trl_ssrm.reporting.plots import held_out_names
from trl_ssrm.rounds.linear import SURE_EVIDENCE
from trl_ssrm.rounds.pretraining import gain, pretraining_pairs
from trl_ssrm.rounds.run_directory import INITIAL, PRETRAINED


WORDS = ["aaaa", "bbbb", "cccc", "dddd"]


def matching_rows(num_rows: int, seed: int) -> list[dict[str, str]]:
    """Pairs whose chosen completion repeats the word of the prompt; the rejected one repeats another word."""
    draw, rows = random.Random(seed), []
    for number in range(num_rows):
        word = draw.choice(WORDS)
        other = draw.choice([each for each in WORDS if each != word])
        prompt = f"{number} {seed} {word}: "
        rows.append(
            {"prompt": prompt, "chosen": f"{word} {draw.randint(0, 9)}", "rejected": f"{other} {draw.randint(0, 9)}"}
        )
    return rows


def pool_rows(num_rows: int, seed: int) -> list[dict]:
    """Prompts with two completions, most of which repeat the word of the prompt."""
    draw, rows = random.Random(seed), []
    for number in range(num_rows):
        word = draw.choice(WORDS)
        words = [word if draw.random() < 0.85 else draw.choice(WORDS) for _ in range(2)]
        completions = [f"{each} {digit}" for each, digit in zip(words, draw.sample(range(10), 2), strict=True)]
        rows.append({"prompt": f"{number} {seed} {word}: ", "completions": completions})
    return rows


def turned(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


@pytest.fixture
def make_matching(make_trainer):
    """Makes trainers whose labels prefer, or with `is_turned` reject, what fits the prompt."""

    def make(is_turned: bool = False, num_pool: int = 400, **settings):
        rows = matching_rows(24, seed=1)
        data = {
            "train_dataset": turned(rows) if is_turned else rows,
            "unlabeled_dataset": pool_rows(num_pool, seed=2),
        }
        return make_trainer(**{**data, **SOFT_ROUND, **settings})

    return make


@pytest.mark.slow
def test_labels_let_pretraining_in_where_it_helps(make_matching, tmp_path, monkeypatch):
    held_out = Dataset.from_list(matching_rows(100, seed=3))
    trainer = make_matching(eval_dataset=held_out)
    trainer.train()
    facts = trainer.round_history[0]
    assert trainer.start == PRETRAINED and facts["pretraining_pairs"] > 350 and facts["pretraining_share_right"] > 0.75
    assert facts["log_loss_with_pretraining"] < facts["log_loss_without_pretraining"]
    # Linear models have judged it, so fold models are trained from one of the starts alone.
    assert trainer.run.linear_path(INITIAL).is_file() and not trainer.run.fold_dir(0, INITIAL).exists()
    without = make_matching(eval_dataset=held_out, pretrain_on_pool=False, output_dir=str(tmp_path / "without"))
    without.train()
    # A linear model helps to label the pool where pretraining is not used, or its evidence is weak.
    assert facts["pretraining_evidence"] > SURE_EVIDENCE
    # The report draws a line for each held-out dataset, and for nothing else.
    assert held_out_names(facts) == held_out_names(without.round_history[0]) == ["eval", "cross_fit"]
    assert "accuracy_of_linear_model" not in facts and "accuracy_of_linear_model" in without.round_history[0]
    monkeypatch.setattr("trl_ssrm.rounds.linear.SURE_EVIDENCE", facts["pretraining_evidence"] + 1)
    weak = make_matching(eval_dataset=held_out, output_dir=str(tmp_path / "weak"))
    weak.train()
    assert weak.start == PRETRAINED and weak.linear_model.labels_pool
    # It reads the initial weights, so that it does not repeat what pretraining got wrong.
    assert weak.round_history[0]["linear_model_has_learned"]
    assert weak.round_history[0]["accuracy_of_linear_model"] == without.round_history[0]["accuracy_of_linear_model"]
    labels = [each.run.read_labels(1)[0]["confidence"] for each in (trainer, weak)]
    assert not np.array_equal(*labels)
    for round in range(2):
        one, other = (each.round_history[round]["eval_accuracy"] for each in (trainer, without))
        assert one > other + 0.05


@pytest.mark.slow
def test_fold_models_judge_where_there_is_no_linear_model(make_matching, held_out, tmp_path, monkeypatch, caplog):
    trainer = make_matching()
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, output_hidden_states=False, **kwargs: forward(*args, **kwargs)
    trainer.train()
    assert trainer.start == PRETRAINED and not trainer.run.linear_path(INITIAL).is_file()
    without = trainer.run.read_fold(0, INITIAL)
    assert without is not None and len(without) == 8
    # Without them either, nothing is trained in vain.
    alone = make_matching(num_folds=None, calibration_dataset=held_out, output_dir=str(tmp_path / "alone"))
    assert alone.settings.num_folds == 0 and alone.settings.pretrains == "if_better"
    monkeypatch.setattr(alone.linear_model, "has_states", False)
    monkeypatch.setattr(alone.pretraining, "_train", lambda *args: 1 / 0)
    alone.train()
    assert alone.start == INITIAL and "Neither linear models nor fold models can judge" in caplog.text


@pytest.mark.slow
def test_weak_evidence_refuses_pretraining_and_costs_no_fold_model(make_matching, monkeypatch):
    monkeypatch.setattr("trl_ssrm.rounds.pretraining.LEAST_EVIDENCE", 100.0)
    trainer = make_matching(num_pool=40)
    train, starts = trainer.folds.train, []
    trainer.folds.train = lambda start, *args: starts.append(start) or train(start, *args)
    trainer.train()
    facts = trainer.round_history[0]
    assert 0 < facts["pretraining_evidence"] < facts["pretraining_least_evidence"] == 100
    assert not facts["is_pretrained"] and trainer.start == INITIAL and starts == [INITIAL]


@pytest.mark.slow
def test_run_with_both_is_resumed_to_the_same_result(make_matching, monkeypatch, tmp_path):
    # Pretraining is let in, and the linear model on the initial weights labels beside it.
    monkeypatch.setattr("trl_ssrm.rounds.pretraining.LEAST_EVIDENCE", -100.0)
    monkeypatch.setattr("trl_ssrm.rounds.linear.SURE_EVIDENCE", 100.0)
    whole = make_matching(num_pool=60, output_dir=str(tmp_path / "whole"))
    whole.train()
    broken = make_matching(num_pool=60)
    monkeypatch.setattr(broken.linear_model, "join", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.train()
    resumed = make_matching(num_pool=60)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.start == PRETRAINED and resumed.linear_model.labels_pool
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))
    # The weights that only the linear model needs are deleted once the pool is labeled.
    assert not resumed.run.weights_path(INITIAL).exists()


@pytest.mark.slow
def test_without_fold_models_the_answer_of_linear_models_counts(make_matching):
    held_out = Dataset.from_list(matching_rows(30, seed=3))
    trainer = make_matching(num_pool=40, calibration_dataset=held_out, num_folds=None)
    trainer.train()
    assert trainer.settings.num_folds == 0 and "pretraining_evidence" in trainer.round_history[0]


def test_gain_is_paired_and_at_the_best_temperature():
    # Right on 3 of 4 at any size: the odds that fit are 3, so the log-loss is that of a coin with .75.
    coin = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    without, trained = np.array([5.0, -5.0, 5.0, -5.0]), np.array([0.1, 0.1, 0.1, -0.1])
    facts = gain(trained, without, trained, np.arange(4))
    assert (facts["accuracy_without_pretraining"], facts["accuracy_with_pretraining"]) == (0.5, 0.75)
    assert facts["log_loss_with_pretraining"] == pytest.approx(coin, abs=1e-3)
    assert facts["log_loss_without_pretraining"] == pytest.approx(np.log(2), abs=1e-3)
    # One of four pairs becomes right.
    assert facts["pretraining_accuracy_change_error"] == pytest.approx(np.std([0, 1, 0, 0], ddof=1) / 2)


def test_evidence_counts_prompts_and_not_pairs():
    right, coin = np.array([1.0, 1.0, 1.0, -1.0]), np.array([1.0, -1.0, 1.0, -1.0])
    log_loss = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    # Ranking three of four right is as unlikely by chance as the log-loss gets lower by it.
    evidence = gain(right, coin, right, np.arange(4))["pretraining_evidence"]
    assert evidence == pytest.approx(2 * 4 * (np.log(2) - log_loss), abs=1e-2)
    # What ranks them wrong is evidence against it.
    assert gain(-right, coin, right, np.arange(4))["pretraining_evidence"] == pytest.approx(0, abs=1e-2)
    # Ten pairs of each prompt tell no more.
    many = (np.repeat(logits, 10) for logits in (right, coin, right))
    assert gain(*many, np.repeat(np.arange(4), 10))["pretraining_evidence"] == pytest.approx(evidence)


@pytest.mark.slow
def test_labels_refuse_pretraining_that_ranks_them_wrong(make_matching, tmp_path):
    trainer = make_matching(is_turned=True)
    trainer.train()
    assert trainer.start == INITIAL and trainer.round_history[0]["pretraining_share_right"] < 0.5
    # What was refused leaves no trace in the weights.
    without = make_matching(is_turned=True, pretrain_on_pool=False, output_dir=str(tmp_path / "without"))
    without.train()
    assert_same_weights(weights_of(trainer.model), weights_of(without.model))
    # Asked for, it is not a question for the labels.
    forced = make_matching(is_turned=True, pretrain_on_pool=True, num_folds=0, output_dir=str(tmp_path / "forced"))
    forced.train()
    assert forced.start == PRETRAINED


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "pairwise"])
def test_labels_of_the_pool_are_never_read(llama, causal, config, tmp_path, kind):
    settings = {**SOFT_ROUND, "num_folds": 0, "pretrain_on_pool": True}
    if kind == "pairwise":
        settings |= {"preference_model": "pairwise", "max_length": 256}
    weights = []
    for number, rows in enumerate((matching_rows(30, seed=2), turned(matching_rows(30, seed=2)))):
        trainer = SSRMTrainer(
            causal() if kind == "pairwise" else llama,
            config(**settings, output_dir=str(tmp_path / str(number))),
            peft_config=LoraConfig(r=2, task_type="SEQ_CLS") if kind == "lora" else None,
            train_dataset=Dataset.from_list(matching_rows(12, seed=1)),
            unlabeled_dataset=Dataset.from_list(rows),
        )
        trainer.train()
        assert trainer.start == PRETRAINED
        weights.append(weights_of(trainer.model))
    assert_same_weights(*weights)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["checkpoint", "weights", "fold", "round"])
def test_run_is_resumed_to_the_same_result(make_matching, tmp_path, place):
    args = {"save_strategy": "steps", "save_steps": 4, "num_pool": 40, "pretrain_on_pool": True, "num_folds": 2}
    expected = make_matching(**args, output_dir=str(tmp_path / "whole"))
    expected.train()
    trainer = make_matching(**args)
    names = {"checkpoint": "end_checkpoint", "weights": "write_weights", "fold": "write_fold", "round": "write_state"}
    function, calls = getattr(trainer.run, names[place]), []

    def interrupt(*args):
        calls.append(args)
        # The first weights are the initial ones. The second ones of anything are cut off.
        if len(calls) == (1 if place == "round" else 2):
            raise KeyboardInterrupt
        function(*args)

    setattr(trainer.run, names[place], interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = make_matching(**args)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(resumed.model), weights_of(expected.model))
    keep = ("pretraining_share_right", "cross_fit_log_loss", "temperature", "global_step")
    one, other = (each.round_history[0] for each in (resumed, expected))
    assert {name: one[name] for name in keep} == {name: other[name] for name in keep}


@pytest.mark.parametrize("has_messages", [False, True])
def test_a_completion_is_paired_with_one_of_another_prompt(make_trainer, has_messages):
    rows = matching_rows(30, seed=2) + [{**row, "prompt": "0 2 again: "} for row in matching_rows(5, seed=4)]
    labeled = matching_rows(6, seed=1)
    if has_messages:
        rows, labeled = ([as_messages(row) for row in each] for each in (rows, labeled))
    trainer = make_trainer(train_dataset=labeled, unlabeled_dataset=rows)
    pairs = list(pretraining_pairs(trainer.data.pool, seed=0))
    own = {
        str(row["prompt"]): {
            str(each[name]) for each in rows if each["prompt"] == row["prompt"] for name in ("chosen", "rejected")
        }
        for row in rows
    }
    assert 25 <= len(pairs) <= len(rows)
    for pair in pairs:
        assert str(pair["chosen"]) in own[str(pair["prompt"])] and pair["rejected"] != pair["chosen"]
    taken = [pair["chosen"] in [row["chosen"] for row in rows] for pair in pairs]
    assert 0 < sum(taken) < len(taken)
    # Of one prompt there is no other, and without prompts there is none.
    same = [{**row, "prompt": rows[0]["prompt"]} for row in rows]
    assert not list(pretraining_pairs(make_trainer(train_dataset=labeled, unlabeled_dataset=same).data.pool, seed=0))


@pytest.mark.slow
def test_a_pool_without_prompts_is_not_pretrained_on(make_trainer, caplog):
    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in matching_rows(30, seed=2)]
    trainer = make_trainer(train_dataset=rows[:8], unlabeled_dataset=rows[8:], **SOFT_ROUND)
    trainer.train()
    assert trainer.start == INITIAL and "no two different prompts" in caplog.text


def test_pretraining_of_a_head_alone_is_refused(config):
    with pytest.raises(ValueError, match="pretrain_on_pool"):
        config(freeze_backbone=True, pretrain_on_pool=True)
