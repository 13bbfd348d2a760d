"""
From an SFT model to an aligned one: train a reward model by SSRM, train the policy on it by DPO or RLOO, and count how
often its completions win over the ones from before. The judge of that is a reward model with labels of its own.

    python recipes/pipeline.py --config recipes/pipeline.yaml

Several GPUs, with DDP:

    accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml recipes/pipeline.py \
        --config recipes/pipeline.yaml

LoRA, and LoRA on a 4-bit base (QLoRA): add `--use_peft`, and `--load_in_4bit`.

The dataset has pairs: `prompt`, `chosen` and `rejected`. Its prompts are split into four parts that share none: the
labeled pairs, the pool, the pairs that the judge is trained on, and the prompts that the win rate is counted on.
Finished steps are kept in `output_dir`; started again, the script goes on with the next one.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
from trl_ssrm.cli.errors import running_script
from trl_ssrm.io.files import write_record
from trl_ssrm.io.storage import changed_facts


@dataclass
class PipelineArguments(ScriptArguments):
    """Arguments of the pipeline, beside the arguments of the reward models."""

    num_labeled: int = field(default=500, metadata={"help": "Prompts whose pairs are labeled."})
    num_unlabeled: int = field(default=4000, metadata={"help": "Prompts of the pool; the policy trains on them too."})
    num_judge: int = field(default=4000, metadata={"help": "Prompts whose pairs the judge is trained on."})
    num_eval: int = field(default=256, metadata={"help": "Prompts that the win rate is counted on."})
    method: str = field(default="dpo", metadata={"help": "How the policy is trained.", "choices": ["dpo", "rloo"]})
    policy_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the policy."})
    policy_num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of the policy over the pool."})
    num_completions: int = field(default=4, metadata={"help": "Completions of a prompt, to learn from and to judge."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest completion in tokens."})
    min_confidence: float = field(default=0.5, metadata={"help": "Least confidence of a pair for DPO, in [0.5, 1)."})


def split_by_prompt(dataset: Dataset, sizes: dict[str, int], seed: int) -> dict[str, tuple[Dataset, Dataset]]:
    """Parts of so many prompts that share none: their pairs, and their prompts."""
    dataset, rows_of = dataset.map(maybe_extract_prompt), {}
    for row, prompt in enumerate(dataset["prompt"]):
        rows_of.setdefault(str(prompt), []).append(row)
    groups = list(rows_of.values())
    if len(groups) < sum(sizes.values()):
        raise ValueError(f"{sum(sizes.values())} prompts are asked for, and the data has {len(groups)}; lower them.")
    drawn, parts = iter(np.random.default_rng(seed).permutation(len(groups)).tolist()), {}
    for name, size in sizes.items():
        own = [groups[next(drawn)] for _ in range(size)]
        prompts = dataset.select([rows[0] for rows in own]).select_columns("prompt")
        parts[name] = dataset.select([row for rows in own for row in rows]), prompts
    return parts


def win_rates(scorer: str, before: Dataset, after: Dataset, num_completions: int) -> np.ndarray:
    """For each prompt, how many of the completions after win over one before; a tie counts half."""
    function, rewards = SSRMRewardFunction(scorer), []
    for part in (before, after):
        own = [function.score([row["prompt"]] * len(row["completions"]), row["completions"]) for row in part]
        # A completion without text was left out; it loses to any other.
        padded = [np.pad(each, (0, num_completions - len(each)), constant_values=-np.inf) for each in own]
        rewards.append(np.stack(padded))
    is_more, is_less = (compare(rewards[1][:, :, None], rewards[0][:, None, :]) for compare in (np.greater, np.less))
    return ((1 + is_more.astype(float) - is_less) / 2).mean(axis=(1, 2))


class Pipeline:
    """The trainings and the generation, each with the settings that all of them share."""

    def __init__(self, script_args: PipelineArguments, training_args: SSRMConfig, model_args: ModelConfig):
        self.script_args, self.training_args, self.model_args = script_args, training_args, model_args
        self.output_dir, self.sft_model = Path(training_args.output_dir), model_args.model_name_or_path
        self.state, self.quantization = PartialState(), get_quantization_config(model_args)
        self.loading = {"revision": model_args.model_revision, "attn_implementation": model_args.attn_implementation}
        training_args.model_init_kwargs = {**self.loading, "dtype": model_args.dtype}

    def check_settings(self) -> None:
        """Keep the settings in `output_dir`, and refuse to go on there with others."""
        settings = asdict(self.script_args) | asdict(self.model_args)
        settings |= {name: getattr(self.training_args, name) for name in ("num_train_epochs", "learning_rate", "seed")}
        job = self.output_dir / self.script_args.method / "job.json"
        if job.is_file() and (changed := changed_facts(job, settings)):
            raise ValueError(
                f"{self.output_dir} was made with other settings: {changed}. Choose another `output_dir`."
            )
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            write_record(job, settings)

    def split(self) -> dict[str, tuple[Dataset, Dataset]]:
        """The four parts of the dataset, each as its pairs and its prompts."""
        args = self.script_args
        dataset = load_dataset(args.dataset_name, name=args.dataset_config, split=args.dataset_train_split)
        sizes = {"labeled": args.num_labeled, "unlabeled": args.num_unlabeled}
        sizes |= {"judge": args.num_judge, "eval": args.num_eval}
        parts = split_by_prompt(dataset, sizes, self.training_args.seed)
        self.state.print("Pairs: " + ", ".join(f"{len(pairs)} {name}" for name, (pairs, _) in parts.items()))
        return parts

    def train_reward_model(self, name: str, labeled: Dataset, unlabeled: Dataset | None) -> str:
        """Directory of a reward model, with rounds on a pool or on labels alone."""
        directory = self.output_dir / name
        if not is_done(directory):
            trainer = SSRMTrainer(
                model=self.sft_model,
                args=replace(self.training_args, output_dir=str(directory)),
                train_dataset=labeled,
                unlabeled_dataset=unlabeled,
                peft_config=get_peft_config(replace(self.model_args, lora_task_type="SEQ_CLS")),
                quantization_config=self.quantization,
            )
            trainer.train(resume_from_checkpoint=unlabeled is not None and trainer.run.has_run)
            self.save(trainer, directory)
        return str(directory)

    def train_policy(self, reward_model: str, prompts: Dataset) -> str:
        """Directory of the policy that was trained on the reward model."""
        directory = self.output_dir / self.script_args.method
        if not is_done(directory):
            make_trainer = self.dpo_trainer if self.script_args.method == "dpo" else self.rloo_trainer
            trainer = make_trainer(reward_model, prompts, output_dir=str(directory), **self.policy_settings())
            trainer.train()
            self.save(trainer, directory)
        return str(directory)

    def policy_settings(self) -> dict[str, Any]:
        """Settings of the policy's trainer, some of them the same as for the reward model."""
        names = ("bf16", "gradient_checkpointing", "seed", "use_cpu", "report_to", "logging_steps", "disable_tqdm")
        names += ("per_device_train_batch_size", "gradient_accumulation_steps", "model_init_kwargs")
        settings = {name: getattr(self.training_args, name) for name in names}
        settings |= {"save_strategy": "no", "learning_rate": self.script_args.policy_learning_rate}
        return settings | {"num_train_epochs": self.script_args.policy_num_train_epochs}

    def dpo_trainer(self, reward_model: str, prompts: Dataset, **settings: Any) -> DPOTrainer:
        completions = self.complete(self.sft_model, prompts, "_completions")
        confidence = self.script_args.min_confidence
        labels = label_preferences(
            reward_model, completions, str(self.output_dir / "_labels"), min_confidence=confidence
        )
        return DPOTrainer(self.sft_model, args=DPOConfig(**settings), train_dataset=labels, **self.adapter())

    def rloo_trainer(self, reward_model: str, prompts: Dataset, **settings: Any) -> RLOOTrainer:
        settings |= {"num_generations": self.script_args.num_completions}
        settings |= {"max_completion_length": self.script_args.max_new_tokens}
        function = SSRMRewardFunction(reward_model)
        return RLOOTrainer(
            self.sft_model, function, args=RLOOConfig(**settings), train_dataset=prompts, **self.adapter()
        )

    def adapter(self) -> dict[str, Any]:
        """LoRA and quantization of the policy, where they are asked for."""
        return {"peft_config": get_peft_config(self.model_args), "quantization_config": self.quantization}

    def save(self, trainer: SSRMTrainer | DPOTrainer | RLOOTrainer, directory: Path) -> None:
        """Save a model whose training has ended, and note that it has."""
        trainer.save_model(str(directory))
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            (directory / "done").touch()
        self.state.wait_for_everyone()

    def complete(self, model: str, prompts: Dataset, name: str) -> Dataset:
        """Completions of the prompts by a policy; the ones that are in `output_dir` are not made again."""
        # The trained policy is in a directory, whole or as an adapter that names its base.
        loading = {**self.loading, "quantization_config": self.quantization} if model == self.sft_model else {}
        return generate_completions(
            model,
            prompts,
            str(self.output_dir / name),
            num_completions=self.script_args.num_completions,
            max_new_tokens=self.script_args.max_new_tokens,
            batch_size=self.training_args.per_device_train_batch_size,
            dtype=self.model_args.dtype,
            model_init_kwargs=loading,
            trust_remote_code=self.training_args.trust_remote_code,
            seed=self.training_args.seed,
        )


