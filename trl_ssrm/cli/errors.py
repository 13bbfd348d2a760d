"""What a command says when it ends early: one sentence, unless the traceback is asked for."""

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from typing import NoReturn


# That of wrong usage, as argparse has it, and that of a program ended by Ctrl-C.
ERROR, INTERRUPTED = 2, 130

# Raised for what a person can mend; other errors are named, since they may be ours.
_EXPECTED = (ValueError, TypeError, OSError, ImportError)


class OneLineParser(ArgumentParser):
    """Argument parser that leaves its usage, which may be hundreds of lines, out of an error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`.")


def sentence(error: BaseException) -> str:
    """`str`: an error in one line."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {message} (`--debug` says where)"


def tell(prog: str, message: str) -> None:
    """Print a line for a person on the standard error, under what a bar has left there."""
    sys.stderr.write(f"\r{prog}: {message}\n")
    sys.stderr.flush()


def exit_status(function: Callable[[], int | None], prog: str, debug: bool = False, interrupted: str = "") -> int:
    """
    Run a function, and turn what it raises into a line on the standard error and an exit status.

    Args:
        function (`Callable[[], int | None]`):
            What to run. It may return a status of its own.
        prog (`str`):
            Name of the command, before the line.
        debug (`bool`, *optional*, defaults to `False`):
            Whether to let everything through, traceback and all.
        interrupted (`str`, *optional*, defaults to `""`):
            What to say after Ctrl-C.

    Returns:
        `int`: 0, or 2 after an error, or 130 after Ctrl-C.
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
