import numpy as np
import pytest

from trl_ssrm.selection import PairScores, above_threshold


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
