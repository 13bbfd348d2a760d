import importlib.util
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from accelerate.commands.config.config_args import load_config_from_file
from conftest import letter_rows
from datasets import Dataset
from packaging.version import Version
from processes import run_python
from recipe_runs import ON_CPU, RECIPES, arguments, run_recipe
from safetensors.torch import load_file

from trl_ssrm import Comparison, PairwiseJudge, SSRMRewardFunction, generate_completions
from trl_ssrm.scoring.pair_scores import sigmoid


pytestmark = pytest.mark.slow


HAS_PPO = Version(trl.__version__) < Version("1.13")
LORA = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "lora_r": 4}
# A high learning rate, since the runs are short.
LEARNING = {"learning_rate": 3e-3, "gradient_accumulation_steps": 1, "save_strategy": "no"}


def test_recommendation_learns_from_clicks_and_ranks_books(bert, tmp_path):
    settings = {
        "model_name_or_path": bert,
        "eos_token": "<|eos|>",
        "max_length": 512,
        "output_dir": tmp_path / "run",
        "num_labeled": 16,
        "num_unlabeled": 24,
        "num_held_out": 8,
        "num_train_epochs": 1,
        "num_rounds": 1,
        "confidence_threshold": 0.5,
        "all_labels_num_train_epochs": 1,
    }
    output = run_recipe("recommendation", **settings)
    table = output[output.index("accuracy  log-loss") :].splitlines()
    titles = [line[:22].strip() for line in table[1:5]]
    assert titles[0] in ("labels alone", "pretraining and labels")
    assert titles[1:] == ["SSRM, round 1", "all labels", "liking itself"]
    first, mean, best = map(
        float, re.search(r"of 100 readers: ([-.\d]+) \(any book ([-.\d]+), the best ([-.\d]+)", output).groups()
    )
    assert first <= best and mean < best
    reward = SSRMRewardFunction(str(tmp_path / "run"))
    assert len(reward(["A reader liked: a book. "] * 2, ["a grim book", "a warm book"])) == 2


def test_clicks_of_the_recommendation_follow_the_liking():
    recipe = runpy.run_path(str(RECIPES / "recommendation.py"))
    readers = [recipe["Reader"](np.random.default_rng(seed)) for seed in range(2000)]
    odds = np.array([reader.pair()["odds"] for reader in readers])
    # The log-odds give the probability of the click.
    for low, high in ((0.5, 1.5), (2.5, 3.5)):
        is_near = (abs(odds) > low) & (abs(odds) < high)
        expected = float(np.mean(1 / (1 + np.exp(-abs(odds[is_near])))))
        assert np.mean(odds[is_near] > 0) == pytest.approx(expected, abs=0.06)


# ---- From a reward model to a policy ----


@pytest.fixture(scope="session")
def letters(tmp_path_factory) -> Path:
    """Pairs in which letters from the first half of the alphabet are better, and prompts, as `load_dataset` reads them."""
    root = tmp_path_factory.mktemp("letters")
    for name, rows in (
        ("pairs/train", letter_rows(256, seed=1)),
        ("pairs/test", letter_rows(64, seed=2)),
        ("prompts/train", [{"prompt": row["prompt"]} for row in letter_rows(256, seed=4)]),
    ):
        (root / name).parent.mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(str(root / f"{name}.parquet"))
    return root


def reward_model_settings(policy: str, letters: Path, output_dir: Path) -> dict:
    return {
        "model_name_or_path": policy,
        "dataset_name": letters / "pairs",
        "output_dir": output_dir,
        "num_labeled": 64,
        "num_calibration": 32,
        "num_folds": 0,
        "num_train_epochs": 8,
        "round_num_train_epochs": 2,
        "num_rounds": 1,
        "padding_token": "<|pad|>",
        "per_device_train_batch_size": 8,
        **LEARNING,
    }


