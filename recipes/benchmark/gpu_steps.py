"""
What gpu.py measures in processes of its own: rewards in bfloat16, throughput and memory, and rounds under a launcher.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from datasets import Dataset
from gpu import FLASH, HERE, GpuArguments, error_line
from speed import SpeedArguments, make_model, make_pool, settings
from trl import TrlParser

from trl_ssrm import SSRMConfig, SSRMTrainer
from trl_ssrm.data.sequences import PairedSequences
from trl_ssrm.scoring.layout import choose_layout
from trl_ssrm.scoring.rows import paired_rows, shared_rows
from trl_ssrm.scoring.score import score_pairs, score_sequences


SHARDED = ("fsdp2", "zero2", "zero3")
# Largest difference between rewards with and without a launcher that counts as rounding, in standard deviations of the
# rewards. Training makes differences in the last digit larger, step by step.
TOLERANCE = {"float32": 0.01, "bf16": 0.2}


@dataclass
class StepArguments(GpuArguments):
    """Arguments of one step."""

    step: str = field(default="rewards", metadata={"help": "Name of the step."})
    output_file: str = field(default="step.json", metadata={"help": "File for its figures."})

    @property
    def of_speed(self) -> SpeedArguments:
        """Arguments of speed.py, whose functions make the model and the pairs."""
        return SpeedArguments(self.dataset_path, self.model_name_or_path, mixed_precision="bf16")


def load(args: StepArguments, num_pairs: int):
    """Model in float32 on the device, its tokenizer, and the first pairs that fit, as text."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = make_model("decoder", args.of_speed, device)
    longest = args.size("max_length")
    pool = make_pool("pairs", args.dataset_path, num_pairs, lambda text: len(tokenizer(text)["input_ids"]) < longest)
    if not pool:
        raise ValueError(f"{args.dataset_path} has no pair of at most {longest} tokens; pass another file.")
    return model, tokenizer, pool


def tokenized(pool: list[dict[str, str]], tokenizer) -> Dataset:
    """Columns `chosen_ids` and `rejected_ids`, each text with the token that ends it."""

    def ids(row: dict[str, str], name: str) -> list[int]:
        return [*tokenizer(row["prompt"] + row[name])["input_ids"], tokenizer.eos_token_id]

    names = ("chosen", "rejected")
    return Dataset.from_list([{f"{name}_ids": ids(row, name) for name in names} for row in pool])


@torch.inference_mode()
def one_at_a_time(model, pairs: Dataset, autocast=contextlib.nullcontext) -> np.ndarray:
    """Rewards of the completions of each pair, each sequence in a batch of its own."""
    scores = []
    for ids in (row[name] for row in pairs for name in ("chosen_ids", "rejected_ids")):
        with autocast():
            scores.append(model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits.item())
    return np.array(scores).reshape(-1, 2)


def measure_rewards(args: StepArguments, attention: str) -> dict:
    """Differences of rewards to float32, one at a time, and the share of the pairs that are ranked alike."""
    model, tokenizer, pool = load(args, args.size("reward_pairs"))
    data, accelerator = tokenized(pool, tokenizer), Accelerator(mixed_precision="bf16")
    pairs, pad = PairedSequences.from_tokenized(data), tokenizer.pad_token_id
    sequences = pairs.sequences[:]["input_ids"]
    reference = one_at_a_time(model, data)
    found = {}

    def score(layout: str) -> np.ndarray:
        rewards = score_sequences(model, sequences, pad, layout)
        return np.stack([rewards[pairs.first], rewards[pairs.second]], axis=1)

    if attention == "sdpa":
        found["float32, batches"] = score(choose_layout(model))
        found["autocast, one at a time"] = one_at_a_time(model, data, accelerator.autocast)
    model.set_attn_implementation(attention)
    with accelerator.autocast():
        layout = choose_layout(model)
    found[f"autocast, batches ({layout})"] = score_pairs(model, pairs, pad, accelerator, layout, disable_tqdm=True)
    # Buffers, such as the frequencies of the positions, stay in float32, as in a model that is loaded in bfloat16.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    if attention == "sdpa":
        found["bfloat16 weights, one at a time"] = one_at_a_time(model, data)
    layout = choose_layout(model)
    found[f"bfloat16 weights, batches ({layout})"] = score(layout)
    return {
        "pairs": len(data),
        "spread": float(reference.std()),
        "ways": {name: distance(rewards, reference) for name, rewards in found.items()},
    }


