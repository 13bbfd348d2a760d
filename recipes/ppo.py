"""
Train a policy by PPO: policy and reference from one checkpoint, reward and value model from an SSRM checkpoint.

TRL 1.12 is the last with PPO: `pip install ".[ppo]"`.

    python recipes/ppo.py --config recipes/ppo.yaml --reward_model_name_or_path Qwen2.5-0.5B-SSRM

Several GPUs, with DDP:

    accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml recipes/ppo.py \\
        --config recipes/ppo.yaml --reward_model_name_or_path Qwen2.5-0.5B-SSRM

LoRA, and LoRA on a 4-bit base (QLoRA): add `--use_peft`, and `--load_in_4bit --dtype bfloat16 --bf16 false`, since
`PPOTrainer` generates without autocast. LoRA covers the policy only; the value model is trained in full, so keep the
learning rate. The reward model may have been trained with LoRA too; its adapter is merged on loading.
"""

import os
from dataclasses import dataclass, field

from accelerate import PartialState
from datasets import Dataset, load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_ssrm import load_ppo_models
from trl_ssrm.cli.errors import running_script


try:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
except ImportError:
    raise SystemExit(
        "TRL removed PPO in 1.13: run `pip install '.[ppo]'` in the clone of trl-ssrm, or use recipes/rloo.py instead."
    ) from None


@dataclass
class PPOScriptArguments(ScriptArguments):
    """Arguments of the script, beside the arguments of the trainer."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory that `ssrm.py` saved, with a model or an adapter."}
    )
    max_prompt_length: int = field(default=512, metadata={"help": "Longer prompts, in tokens, are left out."})
    num_eval: int = field(
        default=64, metadata={"help": "Prompts held out for sample completions, of which the trainer shows one batch."}
    )


def main(script_args: PPOScriptArguments, training_args: PPOConfig, model_args: ModelConfig) -> None:
    if script_args.reward_model_name_or_path is None:
        raise ValueError("Pass `--reward_model_name_or_path`, the directory that `ssrm.py` saved.")
    peft_config = get_peft_config(model_args)
    if training_args.bf16:
        # `PPOTrainer` does not hand this setting to accelerate itself.
        os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16")
    # First of all: it checks that policy and reward model fit together.
    models = load_ppo_models(
        model_args.model_name_or_path,
        script_args.reward_model_name_or_path,
        with_ref_model=peft_config is None,
        dtype=model_args.dtype,
        model_init_kwargs={
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "quantization_config": get_quantization_config(model_args),
        },
    )
    tokenizer = models["processing_class"]

    def tokenize(row: dict) -> dict[str, list[int]]:
        if isinstance(row["prompt"], str):
            return {"input_ids": tokenizer(row["prompt"])["input_ids"]}
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        return {"input_ids": ids}

    def prepare(prompts: Dataset) -> Dataset:
        with PartialState().local_main_process_first():
            ids = prompts.map(tokenize, remove_columns=prompts.column_names, num_proc=training_args.dataset_num_proc)
            kept = ids.filter(lambda row: len(row["input_ids"]) <= script_args.max_prompt_length)
        PartialState().print(f"{len(kept)} of {len(ids)} prompts have at most {script_args.max_prompt_length} tokens.")
        return kept

    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    prompts = prepare(dataset[script_args.dataset_train_split])
    if len(prompts) <= script_args.num_eval:
        raise ValueError(f"`num_eval` is {script_args.num_eval}, and there are {len(prompts)} prompts; lower it.")
    trainer = PPOTrainer(
        args=training_args,
        train_dataset=prompts.select(range(script_args.num_eval, len(prompts))),
        eval_dataset=prompts.select(range(script_args.num_eval)),
        peft_config=peft_config,
        **models,
    )
    trainer.train()
    # With several processes, `save_model` of this trainer would save the value model too.
    policy = trainer.accelerator.unwrap_model(trainer.model).policy
    hub = {"push_to_hub": True, "repo_id": training_args.hub_model_id} if training_args.push_to_hub else {}
    if trainer.accelerator.is_main_process:
        policy.save_pretrained(training_args.output_dir, **hub)
        tokenizer.save_pretrained(training_args.output_dir, **hub)


if __name__ == "__main__":
    parser = TrlParser((PPOScriptArguments, PPOConfig, ModelConfig))
    with running_script():
        main(*parser.parse_args_and_config())
