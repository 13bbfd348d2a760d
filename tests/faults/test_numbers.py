"""Numbers that no run should meet, and that some run will: a correct run, or one clear sentence."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import preference_rows
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from faults.outcomes import refusal_of
from trl_ssrm import NonFiniteScoreError, PseudoLabelingCallback, SSRMTrainer, write_report
from trl_ssrm.rounds.calibrate import fit_temperature
from trl_ssrm.rounds.callback import RoundCallback
from trl_ssrm.rounds.select import precision_threshold
from trl_ssrm.scoring.metrics import preference_metrics, reliability_curve
from trl_ssrm.scoring.pair_scores import PairScores
from trl_ssrm.scoring.preference import mean_win_probability, pairwise_logits
from trl_ssrm.scoring.score import NonFiniteWeightError


def pairs(num_rows: int, seed: int) -> Dataset:
    return Dataset.from_list(preference_rows(num_rows, seed))


@pytest.fixture
def run(make_trainer):
    """A short run of one round after round 0, all of it changeable."""

    def train(**settings) -> SSRMTrainer:
        data = {"train_dataset": pairs(6, seed=1), "unlabeled_dataset": pairs(12, seed=2)}
        trainer = make_trainer(**{"num_train_epochs": 1, "num_rounds": 1, **data, **settings})
        trainer.train()
        return trainer

    return train


def facts_are_finite(trainer: SSRMTrainer) -> None:
    """Every fact that was kept is a number, to those too who read JSON and take no NaN."""

    def refuse(constant: str):
        raise AssertionError(constant)

    for path in trainer.run.root.rglob("*.json"):
        # Those of checkpoints are written by `Trainer`.
        if "checkpoint-" not in path.parent.name:
            json.loads(path.read_text(), parse_constant=refuse)
    for facts in trainer.round_history:
        assert all(math.isfinite(value) for value in facts.values() if isinstance(value, float)), facts


class Spoil(RoundCallback):
    """Makes the weights of one round NaN or infinite."""

    def __init__(self, round: int, value: float):
        self.spoiled_round, self.value, self.round = round, value, None

    def on_round_begin(self, args, state, control, round, **kwargs):
        self.round = round

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.round == self.spoiled_round:
            with torch.no_grad():
                model.score.weight.fill_(self.value)


@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_end_the_run(run, round, value):
    # In the last round too, after which nothing is scored.
    with pytest.raises(NonFiniteWeightError, match=f"weights of round {round} are NaN or infinite") as raised:
        run(callbacks=[Spoil(round, value)], num_rounds=round)
    refusal_of(raised.value)


def test_learning_rate_that_overflows_ends_the_run(run):
    with pytest.raises((NonFiniteWeightError, NonFiniteScoreError), match="lower `learning_rate`") as raised:
        run(learning_rate=1e38)
    refusal_of(raised.value)


@pytest.mark.parametrize("name", ["eval_dataset", "calibration_dataset", "unlabeled_dataset"])
def test_rewards_that_overflow_are_named_with_their_rows(run, llama, held_out, name):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    rows = preference_rows(6, seed=9)
    rows[2]["chosen"] += "~"

    def overflow(module, args, output):
        # The token is in this row alone.
        return output.masked_fill((args[0] == poison)[..., None], math.inf)

    (poison,) = AutoTokenizer.from_pretrained(llama)("~")["input_ids"]
    model.get_input_embeddings().register_forward_hook(overflow)
    with pytest.raises(NonFiniteScoreError, match=f"rows 2 of `{name}`") as raised:
        run(model=model, **{name: Dataset.from_list(rows)})
    refusal_of(raised.value)


def test_half_precision_that_overflows_ends_the_run(run):
    with pytest.raises((NonFiniteWeightError, NonFiniteScoreError), match="precision") as raised:
        # Adam divides by its epsilon, which half precision has not.
        run(model_init_kwargs={"dtype": "float16"}, learning_rate=10.0)
    refusal_of(raised.value)


@pytest.mark.parametrize("threshold", [0.5, 0.999])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_rewards_far_apart_and_close_together(run, llama, held_out, scale, threshold):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    with torch.no_grad():
        model.score.weight.mul_(scale)
    trainer = run(
        model=model,
        learning_rate=0.0,
        confidence_threshold=threshold,
        calibration_dataset=held_out,
        keep_best_round=False,
    )
    facts_are_finite(trainer)
    # The temperature goes to an end of its range, and the confidence is 1 or one half.
    if scale > 1:
        assert trainer.round_history[1]["kept"] == 12
    else:
        assert trainer.termination_reason == "nothing_selected"


@pytest.mark.parametrize(("scale", "is_lost"), [(1e30, True), (1.0, False)])
def test_steps_lost_to_gradients_that_overflow_are_told(run, llama, held_out, caplog, scale, is_lost):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    with torch.no_grad():
        model.score.weight.mul_(scale)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    # By itself, weight decay would change weights.
    trainer = run(model=model, weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, eval_dataset=held_out)
    told = [record.message for record in caplog.records if "the norm of the gradients overflowed" in record.message]
    assert bool(told) == is_lost
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before) == is_lost
    facts_are_finite(trainer)
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert any(math.isinf(norm) for norm in norms) == is_lost
    stored = [log["grad_norm"] for log in trainer.run.read_round(1)["log_history"] if "grad_norm" in log]
    assert stored == [norm if math.isfinite(norm) else None for norm in norms]
    # Who reads it takes null: the resumed run, with its model card, and the report.
    trainer.train(resume_from_checkpoint=True)
    assert trainer.termination_reason == "max_rounds"
    assert [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log] == stored
    assert "<html" in Path(write_report(str(trainer.args.output_dir))).read_text()


@pytest.mark.parametrize("folds", [0, 2])
def test_equal_rewards_are_ties_and_nothing_is_kept(run, llama, folds):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    with torch.no_grad():
        model.score.weight.zero_()
    trainer = run(model=model, learning_rate=0.0, num_folds=folds, confidence_threshold=0.5)
    assert trainer.termination_reason == "nothing_selected"
    facts_are_finite(trainer)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_folds": None},
        {"confidence_threshold": None},
        {"num_folds": 2},
        {"target_precision": 0.9, "num_folds": 2, "confidence_threshold": None},
        {"preference_model": "pairwise"},
    ],
)
@pytest.mark.parametrize(("num_labeled", "num_unlabeled"), [(1, 3), (3, 1)])
def test_one_labeled_pair_and_a_pool_of_one(request, run, settings, num_labeled, num_unlabeled, tmp_path):
    model = request.getfixturevalue("policy" if settings.get("preference_model") == "pairwise" else "llama")
    if settings.get("preference_model") == "pairwise":
        (tmp_path / "comparison.json").write_text(json.dumps({"labels": ["a", "b"]}))
        settings = {**settings, "comparison": str(tmp_path), "max_length": 2000}
    try:
        trainer = run(
            model=model,
            train_dataset=pairs(num_labeled, seed=1),
            unlabeled_dataset=pairs(num_unlabeled, seed=2),
            **settings,
        )
    except (ValueError, TypeError) as error:
        assert "fold" in refusal_of(error) or "target_precision" in str(error)
        assert num_labeled == 1 or settings.get("target_precision")
    else:
        facts_are_finite(trainer)
        assert trainer.termination_reason


@pytest.mark.parametrize(
    "settings",
    [
        {"track_pseudo_label_accuracy": True},
        {"freeze_backbone": True},
    ],
)
def test_pool_of_one_in_other_ways(run, settings):
    trainer = run(unlabeled_dataset=pairs(1, seed=2), **settings)
    facts_are_finite(trainer)
    assert trainer.termination_reason


def test_pair_whose_confidence_is_one_half_is_not_kept(run, llama):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    with torch.no_grad():
        model.score.weight.mul_(1e-30)
    everything = PseudoLabelingCallback(selection_policy=lambda scores: np.ones(len(scores.logits), dtype=bool))
    trainer = run(model=model, learning_rate=0.0, callbacks=[everything])
    assert trainer.termination_reason == "nothing_selected"


def test_pool_too_small_for_its_shares_is_refused(run):
    with pytest.raises(ValueError, match="`pool_per_round='shard'`") as raised:
        run(unlabeled_dataset=pairs(1, seed=2), pool_per_round="shard", num_rounds=2)
    refusal_of(raised.value)


def test_pool_of_many_rows_of_one_token(run, llama):
    """Two thousand rows; a million where `SSRM_LONG_FAULTS` is set."""
    num_rows = 1_000_000 if os.environ.get("SSRM_LONG_FAULTS") else 2_000
    draw = np.random.default_rng(0).integers(97, 123, size=(num_rows, 2))
    letters = np.array([chr(code) for code in range(128)])
    pool = Dataset.from_dict({"chosen": letters[draw[:, 0]].tolist(), "rejected": letters[draw[:, 1]].tolist()})
    trainer = run(unlabeled_dataset=pool, confidence_threshold=0.5)
    kept = trainer.data.pool
    assert len(kept) == len({frozenset(pair) for pair in draw.tolist() if pair[0] != pair[1]})
    assert len(kept) + sum(kept.dropped.values()) == num_rows
    facts_are_finite(trainer)


def test_scores_of_a_callback_that_are_no_numbers_are_refused(run):
    class Own(PseudoLabelingCallback):
        def score(self, trainer, pool, round):
            logits = np.ones(len(pool))
            logits[3] = math.nan
            return PairScores(logits)

    with pytest.raises(NonFiniteScoreError, match="of `unlabeled_dataset`") as raised:
        run(callbacks=[Own()])
    refusal_of(raised.value)


# ---- The functions of numbers alone ----

EXTREME = [0.0, -0.0, 1e-320, 1e-30, 1.0, 30.0, 40.0, 700.0, 1e4, 1e30, 3e38, 6e38]


@pytest.mark.parametrize("size", [1, 2, 500])
def test_no_size_of_a_logit_makes_a_metric_that_is_no_number(size):
    draw = np.random.default_rng(size)
    for _ in range(20):
        logits = draw.choice(EXTREME, size) * draw.choice([-1, 1], size)
        temperature = fit_temperature(logits, draw.integers(0, 1 + size // 2, size))
        assert 0.1 <= temperature <= 100
        metrics = preference_metrics(logits, temperature)
        assert all(math.isfinite(value) and value >= 0 for value in metrics.values()), metrics
        assert sum(part["count"] for part in reliability_curve(logits, temperature)) == size
        scores = PairScores(logits, temperature)
        assert ((scores.confidence >= 0.5) & (scores.confidence <= 1)).all()
        threshold, _ = precision_threshold(logits, np.arange(size), temperature, 0.9)
        assert threshold is None or 0.5 <= threshold <= 1
        other = draw.choice(EXTREME, size) * draw.choice([-1, 1], size)
        one = pairwise_logits(np.stack([logits, other], axis=1))
        assert np.isfinite(one).all() and np.array_equal(one, -pairwise_logits(np.stack([other, logits], axis=1)))
    wins = mean_win_probability(logits[:1, None] - logits[None, :1])
    assert np.isfinite(wins).all()
