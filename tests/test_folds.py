import numpy as np
import pytest
from conftest import assert_same_weights, preference_rows, weights_of
from transformers import TrainerCallback

from trl_ssrm import PseudoLabelingCallback, SSRMRewardFunction
from trl_ssrm.rounds.callback import RoundCallback
from trl_ssrm.rounds.run_directory import INITIAL


pytestmark = pytest.mark.slow


def test_folds_change_nothing_in_the_model_of_the_round(make_trainer, tmp_path):
    args = {"confidence_threshold": 0.5, "keep_best_round": False, "num_rounds": 0, "pretrain_on_pool": False}
    plain = make_trainer(**args)
    plain.train()
    folded = make_trainer(**args, num_folds=3, output_dir=str(tmp_path / "folds"))
    folded.train()
    assert_same_weights(weights_of(folded.model), weights_of(plain.model))
    assert len(folded.state.log_history) > 0 and not any("fold" in str(log) for log in folded.state.log_history)


def test_a_part_is_judged_by_a_model_that_has_not_seen_it(make_trainer, labeled):
    # Labels against the rule in one part: who trained on them says so, who did not does not.
    args = {"num_folds": 4, "num_train_epochs": 30, "num_rounds": 0}
    folds = make_trainer(**args).folds
    wrong = folds.fold_of == 0
    names = ("rejected", "chosen")
    rows = [
        {**row, "chosen": row[names[0]], "rejected": row[names[1]]} if wrong[number] else row
        for number, row in enumerate(labeled)
    ]
    trainer = make_trainer(train_dataset=rows, **args)
    trainer.train()
    logits = trainer.folds.held_out_logits(INITIAL)
    assert (logits[wrong] < 0).mean() >= 0.75
    learned = trainer.score_pairs(trainer.data.labeled_pairs, "labeled").logits
    assert (learned[wrong] > 0).mean() >= 0.75


def test_pairs_of_a_prompt_are_in_one_part(make_trainer):
    rows = preference_rows(24, seed=1)
    for number, row in enumerate(rows):
        row["prompt"] = f"Prompt {number % 5}: "
    trainer = make_trainer(train_dataset=rows, num_folds=3)
    parts = [set(trainer.folds.fold_of[number::5].tolist()) for number in range(5)]
    assert all(len(part) == 1 for part in parts) and set.union(*parts) == {0, 1, 2}


def test_cross_fitted_temperature_calibrates_an_overtrained_model(make_trainer):
    rows = preference_rows(40, seed=1)
    for row in rows[::3]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    args = {"num_folds": 4, "num_train_epochs": 20, "num_rounds": 0}
    trainer = make_trainer(train_dataset=rows, **args)
    trainer.train()
    facts = trainer.round_history[0]
    assert facts["temperature"] > 1.5
    assert facts["cross_fit_calibrated_ece"] < facts["cross_fit_ece"]
    assert facts["cross_fit_calibrated_log_loss"] < facts["cross_fit_log_loss"]


def test_run_with_folds_is_resumed_to_the_same_result(make_trainer, tmp_path):
    args = {"num_folds": 3, "pseudo_label_type": "soft"}
    expected = make_trainer(**args, output_dir=str(tmp_path / "whole"))
    expected.train()
    trainer = make_trainer(**args)
    write_fold = trainer.run.write_fold

    def interrupt(fold: int, start: int, logits: np.ndarray) -> None:
        if fold == 1:
            raise KeyboardInterrupt
        write_fold(fold, start, logits)

    trainer.run.write_fold = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = make_trainer(**args)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(resumed.model), weights_of(expected.model))
    for one, other in zip(resumed.round_history, expected.round_history, strict=True):
        names = {name for name in one if not name.startswith("scoring")}
        assert {name: one[name] for name in names} == {name: other[name] for name in names}


def test_callbacks_of_the_user_are_told_of_the_round_alone(make_trainer, held_out):
    class Count(TrainerCallback):
        trained = evaluated = 0

        def on_train_begin(self, *args, **kwargs):
            self.trained += 1

        def on_evaluate(self, *args, **kwargs):
            self.evaluated += 1

    count = Count()
    args = {"num_folds": 2, "num_rounds": 1, "eval_strategy": "epoch", "eval_on_start": True, "num_train_epochs": 1}
    trainer = make_trainer(**args, eval_dataset=held_out, callbacks=[count])
    trainer.train()
    assert (count.trained, count.evaluated) == (2, 4)


def test_later_rounds_have_the_temperature_that_their_labels_call_for(make_trainer, labeled, tmp_path):
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in labeled.select(range(2))]
    rows += labeled.select(range(2, 16)).to_list()
    temperatures = {}
    for kind in ("hard", "soft"):
        settings = {"num_folds": 4, "num_rounds": 1, "confidence_threshold": 0.5, "num_train_epochs": 20}
        settings["pretrain_on_pool"] = False
        trainer = make_trainer(**settings, train_dataset=rows, pseudo_label_type=kind, output_dir=str(tmp_path / kind))
        trainer.train()
        temperatures[kind] = [facts["temperature"] for facts in trainer.round_history]
    assert temperatures["hard"][0] == temperatures["hard"][1] == temperatures["soft"][0] != 1
    assert temperatures["soft"][1] == 1


