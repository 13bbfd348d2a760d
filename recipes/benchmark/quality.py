"""
What each way of choosing and using pseudo-labels gains: accuracy, log-loss and calibration of its arm, over data sets,
shares of labels and seeds.

    python recipes/benchmark/quality.py --config recipes/benchmark/quality.yaml --dataset_paths one.parquet two.parquet

The pairs are split by prompt into train, dev and test, always in the same way; a seed draws the prompts that keep
their labels. With `quality.yaml` the backbone is frozen and runs once a sequence, so that a run takes seconds; with
`quality_whole.yaml` the whole model is trained, in minutes. For each seed, cross-validation on the labels chooses the
length and the weight decay of round 0, which all arms share. Settings of the arms are chosen by the dev part
(`--part dev`), and the tables show the test part. Results are kept line by line in `output_dir/results.jsonl`, and are
not measured again.
"""

import gc
import json
import random
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from common import default_model_path, half_interval, interval, split_by_prompt
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import TrlParser

from trl_ssrm import PseudoLabelingCallback, SSRMConfig, SSRMTrainer
from trl_ssrm.models.backbone import freeze_backbone


METRICS = (
    *("accuracy", "log_loss", "ece", "ece_floor"),
    *("calibrated_log_loss", "calibrated_ece", "calibrated_ece_floor"),
)

# Settings of each arm beside the ones that all arms share. With folds, the confidence comes from the mean probability of
# the round's model and the fold models, a pair is kept only if all of them agree, and the run ends with its best round.
PAPER = {"confidence_threshold": 0.8, "pseudo_label_type": "hard", "round_init": "continue", "num_folds": 0}
FOLDS = {**PAPER, "num_folds": 5}
ARMS = {
    "paper": PAPER,
    "restart": {**PAPER, "round_init": "base"},
    "no threshold": {**PAPER, "confidence_threshold": 0.5},
    "threshold .65": {**PAPER, "confidence_threshold": 0.65},
    "soft": {**PAPER, "pseudo_label_type": "soft"},
    "soft, no threshold": {**PAPER, "pseudo_label_type": "soft", "confidence_threshold": 0.5},
    "weight .3": {**PAPER, "pseudo_label_weight": 0.3},
    "top half": {**PAPER, "confidence_threshold": None, "selected_fraction": 0.5},
    "calibrated": {**PAPER, "num_folds": 5},
    "precision .9": {**PAPER, "num_folds": 5, "confidence_threshold": None, "target_precision": 0.9},
    # `max_steps` is the length of round 0 here, so the length of the round on the pool is said.
    "default": {"num_rounds": 1, "round_num_train_epochs": 2},
    "default, hard": {"num_rounds": 1, "round_num_train_epochs": 2, "pseudo_label_type": "hard"},
}


