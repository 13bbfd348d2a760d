"""The linear model on the hidden states, which helps to label the pool."""

import logging

import numpy as np
import pytest
import torch
from conftest import SOFT_ROUND, assert_same_weights, preference_rows, weights_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_ssrm import RoundCallback
from trl_ssrm.models.linear import mean_states
from trl_ssrm.rounds.linear import PENALTIES, fit_to_labels, projection_of
from trl_ssrm.rounds.run_directory import INITIAL, PRETRAINED
from trl_ssrm.scoring.pair_scores import sigmoid


SETTINGS = {**SOFT_ROUND, "pretrain_on_pool": False}


def linear_rewards(model, texts: list[str], tokenizer, weights: torch.Tensor) -> torch.Tensor:
    """The linear rewards of texts, each read alone."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        found.append(mean_states(states, torch.ones_like(ids))[0] @ weights)
    return torch.stack(found)


def test_padding_changes_no_mean():
    torch.manual_seed(0)
    states = tuple(torch.randn(2, 5, 4) for _ in range(5))
    is_token = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = mean_states(states, is_token)
    # A third of four layers is the first, two thirds the second.
    for place, layer in enumerate((1, 2, 4)):
        own = states[layer][0, :3]
        expected = (own / own.norm(dim=-1, keepdim=True)).mean(0)
        assert torch.allclose(found[0, 4 * place : 4 * place + 4], expected, atol=1e-6)


def test_dimensions_in_which_pairs_differ_more_are_penalized_less():
    differences = np.random.default_rng(0).normal(size=(50, 4)) * [1, 4, 16, 64]
    features = differences @ projection_of(differences)
    assert (features**2).sum(1).mean() == pytest.approx(1)
    before, after = (np.linalg.svd(each, compute_uv=False) for each in (differences, features))
    assert after / after[0] == pytest.approx((before / before[0]) ** 1.5)
    assert not projection_of(np.zeros((3, 4))).any()


def test_fit_is_the_best_for_its_penalty_and_parts_of_the_labels_choose_it():
    draw = np.random.default_rng(0)
    direction = draw.normal(size=6)
    features = draw.normal(size=(200, 6))
    # Turned so that the first completion is the preferred one, as the labels have it.
    features *= np.sign(features @ direction + draw.logistic(size=200))[:, None]
    prompts = np.arange(200) // 2
    weights = fit_to_labels(features, np.ones(200), prompts)
    assert np.corrcoef(weights, direction)[0, 1] > 0.95
    # The gradient is zero at one of the penalties.
    pull = features.T @ sigmoid(-(features @ weights))
    assert min(np.abs(pull - penalty * weights).max() for penalty in PENALTIES) < 1e-4
    # Labels that say nothing are fitted by nearly nothing, and ties by nothing at all.
    noise = draw.normal(size=(40, 6))
    assert np.abs(noise @ fit_to_labels(noise, np.ones(40), np.arange(40))).max() < 0.5
    assert np.allclose(fit_to_labels(noise, np.full(40, 0.5), np.arange(40)), 0)


class Unlearned(RoundCallback):
    """Says of round 0 that its predictions on labels it has not seen are no better than 0.5 for every pair."""

    def on_round_end(self, args, state, control, round, facts, **kwargs):
        if round == 0:
            facts["has_learned"] = False


@pytest.mark.slow
@pytest.mark.parametrize("has_learned", [True, False])
def test_pool_is_labeled_by_the_mean_of_both_or_by_the_one_that_has_learned(make_trainer, llama, has_learned):
    trainer = make_trainer(callbacks=[] if has_learned else [Unlearned()], **SETTINGS)
    trainer.train()
    facts = trainer.round_history[0]
    assert (
        facts["accuracy_of_linear_model"] > 0.6
        and facts["log_loss_of_linear_model"] < np.log(2)
        and facts["linear_model_has_learned"]
    )
    assert facts["has_learned"] == has_learned and trainer.linear_model.labels_pool
    pool, _ = trainer.run.read_pseudo_labels(1)
    initial = AutoModelForSequenceClassification.from_pretrained(llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    # The model of round 0 again, to ask it for its own probabilities.
    alone = make_trainer(**{**SETTINGS, "num_rounds": 0, "output_dir": f"{trainer.args.output_dir}-0"})
    alone.train()
    expected = []
    for row in pool.select(range(10)):
        texts = [row["prompt"] + row[name] for name in ("chosen", "rejected")]
        one, other = linear_rewards(initial, texts, tokenizer, trainer.linear_model.weights)
        batch = [torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"]]) for text in texts]
        with torch.no_grad():
            first, second = (alone.model(input_ids=ids).logits.item() for ids in batch)
        both = np.array(
            [(one - other).item() / trainer.linear_model.temperature, (first - second) / facts["temperature"]]
        )
        expected.append(sigmoid(both if has_learned else both[:1]).mean())
    assert pool[:10]["confidence"] == pytest.approx(expected, abs=1e-3)


def test_models_without_a_state_of_each_token_go_without(make_trainer, monkeypatch, caplog, tmp_path):
    plain = make_trainer(**SETTINGS)
    forward = plain.model.forward

    def without_states(*args, output_hidden_states=False, **kwargs):
        return forward(*args, **kwargs)

    plain.model.forward = without_states
    with caplog.at_level(logging.WARNING):
        plain.train()
    assert (
        "gives no hidden state for each token" in caplog.text
        and "accuracy_of_linear_model" not in plain.round_history[0]
    )
    caplog.clear()
    monkeypatch.setattr("trl_ssrm.rounds.settings.MOST_LINEAR_PAIRS", 10)
    other = make_trainer(**SETTINGS, output_dir=str(tmp_path / "other"))
    with caplog.at_level(logging.WARNING):
        other.train()
    assert "there are more than 10 labels" in caplog.text
    assert_same_weights(weights_of(plain.model), weights_of(other.model))


@pytest.mark.parametrize(
    "settings",
    [
        {"pseudo_label_type": "hard", "confidence_threshold": 0.6},
        {"num_folds": 0},
        {"round_init": "continue"},
        {"target_precision": 0.6},
        {"freeze_backbone": True, "pretrain_on_pool": None},
        {"num_rounds": 0},
    ],
)
def test_settings_that_ask_for_something_else_fit_none(make_trainer, settings):
    assert not make_trainer(**{**SETTINGS, **settings}).settings.linear_model_labels_pool


def test_default_fits_one_also_with_labels_to_calibrate(make_trainer, held_out):
    assert make_trainer(**SETTINGS).settings.linear_model_labels_pool
    settings = {**SETTINGS, "num_folds": 0}
    assert make_trainer(calibration_dataset=held_out, **settings).settings.linear_model_labels_pool


@pytest.mark.slow
def test_an_interrupted_run_reads_it_again(make_trainer, monkeypatch):
    rows = preference_rows(16, seed=1)
    whole = make_trainer(train_dataset=rows, **SETTINGS)
    whole.train()
    directory = f"{whole.args.output_dir}-again"
    broken = make_trainer(train_dataset=rows, output_dir=directory, **SETTINGS)
    monkeypatch.setattr(broken.linear_model, "join", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.train()
    # A damaged file is fitted again, from the same weights.
    path = broken.run.linear_path(INITIAL)
    before = [each.clone() for each in broken.run.read_linear(INITIAL)]
    path.write_bytes(path.read_bytes()[:-1])
    resumed = make_trainer(train_dataset=rows, output_dir=directory, **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, resumed.run.read_linear(INITIAL), before))
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))


@pytest.mark.slow
def test_labels_of_the_pool_are_never_read(make_trainer, tmp_path):
    rows = preference_rows(40, seed=2)
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    weights = []
    for number, pool in enumerate((rows, turned)):
        trainer = make_trainer(unlabeled_dataset=pool, output_dir=str(tmp_path / str(number)), **SETTINGS)
        trainer.train()
        assert trainer.round_history[0]["linear_model_has_learned"]
        weights.append(weights_of(trainer.model))
    assert_same_weights(*weights)


@pytest.mark.slow
def test_after_pretraining_there_is_none(make_trainer):
    trainer = make_trainer(**{**SETTINGS, "pretrain_on_pool": True})
    assert not trainer.settings.linear_model_labels_pool
    trainer.train()
    assert trainer.start == PRETRAINED and "accuracy_of_linear_model" not in trainer.round_history[0]
    assert not trainer.linear_model.labels_pool and trainer.termination_reason == "max_rounds"
