"""The commands that do not train, each a function of its parsed arguments."""

import contextlib
import io
import os
from argparse import Namespace
from pathlib import Path


def label(args: Namespace) -> None:
    """Label completions with a reward model, and write the pairs as `train.parquet`."""
    from accelerate import PartialState

    from .. import label_preferences
    from ..alignment.labeling import load_labeler
    from ..io.files import written_aside
    from ..io.shapes import named_columns, with_known_columns
    from ..io.sources import load_data

    dataset = load_data(args.dataset_name, args.dataset_split, args.dataset_config)
    named = named_columns(args)
    dataset = with_known_columns(dataset, args.dataset_name, True, named)
    loading = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code, "batch_tokens": args.batch_tokens}
    labeled = label_preferences(
        load_labeler(args.model_name_or_path, **loading),
        dataset,
        # A hidden folder, so that `load_dataset` finds `train.parquet` only.
        os.path.join(args.output_dir, ".labels"),
        pairing=args.pairing,
        min_confidence=args.min_confidence,
        temperature=args.temperature,
        max_length=args.max_length,
        seed=args.seed,
        disable_tqdm=args.disable_tqdm,
    )
    if PartialState().is_main_process:
        path = Path(args.output_dir) / "train.parquet"
        with written_aside(path) as aside:
            labeled.to_parquet(str(aside))
        confidence = sum(labeled["confidence"]) / len(labeled)
        print(f"{len(labeled):,} pairs out of {len(dataset):,} rows, mean confidence {confidence:.3f}: {path}")


def evaluate(args: Namespace) -> None:
    """Evaluate reward models on preference data, and print a table."""
    from .. import evaluate as evaluate_model
    from .. import evaluation_table
    from ..data.ties import with_ties_settled
    from ..io.hub import check_model_is_there
    from ..io.shapes import named_columns, with_known_columns
    from ..io.sources import load_data

    dataset = load_data(args.dataset_name, args.dataset_split, args.dataset_config)
    # The published benchmarks have columns of their own, which are no shape to convert.
    if args.benchmark == "preferences":
        dataset = with_known_columns(dataset, args.dataset_name, False, named_columns(args))
        if {"chosen", "rejected"} <= set(dataset.column_names):
            # Here, so that the log names the file, and once for all models.
            dataset = with_ties_settled(dataset, args.dataset_name, is_trained_on=False)
    for model in args.model_name_or_path:
        check_model_is_there(model)
    evaluations = [
        evaluate_model(
            model,
            dataset,
            benchmark=args.benchmark,
            subset_column=args.subset_column,
            batch_tokens=args.batch_tokens,
            disable_tqdm=args.disable_tqdm,
            max_length=args.max_length,
        )
        for model in args.model_name_or_path
    ]
    print(evaluation_table(evaluations))
    if args.output_file is not None:
        path = Path(args.output_file)
        table = evaluation_table(evaluations, "html" if path.suffix in (".html", ".htm") else "markdown")
        path.write_text(f"{table}\n", encoding="utf-8")


def report(args: Namespace) -> None:
    """Write the report of a run, and print its path."""
    from ..reporting.report import write_report

    print(f"Report: {write_report(args.output_dir, args.path)}")


def env(args: Namespace) -> None:
    """Print versions and hardware: those that TRL prints, and those that the speed depends on."""
    import importlib.metadata

    import psutil
    import torch
    from trl.scripts.env import print_env

    from .. import __version__

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_env()
    facts = {"trl-ssrm version": __version__}
    for name in ("numpy", "tokenizers", "safetensors", "rich", "matplotlib"):
        try:
            facts[f"{name} version"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[f"{name} version"] = "not installed"
    facts["CPU"] = f"{psutil.cpu_count(logical=False)} cores, {psutil.cpu_count()} threads"
    facts["Memory"] = f"{psutil.virtual_memory().total / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        memory = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        facts["Memory of the GPUs"] = ", ".join(f"{each / 2**30:.1f} GiB" for each in memory)
    print("\n".join([printed.getvalue().rstrip(), *(f"- {name}: {value}" for name, value in facts.items())]))


def completion(args: Namespace) -> None:
    """Print the completion script of a shell."""
    import shtab

    from .parser import make_parser

    print(shtab.complete(make_parser(whole=True), shell=args.shell))
