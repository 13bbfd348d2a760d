"""
What an unlabeled pool adds to few labels: labeled-only, SSRM by round, and all labels, over seeds.

    python recipes/benchmark/few_labels.py --config recipes/benchmark/few_labels.yaml --dataset_path pairs.parquet

The pairs are split by prompt into train, dev and test, always in the same way. A seed draws the training prompts that
keep their labels; the rest is the pool. `--preference_model pairwise --arms zero ssrm all` measures a pairwise model, at
first without any training. Settings are chosen with `--part dev`, and the table is made with `--part test`. Results are
kept line by line in `output_dir/results.jsonl`, and are not measured again.
"""

import json
import random
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from common import default_model_path, interval, split_by_prompt
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import TrlParser

from trl_ssrm import Comparison, SSRMConfig, SSRMTrainer, load_pairwise_model
from trl_ssrm.data.sequences import PairedSequences
from trl_ssrm.scoring.metrics import preference_metrics


METRICS = ("accuracy", "log_loss", "ece")


@dataclass
class BenchmarkArguments:
    """Arguments of the benchmark, beside the arguments of the trainer."""

    dataset_path: str = field(metadata={"help": "Parquet file with `prompt`, `chosen` and `rejected`, as messages."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Default: all-MiniLM-L6-v2 of the package."}
    )
    part: str = field(default="test", metadata={"help": "Part to measure on.", "choices": ["dev", "test"]})
    num_seeds: int = field(default=3, metadata={"help": "Number of seeds, from `seed` on."})
    label_fraction: float = field(default=1 / 16, metadata={"help": "Share of the training prompts that is labeled."})
    arms: list[str] = field(
        default_factory=lambda: ["ssrm", "all"],
        metadata={
            "help": "`ssrm` (its round 0 is labeled-only), `all`, `labeled` (round 0 alone), `zero` (no training)."
        },
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Prompts to take, drawn once. Default: all."})
    num_pairs_per_prompt: int | None = field(default=None, metadata={"help": "Pairs of a prompt. Default: all."})
    num_frozen_layers: int = field(default=0, metadata={"help": "Lowest layers that are not trained."})
    max_prompt_words: int = field(default=50, metadata={"help": "Words kept of a prompt, from its end."})
    max_answer_words: int = field(default=80, metadata={"help": "Words kept of an answer, from its start."})
    all_labels_num_train_epochs: float = field(default=2.0, metadata={"help": "Epochs of the arm with all labels."})


def load_parts(script_args: BenchmarkArguments) -> dict[str, list[dict[str, str]]]:
    """Rows as text, by part and prompt."""

    def text(messages: list[dict[str, str]]) -> list[str]:
        return " ".join(message["content"] for message in messages).split()

    rows_of: dict[str, list[dict[str, str]]] = {}
    for row in Dataset.from_parquet(script_args.dataset_path):
        prompt = " ".join(text(row["prompt"])[-script_args.max_prompt_words :]) + "\n"
        answers = {name: " ".join(text(row[name])[: script_args.max_answer_words]) for name in ("chosen", "rejected")}
        if answers["chosen"] != answers["rejected"] and all(answers.values()):
            rows_of.setdefault(str(row["prompt"]), []).append({"prompt": prompt, **answers})
    parts = split_by_prompt(rows_of, script_args.max_prompts)
    limit = script_args.num_pairs_per_prompt
    return {part: [rows[:limit] for rows in groups] for part, groups in parts.items()}


def make_model(script_args: BenchmarkArguments, training_args: SSRMConfig, path: str, tokenizer, seed: int):
    """The pretrained model with the lowest layers frozen, and a new head or, if pairwise, the head of its labels."""
    set_seed(seed)
    if training_args.preference_model == "pairwise":
        given = training_args.comparison and Comparison.from_pretrained(training_args.comparison)
        model = load_pairwise_model(path, (given or Comparison()).label_token_ids(tokenizer))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype="float32")
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.layers?\.(\d+)\.", name)
        is_low = int(layer[1]) < script_args.num_frozen_layers if layer else "embed" in name
        parameter.requires_grad_(not (script_args.num_frozen_layers and is_low))
    return model


def run_seed(script_args, training_args, parts, path, seed, arm) -> dict[str, dict[str, float]]:
    """Metrics of one arm on one seed, by the name of the row in the table."""
    groups = list(parts["train"])
    random.Random(seed).shuffle(groups)
    num_labeled = max(1, round(len(groups) * script_args.label_fraction))
    labeled, pool = (
        Dataset.from_list([row for group in part for row in group])
        for part in (groups[:num_labeled], groups[num_labeled:])
    )
    held_out = Dataset.from_list([row for group in parts[script_args.part] for row in group])
    args = replace(training_args, seed=seed, output_dir=f"{training_args.output_dir}/{script_args.part}-{arm}-{seed}")
    if arm == "all":
        args.num_train_epochs = script_args.all_labels_num_train_epochs
        labeled = Dataset.from_list([row for group in groups for row in group])
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = SSRMTrainer(
        model=make_model(script_args, args, path, tokenizer, seed),
        args=args,
        train_dataset=labeled,
        eval_dataset=held_out,
        processing_class=tokenizer,
        unlabeled_dataset=pool if arm == "ssrm" else None,
    )
    start = time.time()
    if arm != "zero":
        # Rounds that were interrupted go on.
        trainer.train(resume_from_checkpoint=arm == "ssrm" and trainer.run.has_run)
    if arm == "ssrm":
        rows = {f"SSRM, round {facts['round']}": facts for facts in trainer.round_history}
        rows["labeled only"] = rows.pop("SSRM, round 0")
        measured = {
            name: {metric: facts[f"eval_{metric}"] for metric in METRICS}
            | {"pairs": facts["num_train_pairs"], "pseudo_label_accuracy": facts.get("pseudo_label_accuracy")}
            for name, facts in rows.items()
        }
    else:
        pairs = PairedSequences.from_tokenized(trainer.eval_dataset)
        metrics = preference_metrics(trainer.score_pairs(pairs, "held-out pairs").logits)
        name = {"all": "all labels", "labeled": "labeled only", "zero": "Zero-shot"}[arm]
        measured = {name: {**metrics, "pairs": 0 if arm == "zero" else len(trainer.train_dataset)}}
    print(f"seed {seed}, {arm}: {time.time() - start:.0f} s, {measured}", flush=True)
    return measured


def main(script_args: BenchmarkArguments, training_args: SSRMConfig) -> None:
    path = script_args.model_name_or_path or default_model_path()
    parts = load_parts(script_args)
    print({part: f"{len(groups)} prompts, {sum(map(len, groups))} pairs" for part, groups in parts.items()})
    results = Path(training_args.output_dir) / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for seed in range(training_args.seed, training_args.seed + script_args.num_seeds):
        for arm in script_args.arms:
            key = {"part": script_args.part, "seed": seed, "arm": arm}
            if not any(key.items() <= entry.items() for entry in done):
                done.append({**key, "rows": run_seed(script_args, training_args, parts, path, seed, arm)})
                with results.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")

    entries = [entry for entry in done if entry["part"] == script_args.part]
    names = sorted(
        {name for entry in entries for name in entry["rows"]},
        key=lambda name: (name[0] == "a", name[0] == "S", name[0] == "l", name),
    )
    print(
        "\n| Trained on | Pairs | Accuracy | Log-loss | ECE | Pseudo-label accuracy |\n|---|---:|---:|---:|---:|---:|"
    )
    for name in names:
        rows = [entry["rows"][name] for entry in entries if name in entry["rows"]]
        known = [row["pseudo_label_accuracy"] for row in rows if row.get("pseudo_label_accuracy") is not None]
        cells = [f"{np.mean([row['pairs'] for row in rows]):.0f}"]
        cells += [interval([row[metric] for row in rows]) for metric in METRICS]
        print(f"| {name} | {' | '.join(cells)} | {interval(known) if known else '–'} |")
    runs = [entry["rows"] for entry in entries if entry["arm"] == "ssrm"]
    if runs:
        last = [max((name for name in rows if name.startswith("SSRM")), default="labeled only") for rows in runs]
        gains = [
            rows[name]["accuracy"] - rows["labeled only"]["accuracy"] for name, rows in zip(last, runs, strict=True)
        ]
        print(f"\nAccuracy of the last round over labeled-only, seed by seed: {interval(gains)}")


if __name__ == "__main__":
    main(*TrlParser((BenchmarkArguments, SSRMConfig)).parse_args_and_config())
