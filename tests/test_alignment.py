import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import as_messages, make_tokenizer, preference_rows
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

import trl_ssrm
from trl_ssrm import (
    Comparison,
    NonFiniteScoreError,
    PairwiseJudge,
    SSRMRewardFunction,
    load_ppo_models,
    load_reward_model,
)


CPU = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def conversations(num_rows: int) -> tuple[list, list]:
    """Prompts and completions of all kinds: system messages, several turns, calls of tools, any script, any length."""
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices("abc déß 水🙂\n.", k=draw.choice([1, 3, 10, 60])))

    prompts, completions = [], []
    for number in range(num_rows):
        prompt = [{"role": "system", "content": text()}] if number % 3 == 0 else []
        for _ in range(number % 4):
            prompt += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        completion = [{"role": "assistant", "content": text()}]
        if number % 5 == 0:
            call = {"type": "function", "function": {"name": "add", "arguments": {"x": number}}}
            asked = {"role": "assistant", "content": "", "tool_calls": [call]}
            completion = [asked, {"role": "tool", "name": "add", "content": text()}, *completion]
        prompts.append([*prompt, {"role": "user", "content": text()}])
        completions.append(completion)
    return prompts, completions


def rewards_in_trl(kind: str, policy: str, reward_model: str, output_dir, prompts, completions) -> list[float]:
    """What a trainer computes when it is given the directory of the reward model."""
    dataset = Dataset.from_list([{"prompt": "say"}] * 4)
    if kind == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        trainer = OnlineDPOTrainer(
            AutoModelForCausalLM.from_pretrained(policy),
            reward_funcs=reward_model,
            args=OnlineDPOConfig(output_dir=output_dir, **CPU),
            processing_class=AutoTokenizer.from_pretrained(policy),
            train_dataset=dataset,
        )
        rewards = trainer._calculate_rewards_from_functions(prompts, completions, [[0]] * len(prompts))
    else:
        trainer_class, config_class = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}[kind]
        args = config_class(output_dir=output_dir, num_generations=2, per_device_train_batch_size=2, **CPU)
        trainer = trainer_class(policy, reward_funcs=reward_model, args=args, train_dataset=dataset)
        inputs = [{"prompt": prompt} for prompt in prompts]
        rewards = trainer._calculate_rewards(inputs, prompts, completions, [[0]] * len(prompts))
    return rewards.flatten().tolist()


@pytest.mark.parametrize("kind", ["rloo", "grpo", "online_dpo"])
def test_rewards_are_those_that_trl_computes_from_the_directory(kind, policy, llama, tmp_path):
    prompts, completions = conversations(100)
    expected = rewards_in_trl(kind, policy, llama, str(tmp_path), prompts, completions)
    rewards = SSRMRewardFunction(llama)(prompts=prompts, completions=completions, trainer_state=None)
    assert np.std(rewards) > 0.01
    np.testing.assert_allclose(rewards, expected, atol=1e-4)


def test_adapter_works_in_trl_by_its_directory_and_as_a_function(policy, llama, adapter, tmp_path):
    prompts, completions = conversations(20)
    expected = rewards_in_trl("rloo", policy, adapter, str(tmp_path / "trl"), prompts, completions)
    rewards = SSRMRewardFunction(adapter)(prompts=prompts, completions=completions)
    np.testing.assert_allclose(rewards, expected, atol=1e-4)
    assert np.abs(np.subtract(rewards, SSRMRewardFunction(llama)(prompts, completions))).max() > 0.01


