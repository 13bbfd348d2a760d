"""The parser of all commands."""

import argparse
from typing import Any

import shtab

from .errors import OneLineParser
from .help import (
    COMPLETION_EPILOG,
    EPILOG,
    EVALUATE_EPILOG,
    LABEL_EPILOG,
    QUICKSTART_HELP,
    REPORT_EPILOG,
    TRAIN_HELP,
)


SHELLS = ("bash", "zsh")
# Equal to `labeling.PAIRINGS` and `benchmarks.BENCHMARKS`, whose modules import torch.
PAIRINGS = ("best_vs_worst", "best_vs_random", "all")
BENCHMARKS = (
    *("preferences", "best_of_n", "rewardbench", "rm_bench"),
    *("rewardbench_2", "judgebench", "llmbar", "rmb"),
)
DEBUG_HELP = "show the traceback of an error"
# These commands have parsers of their own, made of dataclasses that import TRL.
TRAINING = ("train", "quickstart")

# Arguments whose value a shell completes with the names of files, or of folders.
_FILES = ("config", "comparison", "dataset_name", "model_name_or_path", "output_file", "path")
_PATHS = dict.fromkeys(_FILES, shtab.FILE)
_PATHS |= dict.fromkeys((f"{name}_dataset_name" for name in ("unlabeled", "eval", "calibration")), shtab.FILE)
_PATHS |= {"output_dir": shtab.DIRECTORY}


def make_parser(whole: bool = False) -> OneLineParser:
    """
    Make the parser of all commands.

    Args:
        whole (`bool`, *optional*, defaults to `False`):
            Whether to include the arguments of `train` and `quickstart`, which takes the import of TRL.

    Returns:
        [`~argparse.ArgumentParser`]
    """
    parser = OneLineParser(
        prog="trl-ssrm",
        description="Semi-supervised reward modeling for TRL: train, evaluate and use a reward model from few labels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl-ssrm {_version()}")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    own: dict[str, dict[str, Any]] = {name: {"add_help": False} for name in TRAINING}
    if whole:
        from . import quickstart, train

        own = {
            "train": {"parents": [train.make_parser(add_help=False)]},
            "quickstart": {"parents": [quickstart.make_parser(add_help=False)]},
        }
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_command(commands, "train", TRAIN_HELP, **own["train"])
    _add_label(commands)
    _add_evaluate(commands)
    report = _add_command(commands, "report", "write the report of a run, one HTML file", epilog=REPORT_EPILOG)
    report.add_argument("output_dir", help="output directory of a run")
    report.add_argument("--path", help="file to write (OUTPUT_DIR/report.html)")
    _add_command(commands, "quickstart", QUICKSTART_HELP, **own["quickstart"])
    _add_command(commands, "env", "print versions and hardware, for a bug report")
    completion = _add_command(
        commands, "completion", "print the script that completes this command in a shell", epilog=COMPLETION_EPILOG
    )
    completion.add_argument("shell", choices=SHELLS)
    for command in commands.choices.values():
        _prepare_for_shtab(command)
    return parser


def _add_command(commands, name: str, words: str, **kwargs: Any) -> argparse.ArgumentParser:
    kwargs = {"formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
    command = commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.", **kwargs)
    if name not in TRAINING:
        # Suppressed, so that its default does not overwrite a `--debug` before the command.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG_HELP)
    return command


def _add_label(commands) -> None:
    words = "turn prompts with completions into preference pairs for DPO"
    command = _add_command(commands, "label", words, epilog=LABEL_EPILOG, allow_abbrev=False)
    command.add_argument("--model_name_or_path", required=True, help="reward model, adapter or pairwise model")
    _add_data(command)
    command.add_argument("--output_dir", required=True, help="folder for train.parquet, which `trl dpo` reads")
    command.add_argument(
        "--pairing", choices=PAIRINGS, default=PAIRINGS[0], help="pairs to make of each prompt (%(default)s)"
    )
    command.add_argument(
        "--min_confidence", type=float, default=0.5, help="lowest confidence of a pair, in [0.5, 1) (%(default)s)"
    )
    command.add_argument(
        "--temperature",
        type=float,
        help="divisor of the margin, which calibrates the confidence (default: the one that was saved with the model, or 1)",
    )
    command.add_argument("--max_length", type=int, help="longest sequence in tokens; longer completions are left out")
    command.add_argument("--seed", type=int, default=42, help="seed of `best_vs_random` (%(default)s)")
    command.add_argument("--dtype", default="float32", help="precision of the weights (%(default)s)")
    _add_switch(command, "--trust_remote_code", "run Python code of the checkpoint")
    _add_scoring(command)


def _add_evaluate(commands) -> None:
    words = "evaluate one or more reward models on preference data"
    command = _add_command(commands, "evaluate", words, epilog=EVALUATE_EPILOG, allow_abbrev=False)
    command.add_argument("--model_name_or_path", nargs="+", required=True, help="reward models, the reference first")
    _add_data(command)
    command.add_argument("--benchmark", choices=BENCHMARKS, default=BENCHMARKS[0], help="kind of rows (%(default)s)")
    command.add_argument("--subset_column", help="column to group the rows by; each group gets its own metrics")
    command.add_argument(
        "--max_length", type=int, help="longest sequence in tokens; a comparison with a longer one counts as a tie"
    )
    command.add_argument(
        "--output_file", help="file to write the table to, as Markdown, or as HTML if it ends in .html"
    )
    _add_scoring(command)


def _prepare_for_shtab(command: argparse.ArgumentParser) -> None:
    for action in command._actions:
        if action.dest in _PATHS:
            action.complete = _PATHS[action.dest]  # type: ignore[attr-defined]
        if action.choices is not None:
            # Choices of transformers may be the keys of a dictionary, which shtab 1.7 can't index.
            action.choices = list(action.choices)


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dataset_name", required=True, help="hub ID, folder, or file (JSON lines, CSV, TSV, Parquet)"
    )
    command.add_argument("--dataset_config", help="configuration of a dataset on the hub")
    command.add_argument("--dataset_split", help="split (train, or the only split)")
    for column in ("prompt", "chosen", "rejected"):
        command.add_argument(f"--{column}_column", help=f"column that stands for `{column}`")


def _add_scoring(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch_tokens", type=int, default=16384, help="size of a scoring batch in tokens (%(default)s)"
    )
    _add_switch(command, "--disable_tqdm", "show no progress bars")


def _add_switch(command: argparse.ArgumentParser, name: str, words: str) -> None:
    """An argument that takes `true` or `false`, or nothing for `true`, as those of `train` do."""
    command.add_argument(name, nargs="?", const=True, default=False, type=_truth, metavar="true|false", help=words)


def _truth(text: str) -> bool:
    # As `string_to_bool` of transformers, whose import takes seconds: the help of a command comes before it.
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return words[text.lower()]


def _version() -> str:
    from .. import __version__

    return __version__