@pytest.fixture(scope="session")
def reward_model(policy, letters, tmp_path_factory) -> str:
    """Directory that `ssrm.py` saved."""
    directory = tmp_path_factory.mktemp("reward_model")
    settings = {**ON_CPU, **reward_model_settings(policy, letters, directory)}
    done = run_python(arguments("ssrm", settings), {"PYTHONPATH": str(RECIPES.parent)})
    assert done.returncode == 0, done.stderr[-3000:]
    return str(directory)


def sampled_rewards(policy: str, reward_model: str, directory: Path) -> np.ndarray:
    """Rewards of completions of prompts that were in no training."""
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in letter_rows(64, seed=3)])
    completions = generate_completions(
        policy, prompts, str(directory), num_completions=4, max_new_tokens=8, batch_size=64, disable_tqdm=True
    )
    rows = [(row["prompt"], completion) for row in completions for completion in row["completions"]]
    return np.array(SSRMRewardFunction(reward_model)(*zip(*rows, strict=True)))


# Names of the length of a completion and of the number of steps in each trainer.
LENGTHS = {
    "rloo": {"num_generations": 4, "max_completion_length": 8, "max_steps": 30},
    "grpo": {"num_generations": 4, "max_completion_length": 8, "max_steps": 30},
    "online_dpo": {"max_new_tokens": 8, "max_length": 64, "max_steps": 30, "missing_eos_penalty": 0},
    "dpo": {"max_new_tokens": 8, "num_train_epochs": 2, "min_confidence": 0.5},
    "ppo": {
        "response_length": 8,
        "total_episodes": 32 * 30,
        "local_rollout_forward_batch_size": 32,
        "num_sample_generations": 0,
        "num_eval": 16,
        "missing_eos_penalty": 0.1,
    },
}
POLICY_RECIPES = ["rloo", "grpo", "online_dpo", "dpo", pytest.param("ppo", marks=pytest.mark.skipif("not HAS_PPO"))]


def policy_settings(name: str, policy: str, letters: Path, reward_model: str, output_dir: Path) -> dict:
    return {
        "model_name_or_path": policy,
        "dataset_name": letters / "prompts",
        "reward_model_name_or_path": reward_model,
        "output_dir": output_dir,
        "per_device_train_batch_size": 32,
        **({} if name == "ppo" else {"reward_model_dtype": "float32"}),
        **LENGTHS[name],
        **LEARNING,
    }


@pytest.mark.parametrize("name", POLICY_RECIPES)
def test_policy_gets_higher_rewards_than_it_started_with(name, policy, letters, reward_model, tmp_path):
    run_recipe(name, **policy_settings(name, policy, letters, reward_model, tmp_path / "trained"))
    before = sampled_rewards(policy, reward_model, tmp_path / "before")
    after = sampled_rewards(str(tmp_path / "trained"), reward_model, tmp_path / "after")
    noise = np.hypot(before.std() / np.sqrt(len(before)), after.std() / np.sqrt(len(after)))
    assert after.mean() - before.mean() > 8 * noise, (before.mean(), after.mean(), noise)


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "4-bit"])
@pytest.mark.parametrize("name", ["ssrm", *POLICY_RECIPES])
def test_adapters_are_trained_on_whole_and_on_quantized_models(
    name, quantized, policy, letters, reward_model, tmp_path
):
    trained = tmp_path / "trained"
    if name == "ssrm":
        settings = {**reward_model_settings(policy, letters, trained), "num_train_epochs": 1}
    else:
        settings = policy_settings(name, policy, letters, reward_model, trained)
        settings |= {"max_steps": 2} if name != "ppo" else {"total_episodes": 64}
    run_recipe(name, **settings, **LORA, load_in_4bit=quantized, dtype="float32")
    weights = load_file(trained / "adapter_model.safetensors")
    assert any(weight.abs().sum() > 0 for key, weight in weights.items() if "lora_B" in key)
    if name == "ssrm":
        assert {weight.dtype for key, weight in weights.items() if "score" in key} == {torch.float32}


