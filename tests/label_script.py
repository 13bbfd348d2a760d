"""
Generates and labels in a process of its own, which can kill itself. The tests of resumption and of several processes
start it. Its last line is the result.
"""

import json
import os
import signal
import sys

import conftest
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

import trl_ssrm.alignment.generation
import trl_ssrm.alignment.labeling
import trl_ssrm.alignment.shards
from trl_ssrm import Comparison, PairwiseJudge, generate_completions, label_preferences


def main(policy: str, reward_model: str, output_dir: str, kill_at: str = "", sharded: bool = False) -> None:
    """
    With `kill_at="generation"` or `"labeling"`, the process kills itself before it writes the third shard of that
    step. `sharded` sets the environment of a launcher that shards models by FSDP: transformers then loads the weights
    in the first process only, unless we prevent it.
    """
    if sharded:
        os.environ |= {"ACCELERATE_USE_FSDP": "True", "FSDP_CPU_RAM_EFFICIENT_LOADING": "True"}
    trl_ssrm.alignment.labeling.SHARD_ROWS = 8
    trl_ssrm.alignment.generation.SHARD_BATCHES = 2
    place, written = "generation", []
    write_table = trl_ssrm.alignment.shards.write_table

    def write_or_die(path, *args) -> None:
        if place == kill_at and len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write_table(path, *args)
        written.append(path.name)

    trl_ssrm.alignment.shards.write_table = write_or_die
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in conftest.letter_rows(30, seed=1)])
    completions = generate_completions(
        policy,
        prompts,
        f"{output_dir}/completions",
        num_completions=3,
        max_new_tokens=6,
        batch_size=4,
        disable_tqdm=True,
    )
    place, num_generated = "labeling", len(written)
    written.clear()
    labels = label_preferences(
        reward_model, completions, f"{output_dir}/labels", pairing="best_vs_random", disable_tqdm=True
    )
    # TRL calls a reward function so: every process has a part of the group.
    judge = PairwiseJudge(policy, comparison=Comparison(labels=["a", "b"]))
    texts, state = ["abc", "xyz", "hello", "a b c"], PartialState()
    mine = texts[state.process_index * len(texts) // state.num_processes :][: len(texts) // state.num_processes]
    result = {
        "rewards": gather_object(judge(["say 1"] * len(mine), mine)),
        "completions": completions["completions"][:],
        "labels": labels.to_list(),
        "num_generated": num_generated,
        "num_labeled": len(written),
    }
    if PartialState().is_main_process:
        print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Without a GPU, the processes find each other only if this is said first.
    PartialState(cpu=True)
    main(**json.loads(sys.argv[1]))
    # A process that ends while the threads of the group run sometimes aborts.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
