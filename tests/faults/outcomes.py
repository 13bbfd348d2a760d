"""What a fault may lead to: a correct run, or one clear sentence of the package itself."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl_ssrm


PACKAGE = Path(trl_ssrm.__file__).parent


def refusal_of(error: Exception) -> str:
    """The sentence of an error that the package itself has raised; fails on any other."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    message = str(error)
    if PACKAGE not in raised_in.parents:
        raise AssertionError(f"{raised_in} raised {type(error).__name__}: {message}") from error
    assert isinstance(error, ValueError | TypeError), type(error)
    assert message and "\n" not in message and len(message) < 1500, message
    return message


def result_or_refusal(function: Callable[[], Any]) -> Any:
    """What a function returns, or the sentence with which the package refuses."""
    try:
        return function()
    except Exception as error:
        return refusal_of(error)
