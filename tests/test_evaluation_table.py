import numpy as np
import pytest
from scipy.stats import binomtest

from trl_ssrm import Evaluation, evaluation_table
from trl_ssrm.evaluation.table import sign_test


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (3, 3), (1, 9), (40, 12), (5200, 4800)])
def test_p_value_is_that_of_the_exact_binomial_test(won, lost):
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert sign_test(won, lost) == pytest.approx(expected, rel=1e-8)


def made_up(model: str, outcomes: list[float], **settings) -> Evaluation:
    defaults = {
        "benchmark": "preferences",
        "metrics": {"all": {"num_rows": len(outcomes), "accuracy": float(np.mean(outcomes)), "not_judged": 0}},
        "prompts": list(range(len(outcomes))),
        "strata": ["all"] * len(outcomes),
        "stratum_weights": {"all": 1.0},
        "rows_hash": "same",
    }
    return Evaluation(model=model, outcomes=outcomes, **{**defaults, **settings})


def test_models_on_the_same_rows_are_tested_against_each_other():
    one, other = [1.0] * 90 + [0.0] * 10, [1.0] * 70 + [0.0] * 25 + [1.0] * 5
    table = evaluation_table([made_up("one", one), made_up("o|ther", other)])
    assert table.splitlines()[:4] == [
        "| Model | Pairs | Accuracy |",
        "| --- | ---: | ---: |",
        "| one | 100 | 0.900 |",
        "| o\\|ther | 100 | 0.750 |",
    ]
    line = table.splitlines()[-1].split(" | ")
    # 20 prompts are right with the one alone, 5 with the other alone.
    assert line[:2] == ["| one over o\\|ther", "+0.150"] and line[3:5] == ["20 prompts", "5 prompts"]
    assert line[5] == f"{binomtest(5, 25).pvalue:.2g} |"
    low, high = map(float, line[2].split(" to "))
    # Of a mean of 20 ones, 5 minus ones and 75 zeros.
    half = 1.96 * np.std(np.array(one) - np.array(other)) / 10
    assert (low, high) == pytest.approx((0.15 - half, 0.15 + half), abs=0.015)


def test_rows_with_the_same_prompt_are_one_case():
    outcomes = [1.0] * 8 + [0.0] * 2
    prompts = [0] * 8 + [1] * 2
    line = evaluation_table([made_up("one", outcomes, prompts=prompts), made_up("two", [0.0] * 10, prompts=prompts)])
    assert line.splitlines()[-1].split(" | ")[3:] == ["1 prompts", "0 prompts", "1 |"]


def test_with_one_prompt_for_all_rows_are_what_may_differ():
    outcomes = [1.0] * 70 + [0.0] * 30
    one = made_up("one", outcomes, prompts=[0] * 100, strata=["x"] * 100, stratum_weights={"x": 1.0})
    other = made_up("two", [1.0] * 40 + [0.0] * 60, prompts=[0] * 100, strata=["x"] * 100, stratum_weights={"x": 1.0})
    low, high = map(float, evaluation_table([one, other]).splitlines()[-1].split(" | ")[2].split(" to "))
    assert low == pytest.approx(0.3 - 0.09, abs=0.02) and high == pytest.approx(0.3 + 0.09, abs=0.02)


def test_difference_weighs_the_parts_as_the_benchmark_does():
    strata = {"strata": ["x"] * 2 + ["y"] * 8, "stratum_weights": {"x": 0.75, "y": 0.25}}
    one, other = made_up("one", [1.0] * 2 + [0.0] * 8, **strata), made_up("two", [0.0] * 10, **strata)
    line = evaluation_table([one, other]).splitlines()[-1]
    # Resampled within each part, nothing can vary here.
    assert "| +0.750 | +0.750 to +0.750 |" in line


def test_several_benchmarks_have_one_table_first():
    outcomes = [1.0] * 60 + [0.0] * 40
    metrics = {"all": {"num_rows": 100, "accuracy": 0.6, "score": 0.65, "not_judged": 0}}
    models = [made_up("one", outcomes), made_up("one", outcomes, benchmark="rewardbench", metrics=metrics)]
    table = evaluation_table([*models, made_up("two", outcomes)])
    assert table.splitlines()[0] == "| Model | preferences | rewardbench |"
    cells = table.splitlines()[2].split(" | ")
    low, high = map(float, cells[1][7:-1].split("–"))
    # Of a mean of 60 ones and 40 zeros.
    half = 1.96 * np.std(outcomes) / 10
    assert cells[1].startswith("0.600 (") and (low, high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.015)
    assert cells[2].startswith("0.650 (0.5") and table.splitlines()[3].endswith("| – |")


def test_two_files_of_one_benchmark_are_both_in_the_table():
    rmb = [made_up("one", [share] * 4, benchmark="rmb") for share in (1.0, 0.0)]
    cell = evaluation_table([*rmb, made_up("one", [1.0])]).splitlines()[2].split(" | ")[1]
    assert cell == "1.000 (1.000–1.000) / 0.000 (0.000–0.000)"


def test_table_in_html_is_that_in_markdown():
    one, other = made_up("<one>", [1.0, 0.0]), made_up("two", [0.0, 0.0], rows_hash="else")
    page = evaluation_table([one, other], "html")
    assert "<th>Model</th>" in page and "<td>&lt;one&gt;</td>" in page and "<one>" not in page
    assert page.count("<tr>") == 3 and "<p>&lt;one&gt; and two were evaluated on different rows" in page
    with pytest.raises(ValueError, match="`format` must be 'markdown' or 'html', got 'latex'"):
        evaluation_table([one], "latex")
