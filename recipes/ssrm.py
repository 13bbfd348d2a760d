"""
Train a reward model from few labeled pairs and a pool without labels.

    python recipes/ssrm.py --config recipes/ssrm.yaml

Several GPUs, with DDP; FSDP2 and DeepSpeed work too, where the model does not fit on one:

    accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml recipes/ssrm.py --config recipes/ssrm.yaml

LoRA, and LoRA on a 4-bit base (QLoRA); the score head is trained in float32 either way:

    python recipes/ssrm.py --config recipes/ssrm.yaml --use_peft --learning_rate 1.0e-4
    python recipes/ssrm.py --config recipes/ssrm.yaml --use_peft --learning_rate 1.0e-4 --load_in_4bit

A large model learns from the labels, and teaches the small one on the pool:

    python recipes/ssrm.py --config recipes/ssrm.yaml --model_name_or_path Qwen/Qwen2.5-7B-Instruct --num_rounds 0 \\
        --use_peft --learning_rate 1.0e-4 --output_dir large
    python recipes/ssrm.py --config recipes/ssrm.yaml --teacher_model_name_or_path large
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_ssrm import PseudoLabelingCallback, SSRMConfig, SSRMTrainer
from trl_ssrm.alignment.labeling import load_labeler
from trl_ssrm.cli.errors import running_script
from trl_ssrm.data.prompts import split_by_prompt


@dataclass
class SSRMScriptArguments(ScriptArguments):
    """Arguments of the script, beside the arguments of the trainer."""

    num_labeled: int = field(default=2000, metadata={"help": "Rows of the training split whose labels are used."})
    num_calibration: int = field(default=0, metadata={"help": "Further labeled rows, to calibrate the confidence on."})
    unlabeled_dataset_name: str | None = field(
        default=None, metadata={"help": "Pool of pairs. Default: the other rows of `dataset_name`, labels hidden."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model that labels the pool. Default: the model that is trained."}
    )
    padding_token: str | None = field(
        default=None,
        metadata={"help": "Padding token. PPO needs one that is not the end token. Default: the tokenizer's own."},
    )


def main(script_args: SSRMScriptArguments, training_args: SSRMConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    train = dataset[script_args.dataset_train_split].shuffle(seed=training_args.seed)
    needed = script_args.num_labeled + script_args.num_calibration
    if len(train) < needed:
        raise ValueError(
            f"{needed} labeled pairs are asked for, and the data has {len(train)}; lower the two numbers."
        )
    # No prompt is in two of them.
    calibration, labeled, rest = split_by_prompt(train, [script_args.num_calibration, script_args.num_labeled])
    if script_args.unlabeled_dataset_name is not None:
        pool = load_dataset(script_args.unlabeled_dataset_name, split=script_args.dataset_train_split)
    elif len(rest):
        pool = rest
    else:
        raise ValueError("All rows are labeled pairs; lower `num_labeled`, or pass `--unlabeled_dataset_name`.")

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    if script_args.padding_token is not None and script_args.padding_token not in tokenizer.get_vocab():
        raise ValueError(
            f"`padding_token` {script_args.padding_token!r} is not in the vocabulary; choose one that is."
        )
    if script_args.padding_token is not None:
        tokenizer.pad_token = script_args.padding_token
    callbacks = []
    if (teacher := script_args.teacher_model_name_or_path) is not None:
        callbacks.append(PseudoLabelingCallback(teacher=load_labeler(teacher, dtype=model_args.dtype)))
    trainer = SSRMTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        processing_class=tokenizer,
        train_dataset=labeled,
        eval_dataset=dataset.get(script_args.dataset_test_split),
        unlabeled_dataset=pool,
        calibration_dataset=calibration if len(calibration) else None,
        callbacks=callbacks,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    # Started again after an interruption, it continues.
    trainer.train(resume_from_checkpoint=trainer.run.has_run)
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((SSRMScriptArguments, SSRMConfig, ModelConfig))
    with running_script():
        main(*parser.parse_args_and_config())
