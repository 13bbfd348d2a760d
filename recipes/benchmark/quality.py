"""
What the pool gains: accuracy, log-loss and calibration of each arm, over tasks, shares of labels and seeds.

    python recipes/benchmark/quality.py --config recipes/benchmark/quality.yaml --tasks documentation pairs.parquet

The pairs are split into train, dev and test, always in the same way; a seed draws the groups that keep their labels. Some
of the lowest layers of a BERT or a Llama can be frozen (`--num_frozen_layers`). What they compute of a sequence is kept, so
that a run takes a third of the time; a decoder then needs a `--pad_token` that is not its end token. With
`--num_frozen_layers 0` the model can be of any family. The number of steps on the labels is chosen for each task and share on
the dev part, with a seed of its own; all arms use it. The arm with all labels has its own number, chosen in the same way. The
table shows the test part, which chose nothing. Results are kept line by line in `output_dir/results.jsonl`, and are not
measured again.
"""

import hashlib
import json
import random
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from common import default_model_path, half_interval, interval
from datasets import Dataset, disable_progress_bars
from tasks import load_parts
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import TrlParser

from trl_ssrm import SSRMConfig, SSRMTrainer
from trl_ssrm.data.sequences import PairedSequences
from trl_ssrm.scoring.metrics import preference_metrics


METRICS = ("accuracy", "log_loss", "ece")
# As in `SSRMConfig.paper`.
PAPER = {
    "num_rounds": 3,
    "round_init": "continue",
    "round_num_train_epochs": 1,
    "num_folds": 0,
    "pretrain_on_pool": False,
    "pseudo_label_type": "hard",
    "confidence_threshold": 0.8,
}
# What an arm changes in the settings. The length of round 0 is `max_steps`, so that of a round on the pool is said.
ARMS = {
    "paper": PAPER,
    "default": {"round_num_train_epochs": 2},
}
# The seed that chooses the numbers of steps. No arm is reported with it.
TUNING_SEED = 1000


