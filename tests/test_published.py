"""Benchmarks in their published form, on models whose order of some completions is known."""

import shutil

import numpy as np
import pytest
from conftest import preference_rows
from datasets import Dataset
from transformers import AutoTokenizer

from trl_ssrm import PairwiseJudge, SSRMRewardFunction, evaluate, evaluation_table
from trl_ssrm.cli.main import main
from trl_ssrm.evaluation.published import ties_score


PROMPT = "Say it: "


def run(model, rows: list[dict], benchmark: str, **settings) -> dict[str, dict[str, float]]:
    return evaluate(model, Dataset.from_list(rows), benchmark, disable_tqdm=True, **settings).metrics


@pytest.fixture(scope="module")
def ranked(llama) -> list[str]:
    """Completions of the prompt, the one that the model likes best first."""
    assert AutoTokenizer.from_pretrained(llama).chat_template is not None
    texts = [f"{row['chosen']} {number}" for number, row in enumerate(preference_rows(8, seed=3))]
    prompt = [[{"role": "user", "content": PROMPT}]] * len(texts)
    rewards = SSRMRewardFunction(llama).score(prompt, [[{"role": "assistant", "content": text}] for text in texts])
    assert len(set(rewards.tolist())) == len(texts)
    return [texts[place] for place in np.argsort(-rewards)]


# ---- RewardBench 2 ----


def rewardbench_2_row(subset: str, chosen: list[str], rejected: list[str], row_id: str = "1") -> dict:
    return {"id": row_id, "prompt": PROMPT, "chosen": chosen, "rejected": rejected, "subset": subset}


def test_final_score_of_rewardbench_2_is_the_mean_of_its_six_parts(llama, ranked):
    right = {"chosen": ranked[:1], "rejected": ranked[1:4]}
    wrong = {"chosen": ranked[1:2], "rejected": [ranked[0], *ranked[2:4]]}
    parts = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    rows = [rewardbench_2_row(part, **right) for part in parts] + [rewardbench_2_row("Math", **wrong)]
    # Two prompts with one right answer, of which one is found, and the second one with two right answers, both found.
    rows.append(rewardbench_2_row("Ties", ranked[2:3], ranked[3:5], "ref:1"))
    rows.append(rewardbench_2_row("Ties", ranked[4:5], ranked[5:6] + ranked[:1], "ref:2"))
    rows.append(rewardbench_2_row("Ties", ranked[:2], ranked[7:], "tied:3"))
    metrics = run(llama, rows, "rewardbench_2")
    assert [metrics[part]["accuracy"] for part in parts] == [1, 1, 0.5, 1, 1]
    # No prompt is there in both kinds: 0.3 * 1/2 + 0.3 * 1.
    assert metrics["Ties"]["accuracy"] == pytest.approx(2 / 3) and metrics["Ties"]["score"] == pytest.approx(0.45)
    assert metrics["all"]["score"] == pytest.approx((4 + 0.5 + 0.45) / 6)
    assert metrics["all"]["num_rows"] == 9
    table = evaluation_table([evaluate(llama, Dataset.from_list(rows), benchmark="rewardbench_2", disable_tqdm=True)])
    assert any(line.startswith("| Ties | 3 | 0.450") for line in table.splitlines())
    few = run(llama, rows[:5], "rewardbench_2")
    assert "score" not in few["all"] and few["all"]["accuracy"] == 1


def test_parts_of_rewardbench_2_can_not_be_replaced():
    rows = Dataset.from_list([rewardbench_2_row("Math", ["a"], ["b"])])
    with pytest.raises(ValueError, match="`subset_column` can't be combined with 'rewardbench_2'"):
        evaluate("no-such-model", rows, benchmark="rewardbench_2", subset_column="subset")


def test_score_of_ties_is_the_published_one():
    # Rewards 5, 4 | 1, 0: the right answers are 1 apart, and 3 above the best wrong one. With one right answer: 2 above.
    tied = np.array([1.0, 4.0, 5.0, 3.0, 4.0, 1.0])
    ids, is_right = ["ref:7", "tied:7"], [[True, False], [True, True, False, False]]
    expected = 0.3 + 0.3 + 0.2 + 0.2 + 0.01 * np.tanh(2 / 1 - 1)
    assert ties_score(ids, [np.array([2.0]), tied], is_right) == pytest.approx(expected)
    # Half above: the last two parts of .2 ask for a gap larger than the distance of the right answers, and one has it.
    expected = 0.3 + 0.3 + 0.2 + 0.01 * np.tanh(0.5 / 1 - 1)
    assert ties_score(ids, [np.array([0.5]), tied], is_right) == pytest.approx(expected)
    assert ties_score(ids, [np.array([-2.0]), -tied], is_right) == pytest.approx(0.01 * np.tanh(-5 / 1 - 1))
    assert ties_score(ids[:1], [np.array([2.0])], is_right[:1]) == pytest.approx(0.3)