@dataclass
class BenchmarkArguments:
    """Arguments of the benchmark, beside the arguments of the trainer."""

    dataset_paths: list[str] = field(
        metadata={"help": "Parquet files with `prompt`, `chosen`, `rejected`, as messages."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Default: all-MiniLM-L6-v2 of the package."}
    )
    part: str = field(default="test", metadata={"help": "Part that is shown.", "choices": ["dev", "test"]})
    num_seeds: int = field(default=5, metadata={"help": "Number of seeds, from `seed` on."})
    label_fractions: list[float] = field(
        default_factory=lambda: [1 / 16], metadata={"help": "Shares of the training prompts that are labeled."}
    )
    arms: list[str] | None = field(default=None, metadata={"help": "Names of arms. Default: all of them."})
    steps: list[int] = field(
        default_factory=lambda: [12, 25, 50, 100], metadata={"help": "Lengths of round 0 to choose from."}
    )
    weight_decays: list[float] = field(
        default_factory=lambda: [0.01], metadata={"help": "Weight decays to choose from."}
    )
    all_labels_lengths: list[int] = field(
        default_factory=lambda: [1, 4, 16],
        metadata={"help": "Lengths of the arm with all labels to choose from, in lengths of round 0."},
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Prompts to take, drawn once. Default: all."})
    max_prompt_tokens: int = field(default=64, metadata={"help": "Tokens kept of a prompt, from its end."})
    max_answer_tokens: int = field(default=160, metadata={"help": "Tokens kept of an answer, from its start."})


class Gold(PseudoLabelingCallback):
    """Keeps the same pairs as the arm, with their true labels, to measure what perfect pseudo-labels would give."""

    def score(self, trainer, pool, round):
        scores = super().score(trainer, pool, round)
        return replace(scores, logits=np.abs(scores.logits) * np.where(pool.gold, 1, -1))


def load_parts(path: str, tokenizer, script_args: BenchmarkArguments) -> dict[str, list[list[dict[str, str]]]]:
    """Rows as text, by part and prompt."""

    def cut(messages: list[dict[str, str]], size: slice) -> str:
        text = "\n".join(message["content"] for message in messages)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][size]
        return tokenizer.decode(ids)

    rows_of: dict[str, list[dict[str, str]]] = {}
    for row in Dataset.from_parquet(path):
        answers = {name: cut(row[name], slice(script_args.max_answer_tokens)) for name in ("chosen", "rejected")}
        if answers["chosen"] != answers["rejected"] and all(answers.values()):
            prompt = cut(row["prompt"], slice(-script_args.max_prompt_tokens, None)) + f" {tokenizer.sep_token} "
            rows_of.setdefault(str(row["prompt"]), []).append({"prompt": prompt, **answers})
    return split_by_prompt(rows_of, script_args.max_prompts)


class FrozenModel:
    """A model with a frozen backbone: the features of a sequence are computed once for all runs."""

    def __init__(self, path: str, training_args: SSRMConfig, name: str):
        self.model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype="float32")
        self.backbone = freeze_backbone(self.model)
        self.features_path = Path(training_args.output_dir) / f"features-{name}.npz"
        self.num_saved = 0
        if self.features_path.is_file():
            kept = np.load(self.features_path)
            digests = [bytes(row) for row in kept["digests"]]
            self.backbone.features_of = dict(
                zip(digests, zip(kept["hidden"], kept["pooled"], strict=True), strict=True)
            )

    def with_new_head(self):
        """The model with a new, random score head."""
        head = self.model.classifier
        head.weight.data.normal_(std=0.02)
        head.bias.data.zero_()
        head.requires_grad_(True)
        return self.model

    def save_features(self) -> None:
        """Write the features to disk if there are more than were written last."""
        if len(self.backbone.features_of) == self.num_saved:
            return
        self.num_saved = len(self.backbone.features_of)
        digests, features = zip(*self.backbone.features_of.items(), strict=True)
        hidden, pooled = (np.stack(each) for each in zip(*features, strict=True))
        digests = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), -1)
        np.savez(self.features_path, digests=digests, hidden=hidden, pooled=pooled)


