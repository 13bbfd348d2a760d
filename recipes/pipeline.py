"""
From an SFT model to an aligned one: train a reward model by SSRM, train the policy on it by DPO or RLOO, and count how
often its completions win over those from before, as judged by a reward model that neither training ever saw.

    python recipes/pipeline.py --config recipes/pipeline.yaml

Several GPUs, with DDP:

    accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml recipes/pipeline.py \
        --config recipes/pipeline.yaml

LoRA, and LoRA on a 4-bit base (QLoRA): add `--use_peft`, and `--load_in_4bit`.

The dataset has pairs: `prompt`, `chosen` and `rejected`. Its prompts are split into four parts that share none: the
labeled pairs, the pool, the pairs that the judge is trained on, and the prompts that the win rate is counted on. What
is done is kept in `output_dir`; started again, the script goes on with what is missing.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, load_dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    RLOOConfig,
    RLOOTrainer,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
    maybe_extract_prompt,
)

from trl_ssrm import SSRMConfig, SSRMRewardFunction, SSRMTrainer, generate_completions, label_preferences


@dataclass
class PipelineArguments(ScriptArguments):
    """Arguments of the pipeline besides those of the reward models; the `help` of each says what it is."""

    num_labeled: int = field(default=500, metadata={"help": "Prompts whose pairs are labeled."})
    num_unlabeled: int = field(default=4000, metadata={"help": "Prompts of the pool; the policy trains on them too."})
    num_judge: int = field(default=4000, metadata={"help": "Prompts whose pairs the judge is trained on."})
    num_eval: int = field(default=256, metadata={"help": "Prompts that the win rate is counted on."})
    judge_model_name_or_path: str | None = field(default=None, metadata={"help": "A judge that is already trained."})
    judge_num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of the judge."})
    method: str = field(default="dpo", metadata={"help": "How the policy is trained.", "choices": ["dpo", "rloo"]})
    policy_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the policy."})
    policy_num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of the policy over the pool."})
    policy_batch_size: int = field(default=8, metadata={"help": "Batch size of the policy, per device."})
    num_completions: int = field(default=4, metadata={"help": "Completions of a prompt to learn from."})
    num_eval_completions: int = field(default=2, metadata={"help": "Completions of a prompt to judge."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest completion in tokens."})
    min_confidence: float = field(default=0.5, metadata={"help": "Least confidence of a pair for DPO, in [0.5, 1)."})


def split_by_prompt(dataset: Dataset, sizes: dict[str, int], seed: int) -> dict[str, Dataset]:
    """Parts of a preference dataset, of so many prompts each, that share no prompt."""
    dataset = dataset.map(maybe_extract_prompt)
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(dataset["prompt"]):
        rows_of.setdefault(str(prompt), []).append(row)
    groups = [list(rows_of.values())[index] for index in np.random.default_rng(seed).permutation(len(rows_of))]
    if len(groups) < sum(sizes.values()):
        raise ValueError(f"{sum(sizes.values())} prompts are asked for, and the data has {len(groups)}; lower them.")
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = dataset.select([row for group in groups[start : start + size] for row in group])
        start += size
    return parts


def first_of_each_prompt(pairs: Dataset) -> Dataset:
    """The prompts of a part, each once."""
    first = {str(prompt): row for row, prompt in reversed(list(enumerate(pairs["prompt"])))}
    return pairs.select(sorted(first.values())).select_columns("prompt")


def main(script_args: PipelineArguments, training_args: SSRMConfig, model_args: ModelConfig) -> None:
    output_dir, sft_model = Path(training_args.output_dir), model_args.model_name_or_path
    say = PartialState().print
    training_args.model_init_kwargs = {"revision": model_args.model_revision, "dtype": model_args.dtype}
    quantization_config = get_quantization_config(model_args)
    dataset = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, split=script_args.dataset_train_split
    )
    names = ("labeled", "unlabeled", "judge", "eval")
    parts = split_by_prompt(dataset, {name: getattr(script_args, f"num_{name}") for name in names}, training_args.seed)
    say("Pairs: " + ", ".join(f"{len(part)} {name}" for name, part in parts.items()))

    def train_reward_model(name: str, pairs: Dataset, unlabeled: Dataset | None, **settings) -> str:
        directory = output_dir / name
        if not (directory / "done").is_file():
            trainer = SSRMTrainer(
                model=sft_model,
                args=replace(training_args, output_dir=str(directory), **settings),
                train_dataset=pairs,
                unlabeled_dataset=unlabeled,
                peft_config=get_peft_config(replace(model_args, lora_task_type="SEQ_CLS")),
                quantization_config=quantization_config,
            )
            trainer.train(resume_from_checkpoint=unlabeled is not None and trainer.run.has_run)
            finish(trainer, directory)
        return str(directory)

    def finish(trainer, directory: Path) -> None:
        trainer.save_model(str(directory))
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            (directory / "done").touch()
        trainer.accelerator.wait_for_everyone()

    # The reward model, and the judge on labels of its own.
    reward_model = train_reward_model("reward_model", parts["labeled"], parts["unlabeled"])
    judge_epochs = script_args.judge_num_train_epochs
    judge = script_args.judge_model_name_or_path or train_reward_model(
        "judge", parts["judge"], None, num_train_epochs=judge_epochs
    )

    # The policy, on the prompts of the pool.
    prompts, policy = first_of_each_prompt(parts["unlabeled"]), output_dir / "policy"
    shared = {name: getattr(training_args, name) for name in ("bf16", "gradient_checkpointing", "seed", "use_cpu")}
    shared |= {name: getattr(training_args, name) for name in ("report_to", "logging_steps", "disable_tqdm")}
    shared |= {
        "output_dir": str(policy),
        "learning_rate": script_args.policy_learning_rate,
        "num_train_epochs": script_args.policy_num_train_epochs,
        "per_device_train_batch_size": script_args.policy_batch_size,
        "model_init_kwargs": dict(training_args.model_init_kwargs),
        "save_strategy": "no",
    }
    models = {"peft_config": get_peft_config(model_args), "quantization_config": quantization_config}
    generation = {"max_new_tokens": script_args.max_new_tokens, "dtype": model_args.dtype, "seed": training_args.seed}
    if not (policy / "done").is_file() and script_args.method == "dpo":
        completions = generate_completions(
            sft_model,
            prompts,
            str(output_dir / "completions"),
            num_completions=script_args.num_completions,
            batch_size=script_args.policy_batch_size,
            **generation,
        )
        labels = label_preferences(
            reward_model, completions, str(output_dir / "labels"), min_confidence=script_args.min_confidence
        )
        trainer = DPOTrainer(sft_model, args=DPOConfig(**shared), train_dataset=labels, **models)
        trainer.train()
        finish(trainer, policy)
    elif not (policy / "done").is_file():
        settings = {
            "num_generations": script_args.num_completions,
            "max_completion_length": script_args.max_new_tokens,
        }
        trainer = RLOOTrainer(
            sft_model,
            reward_funcs=SSRMRewardFunction(reward_model),
            args=RLOOConfig(**shared, **settings),
            train_dataset=prompts,
            **models,
        )
        trainer.train()
        finish(trainer, policy)

    # Before and after, on prompts that nothing was trained on.
    eval_prompts, rewards = first_of_each_prompt(parts["eval"]), {}
    for name, model in (("before", sft_model), ("after", str(policy))):
        completions = generate_completions(
            model,
            eval_prompts,
            str(output_dir / f"eval_{name}"),
            num_completions=script_args.num_eval_completions,
            batch_size=script_args.policy_batch_size,
            **generation,
        )
        for scorer in (judge, reward_model):
            function = SSRMRewardFunction(scorer)
            rewards[name, scorer] = [
                function.score([row["prompt"]] * len(row["completions"]), row["completions"]) for row in completions
            ]
    for title, scorer in (("the judge", judge), ("the reward model it was trained on", reward_model)):
        # Every completion after against every one before; a prompt counts once, and a tie half.
        wins = np.array(
            [
                np.mean(np.sign(after[:, None] - before[None, :]) / 2 + 0.5)
                for before, after in zip(rewards["before", scorer], rewards["after", scorer], strict=True)
                if len(before) and len(after)
            ]
        )
        interval = 1.96 * wins.std(ddof=1) / math.sqrt(len(wins))
        say(f"Win rate after over before, by {title}: {wins.mean():.3f} ± {interval:.3f} ({len(wins)} prompts)")


if __name__ == "__main__":
    parser = TrlParser((PipelineArguments, SSRMConfig, ModelConfig))
    main(*parser.parse_args_and_config())
