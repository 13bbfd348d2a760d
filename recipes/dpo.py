"""
Label completions with an SSRM reward model, then train a policy on them by DPO.

The dataset has `prompt`, and may have `completions`; without them the policy generates its own. Completions and labels
are kept in `output_dir`. Started again, the script uses them.

    python recipes/dpo.py --config recipes/dpo.yaml --reward_model_name_or_path Qwen2.5-0.5B-SSRM

Several GPUs, with DDP, FSDP2 or DeepSpeed; the processes share generation and labeling:

    accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml recipes/dpo.py \\
        --config recipes/dpo.yaml --reward_model_name_or_path Qwen2.5-0.5B-SSRM

LoRA, and LoRA on a 4-bit base (QLoRA): add `--use_peft --learning_rate 1.0e-5`, and `--load_in_4bit`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_ssrm import SSRMRewardFunction, generate_completions, label_preferences
from trl_ssrm.cli.errors import running_script


@dataclass
class DPOScriptArguments(ScriptArguments):
    """Arguments of the script, beside the arguments of the trainer."""

    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory that `ssrm.py` saved, with a model or an adapter."}
    )
    reward_model_dtype: str = field(default="float32", metadata={"help": "Precision of the reward model."})
    num_prompts: int | None = field(default=None, metadata={"help": "Prompts to use. Default: all."})
    num_completions: int = field(default=4, metadata={"help": "Completions of a prompt, if the dataset has none."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest completion in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    generation_batch_size: int = field(default=8, metadata={"help": "Prompts in a batch of generation."})
    use_vllm: bool = field(default=False, metadata={"help": "Whether to generate with vLLM, in one process."})
    pairing: str = field(
        default="best_vs_worst",
        metadata={"help": "Pairs of a prompt.", "choices": ["best_vs_worst", "best_vs_random", "all"]},
    )
    min_confidence: float = field(default=0.5, metadata={"help": "Least confidence of a pair, in [0.5, 1)."})


def main(script_args: DPOScriptArguments, training_args: DPOConfig, model_args: ModelConfig) -> None:
    if script_args.reward_model_name_or_path is None:
        raise ValueError("Pass `--reward_model_name_or_path`, the directory that `ssrm.py` saved.")
    output_dir, quantization = Path(training_args.output_dir), get_quantization_config(model_args)
    model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }
    # Loaded first, so that an unusable reward model is refused before the completions are generated.
    reward_function = SSRMRewardFunction(
        script_args.reward_model_name_or_path,
        dtype=script_args.reward_model_dtype,
        trust_remote_code=training_args.trust_remote_code,
    )
    prompts = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, split=script_args.dataset_train_split
    )
    if script_args.num_prompts is not None:
        prompts = prompts.select(range(min(script_args.num_prompts, len(prompts))))
    if "completions" not in prompts.column_names:
        prompts = generate_completions(
            model_args.model_name_or_path,
            prompts,
            # Files and folders with a leading "_" are not pushed to the hub.
            str(output_dir / "_completions"),
            num_completions=script_args.num_completions,
            max_new_tokens=script_args.max_new_tokens,
            temperature=script_args.temperature,
            batch_size=script_args.generation_batch_size,
            use_vllm=script_args.use_vllm,
            dtype=model_args.dtype,
            model_init_kwargs={}
            if script_args.use_vllm
            else {**model_init_kwargs, "quantization_config": quantization},
            trust_remote_code=training_args.trust_remote_code,
            seed=training_args.seed,
        )
    labeled = label_preferences(
        reward_function,
        prompts,
        str(output_dir / "_labels"),
        pairing=script_args.pairing,
        min_confidence=script_args.min_confidence,
        seed=training_args.seed,
    )

    # Its memory is for the trainer.
    del reward_function
    training_args.model_init_kwargs = {**model_init_kwargs, "dtype": model_args.dtype}
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=labeled,
        peft_config=get_peft_config(model_args),
        quantization_config=quantization,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((DPOScriptArguments, DPOConfig, ModelConfig))
    with running_script():
        main(*parser.parse_args_and_config())
