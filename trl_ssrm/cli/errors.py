"""Errors of the commands: one sentence on the standard error, or the traceback with `--debug`."""

import contextlib
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn


# Exit statuses: argparse's for wrong usage, and the shell's for a program ended by Ctrl-C.
ERROR, INTERRUPTED = 2, 130

# Raised for wrong input. The type of any other error is shown with its message, because it may be a bug.
_EXPECTED = (ValueError, TypeError, OSError, ImportError)


class OneLineParser(ArgumentParser):
    """Argument parser whose errors leave out the usage, which may be hundreds of lines long."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`.")


def sentence(error: BaseException) -> str:
    """`str`: message of an error, in one line."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, _EXPECTED):
        return message
    # What huggingface_hub lets through from its HTTP client, httpx or httpx2.
    if type(error).__module__.startswith("httpx"):
        return f"The hub can't be reached ({message}); check the connection, or leave out what needs it."
    return f"{type(error).__name__}: {message} (pass `--debug` to see where)"


def tell(prog: str, message: str) -> None:
    """Print a line on the standard error, over an unfinished progress bar."""
    sys.stderr.write(f"\r{prog}: {message}\n")
    sys.stderr.flush()


def exit_status(function: Callable[[], int | None], prog: str, debug: bool = False, interrupted: str = "") -> int:
    """
    Run a command, and turn an exception into a line on the standard error and an exit status.

    Args:
        function (`Callable[[], int | None]`):
            Function that runs the command, and may return an exit status.
        prog (`str`):
            Name of the command, printed before the message.
        debug (`bool`, *optional*, defaults to `False`):
            Whether to raise the exception, so that Python prints its traceback.
        interrupted (`str`, *optional*, defaults to `""`):
            Sentence to print after Ctrl-C.

    Returns:
        `int`: exit status: the returned one or 0, 2 after an error, 130 after Ctrl-C.
    """
    try:
        return function() or 0
    except KeyboardInterrupt:
        if debug:
            raise
        tell(prog, f"interrupted. {interrupted}".rstrip())
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        tell(prog, f"error: {sentence(error)}")
        return ERROR


@contextlib.contextmanager
def running_script() -> Iterator[None]:
    """
    End a script as the commands end: after wrong input, with one line on the standard error; with several processes, by leaving
    their group. With `python -X dev`, and for any other error, Python prints its traceback.
    """
    try:
        yield
        leave_process_group()
    except _EXPECTED as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {sentence(error)}")


def leave_process_group() -> None:
    """Leave the other processes. One that ends while the threads of the group are at work aborts now and then."""
    # Not before a command needs it: it takes seconds.
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