def test_adapter_of_a_reward_model_trains_a_policy(policy, letters, tmp_path):
    settings = reward_model_settings(policy, letters, tmp_path / "adapter")
    run_recipe("ssrm", **settings, **LORA)
    for name in ("rloo", *(["ppo"] if HAS_PPO else [])):
        settings = policy_settings(name, policy, letters, tmp_path / "adapter", tmp_path / name)
        run_recipe(name, **{**settings, **({"max_steps": 2} if name == "rloo" else {"total_episodes": 64})})
        assert (tmp_path / name / "model.safetensors").is_file()


@pytest.mark.skipif(HAS_PPO, reason="this TRL has PPO")
def test_ppo_says_what_to_install_where_trl_has_none():
    with pytest.raises(
        SystemExit, match=r"run `pip install '.\[ppo\]'` in the clone of trl-ssrm, or use recipes/rloo.py"
    ):
        run_recipe("ppo")


@pytest.mark.parametrize("name", POLICY_RECIPES)
def test_reward_model_that_was_not_trained_is_refused_before_any_work(name, policy, letters, tmp_path):
    settings = policy_settings(name, policy, letters, policy, tmp_path / "trained")
    with pytest.raises(SystemExit, match="error: .*holds no weights for score.weight, which would be random"):
        run_recipe(name, **settings)
    with pytest.raises(SystemExit, match=rf"^{name}.py: error: Pass `--reward_model_name_or_path`"):
        del settings["reward_model_name_or_path"]
        run_recipe(name, **settings)
    assert not (tmp_path / "trained" / "_completions").exists()


def test_pairwise_model_is_trained_by_the_same_recipe(policy, letters, tmp_path):
    settings = reward_model_settings(policy, letters, tmp_path / "run")
    # The tokenizer of the policy has small letters only.
    Comparison(labels=["a", "b"]).save_pretrained(str(tmp_path / "asked"))
    run_recipe("ssrm", **settings, preference_model="pairwise", comparison=tmp_path / "asked")
    judge = PairwiseJudge(str(tmp_path / "run"))
    assert judge.comparison.labels == ["a", "b"]
    rows = letter_rows(64, seed=2)
    found = judge.judge([row["prompt"] for row in rows], [(row["chosen"], row["rejected"]) for row in rows])
    assert (np.array(found) > 0.5).mean() > 0.7


def test_reward_model_teaches_another_on_the_pool(policy, letters, reward_model, tmp_path):
    settings = {**reward_model_settings(policy, letters, tmp_path / "run"), "num_labeled": 8, "num_train_epochs": 1}
    run_recipe("ssrm", **settings, teacher_model_name_or_path=reward_model)
    kept = Dataset.from_parquet(str(tmp_path / "run" / "_rounds" / "round_1" / "pseudo_labels.parquet"))
    teacher = SSRMRewardFunction(reward_model)
    better, worse = (teacher.score(kept["prompt"], kept[side]) for side in ("chosen", "rejected"))
    assert len(kept) > 100
    np.testing.assert_allclose(
        kept["confidence"], sigmoid(np.subtract(better, worse) / teacher.temperature), atol=1e-4
    )
    assert f"which {reward_model} has labeled." in (tmp_path / "run" / "README.md").read_text()


def test_more_rows_than_there_are_and_unknown_padding_are_refused(policy, letters, tmp_path):
    settings = reward_model_settings(policy, letters, tmp_path)
    with pytest.raises(
        SystemExit,
        match="^ssrm.py: error: 332 labeled pairs are asked for, and the data has 256; lower the two numbers",
    ):
        run_recipe("ssrm", **{**settings, "num_labeled": 300})
    with pytest.raises(SystemExit, match="error: All rows are labeled pairs; lower `num_labeled`"):
        run_recipe("ssrm", **{**settings, "num_labeled": 224})
    with pytest.raises(SystemExit, match="error: `padding_token` '<none>' is not in the vocabulary"):
        run_recipe("ssrm", **{**settings, "padding_token": "<none>"})


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_script_of_trl_takes_the_reward_function_by_its_import_path(kind, policy, letters, reward_model, tmp_path):
    settings = {**policy_settings(kind, policy, letters, reward_model, tmp_path), **ON_CPU, "max_steps": 2}
    del settings["reward_model_name_or_path"], settings["reward_model_dtype"]
    command = [importlib.util.find_spec(f"trl.scripts.{kind}").origin, "--reward_funcs", "trl_ssrm.ssrm_reward"]
    for name, value in {**settings, "report_to": "none", "logging_steps": 1}.items():
        command += [f"--{name}", str(value)]
    done = run_python(command, {"PYTHONPATH": str(RECIPES.parent), "SSRM_REWARD_MODEL": reward_model})
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"rewards/{Path(reward_model).name}/mean" in done.stdout


