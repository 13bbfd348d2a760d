import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, as_messages, make_tokenizer, preference_rows
from datasets import Dataset
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
from trl_ssrm.evaluation.benchmarks import REWARDBENCH_SECTIONS, section_scores


SECTIONS = ("Chat", "Chat Hard", "Safety", "Reasoning")
SUBSETS = [subset for section in SECTIONS for subset in REWARDBENCH_SECTIONS[section]]


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
    assert "1 of 8 rows of `dataset` have a text that is too long" in caplog.text
    short = PairwiseJudge(judge)
    short.comparison = replace(short.comparison, max_length=300)
    found = run(short, rows)
    assert found.outcomes[3] == 0.5 and found.metrics["all"]["not_judged"] == 1
    assert "| Not judged |" in evaluation_table([found])
    with pytest.raises(ValueError, match="set `max_length` of the judge's `comparison` instead"):
        run(short, rows, max_length=300)


# ---- RewardBench ----


def rewardbench_rows(subsets: list[str]) -> list[dict]:
    rows = []
    for number, row in enumerate(preference_rows(3 * len(subsets), seed=4)):
        rows.append({**row, "subset": subsets[number % len(subsets)]})
    return rows


@pytest.mark.parametrize("kind", ["scalar", "pairwise"])
def test_rewardbench_is_what_the_models_own_scores_make_of_it(kind, llama, judge):
    rows = rewardbench_rows(SUBSETS)
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
    assert {subset: found.metrics[subset]["accuracy"] for subset in SUBSETS} == pytest.approx(accuracies)
    sections = section_scores(accuracies)
    assert {name: found.metrics[name]["accuracy"] for name in sections} == pytest.approx(sections)
    assert found.metrics["all"]["score"] == pytest.approx(sum(sections.values()) / 4)
    assert found.metrics["all"]["ties"] == 1 and not found.outcomes[0]
    assert sum(found.stratum_weights.values()) == pytest.approx(1)


def test_prior_sets_may_hold_conversations(llama):
    rows = rewardbench_rows(SUBSETS)
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
    assert "`dataset` has no rows of alpacaeval-easy" in caplog.text
    assert "so there is no final score of rewardbench" in caplog.text


# ---- RM-Bench and best of n ----


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


# ---- Several models ----


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
    rows = rewardbench_rows(SUBSETS)
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
            "has rows of the subset 'mt-bench', which RewardBench does not have; drop these rows, or",
        ),
        ("rewardbench", {**ROW, "subset": "shp", "chosen": ["b"]}, "of row 0 of `dataset` must be text, as in"),
        ("rewardbench", {**ROW, "subset": "shp", "chosen": None}, "`chosen` of row 0 of `dataset` is missing"),
        ("rm_bench", {**THREE, "chosen": ["b"] * 2}, "of row 0 of `dataset` must be lists of three texts"),
        ("rm_bench", {**THREE, "domain": "art"}, "rows of the domain 'art', but RM-Bench has only"),
        ("best_of_n", ROW, "`chosen` and `rejected` of row 0 of `dataset` must be lists"),
        (
            "best_of_n",
            {"prompt": "a", "completions": ["b", "c"], "labels": [True]},
            "`completions` of row 0 of `dataset` has 2 entries and `labels` has 1",
        ),
        (
            "best_of_n",
            {"prompt": "a", "completions": ["b", "c"], "labels": [True, True]},
            "completions of row 0 of `dataset` are all right or all wrong",
        ),
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
