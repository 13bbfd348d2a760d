"""
What only a GPU can show, in two parts; `gpu.sh` says what they need and how long they take.

    python recipes/benchmark/gpu.py --part 1 --model_name_or_path SmolLM2-135M-Instruct --dataset_path pairs.parquet

Part 1: rewards in bfloat16 and with flash attention against those in float32, speed, throughput and memory. Part 2: what
the pool gains when the whole model is trained, and rounds under FSDP2 and DeepSpeed. Each step is a process of its own:
where one fails, the others go on. `output_dir/gpu.json` has all figures, `output_dir/gpu.md` the table. A step that is done
is not done again, and a step of quality.py that was stopped goes on where it was.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import interval
from trl import TrlParser


HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "flash-attn", "kernels", "deepspeed")
# Dense products in bfloat16, in TFLOP/s: data sheets of NVIDIA's H100, H200, A100, L40S and L4, half of the figure where
# it is one with sparsity. The first name that the name of a device contains counts.
PEAKS = {
    **{"H100 NVL": 835.5, "H100 PCIe": 756.5, "H100": 989.5, "H200 NVL": 835.5, "H200": 989.5},
    **{"A100": 312, "L40S": 362, "NVIDIA L4": 121},
}
FLASH = "rewards, flash attention"
ARMS = ("labels", "default", "all labels")
METRICS = {"accuracy": "accuracy", "log_loss": "log-loss", "ece": "ECE"}
# Settings of quality.py besides those of its file, and those for a trial.
QUALITY = ["--num_frozen_layers", "0", "--learning_rate", "5e-5", "--score_batch_tokens", "16384"]
SMALL_QUALITY = ["--label_fractions", "0.25", "--max_pairs", "48", "--steps", "2", "--all_labels_epochs", "1"]
SMALL_SPEED = ["--pools", "pairs", "--num_train_pairs", "4", "--num_repeats", "1"]

# Numbers of pairs and sizes of batches; those for a trial on a CPU are behind the others.
SIZES = {
    **{"reward_pairs": (300, 8), "speed_pairs": (300, 6), "pool_pairs": (3000, 12), "train_pairs": (512, 8)},
    **{"train_batch": (32, 4), "score_tokens": ((16_384, 65_536, 262_144), (512,)), "max_length": (384, 384)},
    **{"num_labeled": (64, 16), "num_pool": (192, 24), "num_held_out": (64, 8), "learning_rate": (1e-5, 3e-3)},
}


@dataclass
class GpuArguments:
    """Arguments of the benchmark."""

    model_name_or_path: str = field(metadata={"help": "Decoder, such as SmolLM2-135M-Instruct; a directory."})
    dataset_path: str = field(metadata={"help": "Parquet file with `prompt`, `chosen` and `rejected`, as messages."})
    part: int = field(default=1, metadata={"help": "Part to run.", "choices": [1, 2]})
    output_dir: str = field(default="gpu", metadata={"help": "Directory for figures, table and logs."})
    small: bool = field(default=False, metadata={"help": "Whether to do each step with a few pairs, as a trial."})
    time_limit: int = field(default=570, metadata={"help": "Seconds after which what still runs is stopped."})

    def size(self, name: str):
        """A number of [`SIZES`]."""
        return SIZES[name][self.small]


@dataclass
class Step:
    """A step: its process, the file that this leaves with the figures, and a directory to delete afterwards."""

    name: str
    command: list[str]
    result: Path
    to_delete: Path | None = None


def peak_of(device: str) -> float | None:
    """Floating-point operations a second, in dense products in bfloat16, of a device; `None` if it is not in the table."""
    if "MIG" in device:
        return None
    return next((peak * 1e12 for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)


def without_flash_attention() -> str | None:
    """Why flash attention can't be measured, or `None`."""
    if not torch.cuda.is_available():
        return "it needs a GPU"
    is_there = any(map(importlib.util.find_spec, ("flash_attn", "kernels")))
    return None if is_there else "neither flash_attn nor kernels is installed"


def lanes_of(args: GpuArguments) -> list[list[Step]]:
    """The steps of a part. The lists are worked on side by side; the steps of a list one after the other."""
    output_dir = Path(args.output_dir)
    given = ["--model_name_or_path", args.model_name_or_path]

    def measured(name: str) -> Step:
        path = output_dir / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        command = [str(HERE / "gpu_steps.py"), *given, "--dataset_path", args.dataset_path]
        return Step(name, [*command, "--small", str(args.small), "--step", name, "--output_file", str(path)], path)

    if args.part == 1:
        path = output_dir / "speed.jsonl"
        speed = [str(HERE / "speed.py"), *given, "--dataset_path", args.dataset_path, "--output_file", str(path)]
        speed += ["--models", "decoder", "--mixed_precision", "bf16", "--num_pairs", str(args.size("speed_pairs"))]
        speed += SMALL_SPEED if args.small else []
        names = ["rewards", *([FLASH] if without_flash_attention() is None else []), "throughput"]
        steps = [*map(measured, names), Step("speed", speed, path)]
        # One after the other, since times are measured. Those of a trial mean nothing.
        return [[step] for step in steps] if args.small else [steps]
    is_cpu = not torch.cuda.is_available()
    quality = [str(HERE / "quality.py"), "--config", str(HERE / "quality.yaml"), *given, *QUALITY, "--arms", *ARMS]
    quality += ["--use_cpu", str(is_cpu), "--bf16", str(not is_cpu), "--seeds", *("0" if args.small else "01234")]
    quality += SMALL_QUALITY if args.small else []
    lanes = []
    for task in [args.dataset_path] if args.small else ["documentation", "parameters", args.dataset_path]:
        own = output_dir / f"quality-{Path(task).stem}"
        command = [*quality, "--tasks", task, "--output_dir", str(own)]
        lanes.append([Step(f"quality, {Path(task).stem}", command, own / "results.jsonl", own / "run")])
    # Float32 tells mistakes in sharding from rounding; bfloat16 is how people train.
    return [*lanes, *([measured(f"rounds, {name}")] for name in (["float32"] if args.small else ["float32", "bf16"]))]


