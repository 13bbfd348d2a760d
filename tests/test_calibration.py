import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from trl_ssrm.rounds.calibrate import TEMPERATURES, fit_temperature, has_learned
from trl_ssrm.scoring.metrics import (
    adaptive_calibration_error,
    calibrated_metrics,
    calibration_error_floor,
    expected_calibration_error,
    preference_metrics,
    reliability_curve,
)


@pytest.fixture
def logits() -> np.ndarray:
    """Pair logits three times too large for how often they are right."""
    draw = np.random.default_rng(0)
    true_logits = draw.normal(size=20_000) * 2
    sign = np.where(draw.random(20_000) < 1 / (1 + np.exp(-true_logits)), 1, -1)
    return 3 * true_logits * sign


def test_metrics_agree_with_scikit_learn(logits):
    # Half of the pairs are turned round, so that both classes are there.
    half = len(logits) // 2
    first_logits = np.concatenate([logits[:half], -logits[half:]])
    first_is_chosen = np.arange(len(logits)) < half
    probability = 1 / (1 + np.exp(-first_logits))
    metrics = preference_metrics(logits)
    assert metrics["log_loss"] == pytest.approx(log_loss(first_is_chosen, probability), rel=1e-6)
    assert metrics["brier"] == pytest.approx(brier_score_loss(first_is_chosen, probability), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(((probability > 0.5) == first_is_chosen).mean())


def test_tie_counts_as_wrong():
    assert preference_metrics(np.array([0.0, 1.0]))["accuracy"] == 0.5


def test_ece_of_one_bin_is_the_distance_of_confidence_from_accuracy():
    confidence = np.full(10, 0.9)
    assert expected_calibration_error(confidence, np.arange(10) < 6) == pytest.approx(0.3)


def test_ece_does_not_let_bins_cancel():
    confidence = np.array([0.6] * 10 + [1.0] * 10)
    is_correct = np.array([True] * 10 + [True] * 6 + [False] * 4)
    assert expected_calibration_error(confidence, is_correct) == pytest.approx(0.4)


@pytest.mark.parametrize("num_pairs", [100, 1000])
def test_ece_floor_is_that_of_labels_drawn_from_the_confidence(num_pairs):
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.5, 1.0, size=num_pairs)
    drawn = [expected_calibration_error(confidence, draw.random(num_pairs) < confidence) for _ in range(1000)]
    assert calibration_error_floor(confidence) == pytest.approx(np.mean(drawn), rel=0.05)
    assert np.mean(drawn) > 0.02


def fitted(logits: np.ndarray) -> float:
    """The temperature of pairs that have a prompt of their own each."""
    return fit_temperature(logits, np.arange(len(logits)))


def test_temperature_is_recovered(logits):
    assert fitted(logits) == pytest.approx(3.0, rel=0.05)
    assert fitted(logits / 6) == pytest.approx(0.5, rel=0.05)


def test_fitted_temperature_has_the_lowest_log_loss(logits):
    best = fitted(logits)
    losses = [preference_metrics(logits, temperature)["log_loss"] for temperature in (best, 0.96 * best, 1.04 * best)]
    assert losses[0] == min(losses)


def test_few_pairs_move_the_temperature_by_little(logits):
    def error(temperatures: list[float]) -> float:
        return float(np.mean(np.abs(np.log(np.array(temperatures) / 1.5))))

    few = [logits[start : start + 20] / 2 for start in range(0, 2000, 20)]
    most_likely = [min(TEMPERATURES, key=lambda t: preference_metrics(part, t)["log_loss"]) for part in few]
    assert error([fitted(part) for part in few]) < error(most_likely)
    # From 1 towards what they ask for, and no further.
    for part, wanted in zip(few, most_likely, strict=True):
        assert min(1, wanted) - 0.01 <= fitted(part) <= max(1, wanted) + 0.01


def test_each_prompt_counts_once(logits):
    part = logits[:30]
    pairs, prompts = np.repeat(part, 4), np.repeat(np.arange(30), 4)
    assert fit_temperature(pairs, prompts) == fitted(part) != fitted(pairs)


def test_temperature_stays_near_1_where_every_pair_is_right_or_wrong():
    assert 0.3 < fitted(np.array([0.1, 2.0, 3.0])) < 1
    assert 1 < fitted(np.array([-5.0, -4.0, 0.1])) < 10


def test_adaptive_ece_has_bins_of_as_many_pairs_each():
    # All confidences in one bin of equal width, where the errors cancel; half of them too sure, half not sure enough.
    confidence = np.linspace(0.94, 0.99, 3000)
    is_correct = np.arange(3000) >= 150
    assert expected_calibration_error(confidence, is_correct) < 0.02
    gaps = [abs(np.mean(c - k)) for c, k in zip(np.split(confidence, 15), np.split(is_correct, 15), strict=True)]
    assert adaptive_calibration_error(confidence, is_correct) == pytest.approx(np.mean(gaps))
    assert adaptive_calibration_error(confidence, is_correct) > 0.05


def test_pairs_of_one_confidence_share_a_bin():
    assert adaptive_calibration_error(np.full(100, 0.75), np.arange(100) < 75) == pytest.approx(0.0, abs=1e-12)


def test_reliability_curve_is_what_ece_sums_up(logits):
    curve = reliability_curve(logits)
    total = sum(point["count"] * abs(point["confidence"] - point["accuracy"]) for point in curve)
    assert total / len(logits) == pytest.approx(preference_metrics(logits)["ece"])
    assert [point["confidence"] for point in curve] == sorted(point["confidence"] for point in curve)
    after = reliability_curve(logits, 3.0)
    assert max(abs(point["confidence"] - point["accuracy"]) for point in after) < 0.05


def test_calibrated_metrics_are_those_at_the_temperature(logits):
    assert calibrated_metrics(logits, 3.0)["calibrated_ece"] == preference_metrics(logits, 3.0)["ece"] < 0.01


def test_predictions_have_to_beat_a_coin_by_a_hundredth():
    # At their best temperature, 57 right ones of 100 are .0098 better than a coin, and 58 are .0129 better.
    for right, learned in ((57, False), (58, True), (40, False)):
        assert has_learned(np.repeat([3.0, -3.0], [right, 100 - right])) == learned
