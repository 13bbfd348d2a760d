import math

import numpy as np
import pytest

from trl_ssrm.reporting.verdict import round_line, verdict
from trl_ssrm.rounds.calibrate import changes
from trl_ssrm.scoring.metrics import paired_change, standard_error


def history(accuracy_change: float, log_loss_change: float, error: float = 0.01) -> list[dict]:
    """Round 0 and a round with these changes on 400 held-out pairs."""
    first = {"round": 0, "eval_accuracy": 0.65, "eval_log_loss": 0.7, "eval_pairs": 400, "num_train_pairs": 96}
    last = {
        **{
            "round": 1,
            "eval_accuracy": 0.65 + accuracy_change,
            "eval_log_loss": 0.7 + log_loss_change,
            "eval_pairs": 400,
        },
        **{"eval_accuracy_change": accuracy_change, "eval_accuracy_change_error": error},
        **{"eval_log_loss_change": log_loss_change, "eval_log_loss_change_error": error},
    }
    return [first, last]


@pytest.mark.parametrize(
    ("changed", "opening", "advice"),
    [
        ((0.05, -0.1), "The pseudo-labels helped: accuracy 0.650 to 0.700 (+0.050 ± 0.020), log-loss 0.700 to 0.600 (−0.100 ± 0.020)", "larger pool"),
        ((0.01, -0.1), "The pseudo-labels helped", "larger pool"),
        ((0.01, -0.01), "The pseudo-labels made no difference that these pairs can show", "label more pairs"),
        ((-0.05, 0.0), "The pseudo-labels did harm", "go back to round 0"),
        ((0.05, 0.4), "The pseudo-labels raised the accuracy and made the probabilities worse", "pseudo_label_type='soft'"),
    ],
)  # fmt: skip
def test_first_sentence_says_whether_the_pool_helped(changed, opening, advice):
    words = verdict(history(*changed), "max_rounds", 1)
    assert words[0].startswith(opening) and words[0].endswith("on 400 held-out pairs (`eval_dataset`).")
    assert words[1] == "Round 1 was the last one; the model is from round 1." and advice in words[-1]


def test_kept_round_is_named_with_the_reason():
    words = verdict(history(-0.05, 0.1), "max_rounds", 0)
    assert words[0] == (
        "The model has learned from the labels alone: accuracy 0.650 and log-loss 0.700 on 400 held-out pairs (`eval_dataset`)."
    )
    assert words[1] == (
        "Round 1 was the last one; round 0 had the lowest log-loss on `calibration_dataset`, so the model is from round 0, "
        "which was trained on the 96 labels."
    )


def test_without_held_out_pairs_nothing_is_claimed():
    first = {
        "round": 0,
        "num_train_pairs": 96,
        "cross_fit_accuracy": 0.7,
        "pretraining_share_right": 0.4,
        "is_pretrained": False,
    }
    words = verdict([first, {"round": 1}], "max_rounds", 1)
    assert "is not known" in words[0] and "`eval_dataset`" in words[-1]
    assert words[1] == (
        "Pretraining on the texts of the pool was not used: before it had seen a label, the model ranked 40 % of the labeled pairs "
        "right."
    )


@pytest.mark.parametrize(
    ("after", "opening"),
    [
        (0.44, "was used: "),
        (0.595, "was not used, since the labels say too little for it (odds of 1.5 to 1, and 7.4 to 1 are needed): "),
    ],
)
def test_gain_of_pretraining_has_an_interval(after, opening):
    facts = {"pretraining_share_right": 0.7, "is_pretrained": after < 0.5, "pretraining_evidence": 0.4}
    facts["pretraining_least_evidence"] = 2.0
    facts |= {"accuracy_without_pretraining": 0.6, "accuracy_with_pretraining": 0.75}
    facts |= {"log_loss_without_pretraining": 0.6, "log_loss_with_pretraining": after}
    facts |= {"pretraining_accuracy_change_error": 0.05, "pretraining_log_loss_change_error": 0.1}
    first, last = history(0.05, -0.1)
    words = verdict([{**first, **facts}, last], "max_rounds", 1)[1]
    assert words == (
        f"Pretraining on the texts of the pool {opening}accuracy 0.600 to 0.750 (+0.150 ± 0.098), log-loss 0.600 to {after:.3f} "
        f"(−{0.6 - after:.3f} ± 0.196), on the labels, by models that have not seen them."
    )


def test_what_the_labels_can_confirm_is_said_where_nothing_was_selected():
    first = {**history(0, 0)[0], "highest_precision": 0.86, "target_precision": 0.9}
    words = " ".join(verdict([first], "nothing_selected", 0))
    assert "precision that the held-out labels can confirm is 0.860, and `target_precision` asks for 0.900" in words
    assert "Set it to 0.86, or give more labels." in words
    words = " ".join(verdict([{**first, "labels_needed": 240}], "nothing_selected", 0))
    assert "Set it to 0.86, or give about 240 labels in all." in words
    assert "Lower `confidence_threshold`" in " ".join(verdict(history(0, 0)[:1], "nothing_selected", 0))


def test_labels_that_taught_nothing_are_named():
    words = " ".join(verdict(history(0, 0)[:1], "nothing_learned", 0))
    assert (
        "After round 0 the predictions on labels that the model had not seen were no better than 0.5 for every pair (their "
        "log-loss was less than 0.01 lower), so the pool was not labeled; the model is from round 0" in words
    )