def error_line(log: str, status: int) -> str:
    """The error that ended a process, from its output. What a launcher raises when its script fails is not it."""
    pattern = r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception)\b.*|[\w.]+: error: .*)$"
    of_launchers = ("subprocess.CalledProcessError", "torch.distributed.elastic")
    found = [line for line in re.findall(pattern, log, re.MULTILINE) if not line.startswith(of_launchers)]
    if status < 0:
        return f"ended by signal {-status}"
    return found[-1] if found else f"exit status {status}"


def run_lanes(lanes: list[list[Step]], logs: Path, deadline: float, keep: Callable[[Step, dict], None]) -> None:
    """Run the steps, each in a process, until they are done or the time is over, and keep what each leaves."""
    running: dict[int, tuple[Step, subprocess.Popen, float]] = {}
    try:
        while running or (any(lanes) and time.time() <= deadline):
            for number, lane in enumerate(lanes):
                if lane and number not in running and time.time() <= deadline:
                    step = lane.pop(0)
                    if step.result.suffix == ".json":
                        step.result.unlink(missing_ok=True)
                    print(f"{step.name} ...", flush=True)
                    with (logs / f"{step.name}.log").open("w") as log:
                        process = subprocess.Popen(
                            # With its children in a group, so that they can be stopped together.
                            [sys.executable, *step.command],
                            **{"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True},
                        )
                    running[number] = step, process, time.time()
            is_late = time.time() > deadline
            for number, (step, process, start) in list(running.items()):
                if is_late or process.poll() is not None:
                    stop(process)
                    entry = outcome(step, process, logs / f"{step.name}.log", is_late)
                    keep(step, {"seconds": round(time.time() - start, 1), **entry})
                    del running[number]
            time.sleep(0.1)
        for step in (step for lane in lanes for step in lane):
            words = "not begun within the time limit; the same command goes on"
            keep(step, {"seconds": 0.0, "figures": {}, "error": words})
    finally:
        for _, process, _ in running.values():
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """End a process with its children; one that has ended stays as it is."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)


def outcome(step: Step, process: subprocess.Popen, log: Path, is_late: bool) -> dict:
    """The figures of a step, and its error if it has failed."""
    if step.to_delete is not None:
        shutil.rmtree(step.to_delete, ignore_errors=True)
    text = step.result.read_text(encoding="utf-8") if step.result.is_file() else ""
    # A step that was stopped may have been writing a line.
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n") or not is_late]
    entry: dict = {"figures": found if step.result.suffix == ".jsonl" else found[0] if found else {}}
    if process.returncode and is_late:
        entry["error"] = "stopped at the time limit; the same command goes on"
    elif process.returncode:
        entry["error"] = error_line(log.read_text(encoding="utf-8", errors="replace"), process.returncode)
    if step.name.startswith("quality"):
        # Predictions for single pairs stay in the file.
        for each in entry["figures"]:
            each.pop("logits", None), each.pop("rounds", None)
    return entry


def with_shares(figures: dict, device: str) -> dict:
    """Add what share of the device's peak each way of a step has reached."""
    peak = peak_of(device)
    for way in figures.get("ways", {}).values():
        if peak is not None and "flops" in way:
            way["share_of_peak"] = way["flops"] / peak
    return figures


# ---- The table ----


def table(record: dict) -> str:
    """One line for each figure, and one for each step that was left out or has failed."""
    lines = ["| Step | What | Measured |", "|---|---|---|"]
    lines.append(f"| all | device, versions | {record['device']}; {versions_in_words(record['versions'])} |")
    if peak_of(record["device"]) is None:
        lines.append("| all | share of the device's peak | left out: the peak of this device is not in the table |")
    for name, entry in record["steps"].items():
        kind, figures = name.split(",")[0], entry["figures"]
        if isinstance(figures, dict) and "left_out" in figures:
            lines.append(f"| {name} | left out | {figures['left_out']} |")
        elif figures:
            lines += [f"| {name} | {what} | {measured} |" for what, measured in ROWS[kind](figures)]
        if "error" in entry:
            lines.append(f"| {name} | **failed** | {entry['error'].replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def versions_in_words(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def rewards_rows(figures: dict) -> Iterator[tuple[str, str]]:
    yield "pairs; standard deviation of the rewards in float32", f"{figures['pairs']}; {figures['spread']:.2f}"
    for name, way in figures["ways"].items():
        found = f"{way['largest']:.1e}, {way['median']:.1e}, {way['alike']:.1%}"
        yield f"{name}: largest and median difference to float32 one at a time, pairs ranked alike", found


def throughput_rows(figures: dict) -> Iterator[tuple[str, str]]:
    yield "pairs; weights beside the embeddings", f"{figures['pairs']}; {figures['weights']:,}"
    for name, way in figures["ways"].items():
        share = f", {way['share_of_peak']:.1%} of the peak" if "share_of_peak" in way else ""
        memory = f", {way['memory']:.2f} GB" if way["memory"] is not None else ""
        yield name, f"{way['tokens_per_second']:,.0f} tokens/s{share}{memory}"


def speed_rows(figures: list[dict]) -> Iterator[tuple[str, str]]:
    ways = ("ours", "one at a time", "predict", "pipeline", "floor")
    for record in figures:
        scoring, training = record["scoring"], record["training"]
        seconds = ", ".join(f"{way} {scoring[way]:.2f}" for way in ways)
        yield f"{record['pool']}: seconds to score {scoring['pairs']} pairs", seconds
        seconds = ", ".join(f"{trainer} {training[trainer]:.2f}" for trainer in ("RewardTrainer", "SSRMTrainer"))
        yield f"{record['pool']}: seconds to train on {training['pairs']} pairs", seconds


def quality_rows(figures: list[dict]) -> Iterator[tuple[str, str]]:
    value = {(entry["arm"], entry["seed"]): entry for entry in figures if "seed" in entry}
    for arm in ARMS:
        seeds = sorted(seed for own, seed in value if own == arm and ("labels", seed) in value)
        if not seeds:
            continue
        cells = []
        for metric, title in METRICS.items():
            mean = statistics.mean(value[arm, seed][metric] for seed in seeds)
            change = interval([value[arm, seed][metric] - value["labels", seed][metric] for seed in seeds])
            cells.append(f"{title} {mean:.3f}" + (f" ({change})" if arm != "labels" else ""))
        against = " (against the labels alone)" if arm != "labels" else ""
        yield (
            f"{arm}, {value[arm, seeds[0]]['labels']} labels, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}{against}",
            ", ".join(cells),
        )


def rounds_rows(figures: dict) -> Iterator[tuple[str, str]]:
    # Accelerate shards on GPUs alone.
    note = "" if figures["sharded"] else " (nothing is sharded on a CPU)"
    for name, way in figures["ways"].items():
        if "kept" not in way:
            yield name, f"left out: {way['left_out']}" if "left_out" in way else f"**failed**: {way['error']}"
            continue
        kept = f"{way['kept']} pairs kept, {way['kept_alone']} without it, {way['kept_alike']} alike"
        bound = f"{'within' if way['is_within'] else '**beyond**'} {way['tolerance']:.1e}"
        yield f"{name}{note}", f"{kept}; rewards differ by at most {way['largest_reward_difference']:.1e}, {bound}"


ROWS: dict[str, Callable] = {
    **{"rewards": rewards_rows, "throughput": throughput_rows, "speed": speed_rows},
    **{"quality": quality_rows, "rounds": rounds_rows},
}


def main(args: GpuArguments) -> None:
    deadline = time.time() + args.time_limit
    output_dir = Path(args.output_dir)
    (output_dir / "logs").mkdir(parents=True, exist_ok=True)
    path = output_dir / "gpu.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"steps": {}}
    given = {"model": args.model_name_or_path, "pairs": args.dataset_path, "small": args.small}
    if any(record.get(name, value) != value for name, value in given.items()):
        sys.exit(f"gpu.py: error: {path} was made with another model, other pairs or as a trial; pass another OUTPUT.")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    record |= {"device": device, "versions": versions, **given}

    def keep(step: Step, entry: dict) -> None:
        if isinstance(entry["figures"], dict):
            with_shares(entry["figures"], device)
        record["steps"][step.name] = {"device": device, **entry}
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
        (output_dir / "gpu.md").write_text(table(record), encoding="utf-8")
        print(f"{step.name}: {entry.get('error', 'done')}, {entry['seconds']} s", flush=True)

    if args.part == 1 and (reason := without_flash_attention()) is not None:
        record["steps"][FLASH] = {"device": device, "figures": {"left_out": reason}}

    # Ended from outside, it ends its steps.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu.py: error: ended from outside"))
    done = [
        name for name, entry in record["steps"].items() if "error" not in entry and "left_out" not in entry["figures"]
    ]
    lanes = [[step for step in lane if step.name not in done] for lane in lanes_of(args)]
    run_lanes(lanes, output_dir / "logs", deadline, keep)
    print(f"\n{table(record)}")


if __name__ == "__main__":
    (arguments,) = TrlParser((GpuArguments,)).parse_args_and_config()
    main(arguments)
