"""The commands, their arguments and their help. The code of a command is imported after the command was chosen."""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import shtab

from .errors import ERROR, OneLineParser, exit_status, sentence, tell


SHELLS = ("bash", "zsh")
# Equal to `labeling.PAIRINGS` and `benchmarks.BENCHMARKS`, whose modules import torch.
PAIRINGS = ("best_vs_worst", "best_vs_random", "all")
BENCHMARKS = ("preferences", "rewardbench", "rm_bench", "best_of_n")
DEBUG_HELP = "show the traceback of an error"

EPILOG = """\
examples:
  trl-ssrm quickstart
  trl-ssrm train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name labels.csv \\
      --unlabeled_dataset_name pool.csv --output_dir reward-model
  trl-ssrm evaluate --model_name_or_path reward-model --dataset_name test.csv
  trl-ssrm report reward-model
  trl-ssrm label --model_name_or_path reward-model --dataset_name completions.jsonl --output_dir preferences

`trl-ssrm COMMAND --help` shows the arguments of a command. `--debug` shows the traceback of an error.
"""

LABEL_EPILOG = """\
examples:
  trl-ssrm label --model_name_or_path reward-model --dataset_name completions.jsonl --output_dir preferences
  trl-ssrm label --model_name_or_path reward-model --dataset_name org/completions --dataset_split test \\
      --output_dir preferences --pairing all --min_confidence 0.8 --temperature 1.7
  trl dpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name preferences --output_dir policy

The rows have `prompt` and `completions`, or `prompt`, `completion_a` and `completion_b`. A pairwise model is recognized
by its files. To share the work among several processes: accelerate launch -m trl_ssrm.cli.main label ...
"""

EVALUATE_EPILOG = """\
examples:
  trl-ssrm evaluate --model_name_or_path reward-model --dataset_name test.csv
  trl-ssrm evaluate --model_name_or_path baseline reward-model --dataset_name test.jsonl --subset_column domain \\
      --output_file comparison.md
  trl-ssrm evaluate --model_name_or_path reward-model --dataset_name allenai/reward-bench --dataset_split filtered \\
      --benchmark rewardbench

With several models, the table has a paired test of every two of them.
"""

REPORT_EPILOG = """\
examples:
  trl-ssrm report reward-model
  trl-ssrm report reward-model --path report.html
"""

COMPLETION_EPILOG = """\
to install it for bash:
  trl-ssrm completion bash > ~/.local/share/bash-completion/completions/trl-ssrm
to install it for zsh, with `fpath+=(~/.zfunc)` before `compinit` in ~/.zshrc:
  trl-ssrm completion zsh > ~/.zfunc/_trl-ssrm
"""

# Arguments whose value a shell completes with the names of files, or of folders.
_FILES = ("config", "comparison", "dataset_name", "model_name_or_path", "output_file", "path")
_PATHS = dict.fromkeys(_FILES, shtab.FILE)
_PATHS |= dict.fromkeys((f"{name}_dataset_name" for name in ("unlabeled", "eval", "calibration")), shtab.FILE)
_PATHS |= {"output_dir": shtab.DIRECTORY}

# These commands have parsers of their own, made of dataclasses that import TRL.
_TRAINING = ("train", "quickstart")
TRAIN_HELP = "train a reward model on few labeled pairs and a pool without labels"
QUICKSTART_HELP = "train a small pretrained model on real text in minutes, without the hub or a GPU"


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
    own: dict[str, dict[str, Any]] = {name: {"add_help": False} for name in _TRAINING}
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
    if name not in _TRAINING:
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
        default=1.0,
        help="divisor of the margin, to calibrate the confidence: the temperature of the last round (%(default)s)",
    )
    command.add_argument("--max_length", type=int, help="longest sequence in tokens; longer completions are left out")
    command.add_argument("--seed", type=int, default=42, help="seed of `best_vs_random` (%(default)s)")
    command.add_argument("--dtype", default="float32", help="precision of the weights (%(default)s)")
    command.add_argument("--trust_remote_code", action="store_true", help="run Python code of the checkpoint")
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
    command.add_argument("--output_file", help="Markdown file to write the table to")
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


def _add_scoring(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch_tokens", type=int, default=16384, help="size of a scoring batch in tokens (%(default)s)"
    )
    command.add_argument("--disable_tqdm", action="store_true", help="show no progress bars")


def _version() -> str:
    from .. import __version__

    return __version__


def main(argv: list[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv (`list[str]`, *optional*):
            Arguments. If `None`, those of the process.

    Returns:
        `int`: exit status: 0, 2 after an error, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        command, debug, function = _parse(argv)
    except ValueError as error:
        tell("trl-ssrm", f"error: {sentence(error)}")
        return ERROR
    can_resume = command in (*_TRAINING, "label")
    interrupted = "Run the same command again to resume." if can_resume else ""
    return exit_status(function, f"trl-ssrm {command}", debug, interrupted)


def _parse(argv: list[str]) -> tuple[str, bool, Callable[[], int | None]]:
    """`tuple`: name of the command, whether to show the traceback of an error, and the function that runs the command."""
    parser = make_parser()
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    if command in _TRAINING:
        # Only their own parser knows their arguments. There, `--debug` with a value is an argument of `TrainingArguments`.
        place = argv.index(command)
        parser.parse_args(argv[: place + 1])
        debug, rest = take_debug(argv[place + 1 :])
        debug = debug or "--debug" in argv[:place]
        return command, debug, functools.partial(_train if command == "train" else _quickstart, rest, debug)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        return "", False, parser.print_help
    return arguments.command, arguments.debug, functools.partial(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    from . import commands

    functions = {
        "label": commands.label,
        "evaluate": commands.evaluate,
        "report": commands.report,
        "env": commands.env,
        "completion": commands.completion,
    }
    functions[arguments.command](arguments)


def _train(argv: list[str], debug: bool) -> int | None:
    from .train import launch

    return launch(argv, debug)


def _quickstart(argv: list[str], debug: bool) -> None:
    from .quickstart import main as run

    run(argv)


def take_debug(argv: list[str]) -> tuple[bool, list[str]]:
    """
    Remove `--debug` from the arguments of a training command, unless a value follows it.

    Args:
        argv (`list[str]`):
            Arguments of the command.

    Returns:
        `tuple[bool, list[str]]`: whether `--debug` was removed, and the other arguments.
    """
    is_ours = [
        argument == "--debug" and all(following.startswith("-") for following in argv[place : place + 1])
        for place, argument in enumerate(argv, start=1)
    ]
    return any(is_ours), [argument for argument, ours in zip(argv, is_ours, strict=True) if not ours]


if __name__ == "__main__":
    sys.exit(main())