def distance(rewards: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far rewards of shape `(num_pairs, 2)` are from others."""
    differences = np.abs(rewards - reference)
    alike = np.sign(rewards[:, 0] - rewards[:, 1]) == np.sign(reference[:, 0] - reference[:, 1])
    return {"largest": float(differences.max()), "median": float(np.median(differences)), "alike": float(alike.mean())}


def peak_memory() -> float | None:
    """Most memory of the GPU that tensors had since the last call, in GB."""
    if not torch.cuda.is_available():
        return None
    most = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return most


def measure_throughput(args: StepArguments) -> dict:
    """Tokens a second, FLOPs a second and memory, of scoring by the size of a batch and of training."""
    model, tokenizer, pool = load(args, args.size("pool_pairs"))
    num_weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    data, accelerator = tokenized(pool, tokenizer), Accelerator(mixed_precision="bf16")
    pairs = PairedSequences.from_tokenized(data)
    with accelerator.autocast():
        layout = choose_layout(model)

    def rates(num_tokens: int, seconds: float, flops_a_token: int) -> dict:
        flops = flops_a_token * num_weights * num_tokens / seconds
        return {"tokens": num_tokens, "seconds": seconds, "tokens_per_second": num_tokens / seconds, "flops": flops}

    sequences = [np.array(ids) for ids in pairs.sequences[:]["input_ids"]]
    num_tokens = sum(row.length for row in shared_rows(sequences)) if layout == "shared" else int(pairs.lengths.sum())
    ways = {}
    for size in (*args.size("score_tokens"), None):
        for _ in range(2):
            peak_memory()
            start = time.perf_counter()
            score_pairs(model, pairs, tokenizer.pad_token_id, accelerator, layout, size, disable_tqdm=True)
        # A batch that grows starts the count of the memory anew.
        memory = peak_memory() if size is not None else None
        name = f"scoring, {size:,} tokens a batch" if size is not None else "scoring, batches that grow"
        ways[name] = {**rates(num_tokens, time.perf_counter() - start, 2), "memory": memory}
    halves = [
        [np.array(ids) for ids in data[: args.size("train_pairs")][f"{name}_ids"]] for name in ("chosen", "rejected")
    ]
    rows = paired_rows([*halves[0], *halves[1]]) if layout == "shared" else []
    num_tokens = sum(row.length for row in rows) or sum(map(len, (*halves[0], *halves[1])))
    for checkpointing in (False, True):
        with tempfile.TemporaryDirectory() as directory:
            more = {"gradient_checkpointing": checkpointing, "per_device_train_batch_size": args.size("train_batch")}
            trainer = SSRMTrainer(
                model=make_model("decoder", args.of_speed, model.device)[0],
                args=SSRMConfig(
                    **settings(directory, args.size("max_length"), args.of_speed, **more),
                    num_train_epochs=1,
                    share_prompts=True,
                ),
                train_dataset=Dataset.from_list(pool[: args.size("train_pairs")]),
                processing_class=tokenizer,
            )
            for _ in range(2):
                trainer.optimizer = None
                peak_memory()
                seconds = trainer.train().metrics["train_runtime"]
        name = f"training, {'with' if checkpointing else 'without'} gradient checkpointing"
        ways[name] = {**rates(num_tokens, seconds, 6), "memory": peak_memory()}
        del trainer
    return {"pairs": len(data), "weights": num_weights, "ways": ways}


def measure_rounds(args: StepArguments, precision: str) -> dict:
    """Rounds of ssrm.py under FSDP2 and DeepSpeed with one process, against those without a launcher."""
    model, tokenizer, rows = load(args, sum(args.size(f"num_{name}") for name in ("labeled", "pool", "held_out")))
    held_out, rows = rows[: args.size("num_held_out")], rows[args.size("num_held_out") :]
    pairs = PairedSequences.from_tokenized(tokenized(held_out, tokenizer))
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for split, part in (("train", rows), ("test", held_out)):
            Dataset.from_list(part).to_parquet(root / "data" / f"{split}.parquet")
        names = [name for name in SHARDED if name.startswith("fsdp") or importlib.util.find_spec("deepspeed")]
        figures |= {name: {"left_out": "deepspeed is not installed"} for name in SHARDED if name not in names}
        # Side by side, since most of their time is that of starting.
        running = {name: start_rounds(args, precision, name, root) for name in ("alone", *names)}
        status = {name: process.wait() for name, process in running.items()}
        alone = end_rounds(status["alone"], root / "alone", model, pairs)
        for name in names:
            try:
                found = end_rounds(status[name], root / name, model, pairs)
                figures[name] = compared(found, alone, precision)
            except Exception as error:
                figures[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return {"pairs": len(rows), "precision": precision, "sharded": torch.cuda.is_available(), "ways": figures}


def start_rounds(args: StepArguments, precision: str, name: str, root: Path) -> subprocess.Popen:
    """A run of ssrm.py, under the launcher with the configuration of this name or, for `"alone"`, without one."""
    config = str(HERE.parent / "accelerate_configs" / f"{name}.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", config]
    launch += ["--num_processes", "1", "--main_process_port", "0"]
    launch += ["--mixed_precision", "bf16" if precision == "bf16" else "no"]
    on_cpu = not torch.cuda.is_available()
    launch += ["--cpu"] if on_cpu else []
    command = [sys.executable, *(launch if name != "alone" else [])]
    given = {
        **{"model_name_or_path": args.model_name_or_path, "dataset_name": root / "data", "output_dir": root / name},
        **{"num_labeled": args.size("num_labeled"), "num_folds": 0, "pretrain_on_pool": False},
        **{"pseudo_label_type": "hard", "confidence_threshold": 0.6, "round_init": "continue"},
        **{"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": args.size("learning_rate")},
        **{"bf16": precision == "bf16", "dtype": "float32", "use_cpu": on_cpu, "gradient_checkpointing": False},
        **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "max_length": args.size("max_length")},
    }
    command += [str(HERE.parent / "ssrm.py")]
    command += [word for setting, value in given.items() for word in (f"--{setting}", str(value))]
    with (root / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def end_rounds(status: int, output_dir: Path, model, pairs: PairedSequences) -> dict:
    """Kept pairs of a run with their logits, and the rewards of the model that it has saved on other pairs."""
    log = output_dir.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
    print(f"--- {output_dir.name}\n{log}", flush=True)
    if status:
        raise RuntimeError(error_line(log, status))
    path = output_dir / "_rounds" / "round_1" / "pseudo_labels.parquet"
    if not path.is_file():
        raise ValueError("no pair was kept, so there is nothing to compare")
    kept = pq.read_table(path).to_pydict()
    # Without calibration the temperature is 1.
    logits = [np.log(each / (1 - each)) for each in np.clip(kept["confidence"], 0, 1 - 1e-12)]
    saved = make_model("decoder", SpeedArguments("", str(output_dir)), model.device)[0]
    rewards = score_sequences(saved, pairs.sequences[:]["input_ids"], saved.config.pad_token_id, choose_layout(saved))
    signs = [1 if each else -1 for each in kept["first_is_chosen"]]
    return {
        "logits": {pair: sign * logit for pair, sign, logit in zip(kept["pair"], signs, logits, strict=True)},
        "rewards": rewards,
    }


def compared(run: dict, alone: dict, precision: str) -> dict:
    """What two runs have kept, and how far their rewards are apart."""
    both = run["logits"].keys() & alone["logits"].keys()
    same = [pair for pair in both if (run["logits"][pair] > 0) == (alone["logits"][pair] > 0)]
    difference = float(np.abs(run["rewards"] - alone["rewards"]).max())
    allowed = TOLERANCE[precision] * float(alone["rewards"].std())
    return {
        **{"kept": len(run["logits"]), "kept_alone": len(alone["logits"]), "kept_alike": len(same)},
        "largest_logit_difference": max((abs(run["logits"][p] - alone["logits"][p]) for p in both), default=None),
        **{"largest_reward_difference": difference, "tolerance": allowed, "is_within": difference <= allowed},
    }


MEASURES: dict[str, Callable[[StepArguments], dict]] = {
    "rewards": lambda args: measure_rewards(args, "sdpa"),
    FLASH: lambda args: measure_rewards(args, "flash_attention_2"),
    "throughput": measure_throughput,
    "rounds, float32": lambda args: measure_rounds(args, "float32"),
    "rounds, bf16": lambda args: measure_rounds(args, "bf16"),
}


def main(args: StepArguments) -> None:
    figures = MEASURES[args.step](args)
    Path(args.output_file).write_text(json.dumps(figures) + "\n", encoding="utf-8")
    failed = [f"{name}: {way['error']}" for name, way in figures["ways"].items() if "error" in way]
    if failed:
        sys.exit(f"gpu_steps.py: error: {'; '.join(failed)}")


if __name__ == "__main__":
    main(*TrlParser((StepArguments,)).parse_args_and_config())
