"""The commands, their arguments and their help. What a command does is imported when it was chosen."""

import argparse
import functools
import sys
from collections.abc import Callable

import shtab

from .errors import ERROR, OneLineParser, exit_status, sentence, tell


SHELLS = ("bash", "zsh")
# Those of `label_preferences` and of `evaluate`, which import torch.
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

`trl-ssrm COMMAND --help` says more about each. After an error, `--debug` shows where it comes from.
"""

LABEL_EPILOG = """\
examples:
  trl-ssrm label --model_name_or_path reward-model --dataset_name completions.jsonl --output_dir preferences
  trl-ssrm label --model_name_or_path reward-model --dataset_name org/completions --dataset_split test \\
      --output_dir preferences --pairing all --min_confidence 0.8 --temperature 1.7
  trl dpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name preferences --output_dir policy

The rows have `prompt` and `completions`, or `prompt`, `completion_a` and `completion_b`. A pairwise model is recognized.
Several processes share the work: accelerate launch -m trl_ssrm.cli.main label ...
"""

EVALUATE_EPILOG = """\
examples:
  trl-ssrm evaluate --model_name_or_path reward-model --dataset_name test.csv
  trl-ssrm evaluate --model_name_or_path baseline reward-model --dataset_name test.jsonl --subset_column domain \\
      --output_file comparison.md
  trl-ssrm evaluate --model_name_or_path reward-model --dataset_name allenai/reward-bench --dataset_split filtered \\
      --benchmark rewardbench

Of several models, the table has paired tests between them.
"""

REPORT_EPILOG = """\
examples:
  trl-ssrm report reward-model
  trl-ssrm report reward-model --path report.html
"""

COMPLETION_EPILOG = """\
bash, for good:
  trl-ssrm completion bash > ~/.local/share/bash-completion/completions/trl-ssrm
zsh, for good, with `fpath+=(~/.zfunc)` before `compinit` in ~/.zshrc:
  trl-ssrm completion zsh > ~/.zfunc/_trl-ssrm
"""

# Arguments that a shell completes with the names of files, or of folders.
_PATHS = dict.fromkeys(("config", "dataset_name", "model_name_or_path", "output_file", "path"), shtab.FILE)
_PATHS |= dict.fromkeys((f"{name}_dataset_name" for name in ("unlabeled", "eval", "calibration")), shtab.FILE)
_PATHS |= {"output_dir": shtab.DIRECTORY}

# What `train` and `quickstart` say on the first screen of their help, and here, where their own parser is not made.
TRAIN_HELP = "train a reward model on few labeled pairs and a pool without labels"
QUICKSTART_HELP = "see it work in minutes: a real model, real text, no hub, no GPU"


def make_parser(whole: bool = False) -> OneLineParser:
    """
    The parser of all commands.

    Args:
        whole (`bool`, *optional*, defaults to `False`):
            Whether with the arguments of `train` and `quickstart`, which import TRL.

    Returns:
        [`~argparse.ArgumentParser`]
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(
        prog="trl-ssrm",
        description="Semi-supervised reward modeling for TRL: train, evaluate and use a reward model from few labels.",
        epilog=EPILOG,
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl-ssrm {_version()}")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, words: str, **kwargs) -> argparse.ArgumentParser:
        kwargs = {"description": f"{words[0].upper()}{words[1:]}.", "formatter_class": formatter, **kwargs}
        command = commands.add_parser(name, help=words, **kwargs)
        if not kwargs.keys() & {"add_help", "parents"}:
            # Unset unless it is there, so that one before the command stays.
            command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG_HELP)
        return command

    if whole:
        from . import quickstart, train

        add("train", TRAIN_HELP, parents=[train.make_parser(add_help=False)])
    else:
        add("train", TRAIN_HELP, add_help=False)

    label = add(
        "label",
        "turn prompts with completions into preference pairs for DPO",
        epilog=LABEL_EPILOG,
        allow_abbrev=False,
    )
    label.add_argument("--model_name_or_path", required=True, help="reward model, adapter or pairwise model")
    _add_data(label)
    label.add_argument("--output_dir", required=True, help="folder for train.parquet, which `trl dpo` reads")
    label.add_argument("--pairing", choices=PAIRINGS, default=PAIRINGS[0], help="pairs of a prompt (%(default)s)")
    label.add_argument(
        "--min_confidence", type=float, default=0.5, help="least confidence of a pair, in [0.5, 1) (%(default)s)"
    )
    label.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="divisor of the margin that calibrates the confidence, such as that of the last round (%(default)s)",
    )
    label.add_argument("--max_length", type=int, help="longest sequence in tokens; longer completions are left out")
    label.add_argument("--seed", type=int, default=42, help="seed of `best_vs_random` (%(default)s)")
    label.add_argument("--dtype", default="float32", help="precision to load the model in (%(default)s)")
    label.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    _add_scoring(label)

    evaluate = add(
        "evaluate",
        "measure one or several reward models on preference data",
        epilog=EVALUATE_EPILOG,
        allow_abbrev=False,
    )
    evaluate.add_argument("--model_name_or_path", nargs="+", required=True, help="reward models, the reference first")
    _add_data(evaluate)
    evaluate.add_argument(
        "--benchmark", choices=BENCHMARKS, default=BENCHMARKS[0], help="what the rows are (%(default)s)"
    )
    evaluate.add_argument("--subset_column", help="column whose values are measured one by one")
    evaluate.add_argument(
        "--max_length", type=int, help="longest sequence in tokens; a comparison with a longer one counts as a tie"
    )
    evaluate.add_argument("--output_file", help="Markdown file for the table, besides the screen")
    _add_scoring(evaluate)

    report = add("report", "write report.html of a run, one file for a browser", epilog=REPORT_EPILOG)
    report.add_argument("output_dir", help="output directory of a run")
    report.add_argument("--path", help="file to write (report.html in it)")

    if whole:
        add("quickstart", QUICKSTART_HELP, parents=[quickstart.make_parser(add_help=False)])
    else:
        add("quickstart", QUICKSTART_HELP, add_help=False)
    add("env", "print versions and hardware, for an issue report")
    completion = add("completion", "print a script that completes this command in a shell", epilog=COMPLETION_EPILOG)
    completion.add_argument("shell", choices=SHELLS)
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest in _PATHS:
                action.complete = _PATHS[action.dest]  # type: ignore[attr-defined]
            if action.choices is not None:
                # Those of transformers may be the keys of a dictionary, of which shtab 1.7 wants the first one.
                action.choices = list(action.choices)
    return parser


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dataset_name", required=True, help="hub ID, folder, or file (JSON lines, CSV, TSV, Parquet)"
    )
    command.add_argument("--dataset_config", help="configuration of a dataset of the hub")
    command.add_argument("--dataset_split", help="split (train, or the only one)")


