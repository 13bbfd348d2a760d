"""
Train a policy by GRPO on the rewards of an SSRM reward model.

    python recipes/grpo.py --config recipes/grpo.yaml --reward_model_name_or_path Qwen2.5-0.5B-SSRM

Several GPUs, with DDP, FSDP2 or DeepSpeed:

    accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml recipes/grpo.py \
        --config recipes/grpo.yaml --reward_model_name_or_path Qwen2.5-0.5B-SSRM

LoRA, and LoRA on a 4-bit base (QLoRA): add `--use_peft --learning_rate 1.0e-4`, and `--load_in_4bit`.

The same in one line with TRL's own script, which takes a reward function by its import path:

    SSRM_REWARD_MODEL=Qwen2.5-0.5B-SSRM trl grpo --reward_funcs trl_ssrm.ssrm_reward --model_name_or_path ...
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_ssrm import SSRMRewardFunction
from trl_ssrm.cli.errors import running_script


@dataclass
class GRPOScriptArguments(ScriptArguments):
    """Arguments of the script, beside the arguments of the trainer."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory that `ssrm.py` saved, with a model or an adapter."}
    )
    reward_model_dtype: str = field(default="float32", metadata={"help": "Precision of the reward model."})


def main(script_args: GRPOScriptArguments, training_args: GRPOConfig, model_args: ModelConfig) -> None:
    if script_args.reward_model_name_or_path is None:
        raise ValueError("Pass `--reward_model_name_or_path`, the directory that `ssrm.py` saved.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    train_dataset = dataset[script_args.dataset_train_split]

    # The directory itself works too: `reward_funcs=script_args.reward_model_name_or_path`. `SSRMRewardFunction` checks
    # it before any work, and reads the completions with the tokenizer and the chat template of the reward model.
    reward_function = SSRMRewardFunction(
        script_args.reward_model_name_or_path,
        dtype=script_args.reward_model_dtype,
        trust_remote_code=training_args.trust_remote_code,
    )
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_function,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig))
    with running_script():
        main(*parser.parse_args_and_config())
