import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, as_messages, make_tokenizer, preference_rows
from datasets import Dataset
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, log_loss
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from trl_ssrm import (
    Evaluation,
    PairwiseJudge,
    SSRMRewardFunction,
    SSRMTrainer,
    evaluate,
    evaluation_table,
    export_for_rewardbench,
)
from trl_ssrm.evaluation.benchmarks import (
    REWARDBENCH_SECTIONS,
    best_is_right,
    final_score,
    rm_bench_levels,
    section_scores,
)
from trl_ssrm.evaluation.evaluate import sign_test, wilson_interval


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    """Directory of a pairwise model that `SSRMTrainer` saved."""
    from trl_ssrm import SSRMConfig

    base, directory = (str(tmp_path_factory.mktemp(name)) for name in ("causal", "judge"))
    tokenizer = make_tokenizer(pad_token="<|pad|>", eos_token="<|eos|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    set_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    args = SSRMConfig(
        directory,
        preference_model="pairwise",
        bf16=False,
        gradient_checkpointing=False,
        max_steps=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SSRMTrainer(base, args, train_dataset=Dataset.from_list(preference_rows(8, seed=1)))
    trainer.train()
    trainer.save_model(directory)
    return directory


def run(model, rows: list[dict], benchmark: str = "preferences", **settings) -> Evaluation:
    return evaluate(model, Dataset.from_list(rows), benchmark, disable_tqdm=True, **settings)


def as_user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def as_assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# ---- Preference sets ----


@pytest.mark.parametrize("kind", ["text", "implicit", "conversation", "implicit conversation"])
def test_metrics_are_those_of_the_rewards(llama, kind):
    rows = preference_rows(24, seed=1)
    if "conversation" in kind:
        rows = [as_messages(row) for row in rows]
    reward = SSRMRewardFunction(llama)
    scores = [
        reward.score([row["prompt"] for row in rows], [row[name] for row in rows]) for name in ("chosen", "rejected")
    ]
    logits = scores[0] - scores[1]
    if "implicit" in kind:
        rows = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    found = run(llama, rows)
    # Every other pair is turned round, so that both classes are there.
    first_is_chosen = np.arange(24) % 2 == 0
    probability = 1 / (1 + np.exp(-np.where(first_is_chosen, logits, -logits)))
    metrics = found.metrics["all"]
    assert metrics["accuracy"] == pytest.approx(np.mean(logits > 0))
    assert metrics["log_loss"] == pytest.approx(log_loss(first_is_chosen, probability), rel=1e-5)
    assert metrics["brier"] == pytest.approx(brier_score_loss(first_is_chosen, probability), rel=1e-5)
    assert found.outcomes == (logits > 0).tolist()
    assert 0 < metrics["accuracy"] < 1 and metrics["num_rows"] == 24 and metrics["ties"] == 0


def test_tie_counts_as_half_and_is_counted(llama):
    row = preference_rows(1)[0]
    tie = {**row, "rejected": row["chosen"]}
    found = run(llama, [tie, tie, tie])
    assert found.metrics["all"]["accuracy"] == 0.5 and found.metrics["all"]["ties"] == 3
    assert found.metrics["all"]["log_loss"] == pytest.approx(np.log(2))


def test_subsets_are_measured_by_themselves(llama):
    rows = preference_rows(24, seed=1)
    found = run(
        llama, [{**row, "source": "xy"[number % 2]} for number, row in enumerate(rows)], subset_column="source"
    )
    for number, subset in enumerate("xy"):
        alone = run(llama, rows[number::2])
        assert found.metrics[subset] == pytest.approx(alone.metrics["all"])
    assert list(found.metrics) == ["all", "x", "y"]
    assert Evaluation(**json.loads(json.dumps(asdict(found)))) == found


def test_saved_pairwise_model_is_known_as_one(judge):
    rows = preference_rows(16, seed=1)
    found = run(judge, rows)
    loaded = PairwiseJudge(judge)
    logits = loaded.logits([row["prompt"] for row in rows], [(row["chosen"], row["rejected"]) for row in rows])
    assert found.outcomes == (logits > 0).tolist()
    assert found.metrics["all"]["log_loss"] == pytest.approx(np.mean(np.logaddexp(0, -logits)), rel=1e-5)
    assert run(loaded, rows).metrics == found.metrics


def test_text_that_is_too_long_is_a_tie_and_is_counted(llama, judge, caplog):
    rows = preference_rows(8, seed=1)
    rows[3]["prompt"] = "long " * 100
    # Its tokens are bytes.
    found = run(llama, rows, max_length=200)
    assert found.outcomes[3] == 0.5 and found.metrics["all"]["not_judged"] == 1
    assert "1 of 8 rows have a text that is too long" in caplog.text
    short = PairwiseJudge(judge)
    short.comparison = replace(short.comparison, max_length=300)
    found = run(short, rows)
    assert found.outcomes[3] == 0.5 and found.metrics["all"]["not_judged"] == 1
    assert "| Not judged |" in evaluation_table([found])
    with pytest.raises(ValueError, match="A judge has the `max_length` of its comparison"):
        run(short, rows, max_length=300)


@pytest.mark.parametrize("count", [1, 20, 500])
def test_interval_is_that_of_wilson(count):
    for right in {0, count // 3, count}:
        expected = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson_interval(right, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


# ---- RewardBench ----

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


def rewardbench_rows(subsets: list[str]) -> list[dict]:
    rows = []
    for number, row in enumerate(preference_rows(3 * len(subsets), seed=4)):
        rows.append({**row, "subset": subsets[number % len(subsets)]})
    return rows


@pytest.mark.parametrize("kind", ["scalar", "pairwise"])
def test_rewardbench_is_what_the_models_own_scores_make_of_it(kind, llama, judge):
    rows = rewardbench_rows([*TABLE])
    # A tie is wrong.
    rows[0]["rejected"] = rows[0]["chosen"]
    if kind == "scalar":
        reward = SSRMRewardFunction(llama)
        chosen, rejected = (
            reward.score([as_user(row["prompt"]) for row in rows], [as_assistant(row[name]) for row in rows])
            for name in ("chosen", "rejected")
        )
        logits = chosen - rejected
    else:
        prompts = [row["prompt"] for row in rows]
        logits = PairwiseJudge(judge).logits(prompts, [(row["chosen"], row["rejected"]) for row in rows])
    right: dict[str, list[bool]] = {}
    for row, logit in zip(rows, logits, strict=True):
        right.setdefault(row["subset"], []).append(logit > 0)
    found = run({"scalar": llama, "pairwise": judge}[kind], rows, "rewardbench")
    accuracies = {subset: float(np.mean(each)) for subset, each in right.items()}
    assert {subset: found.metrics[subset]["accuracy"] for subset in TABLE} == pytest.approx(accuracies)
    sections = section_scores(accuracies)
    assert {name: found.metrics[name]["accuracy"] for name in sections} == pytest.approx(sections)
    assert found.metrics["all"]["score"] == pytest.approx(sum(sections.values()) / 4)
    assert found.metrics["all"]["ties"] == 1 and not found.outcomes[0]
    assert sum(found.stratum_weights.values()) == pytest.approx(1)


def test_prior_sets_may_hold_conversations(llama):
    rows = rewardbench_rows([*TABLE])
    prior = rewardbench_rows(["anthropic_helpful", "anthropic_hhh", "shp", "summarize"])
    turns = [*as_user("a"), *as_assistant("b"), *as_user("c")]
    prior = [{**row, "prompt": turns} for row in prior]
    reward = SSRMRewardFunction(llama)
    chosen, rejected = (
        reward.score([turns] * len(prior), [as_assistant(row[name]) for row in prior])
        for name in ("chosen", "rejected")
    )
    assert run(llama, prior, "rewardbench").outcomes == (chosen > rejected).tolist()
    rows = [{**row, "prompt": as_user(row["prompt"])} for row in rows] + prior
    found = run(llama, rows, "rewardbench")
    four = [found.metrics[section]["accuracy"] for section in SECTIONS]
    expected = (sum(four) + 0.5 * np.mean(chosen > rejected)) / 4.5
    assert found.metrics["all"]["score"] == pytest.approx(expected)


def test_part_of_rewardbench_has_no_final_score(llama, caplog):
    found = run(llama, rewardbench_rows(["math-prm", "hep-go"]), "rewardbench")
    assert "score" not in found.metrics["all"] and "Chat" not in found.metrics
    # As published: 984 to 164.
    math, code = (found.metrics[subset]["accuracy"] for subset in ("math-prm", "hep-go"))
    assert found.metrics["Reasoning"]["accuracy"] == pytest.approx((6 * math + code) / 7)
    assert "No row is of alpacaeval-easy" in caplog.text and "no final score of rewardbench" in caplog.text


# ---- RM-Bench and best of n ----


def test_levels_of_rm_bench_are_the_triangles_of_the_matrix():
    # Chosen completions by row, from plain to ornate, against rejected ones by column.
    one = [[1, -1, -1], [1, 1, -1], [1, 1, -1]]
    other = [[1, 1, -1], [-1, 1, -1], [1, -1, 1]]
    levels = rm_bench_levels(np.array([one, other]).reshape(2, 9))
    # Easy lies below the diagonal: 3 and 1 of 3. Normal on it: 2 and 3 of 3. Hard above: 0 and 1 of 3.
    assert levels == pytest.approx({"easy": 4 / 6, "normal": 5 / 6, "hard": 1 / 6})


@pytest.mark.parametrize("kind", ["scalar", "pairwise"])
def test_rm_bench_is_the_mean_over_the_domains(kind, llama, judge):
    domains = ["chat", "code", "math", "safety-refuse", "safety-response", "chat"]
    texts = preference_rows(18, seed=5)
    rows = [
        {
            "prompt": f"say {number}",
            **{name: [row[name] for row in texts[3 * number : 3 * number + 3]] for name in ("chosen", "rejected")},
            "domain": domain,
        }
        for number, domain in enumerate(domains)
    ]
    wins = np.zeros((6, 3, 3))
    for number, row in enumerate(rows):
        for i, chosen in enumerate(row["chosen"]):
            for j, rejected in enumerate(row["rejected"]):
                if kind == "scalar":
                    prompt = as_user(row["prompt"])
                    one, two = SSRMRewardFunction(llama).score([prompt] * 2, [*map(as_assistant, (chosen, rejected))])
                    wins[number, i, j] = one > two
                else:
                    wins[number, i, j] = PairwiseJudge(judge).logits([row["prompt"]], [(chosen, rejected)])[0] > 0
    found = run({"scalar": llama, "pairwise": judge}[kind], rows, "rm_bench")
    by_domain = {"chat": wins[[0, 5]], "code": wins[[1]], "math": wins[[2]], "safety": wins[[3, 4]]}
    for domain, own in by_domain.items():
        assert found.metrics[domain]["accuracy"] == pytest.approx(own.mean())
        assert found.metrics[domain]["hard"] == pytest.approx(np.mean(own[:, [0, 0, 1], [1, 2, 2]]))
        assert found.metrics[domain]["easy"] == pytest.approx(np.mean(own[:, [1, 2, 2], [0, 0, 1]]))
    overall = found.metrics["all"]
    assert overall["score"] == pytest.approx(np.mean([own.mean() for own in by_domain.values()]))
    # As its authors say of their averages: over levels and over domains they are the same.
    assert overall["score"] == pytest.approx(np.mean([overall[level] for level in ("easy", "normal", "hard")]))


@pytest.mark.parametrize("kind", ["scalar", "pairwise"])
def test_best_of_n_is_right_if_the_best_one_is(kind, llama, judge):
    texts = preference_rows(24, seed=6)
    rows = []
    for number in range(12):
        completions = [texts[2 * number + i][name] for i in range(2) for name in ("chosen", "rejected")]
        rows.append({"prompt": f"say {number}", "completions": completions, "labels": [True, False, True, False]})
    if kind == "scalar":
        reward = SSRMRewardFunction(llama)
        best = [int(np.argmax(reward.score([row["prompt"]] * 4, row["completions"]))) for row in rows]
    else:
        best = [PairwiseJudge(judge).rank(row["prompt"], row["completions"])[0] for row in rows]
    model = {"scalar": llama, "pairwise": judge}[kind]
    found = run(model, rows, "best_of_n")
    assert found.outcomes == [row["labels"][position] for row, position in zip(rows, best, strict=True)]
    lists = [
        {"prompt": row["prompt"], "chosen": row["completions"][::2], "rejected": row["completions"][1::2]}
        for row in rows
    ]
    assert run(model, lists, "best_of_n").outcomes == found.outcomes


def test_ties_for_the_best_share_it():
    # Pairs in order: 01, 02, 12. The first two are equal, and better than the third.
    assert best_is_right(np.array([0.0, 2.0, 2.0]), [True, False, False]) == (0.5, True)
    # The second could not be compared with anything, so it is not the best.
    assert best_is_right(np.array([np.nan, 1.0, np.nan]), [True, False, False]) == (1.0, False)
    assert best_is_right(np.array([-1.0, 1.0, 1.0]), [True, False, False]) == (0.0, False)


# ---- Several models ----


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


def test_difference_weighs_the_parts_as_the_benchmark_does():
    strata = {"strata": ["x"] * 2 + ["y"] * 8, "stratum_weights": {"x": 0.75, "y": 0.25}}
    one, other = made_up("one", [1.0] * 2 + [0.0] * 8, **strata), made_up("two", [0.0] * 10, **strata)
    line = evaluation_table([one, other]).splitlines()[-1]
    # Resampled within each part, nothing can vary here.
    assert "| +0.750 | +0.750 to +0.750 |" in line


def test_models_on_other_rows_are_not_tested(llama):
    rows = preference_rows(8, seed=1)
    one, other = run(llama, rows), run(llama, preference_rows(8, seed=2))
    assert "were evaluated on different rows, so no test compares them." in evaluation_table([one, other])
    same = evaluation_table([one, run(llama, rows)])
    assert "| +0.000 | +0.000 to +0.000 | 0 prompts | 0 prompts | 1 |" in same
    # Exchanged labels are other rows.
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert run(llama, turned).rows_hash != one.rows_hash


def test_table_lists_the_subsets_of_each_model(llama, judge):
    rows = rewardbench_rows([*TABLE])
    table = evaluation_table([run(model, rows, "rewardbench") for model in (llama, judge)])
    lines = table.splitlines()
    assert lines[0].startswith("| Model | Pairs | Score | Accuracy |")
    assert [line.split(" | ")[0] for line in lines[5:]][2:6] == [f"| {section}" for section in SECTIONS]
    assert sum(line.startswith("| hep-") for line in lines) == 6
    assert lines[-1].startswith(f"| {llama} over {judge} | ")


# ---- The package `rewardbench` ----


def test_export_names_things_as_transformers_4_does_and_scores_the_same(llama, judge, tmp_path):
    copy = tmp_path / "copy"
    export_for_rewardbench(llama, str(copy))
    config, tokenizer = (json.loads((copy / f"{name}.json").read_text()) for name in ("config", "tokenizer_config"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == "float32"
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    assert "<|user|>" in tokenizer["additional_special_tokens"] and "extra_special_tokens" not in tokenizer
    rows = [as_messages(row) for row in preference_rows(8, seed=1)]
    assert run(str(copy), rows).metrics == run(llama, rows).metrics
    with pytest.raises(ValueError, match="exists; choose another one"):
        export_for_rewardbench(llama, str(copy))
    for directory in (judge, str(tmp_path)):
        with pytest.raises(ValueError, match="is no directory of a scalar reward model"):
            export_for_rewardbench(directory, str(tmp_path / "other"))


# ---- Bad input ----

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}
THREE = {"prompt": "a", "chosen": ["b"] * 3, "rejected": ["c"] * 3, "domain": "chat"}


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        ("rewardbanch", ROW, "`benchmark` must be one of .*, got 'rewardbanch'"),
        ("preferences", {**ROW, "chosen": ""}, "`chosen` of row 0 of `dataset` is empty"),
        ("preferences", {"prompt": "a", "completions": ["b", "c"]}, "no column `chosen` and no column `rejected`"),
        ("preferences", {"chosen_ids": [1], "rejected_ids": [2]}, "`dataset` is tokenized"),
        ("rewardbench", ROW, "`dataset` has no column `subset`"),
        (
            "rewardbench",
            {**ROW, "subset": "mt-bench"},
            "RewardBench has no subset 'mt-bench'; leave those rows out, or",
        ),
        ("rewardbench", {**ROW, "subset": "shp", "chosen": ["b"]}, "of row 0 of `dataset` are not text"),
        ("rewardbench", {**ROW, "subset": "shp", "chosen": None}, "`chosen` of row 0 of `dataset` is missing"),
        ("rm_bench", {**THREE, "chosen": ["b"] * 2}, "of row 0 of `dataset` are not three texts each"),
        ("rm_bench", {**THREE, "domain": "art"}, "RM-Bench has no domain 'art', only"),
        ("best_of_n", ROW, "`chosen` and `rejected` of row 0 of `dataset` are not lists"),
        ("best_of_n", {"prompt": "a", "completions": ["b", "c"], "labels": [True]}, "differ in length"),
        ("best_of_n", {"prompt": "a", "completions": ["b", "c"], "labels": [True, True]}, "No choice is in row 0"),
    ],
)
def test_data_of_another_form_is_refused_before_the_model_is_loaded(benchmark, row, message):
    with pytest.raises(ValueError, match=message):
        run("no-such-model", [row], benchmark)


def test_subset_that_is_named_as_all_rows_are_is_refused():
    with pytest.raises(ValueError, match="A subset is named 'all'"):
        run("no-such-model", [{**ROW, "source": "all"}], subset_column="source")


def test_row_with_a_reward_that_is_not_finite_is_named(llama):
    reward = SSRMRewardFunction(llama)
    ids = reward.tokenize("q", "Z")
    token = ids[1]
    assert token not in reward.tokenize("x", "y")
    reward.model.get_input_embeddings().weight.data[token] = float("nan")
    rows = [{"prompt": "x", "chosen": "y", "rejected": "z"}] * 2 + [{"prompt": "q", "chosen": "y", "rejected": "Z"}]
    with pytest.raises(ValueError, match="infinite rewards to rows 2 of `dataset`"):
        run(reward, rows)
