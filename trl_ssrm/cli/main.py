"""Runs a command. Its code is imported after it was chosen, because TRL takes seconds to import."""

import argparse
import functools
import logging
import sys
import warnings
from collections.abc import Callable

from .errors import ERROR, exit_status, sentence, take_debug, tell
from .parser import TRAINING, make_parser


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
    can_resume = command in (*TRAINING, "label")
    interrupted = "Run the same command again to resume." if can_resume else ""
    return exit_status(function, f"trl-ssrm {command}", debug, interrupted)


def _parse(argv: list[str]) -> tuple[str, bool, Callable[[], int | None]]:
    """`tuple`: name of the command, whether to show the traceback of an error, and the function that runs the command."""
    parser = make_parser()
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    if command in TRAINING:
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


def without_noise() -> None:
    """Silence warnings of libraries that are meant for their developers."""
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _train(argv: list[str], debug: bool) -> int | None:
    if not debug:
        without_noise()
    from .train import launch

    return launch(argv, debug)


def _quickstart(argv: list[str], debug: bool) -> None:
    if not debug:
        without_noise()
    from .quickstart import main as run

    run(argv)


if __name__ == "__main__":
    sys.exit(main())