def test_fold_models_are_trained_on_the_labels_alone_and_once(make_trainer):
    seen = []

    class Watch(RoundCallback):
        def on_round_begin(self, args, state, control, round, **kwargs):
            seen.append(round)

    settings = {"num_folds": 3, "num_rounds": 2, "confidence_threshold": 0.5, "pretrain_on_pool": False}
    trainer = make_trainer(**settings, callbacks=[Watch()])
    train_once, sizes = trainer.train_once, []
    trainer.train_once = lambda *args: sizes.append((trainer.round, len(trainer.train_dataset))) or train_once(*args)
    trainer.train()
    folds = [(0, 16 - int((trainer.folds.fold_of == fold).sum())) for fold in range(3)]
    assert sizes[:4] == [*folds, (0, 16)] and all(round > 0 and size > 16 for round, size in sizes[4:])
    assert not list(trainer.run.root.rglob("fold_*/weights.safetensors"))
    assert "cross_fit_accuracy" in trainer.round_history[0] and "cross_fit_accuracy" not in trainer.round_history[1]


def test_folds_are_there_where_they_calibrate_or_decide(make_trainer, labeled, held_out, caplog, monkeypatch):
    def num_folds(rows=labeled, **kwargs) -> int:
        return make_trainer(train_dataset=rows, num_folds=None, **kwargs).folds.num_folds

    assert num_folds() == 3
    assert "that part calibrate the confidence. `num_folds=0` leaves them out, and" in caplog.text
    assert num_folds(rows=labeled.select(range(2))) == 2
    assert num_folds(rows=labeled.select(range(1))) == 0
    assert num_folds(num_rounds=0) == 3
    # Linear models decide about pretraining, where there can be some.
    assert num_folds(calibration_dataset=held_out) == 0
    assert make_trainer(num_folds=None, calibration_dataset=held_out).settings.pretrains == "if_better"
    assert make_trainer(num_folds=0, calibration_dataset=held_out).settings.pretrains == "never"
    monkeypatch.setattr("trl_ssrm.rounds.settings.MOST_LINEAR_PAIRS", 10)
    caplog.clear()
    assert num_folds(calibration_dataset=held_out) == 3
    assert "that part decide whether the model is pretrained" in caplog.text
    for settled in ({"pretrain_on_pool": False}, {"pretrain_on_pool": True}, {"freeze_backbone": True}):
        assert num_folds(calibration_dataset=held_out, **settled) == 0
        assert num_folds(**settled) == 3

    class Own(PseudoLabelingCallback):
        def score(self, trainer, pool, round):
            return super().score(trainer, pool, round)

    assert num_folds(callbacks=[Own()]) == 0


def test_more_parts_than_prompts_are_refused(make_trainer, labeled):
    with pytest.raises(ValueError, match="`num_folds` is 17, but the labeled pairs have 16 prompts"):
        make_trainer(num_folds=17)


def test_labels_of_a_part_never_reach_its_model(make_trainer, labeled, tmp_path):
    args = {"num_folds": 4, "num_rounds": 1, "confidence_threshold": 0.5, "pretrain_on_pool": False}
    one = make_trainer(**args, output_dir=str(tmp_path / "one"))
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if one.folds.fold_of[number] == 2 else row
        for number, row in enumerate(labeled)
    ]
    other = make_trainer(train_dataset=turned, **args, output_dir=str(tmp_path / "other"))
    assert one.folds.fold_of.tolist() == other.folds.fold_of.tolist()
    one.train()
    other.train()
    without, with_part = ([trainer.run.read_fold(fold, INITIAL) for trainer in (one, other)] for fold in (2, 1))
    # The labels are turned, and so are the logits of chosen over rejected.
    assert np.array_equal(without[0], -without[1])
    assert not np.array_equal(np.abs(with_part[0]), np.abs(with_part[1]))


def test_labels_that_teach_nothing_end_the_rounds(make_trainer, held_out):
    # The calibration pairs are labeled against what the model learns.
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in held_out]
    settings = {"pseudo_label_type": "soft", "confidence_threshold": None, "num_train_epochs": 8, "num_rounds": 1}
    trainer = make_trainer(**settings, calibration_dataset=turned)
    trainer.train()
    assert trainer.termination_reason == "nothing_learned" and len(trainer.round_history) == 1
    # The pool is not scored for nothing.
    assert not trainer.run.round_dir(1).exists()


def test_a_teacher_labels_the_pool_whatever_its_student_has_learned(make_trainer, held_out, llama, tmp_path):
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in held_out]
    settings = {"pseudo_label_type": "soft", "confidence_threshold": 0.5, "num_train_epochs": 8, "num_rounds": 1}
    callback = PseudoLabelingCallback(teacher=SSRMRewardFunction(llama))
    trainer = make_trainer(**settings, calibration_dataset=turned, callbacks=[callback])
    trainer.train()
    assert not trainer.round_history[0]["has_learned"]
    assert trainer.termination_reason == "max_rounds" and trainer.round_history[1]["num_train_pairs"] > 16
