"""
A short run in a process of its own. Started by the tests of several processes and of faults; prints, as its last line, what
came out.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence

import conftest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

import trl_ssrm.scoring.score
from trl_ssrm import SSRMConfig, SSRMTrainer
from trl_ssrm.io.storage import content_hash
from trl_ssrm.models.sharding import whole_weights


def main(
    model: str,
    output_dir: str,
    resume: bool = False,
    lora: bool = False,
    stream: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    kill_in_scoring_for: int = 0,
    shard_tokens: int = 512,
    **settings,
) -> None:
    """`kill_in_scoring_for` is a round; the process that gets the second shard of its scores is killed."""
    # By default a few sequences a shard.
    trl_ssrm.scoring.score.SHARD_TOKENS = shard_tokens
    scored = []
    write_shard = trl_ssrm.scoring.score.write_tensors

    def count_shard(path, tensors, key):
        if trainer.round + 1 == kill_in_scoring_for and path.name.startswith("shard-00001"):
            os.kill(os.getpid(), signal.SIGKILL)
        scored.append([trainer.round + 1, int(path.name.split("-")[1])])
        write_shard(path, tensors, key)

    trl_ssrm.scoring.score.write_tensors = count_shard
    args = SSRMConfig(
        **{
            "output_dir": output_dir,
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2 if lora else 3e-3,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 3,
            "num_rounds": 2,
            "confidence_threshold": 0.6,
            "num_folds": 0,
            "round_init": "continue",
            "pseudo_label_type": "hard",
            "pool_per_round": "shard" if lora else "full",
            "max_unlabeled_samples": 40 if stream else None,
            # After a resumption within a logging interval, `Trainer` logs the mean over the rest of it.
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 3,
            "disable_tqdm": True,
            **settings,
        }
    )
    labeled, pool, held_out = (
        Dataset.from_list(conftest.preference_rows(num_rows, seed)) for num_rows, seed in ((16, 1), (40, 2), (12, 3))
    )
    trainer = SSRMTrainer(
        model,
        args,
        train_dataset=labeled,
        eval_dataset=held_out,
        unlabeled_dataset=pool.to_iterable_dataset() if stream else pool,
        peft_config=LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]) if lora else None,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: value.tolist() for name, value in sorted(whole_weights(trainer.unwrapped_model).items())}
    kept = [trainer.run.read_pseudo_labels(round)[0].to_dict() for round in range(1, len(trainer.round_history))]
    result = {
        "weights": content_hash(weights),
        "kept": [dict(zip(each["pair"], each["first_is_chosen"], strict=True)) for each in kept],
        "confidence": [each["confidence"] for each in kept],
        "facts": [
            {name: value for name, value in facts.items() if not name.startswith("scoring")}
            for facts in trainer.round_history
        ],
        "losses": [[log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log],
        "num_logs": len(trainer.state.log_history),
        "scored": scored,
    }
    if trainer.accelerator.is_main_process:
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(**json.loads(sys.argv[1]))
    # A process that ends with the group's threads at work now and then aborts.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