def is_done(directory: Path) -> bool:
    """Whether a training has ended and its model is saved."""
    return (directory / "done").is_file()


def main(script_args: PipelineArguments, training_args: SSRMConfig, model_args: ModelConfig) -> None:
    pipeline = Pipeline(script_args, training_args, model_args)
    pipeline.check_settings()
    parts = pipeline.split()
    (labeled, _), (unlabeled, prompts), (judge_pairs, _), (_, eval_prompts) = parts.values()

    # The reward model, the judge on labels of its own, and the policy on the prompts of the pool.
    reward_model = pipeline.train_reward_model("reward_model", labeled, unlabeled)
    judge = pipeline.train_reward_model("judge", judge_pairs, None)
    policy = pipeline.train_policy(reward_model, prompts)

    # Before and after, on prompts that were in no training.
    before = pipeline.complete(model_args.model_name_or_path, eval_prompts, "_eval_before")
    after = pipeline.complete(policy, eval_prompts, f"_eval_{script_args.method}")
    for title, scorer in (("the judge", judge), ("the reward model it was trained on", reward_model)):
        wins = win_rates(scorer, before, after, script_args.num_completions)
        interval = 1.96 * wins.std(ddof=1) / math.sqrt(len(wins))
        pipeline.state.print(
            f"Win rate after over before, by {title}: {wins.mean():.3f} ± {interval:.3f} "
            f"(95 % over {len(wins)} prompts; one training run)"
        )


if __name__ == "__main__":
    parser = TrlParser((PipelineArguments, SSRMConfig, ModelConfig))
    with running_script():
        main(*parser.parse_args_and_config())