@dataclass
class BenchmarkArguments:
    """Arguments of the benchmark, beside the arguments of the trainer."""

    tasks: list[str] = field(
        metadata={
            "help": "`documentation`, `parameters`, or Parquet files with `prompt`, `chosen`, `rejected`, as messages."
        }
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Default: all-MiniLM-L6-v2 of the package."}
    )
    num_frozen_layers: int = field(default=0, metadata={"help": "Lowest layers that are not trained."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds of the arms."})
    label_fractions: list[float] = field(
        default_factory=lambda: [1 / 16], metadata={"help": "Shares of the training groups that are labeled."}
    )
    arms: list[str] | None = field(default=None, metadata={"help": "Names of arms. Default: all of them."})
    steps: list[int] = field(
        default_factory=lambda: [15, 30, 60, 120], metadata={"help": "Numbers of steps on the labels to choose from."}
    )
    all_labels_epochs: list[int] = field(
        default_factory=lambda: [1, 3], metadata={"help": "Epochs of the arm with all labels to choose from."}
    )
    max_pairs: int = field(default=1_280, metadata={"help": "Pairs of a task, of which 5/8 are for training."})
    pairs_per_prompt: int = field(default=4, metadata={"help": "Most pairs of a group."})
    max_prompt_tokens: int = field(default=32, metadata={"help": "Tokens kept of a prompt, from its end."})
    max_answer_tokens: int = field(default=64, metadata={"help": "Tokens kept of an answer, from its start."})


class FrozenLayers:
    """Freezes the lowest layers of a BERT or a Llama, and computes what they give for a sequence once, in half precision."""

    def __init__(self, path: str, num_layers: int, pad_token_id: int):
        self.num_layers, self.pad_token_id = num_layers, pad_token_id
        self.lower = AutoModel.from_pretrained(path, dtype="float32").eval()
        self._keep_layers(self.lower, slice(num_layers))
        if hasattr(self.lower, "norm"):
            # A decoder has it after its last layer.
            self.lower.norm = nn.Identity()
        self.hidden_of: dict[bytes, torch.Tensor] = {}

    def freeze(self, model) -> None:
        """Make a model look up what the lowest layers give."""
        backbone = model.base_model
        embeddings = backbone.embeddings if hasattr(backbone, "encoder") else backbone.embed_tokens
        embeddings.requires_grad_(False)
        embeddings.forward = self._hidden
        self._keep_layers(backbone, slice(self.num_layers, None))

    @staticmethod
    def _keep_layers(backbone, kept: slice) -> None:
        if hasattr(backbone, "encoder"):
            backbone.encoder.layer = backbone.encoder.layer[kept]
        else:
            backbone.layers = backbone.layers[kept]

    @torch.no_grad()
    def _hidden(self, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
        is_token = input_ids != self.pad_token_id
        keys = [
            hashlib.blake2b(ids[here].numpy(), digest_size=16).digest()
            for ids, here in zip(input_ids, is_token, strict=True)
        ]
        if new := [row for row, key in enumerate(keys) if key not in self.hidden_of]:
            hidden = self.lower(input_ids=input_ids[new], attention_mask=is_token[new].long()).last_hidden_state.half()
            for row, values in zip(new, hidden, strict=True):
                self.hidden_of[keys[row]] = values[: int(is_token[row].sum())].clone()
        padded = nn.utils.rnn.pad_sequence([self.hidden_of[key] for key in keys], batch_first=True).float()
        return nn.functional.pad(padded, (0, 0, 0, input_ids.shape[1] - padded.shape[1]))


class Task:
    """The runs on one task."""

    def __init__(self, script_args: BenchmarkArguments, training_args: SSRMConfig, path: str, name: str):
        self.script_args, self.path = script_args, path
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        # The file has the token of a BERT, whose tokenizer names none.
        is_known = training_args.eos_token in self.tokenizer.get_vocab()
        self.training_args = training_args if is_known else replace(training_args, eos_token=self.tokenizer.eos_token)
        self.parts = load_parts(
            name,
            self.tokenizer,
            script_args.max_pairs,
            script_args.pairs_per_prompt,
            (script_args.max_prompt_tokens, script_args.max_answer_tokens),
        )
        self.frozen = None
        if script_args.num_frozen_layers:
            # What is kept belongs to a sequence in a row of its own.
            self.training_args = replace(self.training_args, share_prompts=False)
            pad_token_id = self.tokenizer.convert_tokens_to_ids(training_args.pad_token or self.tokenizer.pad_token)
            assert pad_token_id != self.tokenizer.eos_token_id, "Give a `--pad_token` that is not the end token."
            self.frozen = FrozenLayers(path, script_args.num_frozen_layers, pad_token_id)
        # Tokens that the model has read in training, and in scoring the pool.
        self.tokens = {"trained": 0, "scored": 0}

    def draw(self, seed: int, fraction: float) -> tuple[Dataset, Dataset]:
        """Labeled and unlabeled pairs of a seed."""
        groups = list(self.parts["train"])
        random.Random(seed).shuffle(groups)
        rows = [row for group in groups for row in group]
        num_labeled, wanted = 0, max(8, round(len(rows) * fraction))
        for group in groups:
            num_labeled += len(group) if num_labeled < wanted else 0
        return Dataset.from_list(rows[:num_labeled]), Dataset.from_list(rows[num_labeled:])

    def make_model(self, seed: int):
        """The pretrained model with a new head."""
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(self.path, num_labels=1, dtype="float32")
        if self.frozen is not None:
            self.frozen.freeze(model)
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        return model

    def _count(self, model, args, kwargs) -> None:
        kind = "trained" if model.training and torch.is_grad_enabled() else "scored"
        self.tokens[kind] += int(kwargs["attention_mask"].sum())

    def train(self, seed: int, part: str, labeled: Dataset, pool: Dataset | None = None, **settings) -> dict:
        """Metrics of the final model of a run on a part, what it cost, and facts about its rounds."""
        output_dir = f"{self.training_args.output_dir}/run"
        shutil.rmtree(output_dir, ignore_errors=True)
        self.tokens = {"trained": 0, "scored": 0}
        trainer = SSRMTrainer(
            model=self.make_model(seed),
            args=replace(self.training_args, seed=seed, output_dir=output_dir, **settings),
            train_dataset=labeled,
            eval_dataset=Dataset.from_list([row for group in self.parts[part] for row in group]),
            processing_class=self.tokenizer,
            unlabeled_dataset=pool,
        )
        held_out = PairedSequences.from_tokenized(trainer.eval_dataset)
        start = time.time()
        trainer.train()
        rounds = trainer.round_history if pool is not None else []
        # The evaluation at the end of each round is no cost of the arm.
        self.tokens["scored"] -= len(rounds) * int(held_out.lengths.sum())
        cost = {"seconds": time.time() - start, "steps": int(self._steps(trainer)), **self.tokens}
        logits = trainer.score_pairs(held_out, "held-out pairs").logits
        metrics = {name: value for name, value in preference_metrics(logits).items() if name in METRICS}
        return {**metrics, "labels": len(labeled), "cost": cost, "rounds": rounds, "logits": logits.round(4).tolist()}

    @staticmethod
    def _steps(trainer: SSRMTrainer) -> int:
        return trainer.round_history[-1]["global_step"] if trainer.has_pool else trainer.state.global_step

    def tune(self, fraction: float) -> dict[str, float]:
        """The number of steps on the labels, or epochs on all of them, with the lowest log-loss on the dev part."""
        script_args = self.script_args
        labeled, _ = self.draw(TUNING_SEED, fraction)
        if fraction == 1:
            choices = [{"num_train_epochs": epochs, "max_steps": -1} for epochs in script_args.all_labels_epochs]
        else:
            choices = [{"max_steps": steps} for steps in script_args.steps]
        losses = [self.train(TUNING_SEED, "dev", labeled, **settings)["log_loss"] for settings in choices]
        return choices[int(np.argmin(losses))]

    def run(self, arm: str, seed: int, fraction: float, settings: dict[str, float]) -> dict:
        """Metrics of an arm on the test part."""
        labeled, pool = self.draw(seed, fraction)
        if arm in ("labels", "all labels"):
            return self.train(seed, "test", labeled, **settings)
        if arm == "labels, all steps":
            # As many steps as the default takes.
            batch = self.training_args.per_device_train_batch_size
            more = ARMS["default"]["round_num_train_epochs"] * -(-(len(labeled) + len(pool)) // batch)
            return self.train(seed, "test", labeled, max_steps=int(settings["max_steps"] + more))
        # As epochs, so that a fold model reads its share of the labels as often as round 0 reads all of them.
        steps_of_an_epoch = -(-len(labeled) // self.training_args.per_device_train_batch_size)
        length = {"num_train_epochs": (settings["max_steps"] - 0.01) / steps_of_an_epoch, "max_steps": -1}
        return self.train(seed, "test", labeled, pool, **{**length, **ARMS[arm]})


def table(results: list[dict], arms: list[str]) -> str:
    """One line an arm: means over seeds, differences to the labels alone with 95 % intervals, and costs."""
    value = {(entry["seed"], entry["arm"]): entry for entry in results}
    lines = [
        "| Arm | Seeds | Accuracy | − labels | Log-loss | − labels | ECE | − labels | Tokens trained | scored | Seconds |"
    ]
    lines.append("|---|" + "---:|" * 10)
    for arm in arms:
        seeds = sorted(seed for seed, name in value if name == arm and (seed, "labels") in value)
        if not seeds:
            continue
        cells = [str(len(seeds))]
        for metric in METRICS:
            cells.append(f"{np.mean([value[seed, arm][metric] for seed in seeds]):.3f}")
            cells.append(interval([value[seed, arm][metric] - value[seed, "labels"][metric] for seed in seeds]))
        for name in ("trained", "scored", "seconds"):
            cells.append(f"{np.mean([value[seed, arm]['cost'][name] for seed in seeds]):,.0f}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(results: list[dict], arm: str = "default") -> str:
    """One line a task: an arm beside the labels alone, the paper and all labels, and what it changes, over seeds."""
    value = {(entry["task"], entry["seed"], entry["arm"]): entry for entry in results}
    titles = ["Task", "Seeds", "Labels", "Accuracy: labels", "for all steps", "paper", arm, "all", f"{arm} − labels"]
    titles += ["Log-loss: labels", arm, "−", "ECE: labels", arm]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    for task in dict.fromkeys(entry["task"] for entry in results):
        seeds = sorted(
            seed for name, seed, own in value if (name, own) == (task, arm) and (task, seed, "labels") in value
        )
        if seeds:
            lines.append(f"| {' | '.join([task, str(len(seeds)), *_cells(value, task, seeds, arm)])} |")
    return "\n".join(lines)


def _cells(value: dict[tuple, dict], task: str, seeds: list[int], arm: str) -> list[str]:
    def mean(own: str, metric: str) -> str:
        found = [value[task, seed, own][metric] for seed in seeds if (task, seed, own) in value]
        return f"{np.mean(found):.3f}" if found else "–"

    def change(metric: str) -> str:
        return interval([value[task, seed, arm][metric] - value[task, seed, "labels"][metric] for seed in seeds])

    cells = [f"{np.mean([value[task, seed, 'labels']['labels'] for seed in seeds]):.0f}"]
    cells += [mean(own, "accuracy") for own in ("labels", "labels, all steps", "paper", arm, "all labels")]
    cells += [change("accuracy"), mean("labels", "log_loss"), mean(arm, "log_loss"), change("log_loss")]
    return [*cells, mean("labels", "ece"), mean(arm, "ece")]


def share_of_gap(results: list[dict], arm: str) -> str:
    """Share of the gap between labels alone and all labels that an arm closes, over all tasks, with an interval over seeds."""
    value = {(entry["seed"], entry["arm"], entry["task"]): entry["accuracy"] for entry in results}
    shares = []
    for seed in sorted({seed for seed, _, _ in value}):
        tasks = [task for each, name, task in value if each == seed and name == arm]
        have = [task for task in tasks if {(seed, "labels", task), (seed, "all labels", task)} <= value.keys()]
        gain = sum(value[seed, arm, task] - value[seed, "labels", task] for task in have)
        gap = sum(value[seed, "all labels", task] - value[seed, "labels", task] for task in have)
        shares += [gain / gap] if gap else []
    return interval(shares) if shares else "–"


def plot(results: list[dict], arms: list[str], path: Path) -> None:
    """Gain in accuracy over the labels alone, by arm and task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({entry["task"] for entry in results})
    arms = [arm for arm in arms if arm != "labels" and any(entry["arm"] == arm for entry in results)]
    figure, panels = plt.subplots(
        1, len(names), figsize=(3.5 * len(names), 0.3 * len(arms) + 1.2), sharey=True, squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=True):
        value = {(e["seed"], e["arm"]): e["accuracy"] for e in results if e["task"] == name}
        for place, arm in enumerate(arms):
            gains = [
                value[key] - value[key[0], "labels"] for key in value if key[1] == arm and (key[0], "labels") in value
            ]
            if gains:
                panel.errorbar(np.mean(gains), place, xerr=half_interval(gains), fmt="o", color="C0")
        panel.axvline(0, color="gray", linewidth=1)
        panel.set(title=name, xlabel="accuracy over labels alone", yticks=range(len(arms)), yticklabels=arms)
        panel.grid(alpha=0.3)
    panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


class Results:
    """The results so far, a line each in a file."""

    def __init__(self, path: Path):
        self.path = path
        *whole, cut_off = path.read_text().split("\n") if path.exists() else [""]
        # A run that was killed while it wrote a line measures that once more.
        if cut_off:
            path.write_text("".join(f"{line}\n" for line in whole))
        self.entries = [json.loads(line) for line in whole]

    def find(self, key: dict) -> dict | None:
        return next((entry for entry in self.entries if key.items() <= entry.items()), None)

    def keep(self, entry: dict) -> dict:
        self.entries.append(entry)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        return entry


def main(script_args: BenchmarkArguments, training_args: SSRMConfig) -> None:
    disable_progress_bars()
    path = script_args.model_name_or_path or default_model_path()
    arms = ["labels", "labels, all steps", *ARMS, "all labels"]
    wanted = arms if script_args.arms is None else [arm for arm in arms if arm in script_args.arms]
    output_dir = Path(training_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results = Results(output_dir / "results.jsonl")
    for name in script_args.tasks:
        task = Task(script_args, training_args, path, name)
        for seed, fraction in (
            (seed, fraction) for seed in script_args.seeds for fraction in script_args.label_fractions
        ):
            for arm in wanted:
                # All labels are the same, whatever the share of the others.
                share = 1 if arm == "all labels" else fraction
                key = {"task": Path(name).stem, "fraction": share}
                if results.find({**key, "seed": seed, "arm": arm}):
                    continue
                tuned = results.find({**key, "arm": "tuning"})
                tuned = tuned or results.keep({**key, "arm": "tuning", "settings": task.tune(share)})
                found = task.run(arm, seed, share, tuned["settings"])
                results.keep({**key, "seed": seed, "arm": arm, **found})
                print(
                    key, seed, arm, {metric: round(found[metric], 4) for metric in METRICS}, found["cost"], flush=True
                )
    measured = [entry for entry in results.entries if entry["arm"] != "tuning"]
    for fraction in script_args.label_fractions:
        here = [entry for entry in measured if entry["fraction"] in (fraction, 1)]
        for name in sorted({entry["task"] for entry in here}):
            print(f"\n{name}, {fraction:.3f} of the labels\n")
            print(table([entry for entry in here if entry["task"] == name], arms))
        print(f"\nAll tasks, {fraction:.3f} of the labels\n\n{summary(here)}")
        for arm in ARMS:
            print(
                f"\nShare of the gap closed over all tasks, {fraction:.3f} of the labels, {arm}: {share_of_gap(here, arm)}"
            )
        plot(here, arms, output_dir / f"quality-{fraction:.3f}.png")


if __name__ == "__main__":
    main(*TrlParser((BenchmarkArguments, SSRMConfig)).parse_args_and_config())