def _add_scoring(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--batch_tokens", type=int, default=16384, help="size of a scoring batch in tokens (%(default)s)"
    )
    command.add_argument("--disable_tqdm", action="store_true", help="show no bars")


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
    is_resumed = command in ("train", "label", "quickstart")
    interrupted = "The same command goes on from where it was." if is_resumed else ""
    return exit_status(function, f"trl-ssrm {command}", debug, interrupted)


def _parse(argv: list[str]) -> tuple[str, bool, Callable[[], int | None]]:
    """Name of the command, whether its errors come with a traceback, and what runs it."""
    parser = make_parser()
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    if command in ("train", "quickstart"):
        # Their parser is made of dataclasses, and there `--debug` with a value is one of `TrainingArguments`.
        place = argv.index(command)
        parser.parse_args(argv[: place + 1])
        debug, rest = take_debug(argv[place + 1 :])
        debug = debug or "--debug" in argv[:place]
        return command, debug, functools.partial(_train if command == "train" else _quickstart, rest, debug)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        return "", False, parser.print_help
    return arguments.command, arguments.debug, functools.partial(_run, arguments)


def _run(arguments: argparse.Namespace) -> int | None:
    from . import commands

    return getattr(commands, arguments.command)(arguments)


def _train(argv: list[str], debug: bool) -> int | None:
    from .train import launch

    return launch(argv, debug)


def _quickstart(argv: list[str], debug: bool) -> None:
    from .quickstart import main as run

    run(argv)


def take_debug(argv: list[str]) -> tuple[bool, list[str]]:
    """
    Take `--debug` out of the arguments of a training command, unless it has a value.

    Args:
        argv (`list[str]`):
            Arguments.

    Returns:
        `tuple[bool, list[str]]`: whether it was there, and the others.
    """
    is_ours = [
        argument == "--debug" and all(following.startswith("-") for following in argv[place : place + 1])
        for place, argument in enumerate(argv, start=1)
    ]
    return any(is_ours), [argument for argument, ours in zip(argv, is_ours, strict=True) if not ours]


if __name__ == "__main__":
    sys.exit(main())