def test_round_is_one_line():
    assert round_line(history(0.05, -0.1)[:1]) == (
        "Round 0: accuracy 0.650, log-loss 0.700, on 400 held-out pairs (`eval_dataset`)"
    )
    assert round_line(history(0.05, -0.1)) == (
        "Round 1: accuracy 0.650 to 0.700 (+0.050 ± 0.020), log-loss 0.700 to 0.600 (−0.100 ± 0.020), against the labels "
        "alone, on 400 held-out pairs (`eval_dataset`)"
    )
    folds = {"round": 0, "cross_fit_accuracy": 0.6, "cross_fit_log_loss": 0.65, "cross_fit_pairs": 96}
    assert round_line([folds]) == "Round 0: accuracy 0.600, log-loss 0.650, on 96 labels, by fold models"
    assert "nothing is held out" in round_line([{"round": 0, "num_train_pairs": 96}])


def test_changes_are_paired(caplog):
    # Of 100 pairs, 10 become right and 2 wrong: 8 more, with the standard error of 12 pairs that have changed.
    before = np.array([1.0] * 80 + [-1.0] * 20)
    after = before.copy()
    after[80:90], after[:2] = 1.0, -1.0
    each = np.arange(100)
    facts = paired_change(after, before, each)
    assert facts["accuracy_change"] == pytest.approx(0.08)
    assert facts["accuracy_change_error"] == pytest.approx(np.sqrt((0.12 - 0.08**2) / 99))
    assert facts["log_loss_change"] == pytest.approx(-0.08)
    found = changes({"eval": after, "new": after}, {"eval": before}, {"eval": each}, (1.0, 1.0), 1)
    assert found == {f"eval_{name}": value for name, value in facts.items()} and not caplog.text
    changes({"eval": before}, {"eval": after}, {"eval": each}, (1.0, 1.0), 1)
    assert "Round 1 is worse than round 0 on `eval_dataset`: accuracy -0.080" in caplog.text


@pytest.mark.parametrize("temperatures", [(1.0, 4.0), (1.0, 0.25)])
def test_log_loss_is_that_with_or_without_the_temperature(temperatures):
    logits, each = np.array([4.0] * 70 + [-4.0] * 30), np.arange(100)
    # The same predictions, and a temperature that mends those of round 0, or makes them worse.
    found = changes({"eval": logits}, {"eval": logits}, {"eval": each}, temperatures, 1)
    raw, calibrated = (np.logaddexp(0.0, -logits / temperature).mean() for temperature in temperatures)
    lower = min(raw, calibrated)
    assert found["eval_log_loss_change"] == pytest.approx(raw - lower) and found["eval_accuracy_change"] == 0
    first, last = history(0.0, raw - lower)
    first |= {"eval_accuracy": 0.7, "eval_log_loss": raw, "eval_calibrated_log_loss": calibrated}
    last |= {"eval_accuracy": 0.7, "eval_log_loss": raw}
    assert f"log-loss {lower:.3f} to {raw:.3f} (+{raw - lower:.3f} ± " in verdict([first, last], "max_rounds", 1)[0]
    assert f"log-loss {lower:.3f}, on" in round_line([first])


def test_pairs_of_one_prompt_count_together():
    draw = np.random.default_rng(0)
    means = []
    for _ in range(2000):
        # 30 prompts with 1 to 5 pairs, whose values differ by prompt and a little by pair.
        prompts = np.repeat(np.arange(30), draw.integers(1, 6, size=30))
        values = draw.normal(size=30)[prompts] + 0.3 * draw.normal(size=len(prompts))
        means.append((values.mean(), standard_error(values, prompts), standard_error(values, np.arange(len(values)))))
    mean, error, error_by_pair = np.array(means).T
    assert np.sqrt((error**2).mean()) == pytest.approx(mean.std(), rel=0.05)
    assert np.sqrt((error_by_pair**2).mean()) < 0.7 * mean.std()
    # One prompt for all says nothing about which pairs belong together, and two say little: whose sums are equal by chance.
    by_pair = pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
    assert standard_error(values, np.zeros(len(values))) == by_pair
    assert standard_error(values - values.mean(), np.arange(len(values)) // (len(values) - 1)) >= by_pair.expected
    balanced = np.array([1.0, -1.0, 1.0, -1.0])
    assert standard_error(balanced, np.array([0, 0, 1, 1])) == standard_error(balanced, np.arange(4)) > 0
    assert standard_error(values[:1], np.zeros(1)) == math.inf


def test_a_single_held_out_pair_shows_nothing():
    # JSON has no infinity, so a run that is read again has none.
    for error in (math.inf, None):
        words = verdict(history(0.0, -0.1, error=error), "max_rounds", 1)
        assert words[0].startswith("The pseudo-labels made no difference") and "(−0.100 ± inf)" in words[0]


def test_a_linear_model_that_helped_is_named_with_what_it_knows():
    first, last = history(0.05, -0.1)
    facts = {"accuracy_of_linear_model": 0.62, "log_loss_of_linear_model": 0.655, "linear_model_has_learned": True}
    sentence = (
        "A linear model on the hidden states helped to label the pool: accuracy 0.620 and log-loss 0.655 on the labels, each by a "
        "model that was fitted without it."
    )
    assert verdict([{**first, **facts}, last], "max_rounds", 1)[1] == sentence
    assert sentence not in verdict([{**first, **facts, "linear_model_has_learned": False}, last], "max_rounds", 1)
    # Nothing was labeled.
    assert sentence not in verdict([{**first, **facts}], "callback", 0)
