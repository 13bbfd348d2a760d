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
from dataclasses import asdict, dataclass, field, replace
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
from trl_ssrm.io.files import write_record
from trl_ssrm.io.storage import changed_facts


@dataclass
class PipelineArguments(ScriptArguments):
    """Arguments of the pipeline besides those of the reward models; the `help` of each says what it is."""

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


def main(script_args: PipelineArguments, training_args: SSRMConfig, model_args: ModelConfig) -> None:
    output_dir, sft_model = Path(training_args.output_dir), model_args.model_name_or_path
    state, quantization = PartialState(), get_quantization_config(model_args)
    model_init_kwargs = {"revision": model_args.model_revision, "attn_implementation": model_args.attn_implementation}
    training_args.model_init_kwargs = {**model_init_kwargs, "dtype": model_args.dtype}
    policy, settings = output_dir / script_args.method, asdict(script_args) | asdict(model_args)
    settings |= {name: getattr(training_args, name) for name in ("num_train_epochs", "learning_rate", "seed")}
    job = policy / "job.json"
    if job.is_file() and (changed := changed_facts(job, settings)):
        raise ValueError(f"{output_dir} was made with other settings: {changed}. Choose another `output_dir`.")
    state.wait_for_everyone()
    if state.is_main_process:
        write_record(job, settings)
    dataset = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, split=script_args.dataset_train_split
    )
    sizes = {name: settings[f"num_{name}"] for name in ("labeled", "unlabeled", "judge", "eval")}
    parts = split_by_prompt(dataset, sizes, training_args.seed)
    state.print("Pairs: " + ", ".join(f"{len(pairs)} {name}" for name, (pairs, _) in parts.items()))

    def train(directory: Path, make_trainer) -> str:
        if not (directory / "done").is_file():
            trainer = make_trainer()
            trainer.train(resume_from_checkpoint=getattr(trainer, "has_pool", False) and trainer.run.has_run)
            trainer.save_model(str(directory))
            state.wait_for_everyone()
            if state.is_main_process:
                (directory / "done").touch()
            state.wait_for_everyone()
        return str(directory)

    def reward_trainer(directory: Path, labeled: Dataset, unlabeled: Dataset | None) -> SSRMTrainer:
        return SSRMTrainer(
            model=sft_model,
            args=replace(training_args, output_dir=str(directory)),
            train_dataset=labeled,
            unlabeled_dataset=unlabeled,
            peft_config=get_peft_config(replace(model_args, lora_task_type="SEQ_CLS")),
            quantization_config=quantization,
        )

    def complete(model: str, prompts: Dataset, name: str) -> Dataset:
        return generate_completions(
            model,
            prompts,
            str(output_dir / name),
            num_completions=script_args.num_completions,
            max_new_tokens=script_args.max_new_tokens,
            batch_size=training_args.per_device_train_batch_size,
            dtype=model_args.dtype,
            model_init_kwargs={**model_init_kwargs, "quantization_config": quantization} if model == sft_model else {},
            trust_remote_code=training_args.trust_remote_code,
            seed=training_args.seed,
        )

    def policy_trainer() -> DPOTrainer | RLOOTrainer:
        names = ("bf16", "gradient_checkpointing", "seed", "use_cpu", "report_to", "logging_steps", "disable_tqdm")
        names += ("per_device_train_batch_size", "gradient_accumulation_steps", "model_init_kwargs")
        shared = {name: getattr(training_args, name) for name in names}
        shared |= {"output_dir": str(policy), "save_strategy": "no", "learning_rate": script_args.policy_learning_rate}
        shared |= {"num_train_epochs": script_args.policy_num_train_epochs}
        models = {"peft_config": get_peft_config(model_args), "quantization_config": quantization}
        if script_args.method == "dpo":
            completions = complete(sft_model, parts["unlabeled"][1], "_completions")
            confidence = script_args.min_confidence
            labels = label_preferences(
                reward_model, completions, str(output_dir / "_labels"), min_confidence=confidence
            )
            return DPOTrainer(sft_model, args=DPOConfig(**shared), train_dataset=labels, **models)
        shared |= {"num_generations": script_args.num_completions, "max_completion_length": script_args.max_new_tokens}
        function, prompts = SSRMRewardFunction(reward_model), parts["unlabeled"][1]
        return RLOOTrainer(sft_model, function, args=RLOOConfig(**shared), train_dataset=prompts, **models)

    # The reward model, the judge on labels of its own, and the policy on the prompts of the pool.
    directory = output_dir / "reward_model"
    labeled, unlabeled = parts["labeled"][0], parts["unlabeled"][0]
    reward_model = train(directory, lambda: reward_trainer(directory, labeled, unlabeled))
    judge = train(output_dir / "judge", lambda: reward_trainer(output_dir / "judge", parts["judge"][0], None))
    train(policy, policy_trainer)

    # Before and after, on prompts that nothing was trained on.
    before = complete(sft_model, parts["eval"][1], "_eval_before")
    after = complete(str(policy), parts["eval"][1], f"_eval_{script_args.method}")
    for title, scorer in (("the judge", judge), ("the reward model it was trained on", reward_model)):
        wins = win_rates(scorer, before, after, script_args.num_completions)
        interval = 1.96 * wins.std(ddof=1) / math.sqrt(len(wins))
        state.print(
            f"Win rate after over before, by {title}: {wins.mean():.3f} ± {interval:.3f} "
            f"(95 % over {len(wins)} prompts; one training run)"
        )


if __name__ == "__main__":
    parser = TrlParser((PipelineArguments, SSRMConfig, ModelConfig))
    main(*parser.parse_args_and_config())