@pytest.mark.parametrize("name", POLICY_RECIPES)
def test_two_processes_train_a_policy(name, policy, letters, reward_model, tmp_path):
    settings = {**policy_settings(name, policy, letters, reward_model, tmp_path), **ON_CPU}
    settings |= {"per_device_train_batch_size": 4, "logging_steps": 1}
    settings |= {"dpo": {"num_prompts": 32}, "ppo": {"total_episodes": 16}}.get(name, {"max_steps": 2})
    done = run_python(arguments(name, settings), {"PYTHONPATH": str(RECIPES.parent)}, num_processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["dpo", "rloo"])
def test_pipeline_ends_with_a_policy_that_wins(method, policy, letters, tmp_path):
    settings = {
        "model_name_or_path": policy,
        "dataset_name": letters / "pairs",
        "output_dir": tmp_path,
        "num_labeled": 48,
        "num_unlabeled": 96,
        "num_judge": 64,
        "num_eval": 48,
        "num_train_epochs": 8,
        "round_num_train_epochs": 1,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 16,
        "method": method,
        "policy_learning_rate": 3e-3,
        "policy_num_train_epochs": 2,
        "max_new_tokens": 8,
        "min_confidence": 0.5,
    }
    first = run_recipe("pipeline", **settings)
    wins, interval = map(float, re.search(r"by the judge: ([.\d]+) ± ([.\d]+)", first).groups())
    assert wins - 0.5 > 3 * interval, first
    assert "Pairs: 48 labeled, 96 unlabeled, 64 judge, 48 eval" in first
    # Started again, it has no step left to do.
    again = run_recipe("pipeline", **settings)
    assert first.splitlines()[-2:] == again.splitlines()[-2:] and "train_loss" not in again
    with pytest.raises(
        SystemExit, match=r"error: .*was made with other settings: `policy_learning_rate` \(0.003 then, 1.0 now\)"
    ):
        run_recipe("pipeline", **{**settings, "policy_learning_rate": 1.0})


def test_completion_without_text_loses_to_any_other(reward_model):
    win_rates = runpy.run_path(str(RECIPES / "pipeline.py"))["win_rates"]
    say = [{"role": "user", "content": "say 1"}]

    def completions(*texts: str) -> list:
        return [[{"role": "assistant", "content": text}] for text in texts]

    before = [{"prompt": say, "completions": completions("zzz", "yyy")}] * 3
    after = [{"prompt": say, "completions": completions(*texts)} for texts in (["aaa", "bbb"], ["aaa"], [])]
    found = win_rates(reward_model, Dataset.from_list(before), Dataset.from_list(after), 2)
    assert found.tolist() == [1.0, 0.5, 0.0]
    same = Dataset.from_list(before)
    assert win_rates(reward_model, same, same, 2).tolist() == [0.5] * 3


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_of_accelerate_is_one(path):
    config = load_config_from_file(str(path)).to_dict()
    kind = {"multi_gpu": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[path.stem]
    assert config["distributed_type"] == kind
    assert config["mixed_precision"] == "bf16"
    if kind == "FSDP":
        assert config["fsdp_config"]["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert config["deepspeed_config"]["zero_stage"] == int(path.stem[-1])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_is_on_the_map(path):
    assert f"[`{path.name}`]({path.name})" in (RECIPES / "README.md").read_text(encoding="utf-8")
    # The server has four flags and trains nothing.
    assert path.stem == "serve" or path.with_suffix(".yaml").is_file()