class Benchmark:
    """The runs on one data set."""

    def __init__(self, script_args: BenchmarkArguments, training_args: SSRMConfig, path: str, dataset_path: str):
        self.script_args, self.training_args, self.path = script_args, training_args, path
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.name = Path(dataset_path).stem
        self.frozen = FrozenModel(path, training_args, self.name) if training_args.freeze_backbone else None
        self.parts = load_parts(dataset_path, self.tokenizer, script_args)
        self.held_out = {
            part: Dataset.from_list([row for group in self.parts[part] for row in group]) for part in ("dev", "test")
        }

    def draw(self, seed: int, fraction: float) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Labeled and unlabeled rows of a seed."""
        groups = list(self.parts["train"])
        random.Random(seed).shuffle(groups)
        num_labeled = max(5, round(len(groups) * fraction))
        labeled, pool = groups[:num_labeled], groups[num_labeled:]
        return [row for group in labeled for row in group], [row for group in pool for row in group]

    def make_model(self, seed: int):
        """The pretrained model with a new head."""
        set_seed(seed)
        if self.frozen is not None:
            return self.frozen.with_new_head()
        return AutoModelForSequenceClassification.from_pretrained(self.path, num_labels=1, dtype="float32")

    def train(self, seed: int, labeled, pool, callbacks=None, **settings) -> tuple[list[dict], int]:
        """Facts of the rounds of a run, and the round that the final model is from."""
        output_dir = f"{self.training_args.output_dir}/run"
        shutil.rmtree(output_dir, ignore_errors=True)
        args = replace(self.training_args, seed=seed, output_dir=output_dir, **settings)
        trainer = SSRMTrainer(
            model=self.make_model(seed),
            args=args,
            train_dataset=Dataset.from_list(labeled),
            eval_dataset=self.held_out,
            processing_class=self.tokenizer,
            unlabeled_dataset=Dataset.from_list(pool),
            callbacks=callbacks,
        )
        # Every training ends with a garbage collection, which would go through tens of thousands of features.
        gc.freeze()
        kept_round = trainer.train().metrics["kept_round"]
        return trainer.round_history, kept_round

    def measure(self, rounds: list[dict], kept_round: int) -> dict[str, dict[str, float]]:
        """Metrics of the final model of a run, by part."""
        last, facts = rounds[-1], rounds[kept_round]
        metrics = {}
        for part in ("dev", "test"):
            # Without folds no temperature is fitted.
            found = {
                name: facts.get(f"eval_{part}_{name}", facts[f"eval_{part}_{name.removeprefix('calibrated_')}"])
                for name in METRICS
            }
            metrics[part] = {
                **found,
                "kept_round": kept_round,
                "temperature": facts["temperature"],
                "kept": last.get("kept", 0),
                "pseudo_label_accuracy": last.get("pseudo_label_accuracy"),
            }
        return metrics

    def tune(self, seed: int, labeled, pool) -> dict[str, float]:
        """Length and weight decay of round 0 with the lowest cross-validated log-loss on the labels."""
        script_args = self.script_args
        if len(script_args.steps) * len(script_args.weight_decays) == 1:
            return {"max_steps": script_args.steps[0], "weight_decay": script_args.weight_decays[0]}
        losses = {}
        for steps in script_args.steps:
            for weight_decay in script_args.weight_decays:
                settings = {"max_steps": steps, "weight_decay": weight_decay}
                (facts,), _ = self.train(seed, labeled, pool[:2], num_rounds=0, **FOLDS, **settings)
                losses[steps, weight_decay] = facts["cross_fit_log_loss"]
        steps, weight_decay = min(losses, key=lambda key: losses[key])
        return {"max_steps": steps, "weight_decay": weight_decay}

    def run(self, seed: int, fraction: float, arm: str, settings: dict[str, float]) -> dict[str, dict[str, float]]:
        """Metrics of an arm, by part."""
        labeled, pool = self.draw(seed, fraction)
        if arm == "labels":
            return self.measure(*self.train(seed, labeled, pool[:2], num_rounds=0, **PAPER, **settings))
        if arm == "labels, all steps":
            settings = {**settings, "max_steps": settings["max_steps"] * (1 + self.training_args.num_rounds)}
            return self.measure(*self.train(seed, labeled, pool[:2], num_rounds=0, **PAPER, **settings))
        if arm == "all labels":
            # More data allows more steps: their number is chosen on the dev part.
            lengths = [settings["max_steps"] * factor for factor in self.script_args.all_labels_lengths]
            runs = [
                self.measure(*self.train(seed, labeled + pool[2:], pool[:2], num_rounds=0, **PAPER, max_steps=length))
                for length in lengths
            ]
            return min(runs, key=lambda metrics: metrics["dev"]["log_loss"])
        is_gold = arm.endswith(", true labels")
        callbacks = [Gold()] if is_gold else None
        changes = ARMS[arm.removesuffix(", true labels")]
        return self.measure(*self.train(seed, labeled, pool, callbacks, **{**settings, **changes}))


def table(results: list[dict], arms: list[str], part: str) -> str:
    """One line an arm: means over seeds, with intervals, and the share of the gap to all labels that it closes."""
    value = {(entry["seed"], entry["arm"]): entry["metrics"][part] for entry in results}
    seeds = sorted({seed for seed, _ in value})
    lines = [
        "| Arm | Accuracy | − labels | Share of the gap | Log-loss | ECE | by chance "
        "| Calibrated log-loss | ECE | by chance | Kept | Right |"
    ]
    lines.append("|---|" + "---:|" * 11)
    for arm in arms:
        have = [seed for seed in seeds if (seed, arm) in value]
        if not have:
            continue
        rows = [value[seed, arm] for seed in have]
        gain = [value[seed, arm]["accuracy"] - value[seed, "labels"]["accuracy"] for seed in have]
        gap = [value[seed, "all labels"]["accuracy"] - value[seed, "labels"]["accuracy"] for seed in have]
        right = [row["pseudo_label_accuracy"] for row in rows if row["pseudo_label_accuracy"] is not None]
        share = f"{np.mean(gain) / np.mean(gap):.2f}" if np.mean(gap) else "–"
        cells = [interval([row["accuracy"] for row in rows]), interval(gain), share]
        cells += [f"{np.mean([row[metric] for row in rows]):.3f}" for metric in METRICS[1:]]
        cells += [f"{np.mean([row['kept'] for row in rows]):.0f}", f"{np.mean(right):.3f}" if right else "–"]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: list[dict], arms: list[str], part: str, path: Path) -> None:
    """Gain in accuracy over the labels alone, by arm and data set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({entry["dataset"] for entry in results})
    arms = [arm for arm in arms if arm != "labels" and any(entry["arm"] == arm for entry in results)]
    figure, panels = plt.subplots(
        1, len(names), figsize=(5 * len(names), 0.3 * len(arms) + 1.2), sharey=True, squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=True):
        value = {(e["seed"], e["arm"]): e["metrics"][part]["accuracy"] for e in results if e["dataset"] == name}
        for place, arm in enumerate(arms):
            gains = [value[key] - value[key[0], "labels"] for key in value if key[1] == arm]
            panel.errorbar(np.mean(gains), place, xerr=half_interval(gains), fmt="o", color="C0")
        panel.axvline(0, color="gray", linewidth=1)
        panel.set(title=name, xlabel="accuracy over labels alone", yticks=range(len(arms)), yticklabels=arms)
        panel.grid(alpha=0.3)
    panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main(script_args: BenchmarkArguments, training_args: SSRMConfig) -> None:
    disable_progress_bars()
    path = script_args.model_name_or_path or default_model_path()
    arms = ["labels", "labels, all steps", *(script_args.arms or [*ARMS, "paper, true labels"]), "all labels"]
    output_dir = Path(training_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    kept = output_dir / "results.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for dataset_path in script_args.dataset_paths:
        benchmark = Benchmark(script_args, training_args, path, dataset_path)
        seeds = range(training_args.seed, training_args.seed + script_args.num_seeds)
        for fraction, seed in ((fraction, seed) for fraction in script_args.label_fractions for seed in seeds):
            key = {"dataset": benchmark.name, "fraction": fraction, "seed": seed}
            settings = next((entry["settings"] for entry in done if key.items() <= entry.items()), None)
            for arm in arms:
                if any({**key, "arm": arm}.items() <= entry.items() for entry in done):
                    continue
                start = time.time()
                settings = settings or benchmark.tune(seed, *benchmark.draw(seed, fraction))
                metrics = benchmark.run(seed, fraction, arm, settings)
                done.append({**key, "arm": arm, "settings": settings, "metrics": metrics})
                with kept.open("a") as file:
                    file.write(json.dumps({**done[-1], "seconds": time.time() - start}) + "\n")
                print(key, arm, metrics[script_args.part], flush=True)
                if benchmark.frozen is not None:
                    benchmark.frozen.save_features()
    for fraction in script_args.label_fractions:
        here = [entry for entry in done if entry["fraction"] == fraction]
        for name in sorted({entry["dataset"] for entry in here}):
            print(f"\n{name}, {fraction:.3f} of the labels\n")
            print(table([entry for entry in here if entry["dataset"] == name], arms, script_args.part))
        plot(here, arms, script_args.part, output_dir / f"quality-{fraction:.3f}.png")


if __name__ == "__main__":
    main(*TrlParser((BenchmarkArguments, SSRMConfig)).parse_args_and_config())
