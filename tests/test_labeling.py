import itertools
import os

import numpy as np
import pytest
import torch
from conftest import as_messages, letter_rows, preference_rows, run_script
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import trl_ssrm.alignment.labeling
from trl_ssrm import NonFiniteScoreError, SSRMRewardFunction, best_of_n, generate_completions, label_preferences


pytestmark = pytest.mark.slow


def rows_with_completions(num_rows: int, num_completions: int = 4) -> list[dict]:
    rows = preference_rows(num_rows * num_completions, seed=4)
    return [
        {
            "prompt": rows[start]["prompt"],
            "completions": [row["chosen"] for row in rows[start : start + num_completions]],
        }
        for start in range(0, len(rows), num_completions)
    ]


@pytest.fixture
def rewards(llama):
    function = SSRMRewardFunction(llama)
    return lambda row: np.array(function.score([row["prompt"]] * len(row["completions"]), row["completions"]))


@pytest.mark.parametrize("pairing", ["best_vs_worst", "best_vs_random", "all"])
def test_pairs_are_those_that_the_rewards_say(llama, rewards, tmp_path, pairing):
    rows = rows_with_completions(12)
    labels = label_preferences(llama, Dataset.from_list(rows), str(tmp_path), pairing=pairing)
    expected = set()
    for row in rows:
        own = rewards(row)
        pairs = {
            "best_vs_worst": [(own.argmax(), own.argmin())],
            "best_vs_random": [(own.argmax(), other) for other in range(4) if other != own.argmax()],
            "all": [(i, j) for i, j in itertools.permutations(range(4), 2) if own[i] > own[j]],
        }[pairing]
        expected |= {(row["prompt"], row["completions"][i], row["completions"][j]) for i, j in pairs}
    found = {(row["prompt"], row["chosen"], row["rejected"]) for row in labels}
    assert len(labels) == {"best_vs_worst": 12, "best_vs_random": 12, "all": 72}[pairing] == len(found)
    assert found <= expected
    for row in labels:
        margin = np.diff(rewards({"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]]}))[0]
        assert row["reward_margin"] == pytest.approx(margin, abs=1e-6) and row["reward_margin"] > 0
        assert row["confidence"] == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-6)


def test_completions_that_an_encoder_has_no_positions_for_are_left_out(bert, tmp_path, caplog):
    rows = rows_with_completions(3)
    rows[1]["completions"][2] += "z" * 600
    labels = label_preferences(bert, Dataset.from_list(rows), str(tmp_path), pairing="all")
    assert len(labels) == 6 + 3 + 6
    assert "1 (completions longer than max_length=512)" in caplog.text
    reward = SSRMRewardFunction(bert)
    with pytest.raises(ValueError, match=r"has 6\d\d tokens, but the reward model has positions for 512; shorten"):
        reward(["say 1"], ["z" * 600])


def test_random_completion_is_drawn_from_the_seed(llama, tmp_path):
    data = Dataset.from_list(rows_with_completions(20))
    rejected = [
        label_preferences(llama, data, str(tmp_path / name), pairing="best_vs_random", seed=seed)["rejected"][:]
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    ]
    assert rejected[0] == rejected[1] != rejected[2]


@pytest.mark.parametrize("columns", [("completion_a", "completion_b"), ("chosen", "rejected")])
@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_two_columns_give_a_pair_whatever_their_order(llama, tmp_path, columns, kind):
    rows = preference_rows(10)
    rows = [as_messages(row) for row in rows] if kind == "conversation" else rows
    labels = [
        label_preferences(
            llama,
            Dataset.from_list(
                [{"prompt": row["prompt"], columns[0]: row[first], columns[1]: row[second]} for row in rows]
            ),
            str(tmp_path / first),
        ).to_list()
        for first, second in (("chosen", "rejected"), ("rejected", "chosen"))
    ]
    assert labels[0] == labels[1] and len(labels[0]) == 10
    assert {tuple(row) for row in labels[0]} == {("prompt", "chosen", "rejected", "reward_margin", "confidence")}


def test_whatever_is_left_out_is_counted(llama, rewards, tmp_path, caplog):
    rows = rows_with_completions(10, 2)
    confidences = [1 / (1 + np.exp(-np.ptp(rewards(row)))) for row in rows]
    rows += [{"prompt": "a", "completions": ["same", "same"]}, {"prompt": "b", "completions": ["lone"]}]
    rows += [{"prompt": "c", "completions": ["x", "y" * 90]}]
    threshold = float(np.median(confidences))
    labels = label_preferences(llama, Dataset.from_list(rows), str(tmp_path), min_confidence=threshold, max_length=80)
    assert len(labels) == sum(confidence >= threshold for confidence in confidences) == 5
    message = next(record.getMessage() for record in caplog.records if "Left out of" in record.getMessage())
    assert f"5 (confidence below {threshold})" in message
    assert "1 (tie)" in message
    assert "1 (completions longer than max_length=80)" in message
    assert "2 (rows with fewer than two completions)" in message


def test_temperature_divides_the_margin(llama, tmp_path):
    data = Dataset.from_list(rows_with_completions(5))
    plain = label_preferences(llama, data, str(tmp_path / "plain"))
    cooled = label_preferences(llama, data, str(tmp_path / "cooled"), temperature=2.0)
    assert cooled["reward_margin"][:] == plain["reward_margin"][:]
    np.testing.assert_allclose(cooled["confidence"], 1 / (1 + np.exp(-np.array(plain["reward_margin"]) / 2)))


def test_shaping_of_a_reward_function_is_left_out(llama, tmp_path):
    data = Dataset.from_list(rows_with_completions(5))
    plain = label_preferences(llama, data, str(tmp_path / "plain"))
    clipped = SSRMRewardFunction(llama, reward_clip_range=(-1e-6, 1e-6))
    assert label_preferences(clipped, data, str(tmp_path / "clipped")).to_list() == plain.to_list()


def test_best_completion_is_the_one_with_the_highest_reward(llama, rewards, tmp_path):
    rows = rows_with_completions(8)
    best = best_of_n(llama, Dataset.from_list(rows), str(tmp_path))
    assert best.column_names == ["prompt", "completion", "reward"]
    for row, chosen in zip(rows, best, strict=True):
        assert chosen["completion"] == row["completions"][rewards(row).argmax()]
        assert chosen["reward"] == pytest.approx(rewards(row).max(), abs=1e-6)


@pytest.mark.parametrize("columns", [{}, {"tools": '[{"name": "add"}]', "chat_template_kwargs": {"a": 1}}])
def test_labels_are_what_trl_trains_on(policy, llama, tmp_path, columns):
    rows = [{**row, **columns} for row in letter_rows(8, seed=1)]
    data = Dataset.from_list([{"completions": [row.pop("chosen"), row.pop("rejected")], **row} for row in rows])
    cpu = {"report_to": "none", "bf16": False, "use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 2}
    labels = label_preferences(llama, data, str(tmp_path / "labels"))
    assert set(columns) <= set(labels.column_names)
    trained = DPOTrainer(policy, args=DPOConfig(output_dir=str(tmp_path / "dpo"), **cpu), train_dataset=labels).train()
    assert trained.global_step == 1
    best = best_of_n(llama, data, str(tmp_path / "best"))
    trained = SFTTrainer(policy, args=SFTConfig(output_dir=str(tmp_path / "sft"), **cpu), train_dataset=best).train()
    assert trained.global_step == 1


def test_shards_do_not_change_the_labels(llama, tmp_path, monkeypatch):
    data = Dataset.from_list(rows_with_completions(20))
    whole = label_preferences(llama, data, str(tmp_path / "whole"), pairing="best_vs_random")
    monkeypatch.setattr(trl_ssrm.alignment.labeling, "SHARD_ROWS", 3)
    in_shards = label_preferences(llama, data, str(tmp_path / "shards"), pairing="best_vs_random")
    assert len(list((tmp_path / "shards").glob("*.parquet"))) == 7
    assert in_shards["rejected"][:] == whole["rejected"][:]
    np.testing.assert_allclose(in_shards["reward_margin"], whole["reward_margin"], atol=1e-5)


def test_shard_of_which_nothing_is_left_does_no_harm(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(trl_ssrm.alignment.labeling, "SHARD_ROWS", 2)
    ties = [{"prompt": "a", "completions": ["same", "same"]}] * 2
    rows = rows_with_completions(4)
    labels = label_preferences(llama, Dataset.from_list([*ties, *rows, *ties]), str(tmp_path))
    assert labels["prompt"][:] == [row["prompt"] for row in rows]


# ---- Interruptions and several processes ----


@pytest.fixture(scope="module")
def undisturbed(policy, scorer, tmp_path_factory) -> dict:
    return run_script(
        "label_script.py",
        policy=policy,
        reward_model=scorer,
        output_dir=str(tmp_path_factory.mktemp("undisturbed")),
    )


@pytest.fixture(scope="module")
def scorer(llama, policy, tmp_path_factory) -> str:
    """A reward model that reads the letters of the policy."""
    directory = str(tmp_path_factory.mktemp("scorer"))
    AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1).save_pretrained(directory)
    AutoTokenizer.from_pretrained(policy).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kill_at", ["generation", "labeling"])
def test_killed_job_resumes_to_the_result_of_the_undisturbed_one(policy, scorer, undisturbed, tmp_path, kill_at):
    settings = {"policy": policy, "reward_model": scorer, "output_dir": str(tmp_path)}
    assert run_script("label_script.py", **settings, kill_at=kill_at) is None
    resumed = run_script("label_script.py", **settings)
    assert resumed["completions"] == undisturbed["completions"]
    assert resumed["labels"] == undisturbed["labels"] and len(resumed["labels"]) > 20
    # What was done is not done again.
    generated, labeled = (2, 4) if kill_at == "generation" else (0, 2)
    assert (undisturbed["num_generated"], undisturbed["num_labeled"]) == (4, 4)
    assert (resumed["num_generated"], resumed["num_labeled"]) == (generated, labeled)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_give_the_labels_of_one(policy, scorer, undisturbed, tmp_path, sharded):
    settings = {"policy": policy, "reward_model": scorer, "output_dir": str(tmp_path), "sharded": sharded}
    two = run_script("label_script.py", num_processes=2, **settings)
    assert two["completions"] == undisturbed["completions"]
    for mine, theirs in zip(two["labels"], undisturbed["labels"], strict=True):
        numbers = ("reward_margin", "confidence")
        assert [mine.pop(name) for name in numbers] == pytest.approx([theirs[name] for name in numbers], abs=1e-6)
        assert mine == {name: value for name, value in theirs.items() if name not in numbers}
    assert (two["num_generated"], two["num_labeled"]) == (2, 2), "they share the work"
    # A group of completions that is spread over the processes is still one group.
    assert two["rewards"] == pytest.approx(undisturbed["rewards"], abs=1e-6)
    assert len(set(two["rewards"])) == 4


def test_damaged_shard_is_made_again(llama, tmp_path, caplog):
    data = Dataset.from_list(rows_with_completions(5))
    labels = label_preferences(llama, data, str(tmp_path)).to_list()
    (shard,) = tmp_path.glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:-7])
    assert label_preferences(llama, data, str(tmp_path)).to_list() == labels
    assert "is damaged and is made again" in caplog.text


def test_rows_with_rewards_that_are_not_finite_are_named(llama, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[AutoTokenizer.from_pretrained(llama)("~")["input_ids"][0]] = float("nan")
    rows = [{"prompt": "a", "completions": ["b", "c", "~" if number in (3, 70) else "d"]} for number in range(80)]
    with pytest.raises(NonFiniteScoreError, match="to rows 3 of `dataset`"):
        label_preferences(model, Dataset.from_list(rows), str(tmp_path / "one"))
    with pytest.raises(NonFiniteScoreError, match="to rows 66 of `dataset`"):
        label_preferences(model, Dataset.from_list(rows[4:]), str(tmp_path / "other"))


def test_fields_of_messages_are_kept(llama, tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}
    rows = [
        {
            "prompt": [{"role": "user", "content": "go"}],
            "completions": [[call], [{"role": "assistant", "content": "no"}]],
        }
    ]
    labels = label_preferences(llama, Dataset.from_list(rows), str(tmp_path))
    called = [row[name][0] for row in labels for name in ("chosen", "rejected") if row[name][0].get("tool_calls")]
    assert called[0]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_directory_of_another_job_is_refused(llama, tmp_path):
    data = Dataset.from_list(rows_with_completions(5))
    label_preferences(llama, data, str(tmp_path))
    with pytest.raises(
        ValueError, match=r"holds the result of another job: `pairing` \('best_vs_worst' then, 'all' now"
    ):
        label_preferences(llama, data, str(tmp_path), pairing="all")
    with pytest.raises(ValueError, match="another job: `dataset`"):
        label_preferences(llama, data.select(range(4)), str(tmp_path))


# ---- What is refused ----


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"completions": ["a", "b"]}], "it needs `prompt` with `completions`"),
        ([{"chosen": "a", "rejected": "b"}], "has no column `prompt`"),
        (
            [{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}],
            "`chosen` and `rejected` of `dataset` have different fields or types",
        ),
        ([{"prompt": "a"}], "has the columns \\['prompt'\\]; it needs"),
        ([{"prompt": "a", "completions": ["b", ""]}], r"`completions\[1\]` of row 0 of `dataset` is empty"),
        ([{"prompt": "a", "completions": ["b", None]}], r"`completions\[1\]` of row 0 of `dataset` is missing"),
        ([{"prompt": "a", "completions": ["b", "c"]}, {"prompt": None, "completions": ["b"]}], "`prompt` of row 1"),
        ([{"prompt": "a", "completions": ["b", "b"]}], r"Nothing of `dataset` is left \(1 \(tie\)\)"),
    ],
)
def test_data_that_can_not_be_labeled_is_refused(llama, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        label_preferences(llama, Dataset.from_list(rows), str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairing": "worst"}, "`pairing` must be one of"),
        ({"min_confidence": 1.0}, r"`min_confidence` must be in \[0.5, 1\), got 1.0"),
        ({"min_confidence": float("nan")}, "`min_confidence` must be"),
        ({"temperature": 0.0}, "`temperature` must be positive and finite"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        label_preferences("nowhere", Dataset.from_list(rows_with_completions(1)), str(tmp_path), **settings)
    assert not os.listdir(tmp_path)


# ---- Generation ----


def prompts(kind: str = "conversation", num_rows: int = 10) -> Dataset:
    rows = letter_rows(num_rows, seed=1)
    return Dataset.from_list(
        [{"prompt": row["prompt"] if kind == "conversation" else row["prompt"][0]["content"]} for row in rows]
    )


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_completions_are_what_the_policy_says(policy, tmp_path, kind):
    made = generate_completions(
        policy, prompts(kind), str(tmp_path), num_completions=1, max_new_tokens=5, temperature=0, batch_size=4
    )
    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    said = 0
    for row in made:
        if kind == "conversation":
            inputs = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(row["prompt"], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected = [[{"role": "assistant", "content": text}] if kind == "conversation" else text] if text else []
        assert row["completions"] == expected
        said += len(expected)
    assert said > 5


def test_completions_are_drawn_from_the_seed_and_differ(policy, tmp_path):
    settings = {"num_completions": 4, "max_new_tokens": 8, "batch_size": 4}
    made = [
        generate_completions(policy, prompts(), str(tmp_path / name), seed=seed, **settings)["completions"][:]
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    ]
    assert made[0] == made[1] != made[2]
    for completions in made[0]:
        assert len({completion[0]["content"] for completion in completions}) == len(completions)


def test_same_prompt_gets_other_completions_in_other_batches_and_shards(policy, tmp_path):
    same = Dataset.from_list([prompts()[0]] * 16)
    settings = {"num_completions": 1, "max_new_tokens": 8, "batch_size": 2}
    made = generate_completions(policy, same, str(tmp_path), **settings)
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    # If all batches drew the same numbers, there would be 2; if all shards did, 8.
    assert len({completion[0]["content"] for row in made for completion in row["completions"]}) > 12


def test_what_the_model_declares_does_not_change_the_sampling(policy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.generation_config.repetition_penalty = 50.0
    settings = {"num_completions": 2, "max_new_tokens": 8}
    declared = generate_completions(model, prompts(), str(tmp_path / "declared"), **settings)
    plain = generate_completions(policy, prompts(), str(tmp_path / "plain"), **settings)
    assert declared["completions"][:] == plain["completions"][:]
    assert model.generation_config.repetition_penalty == 50.0


def test_completions_without_text_are_counted(policy, tmp_path, caplog):
    made = generate_completions(policy, prompts(num_rows=40), str(tmp_path), num_completions=4, max_new_tokens=2)
    number = sum(map(len, made["completions"][:]))
    assert f"Left out of `dataset`: {160 - number} (completions without text)" in caplog.text and number < 160


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "all completions of a prompt are the same"),
        ({"num_completions": 0}, "`num_completions` must be positive"),
        ({"top_p": 1.5}, r"`top_p` must be in \(0, 1\]"),
    ],
)
def test_settings_of_generation_that_make_no_sense_are_refused(policy, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        generate_completions(policy, prompts(), str(tmp_path), **settings)


def test_prompts_that_can_not_be_completed_are_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="has no column `prompt`"):
        generate_completions(policy, Dataset.from_list([{"text": "a"}]), str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer of the policy has no chat template"):
        generate_completions(policy, prompts(), str(tmp_path), processing_class=tokenizer)
