import numpy as np
import pytest
from scipy.stats import binomtest

from trl_ssrm.evaluation.benchmarks import (
    REWARDBENCH_SECTIONS,
    best_is_right,
    final_score,
    rm_bench_levels,
    section_scores,
)
from trl_ssrm.evaluation.evaluate import independent_count, wilson_interval


# Accuracies of a model that does not exist.
TABLE = {
    # 100 * 1 + 95 * .8 + 95 * .6 + 28 * .5 + 40 * .75 = 277 of 358
    **{"alpacaeval-easy": 1.0, "alpacaeval-length": 0.8, "alpacaeval-hard": 0.6},
    **{"mt-bench-easy": 0.5, "mt-bench-med": 0.75},
    # 37 * 0 + 100 * .5 + 134 * .5 + 92 * .25 + 47 * 1 + 46 * .5 = 210 of 456
    **{"mt-bench-hard": 0.0, "llmbar-natural": 0.5, "llmbar-adver-neighbor": 0.5, "llmbar-adver-GPTInst": 0.25},
    **{"llmbar-adver-GPTOut": 1.0, "llmbar-adver-manual": 0.5},
    # 100 * .9 + 100 * .8 + 154 * .5 + 250 * .6 + 136 * .25 = 431 of 740
    **{"refusals-dangerous": 0.9, "refusals-offensive": 0.8, "xstest-should-refuse": 0.5},
    **{"xstest-should-respond": 0.6, "donotanswer": 0.25},
    # Mathematics .5, and code (.75 + .5 + 1 + .25 + 1 + 0) / 6 = 7 / 12; both count half: 13 / 24
    **{
        "math-prm": 0.5,
        "hep-cpp": 0.75,
        "hep-go": 0.5,
        "hep-java": 1.0,
        "hep-js": 0.25,
        "hep-python": 1.0,
        "hep-rust": 0.0,
    },
}
SECTIONS = {"Chat": 277 / 358, "Chat Hard": 210 / 456, "Safety": 431 / 740, "Reasoning": 13 / 24}


def test_scores_of_rewardbench_are_those_worked_out_by_hand():
    assert len(TABLE) == 23
    assert section_scores(TABLE) == pytest.approx(SECTIONS)
    # .773743 + .460526 + .582432 + .541667 = 2.358368
    assert final_score(section_scores(TABLE)) == pytest.approx(2.358368 / 4, abs=1e-6)
    # (.6 + .8 + .5 + .7) / 4 = .65, of which half counts: (2.358368 + .325) / 4.5
    prior = {"anthropic_helpful": 0.6, "anthropic_hhh": 0.8, "shp": 0.5, "summarize": 0.7}
    assert section_scores(TABLE | prior) == pytest.approx(SECTIONS | {"Prior Sets": 0.65})
    assert final_score(section_scores(TABLE | prior)) == pytest.approx(2.683368 / 4.5, abs=1e-6)


@pytest.mark.parametrize(
    ("sections", "score"),
    # Of the leaderboard in May 2024: ArmoRM-Llama3-8B-v0.1 and pair-preference-model-LLaMA3-8B, as
    # https://github.com/RLHFlow/RLHF-Reward-Modeling quotes it.
    [((96.9, 76.8, 92.2, 97.3, 74.3), 89.0), ((98.3, 65.8, 89.7, 94.7, 74.6), 85.7)],
)
def test_scores_of_rewardbench_are_those_published(sections, score):
    assert round(final_score(dict(zip(REWARDBENCH_SECTIONS, sections, strict=True))), 1) == score


def test_levels_of_rm_bench_are_the_triangles_of_the_matrix():
    # Chosen completions by row, from plain to ornate, against rejected ones by column.
    one = [[1, -1, -1], [1, 1, -1], [1, 1, -1]]
    other = [[1, 1, -1], [-1, 1, -1], [1, -1, 1]]
    levels = rm_bench_levels(np.array([one, other]).reshape(2, 9))
    # Easy lies below the diagonal: 3 and 1 of 3. Normal on it: 2 and 3 of 3. Hard above: 0 and 1 of 3.
    assert levels == pytest.approx({"easy": 4 / 6, "normal": 5 / 6, "hard": 1 / 6})


def test_ties_for_the_best_share_it():
    # Pairs in order: 01, 02, 12. The first two are equal, and better than the third.
    assert best_is_right(np.array([0.0, 2.0, 2.0]), [True, False, False]) == (0.5, True)
    # The second could not be compared with anything, so it is not the best.
    assert best_is_right(np.array([np.nan, 1.0, np.nan]), [True, False, False]) == (1.0, False)
    # Not even where the others are equal.
    assert best_is_right(np.array([np.nan, 0.0, np.nan]), [True, True, False]) == (0.5, True)
    assert best_is_right(np.array([-1.0, 1.0, 1.0]), [True, False, False]) == (0.0, False)


def test_rows_of_one_prompt_count_together():
    outcomes, prompts = np.array([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), np.arange(8)
    assert independent_count(outcomes, prompts) == 8
    # Two rows of each prompt, with the same outcome: as much as 4 rows, but for the degrees of freedom.
    assert independent_count(outcomes, prompts // 2) == pytest.approx(8 * 3 / 7)
    # Rows that balance each other within a prompt are no less than rows.
    assert independent_count(outcomes, prompts % 2) == 8
    assert independent_count(np.ones(8), prompts // 2) == 4
    assert independent_count(outcomes, np.zeros(8)) == 8
    assert independent_count(outcomes[:1], prompts[:1]) == 1


@pytest.mark.parametrize("count", [1, 20, 500])
def test_interval_is_that_of_wilson(count):
    for right in {0, count // 3, count}:
        expected = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson_interval(right, count) == pytest.approx((expected.low, expected.high), abs=1e-9)