def test_completions_of_equal_reward_share_the_point_of_rewardbench_2(llama, ranked):
    metrics = run(llama, [rewardbench_2_row("Math", ranked[:1], [ranked[0], *ranked[1:3]])], "rewardbench_2")
    assert metrics["Math"] == {**metrics["Math"], "accuracy": 0.5, "ties": 1}


# ---- Pairs ----


def judgebench_row(source: str, better: str, worse: str, label: str) -> dict:
    first, second = (better, worse) if label == "A>B" else (worse, better)
    return {"question": PROMPT, "response_A": first, "response_B": second, "label": label, "source": source}


def test_domains_of_judgebench_are_those_of_its_sources(llama, ranked):
    rows = [
        judgebench_row("mmlu-pro-math", ranked[0], ranked[1], "A>B"),
        judgebench_row("mmlu-pro-law", ranked[2], ranked[1], "B>A"),
        judgebench_row("livebench-reasoning", ranked[1], ranked[3], "B>A"),
        judgebench_row("livebench-math", ranked[4], ranked[3], "A>B"),
        judgebench_row("livecodebench", ranked[5], ranked[6], "A>B"),
    ]
    metrics = run(llama, rows, "judgebench")
    expected = {"knowledge": 0.5, "reasoning": 1, "math": 0, "coding": 1, "all": 0.6}
    assert {name: metrics[name]["accuracy"] for name in metrics} == pytest.approx(expected)


def test_models_are_compared_on_the_parts_that_are_there(llama, ranked):
    rows = [rewardbench_2_row("Math", ranked[:1], ranked[1:4]), rewardbench_2_row("Math", ranked[1:2], ranked[:1])]
    found = evaluate(llama, Dataset.from_list(rows), "rewardbench_2", disable_tqdm=True)
    assert found.stratum_weights == {"Math": 1.0}


def test_equal_answers_are_wrong_in_a_published_benchmark(llama, ranked):
    metrics = run(llama, [judgebench_row("livecodebench", ranked[0], ranked[0], "A>B")], "judgebench")
    assert metrics["all"]["accuracy"] == 0 and metrics["all"]["ties"] == 1


def test_command_reads_a_published_file(llama, ranked, tmp_path, capsys):
    row = {"input": PROMPT, "output_1": ranked[1], "output_2": ranked[0], "label": 2}
    Dataset.from_list([row] * 2).to_json(tmp_path / "dataset.json")
    words = ["--model_name_or_path", llama, "--dataset_name", str(tmp_path / "dataset.json"), "--benchmark", "llmbar"]
    assert main(["evaluate", *words, "--disable_tqdm"]) == 0
    assert "| 2 | 1.000 (" in capsys.readouterr().out


def test_llmbar_names_the_better_output_by_its_number(llama, ranked, causal):
    rows = [
        {"input": PROMPT, "output_1": ranked[0], "output_2": ranked[1], "label": 1, "part": "Natural"},
        {"input": PROMPT, "output_1": ranked[2], "output_2": ranked[1], "label": 2, "part": "Neighbor"},
        {"input": PROMPT, "output_1": ranked[2], "output_2": ranked[3], "label": 2, "part": "Neighbor"},
    ]
    metrics = run(llama, rows, "llmbar", subset_column="part")
    assert metrics["Natural"]["accuracy"] == 1 and metrics["Neighbor"]["accuracy"] == 0.5
    assert metrics["all"]["accuracy"] == pytest.approx(2 / 3)
    assert list(run(llama, rows, "llmbar")) == ["all"]
    # A judge reads the same conversation.
    judge, user = PairwiseJudge(causal()), [{"role": "user", "content": PROMPT}]
    one, other = ([{"role": "assistant", "content": text}] for text in ranked[:2])
    expected = np.logaddexp(0, -judge.logits([user], [(one, other)])[0])
    assert run(judge, rows[:1], "llmbar")["all"]["log_loss"] == pytest.approx(expected)


def rmb_row(goal: str, **answers) -> dict:
    turns = [{"content": PROMPT, "language": "English", "role": "user"}]
    path = f"Pairwise_set/{goal}/S1"
    return {"conversation_input": turns, "category_path": path, **answers}