@pytest.fixture
def adapter(llama, tmp_path) -> str:
    """Directory of an adapter with a score head, and of its tokenizer."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1), config)
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["text", "conversation", "tools"])
def test_completions_are_tokenized_as_the_reward_trainer_tokenizes(kind, llama, tmp_path):
    rows = preference_rows(10)
    if kind != "text":
        rows = [as_messages(row) for row in rows]
    if kind == "tools":
        # A template with arguments of its own.
        template = "{{ mark }}" + AutoTokenizer.from_pretrained(llama).chat_template
        rows = [{**row, "tools": json.dumps([TOOL]), "chat_template_kwargs": {"mark": "!"}} for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    if kind == "tools":
        tokenizer.chat_template = template
    trainer = RewardTrainer(
        llama,
        args=RewardConfig(output_dir=str(tmp_path), **CPU),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    function = SSRMRewardFunction(llama, processing_class=tokenizer)
    for row, expected in zip(rows, trainer.train_dataset, strict=True):
        columns = (row.get("tools"), row.get("chat_template_kwargs"))
        assert function.tokenize(row["prompt"], row["chosen"], *columns) == expected["chosen_ids"]
        assert function.tokenize(row["prompt"], row["rejected"], *columns) == expected["rejected_ids"]
    if kind == "tools":
        given = {name: [row[name] for row in rows] for name in rows[0]}
        with_tools = function(given["prompt"], given["chosen"], **given)
        assert with_tools != function(given["prompt"], given["chosen"], chat_template_kwargs=[{"mark": "!"}] * 10)


def test_rewards_do_not_depend_on_the_batch(llama):
    prompts, completions = conversations(40)
    one = SSRMRewardFunction(llama, batch_tokens=1)(prompts, completions)
    all_at_once = SSRMRewardFunction(llama, batch_tokens=1 << 20)(prompts, completions)
    np.testing.assert_allclose(one, all_at_once, atol=1e-5)


def test_empty_completion_has_a_reward_since_policies_write_some(llama):
    function = SSRMRewardFunction(llama)
    assert np.isfinite(function(["say"], [""])).all()
    assert np.isfinite(
        function([[{"role": "user", "content": "say"}]], [[{"role": "assistant", "content": ""}]])
    ).all()
    assert function([], []) == []


def test_reference_dataset_fixes_mean_and_variance(llama):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(30)]
    function = SSRMRewardFunction(llama, reference_dataset=Dataset.from_list(rows))
    rewards = function([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert np.mean(rewards) == pytest.approx(0, abs=1e-6)
    assert np.std(rewards) == pytest.approx(1, abs=1e-6)


def test_rewards_are_clipped_after_scaling(llama):
    prompts, completions = conversations(40)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(30)]
    settings = {"reference_dataset": Dataset.from_list(rows)}
    scaled = SSRMRewardFunction(llama, **settings)(prompts, completions)
    low, high = np.quantile(scaled, [0.25, 0.75])
    clipped = SSRMRewardFunction(llama, reward_clip_range=(low, high), **settings)(prompts, completions)
    np.testing.assert_allclose(clipped, np.clip(scaled, low, high))
    # Clipping before scaling would give other rewards.
    plain = SSRMRewardFunction(llama)(prompts, completions)
    assert not np.allclose(np.clip(plain, low, high), np.clip(scaled, low, high), atol=0.1)


@pytest.mark.parametrize("as_text", [False, True])
def test_baseline_column_gives_the_log_odds(llama, as_text):
    prompts, completions = conversations(8)
    baselines = [[{"role": "assistant", "content": f"baseline {number}"}] for number in range(8)]
    plain = SSRMRewardFunction(llama)
    column = [baseline[0]["content"] for baseline in baselines] if as_text else baselines
    rewards = SSRMRewardFunction(llama, baseline_column="reference")(prompts, completions, reference=column)
    expected = np.subtract(plain(prompts, completions), plain(prompts, baselines))
    np.testing.assert_allclose(rewards, expected, atol=1e-6)


def test_reward_model_runs_in_the_precision_that_is_asked_for(llama):
    prompts, completions = conversations(20)
    function = SSRMRewardFunction(llama, dtype="bfloat16", device="cpu")
    rewards = function(prompts, completions)
    assert {parameter.dtype for parameter in function.model.parameters()} == {torch.bfloat16}
    np.testing.assert_allclose(rewards, SSRMRewardFunction(llama)(prompts, completions), atol=0.05)
    # The last layer is in float32, so rewards that are close stay apart.
    assert len(set(rewards)) == len(set(SSRMRewardFunction(llama)(prompts, completions)))


def test_named_reward_function_is_made_from_the_environment(llama, monkeypatch):
    monkeypatch.setenv("SSRM_REWARD_MODEL", llama)
    prompts, completions = conversations(3)
    assert trl_ssrm.ssrm_reward(prompts, completions) == SSRMRewardFunction(llama)(prompts, completions)
    monkeypatch.delenv("SSRM_REWARD_MODEL")
    with pytest.raises(ValueError, match="needs the environment variable SSRM_REWARD_MODEL"):
        _ = trl_ssrm.ssrm_reward


# ---- What is refused ----


def saved(model, tokenizer_of: str, directory) -> str:
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("load", [load_reward_model, SSRMRewardFunction, lambda path: load_ppo_models(path, path)])
def test_random_score_head_is_refused(load, policy):
    with pytest.raises(ValueError, match="holds no weights for score.weight, which would be random"):
        load(policy)


def test_adapter_without_a_score_head_is_refused(policy, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="holds no weights for score.weight, which would be random"):
        load_reward_model(saved(model, policy, tmp_path))


def test_several_labels_are_refused(llama, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3, ignore_mismatched_sizes=True)
    path = saved(model, llama, tmp_path)
    with pytest.raises(ValueError, match="has 3 labels, but a reward model has one"):
        load_reward_model(path)
    with pytest.raises(ValueError, match="has 3 labels, but a reward model has one"):
        SSRMRewardFunction(model)


def test_adapter_with_several_labels_is_refused(policy, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=2)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has 2 labels, but a reward model has one"):
        load_reward_model(saved(model, policy, tmp_path))


def test_rewards_that_are_not_finite_end_the_run_with_a_sentence(llama):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    with pytest.raises(NonFiniteScoreError, match="NaN or infinite rewards to rows 0, 1 of `completions`"):
        SSRMRewardFunction(model)(["a", "b"], ["c", "d"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline_column": "x", "reference_dataset": Dataset.from_list([{"prompt": "a"}])}, "choose one"),
        (
            {"reference_dataset": Dataset.from_list([{"prompt": "a", "completion": None}])},
            "`completion` of row 0 of `reference_dataset` is missing",
        ),
        ({"reference_dataset": Dataset.from_list([{"prompt": "a"}])}, "has no column `completion`"),
        ({"reward_clip_range": (1.0, -1.0)}, "must be a lower and a higher bound"),
    ],
)
def test_settings_that_make_no_sense_are_refused(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        SSRMRewardFunction(llama, **settings)


def test_data_that_lacks_something_is_refused_with_a_sentence(llama):
    with pytest.raises(ValueError, match="has no column `reference`; add it"):
        SSRMRewardFunction(llama, baseline_column="reference")(["a"], ["b"])
    with pytest.raises(ValueError, match="the tokenizer of the reward model has no chat template"):
        tokenizer = make_tokenizer(pad_token="<|pad|>", eos_token="<|eos|>")
        SSRMRewardFunction(llama, processing_class=tokenizer)(*conversations(1))
    same = Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3)
    with pytest.raises(ValueError, match="All rows of `reference_dataset` get the same reward"):
        SSRMRewardFunction(llama, reference_dataset=same)(["a"], ["b"])


@pytest.fixture
def scorer(policy, tmp_path):
    """Saves a reward model of the family of the policy, with another tokenizer if told so."""

    def save(change=lambda tokenizer: None) -> str:
        model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
        model.save_pretrained(tmp_path / "scorer")
        tokenizer = AutoTokenizer.from_pretrained(policy)
        change(tokenizer)
        tokenizer.save_pretrained(tmp_path / "scorer")
        return str(tmp_path / "scorer")

    return save


def test_models_of_ppo_come_from_two_checkpoints(policy, scorer):
    models = load_ppo_models(policy, scorer())
    assert models["processing_class"].padding_side == "left"
    for one, other in (("model", "ref_model"), ("reward_model", "value_model")):
        assert models[one] is not models[other]
        for name, parameter in models[one].named_parameters():
            assert torch.equal(parameter, models[other].get_parameter(name)), name
    assert load_ppo_models(policy, scorer(), with_ref_model=False)["ref_model"] is None


def test_models_of_ppo_pad_as_the_reward_model_does(policy, scorer):
    models = load_ppo_models(policy, scorer(lambda tokenizer: setattr(tokenizer, "pad_token", "<|user|>")))
    assert models["processing_class"].pad_token == "<|user|>"
    pad_token_ids = {models[name].config.pad_token_id for name in ("reward_model", "value_model")}
    assert pad_token_ids == {models["processing_class"].convert_tokens_to_ids("<|user|>")}


def test_fingerprint_of_a_judge_changes_with_all_that_decides_its_probabilities(policy):
    def judge(**settings) -> PairwiseJudge:
        return PairwiseJudge(policy, comparison=Comparison(**{"labels": ["a", "b"], **settings}))

    changed_weight, changed_template = judge(), judge()
    next(changed_weight.model.parameters()).data.zero_()
    changed_template.processing_class.chat_template += " "
    judges = [judge(), judge(labels=["c", "d"]), judge(max_length=50), changed_weight, changed_template]
    assert len({each.fingerprint for each in judges}) == 5
    assert judge().fingerprint == judges[0].fingerprint


def test_template_that_goes_on_behind_the_end_token_is_told_of(policy, scorer, caplog):
    load_ppo_models(policy, scorer())
    assert "puts text behind the end token" not in caplog.text
    load_ppo_models(
        policy, scorer(lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages[0].content }} z"))
    )
    assert "puts text behind the end token" in caplog.text


def test_models_of_ppo_have_to_fit_together(policy, scorer, bert, llama):
    with pytest.raises(ValueError, match="have different vocabularies"):
        load_ppo_models(policy, llama)
    with pytest.raises(ValueError, match="PPO needs a padding token that is not the end token"):
        load_ppo_models(policy, scorer(lambda tokenizer: setattr(tokenizer, "pad_token", tokenizer.eos_token)))
    with pytest.raises(ValueError, match="PPO reads a reward at every token, which BertForSequenceClassification"):
        load_ppo_models(bert, bert)


def test_loading_into_ppo_merges_an_adapter(policy, tmp_path):
    torch.manual_seed(1)
    config = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1), config).eval()
    path = saved(model, policy, tmp_path)
    inputs = AutoTokenizer.from_pretrained(policy)("say it", return_tensors="pt")
    for merged in map(partial(dict.__getitem__, load_ppo_models(policy, path)), ("reward_model", "value_model")):
        assert not any("lora" in name for name, _ in merged.named_parameters())
        # PEFT freezes what it loads, and a value model has to learn.
        assert all(parameter.requires_grad for parameter in merged.parameters())
        torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits)
