import numpy as np
import pytest

from trl_ssrm import PairScores
from trl_ssrm.rounds.select import (
    above_threshold,
    candidates,
    labels_needed,
    precision_threshold,
    wilson_lower_bound,
)


def test_confidence_is_the_larger_probability_to_the_bit():
    scores = PairScores(np.random.default_rng(0).normal(size=1000) * 5, temperature=1.7)
    assert np.array_equal(scores.confidence, np.maximum(scores.probability, 1 - scores.probability))


def test_exchanging_the_completions_keeps_the_confidence_to_the_bit():
    logits = np.random.default_rng(0).normal(size=1000) * 5
    one, other = PairScores(logits), PairScores(-logits)
    assert np.array_equal(one.confidence, other.confidence)
    assert np.array_equal(one.probability, 1 - other.probability)


def test_threshold_is_exceeded_strictly():
    logits = np.array([0.0, 1.0, -1.0, 2.0])
    at_one = PairScores(logits).confidence[1]
    assert above_threshold(PairScores(logits), at_one).tolist() == [False, False, False, True]
    assert above_threshold(PairScores(logits), np.nextafter(at_one, 0)).tolist() == [False, True, True, True]


def test_tie_is_never_kept():
    assert not above_threshold(PairScores(np.zeros(3)), 0.5).any()


def test_temperature_lowers_confidence():
    logits = np.array([2.0])
    assert PairScores(logits, temperature=4.0).confidence == pytest.approx(1 / (1 + np.exp(-0.5)))


def test_extreme_logits_give_no_warning_and_no_nan():
    with np.errstate(all="raise", under="ignore"):
        assert PairScores(np.array([1e6, -1e6])).probability.tolist() == [1.0, 0.0]


def test_lower_bound_is_that_of_the_published_interval():
    # By hand: (0.9 + 2.7055 / 40 - 1.64485 * sqrt(0.0045 + 2.7055 / 1600)) / (1 + 2.7055 / 20).
    assert wilson_lower_bound(np.array([18]), np.array([20]))[0] == pytest.approx(0.7384, abs=5e-4)
    assert wilson_lower_bound(np.array([0, 0]), np.array([0, 5])).tolist() == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.parametrize(("num_pairs", "target", "reaches"), [(51, 0.95, False), (52, 0.95, True), (268, 0.99, True)])
def test_how_many_labels_a_target_takes(num_pairs, target, reaches):
    threshold, _ = precision_threshold(np.linspace(0.1, 5, num_pairs), np.arange(num_pairs), 1.0, target)
    assert threshold == (0.5 if reaches else None)


def test_how_many_labels_would_confirm_a_target():
    # All of 40 are right: as many as in the test above. Of 100 equally sure ones, 90 are right: 2.7055 * .85 * .15 / .05².
    assert labels_needed(np.linspace(0.1, 5, 40), np.arange(40), 1.0, 0.95) == 52
    logits = np.repeat([1.0, -1.0], [90, 10])
    assert labels_needed(logits, np.arange(100), 1.0, 0.85) == 138
    assert labels_needed(logits, np.arange(100), 1.0, 0.9) is None


def test_more_pairs_of_a_prompt_confirm_nothing_more():
    logits, prompts = np.repeat(np.linspace(0.1, 5, 51), 4), np.repeat(np.arange(51), 4)
    threshold, highest = precision_threshold(logits, prompts, 1.0, 0.95)
    assert threshold is None
    assert highest == precision_threshold(logits[::4], prompts[::4], 1.0, 0.95)[1] < 0.95
    # 51.4 prompts, with 4 pairs each.
    assert labels_needed(logits, prompts, 1.0, 0.95) == 206


def test_pseudo_labels_above_the_threshold_are_right_as_often_as_wanted():
    draw = np.random.default_rng(0)
    strength = np.abs(draw.normal(size=40_000)) * 2
    logits = np.where(draw.random(40_000) < 1 / (1 + np.exp(-strength)), strength, -strength)
    # Twice as sure as it should be: the threshold is not fooled, since it counts.
    held_out, pool = np.split(logits * 2, [2_000])
    for target in (0.8, 0.9, 0.95):
        threshold, _ = precision_threshold(held_out, np.arange(2_000), 1.0, target)
        kept = above_threshold(PairScores(pool), threshold)
        precision = (pool[kept] > 0).mean()
        assert target - 0.005 < precision < target + 0.03
        # It is the lowest one.
        lower = np.sort(PairScores(held_out).confidence)
        lower = lower[lower < threshold]
        bounds = []
        for each in lower:
            right = held_out[PairScores(held_out).confidence > each] > 0
            bounds.append(wilson_lower_bound(np.array([right.sum()]), np.array([len(right)]))[0])
        assert max(bounds) < target


def test_ties_can_have_no_label():
    assert candidates(PairScores(np.array([0.0, 1.0, -2.0, 1e-17]))).tolist() == [False, True, True, False]
