"""
Train a policy by Online DPO: two completions a prompt, and the SSRM reward model chooses the better one.

    python recipes/online_dpo.py --config recipes/online_dpo.yaml --reward_model_name_or_path Qwen2.5-0.5B-SSRM

Several GPUs, with DDP or DeepSpeed:

    accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml recipes/online_dpo.py \
        --config recipes/online_dpo.yaml --reward_model_name_or_path Qwen2.5-0.5B-SSRM

LoRA, and LoRA on a 4-bit base (QLoRA): add `--use_peft --learning_rate 1.0e-4`, and `--load_in_4bit`.

Online DPO is experimental in TRL, and its place may change.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from trl_ssrm import SSRMRewardFunction
from trl_ssrm.cli.errors import running_script


@dataclass
class OnlineDPOScriptArguments(ScriptArguments):
    """Arguments of the script, beside the arguments of the trainer."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory that `ssrm.py` saved, with a model or an adapter."}
    )
    reward_model_dtype: str = field(default="float32", metadata={"help": "Precision of the reward model."})


def main(script_args: OnlineDPOScriptArguments, training_args: OnlineDPOConfig, model_args: ModelConfig) -> None:
    if script_args.reward_model_name_or_path is None:
        raise ValueError("Pass `--reward_model_name_or_path`, the directory that `ssrm.py` saved.")
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    train_dataset = dataset[script_args.dataset_train_split]

    # The directory itself works too: `reward_funcs=script_args.reward_model_name_or_path`. `SSRMRewardFunction` checks
    # it before any work, and reads the completions with the tokenizer and the chat template of the reward model.
    reward_function = SSRMRewardFunction(
        script_args.reward_model_name_or_path,
        dtype=script_args.reward_model_dtype,
        trust_remote_code=training_args.trust_remote_code,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, padding_side="left"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    peft_config = get_peft_config(model_args)
    # Both models are loaded here: under DeepSpeed ZeRO-3 the trainer can't copy the policy.
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            attn_implementation=model_args.attn_implementation,
            dtype=model_args.dtype,
            quantization_config=get_quantization_config(model_args),
        )
        if needed
        else None
        for needed in (True, peft_config is None)
    )
    trainer = OnlineDPOTrainer(
        model=policy,
        ref_model=reference,
        processing_class=tokenizer,
        reward_funcs=reward_function,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((OnlineDPOScriptArguments, OnlineDPOConfig, ModelConfig))
    with running_script():
        main(*parser.parse_args_and_config())