def answer(text: str) -> dict[str, str]:
    return {"llm_name": "a", "answer": text}


def test_pairs_of_rmb_are_measured_by_goal(llama, ranked):
    rows = [
        rmb_row("Harmlessness", chosen=answer(ranked[0]), reject=answer(ranked[1])),
        rmb_row("Helpfulness", chosen=answer(ranked[2]), reject=answer(ranked[1])),
        rmb_row("Helpfulness", chosen=answer(ranked[2]), reject=answer(ranked[5])),
    ]
    metrics = run(llama, rows, "rmb")
    assert metrics["Harmlessness"]["accuracy"] == 1 and metrics["Helpfulness"]["accuracy"] == 0.5


def test_the_best_of_rmb_has_to_beat_every_other(llama, ranked):
    rows = [
        rmb_row("Harmlessness", bon_best=answer(ranked[1]), loser_list=[answer(ranked[2]), answer(ranked[5])]),
        rmb_row("Harmlessness", bon_best=answer(ranked[1]), loser_list=[answer(ranked[2]), answer(ranked[0])]),
        # A draw does not beat.
        rmb_row("Harmlessness", bon_best=answer(ranked[1]), loser_list=[answer(ranked[1]), answer(ranked[3])]),
    ]
    metrics = run(llama, rows, "rmb")["all"]
    assert metrics["accuracy"] == pytest.approx(1 / 3) and metrics["ties"] == 1


def test_empty_texts_are_read_as_published(llama, ranked, tmp_path):
    row = judgebench_row("livecodebench", ranked[0], "", "A>B")
    message = [{"role": "user", "content": PROMPT}]
    rewards = SSRMRewardFunction(llama).score(
        [message] * 2, [[{"role": "assistant", "content": each}] for each in ("", ranked[0])]
    )
    assert run(llama, [row], "judgebench")["all"]["accuracy"] == float(rewards[1] > rewards[0])
    # A template that takes turns strictly: without its last turn, which is empty, the conversation would end in a model's.
    strict = AutoTokenizer.from_pretrained(llama)
    strict.chat_template = (
        "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    )
    shutil.copytree(llama, tmp_path / "strict")
    strict.save_pretrained(tmp_path / "strict")
    turns = [{"role": role, "content": text} for role, text in (("user", PROMPT), ("assistant", "Yes."), ("user", ""))]
    row = {"conversation_input": turns, "chosen": answer(ranked[0]), "reject": answer("")}
    assert run(str(tmp_path / "strict"), [row], "rmb")["all"]["num_rows"] == 1


# ---- Rows of another form ----


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        (
            "rewardbench_2",
            rewardbench_2_row("Maths", ["a"], ["b"]),
            "`subset` of row 0 of `dataset` is 'Maths', which",
        ),
        (
            "rewardbench_2",
            rewardbench_2_row("Math", ["a"], []),
            "`rejected` of row 0 of `dataset` must be a list of t",
        ),
        (
            "rewardbench_2",
            rewardbench_2_row("Ties", ["a"], ["b"]),
            "`id` of row 0 of `dataset` must be 'ref:N' or 'tie",
        ),
        (
            "judgebench",
            judgebench_row("livebench-math", "a", "b", "A=B"),
            "`label` of row 0 of `dataset` must be 'A>B' o",
        ),
        (
            "judgebench",
            judgebench_row("mine", "a", "b", "A>B"),
            "`source` of row 0 of `dataset` is 'mine', which Judge",
        ),
        (
            "llmbar",
            {"input": "a", "output_1": "b", "output_2": "c", "label": 3},
            "`label` of row 0 of `dataset` must be 1",
        ),
        ("llmbar", {"input": "a", "output_1": "b", "label": 1}, "`dataset` .*output_2"),
        (
            "rmb",
            rmb_row("Helpfulness", chosen={"answer": "a"}, reject={"text": "b"}),
            "`reject` of row 0 of `dataset` mu",
        ),
        (
            "rmb",
            rmb_row("Helpfulness", bon_best=answer("a"), loser_list=[]),
            "`loser_list` of row 0 of `dataset` is empty, so the best",
        ),
        (
            "rmb",
            {"conversation_input": [{"content": "a"}], "chosen": answer("a"), "reject": answer("b")},
            "`conversation_input` of row 0 of `dataset` must be a list of messages with `role`",
        ),
    ],
)
def test_rows_of_another_form_are_named_before_the_model_is_loaded(benchmark, row, message):
    with pytest.raises(ValueError, match=message):
        run("no-such-model", [row], benchmark)
