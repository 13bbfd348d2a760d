"""
Memory and time that a pool costs, by its size and by the stage of a run.

    python recipes/benchmark/memory.py --num_pairs 10000 100000 1000000

Each size is a process of its own, which loads a Parquet file of generated pairs and does a run: make the pool, train a
few steps on labeled pairs, label the pool, make the next round's data, train a few steps on it. The model is tiny and
made here, so that only the pool grows. Memory is the largest `RssAnon` of Linux within a stage. Pages mapped from files
do not count, since the system can take them back.
"""

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, set_seed
from trl import TrlParser

from trl_ssrm import SSRMConfig, SSRMTrainer


WORDS = (
    "the a of to and in is it you that was for on are with as they be at one have this from or had by hot but some what "
    "there we can out other were all your when up use how said an each she which do their time if will way about many "
    "then them would write like so these her long make thing see him two has look more day could go come did my sound no "
    "most number who over know water than call first people may down side been now find any new work part take get place"
).split()
STAGES = ("start", "load", "tokenize", "make the pool", "round 0", "score", "label", "round 1", "rest")


@dataclass
class BenchmarkArguments:
    """Arguments of the benchmark."""

    num_pairs: list[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000], metadata={"help": "Numbers of pairs in the pool."}
    )
    num_completions: int = field(default=2, metadata={"help": "Completions of a prompt, which give all their pairs."})
    num_words: int = field(default=8, metadata={"help": "Mean number of words of a completion."})
    max_steps: int = field(default=5, metadata={"help": "Steps of a round."})
    work_dir: str | None = field(
        default=None, metadata={"help": "Directory for the pools and runs. Default: the system's own."}
    )
    pool_path: str | None = field(
        default=None, metadata={"help": "Measure on this pool alone, in this process; used by the benchmark itself."}
    )


def write_pool(path: Path, script_args: BenchmarkArguments, num_pairs: int) -> None:
    """Prompts and completions of words drawn at random, ten thousand rows at a time."""
    draw = random.Random(0)
    num_rows = -(-num_pairs // (script_args.num_completions * (script_args.num_completions - 1) // 2))
    schema = pa.schema({"prompt": pa.string(), "completions": pa.list_(pa.string())})

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 2 * script_args.num_words)))

    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, 10_000):
            numbers = range(start, min(start + 10_000, num_rows))
            prompts = [f"{text()} {number}: " for number in numbers]
            completions = [[text() for _ in range(script_args.num_completions)] for _ in numbers]
            writer.write_table(pa.table([prompts, completions], schema=schema))


def private_memory() -> float:
    """Memory of this process that is not mapped from files, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1000


class Meter:
    """Largest private memory, in MB, and time, in seconds, of each stage of a run."""

    def __init__(self):
        self.memory, self.seconds = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
        self.stage = STAGES[0]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.memory[self.stage] = max(self.memory[self.stage], private_memory())
            time.sleep(0.005)

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Measure a stage; one that it interrupts goes on after it."""
        before, self.stage, start = self.stage, stage, time.perf_counter()
        try:
            yield
        finally:
            self.stage = before
            seconds = time.perf_counter() - start
            self.seconds[stage] += seconds
            self.seconds[before] -= seconds


class TrainerInStages(SSRMTrainer):
    """Trains, and measures each stage."""

    def __init__(self, meter: Meter, **kwargs):
        self.meter = meter
        super().__init__(**kwargs)

    def _prepare_dataset(self, *args):
        with self.meter.within("tokenize"):
            return super()._prepare_dataset(*args)

    def train_once(self, *args):
        with self.meter.within(f"round {self.round}"):
            super().train_once(*args)

    def score(self, *args):
        with self.meter.within("score"):
            return super().score(*args)

    def keep(self, *args):
        with self.meter.within("label"):
            super().keep(*args)

    def rows_of(self, *args):
        with self.meter.within("label"):
            return super().rows_of(*args)


def measure(path: Path, script_args: BenchmarkArguments) -> dict:
    """Do one run on a pool, and return the memory and the seconds of each stage."""
    meter = Meter()
    disable_progress_bars()
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    set_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    args = SSRMConfig(
        output_dir=str(path.parent / "run"),
        num_rounds=1,
        max_steps=script_args.max_steps,
        num_folds=0,
        confidence_threshold=0.5,
        learning_rate=1e-3,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    labeled = [{"prompt": f"{word} ", "chosen": f"good {word}", "rejected": f"no {word}"} for word in WORDS]
    with meter.within("load"):
        pool = Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))
    with meter.within("make the pool"):
        trainer = TrainerInStages(
            meter,
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(labeled),
            unlabeled_dataset=pool,
        )
    with meter.within("rest"):
        trainer.train()
    return {"kept": trainer.round_history[1]["kept"], "memory": meter.memory, "seconds": meter.seconds}


def measured_apart(script_args: BenchmarkArguments, num_pairs: int) -> dict:
    """The same in a process of its own, and in a directory that is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=script_args.work_dir) as directory:
        path = Path(directory) / "pool.parquet"
        write_pool(path, script_args, num_pairs)
        command = [sys.executable, __file__, "--pool_path", str(path), "--max_steps", str(script_args.max_steps)]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def main(script_args: BenchmarkArguments) -> None:
    if script_args.pool_path is not None:
        print(json.dumps(measure(Path(script_args.pool_path), script_args)))
        return
    results = {num_pairs: measured_apart(script_args, num_pairs) for num_pairs in script_args.num_pairs}
    for name, unit in (("memory", "MB, largest"), ("seconds", "s")):
        print(f"\n| Stage ({unit}) | {' | '.join(f'{size:,} pairs' for size in results)} |")
        print(f"|---|{'---:|' * len(results)}")
        # The time before the first stage is no time of the run, but its memory counts.
        stages, whole = {"memory": (STAGES, max), "seconds": (STAGES[1:], sum)}[name]
        for stage in stages:
            print(f"| {stage} | {' | '.join(f'{each[name][stage]:.0f}' for each in results.values())} |")
        totals = (whole(each[name][stage] for stage in stages) for each in results.values())
        print(f"| whole run | {' | '.join(f'{total:.0f}' for total in totals)} |")
    kept = [f"{each['kept']:,}" for each in results.values()]
    print(f"\nPairs kept: {', '.join(kept)}.")


if __name__ == "__main__":
    main(*TrlParser(BenchmarkArguments).parse_args_and_config())
