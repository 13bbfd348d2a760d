import json

import numpy as np
import pytest
from conftest import preference_rows
from datasets import Dataset
from peft import LoraConfig

from trl_ssrm import (
    PairwiseJudge,
    PseudoLabelingCallback,
    SSRMRewardFunction,
    SSRMTrainer,
    evaluate,
    label_preferences,
)
from trl_ssrm.models.calibration import load_temperature, save_temperature
from trl_ssrm.scoring.metrics import preference_metrics
from trl_ssrm.scoring.pair_scores import sigmoid


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "adapter", "merged"])
def test_temperature_of_the_kept_round_is_saved_with_the_model(llama, config, labeled, unlabeled, tmp_path, kind):
    peft = None if kind == "full" else LoraConfig(r=2, task_type="SEQ_CLS")
    calibration = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in preference_rows(8, seed=4)]
    trainer = SSRMTrainer(
        llama,
        config(num_rounds=1),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        calibration_dataset=Dataset.from_list(calibration + preference_rows(12, seed=5)),
        peft_config=peft,
    )
    trainer.train()
    directory = str(tmp_path / "model")
    trainer.merge_and_save(directory) if kind == "merged" else trainer.save_model(directory)
    expected = trainer.round_history[trainer.kept_round]["temperature"]
    assert expected != 1
    assert SSRMRewardFunction(directory).temperature == load_temperature(directory) == expected


def test_probabilities_are_those_at_the_saved_temperature(llama, held_out, tmp_path):
    model = SSRMRewardFunction(llama)
    assert model.temperature == 1
    model.temperature = 2.5
    rows = held_out.to_list()
    logits = np.subtract(*(model.score([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected")))  # fmt: skip
    metrics = evaluate(model, held_out).metrics["all"]
    assert (
        metrics["log_loss"] == pytest.approx(preference_metrics(logits, 2.5)["log_loss"])
        and metrics["temperature"] == 2.5
    )
    assert "temperature" not in evaluate(llama, held_out).metrics["all"]
    made = label_preferences(model, held_out, str(tmp_path / "labels"))
    np.testing.assert_allclose(made["confidence"], sigmoid(np.array(made["reward_margin"]) / 2.5))
    other = label_preferences(model, held_out, str(tmp_path / "other"), temperature=1.0)
    np.testing.assert_allclose(other["confidence"], sigmoid(np.array(other["reward_margin"])))


def test_judge_uses_it(causal):
    judge = PairwiseJudge(causal())
    pairs = (["2 + 2?"], [("4", "5")])
    logit = judge.logits(*pairs)
    judge.temperature = 3.0
    assert judge.judge(*pairs) == pytest.approx(sigmoid(logit / 3).tolist()) and judge.logits(*pairs) == logit


def test_model_without_a_pool_leaves_no_temperature_of_another(llama, config, labeled, tmp_path):
    save_temperature(str(tmp_path), 2.0)
    SSRMTrainer(llama, config(), train_dataset=labeled).save_model(str(tmp_path))
    assert load_temperature(str(tmp_path)) == 1.0


@pytest.mark.parametrize("content", ["{}", '{"temperature": 0}', '{"temperature": NaN}', "no JSON"])
def test_damaged_file_is_named(tmp_path, content):
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(ValueError, match="calibration.json"):
        load_temperature(str(tmp_path))
    save_temperature(str(tmp_path), 1.5)
    assert json.loads((tmp_path / "calibration.json").read_text()) == {"temperature": 1.5}


@pytest.mark.slow
def test_a_larger_scalar_model_labels_the_pool(llama, bert, config, unlabeled, held_out, tmp_path):
    args = config(output_dir=str(tmp_path / "teacher"), num_rounds=0, num_train_epochs=8)
    teacher = SSRMTrainer(
        llama, args, train_dataset=Dataset.from_list(preference_rows(64, seed=1)), unlabeled_dataset=unlabeled
    )
    teacher.train()
    teacher.save_model(str(tmp_path / "teacher"))
    save_temperature(str(tmp_path / "teacher"), 2.0)
    large = SSRMRewardFunction(str(tmp_path / "teacher"))
    student = SSRMTrainer(
        bert,
        config(output_dir=str(tmp_path / "student"), num_rounds=1, pseudo_label_type="soft", confidence_threshold=0.5),
        train_dataset=Dataset.from_list(preference_rows(8, seed=9)),
        unlabeled_dataset=unlabeled,
        callbacks=[PseudoLabelingCallback(teacher=large)],
    )
    student.train()
    kept = student.run.read_pseudo_labels(1)[0]
    assert len(kept) == len(unlabeled)
    rewards = [large.score(kept["prompt"], kept[side]) for side in ("chosen", "rejected")]
    np.testing.assert_allclose(kept["confidence"], sigmoid(np.subtract(*rewards) / 2), atol=1e-5)
