"""A run that is told to end ends at once, and says how to go on."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def leaving_with_advice(advice: Callable[[], str | None]) -> Iterator[None]:
    """
    At Ctrl-C and at SIGTERM, write one line of advice to stderr and leave. Nothing is saved then: what is needed to go on
    is on disk already.

    Ctrl-C raises `KeyboardInterrupt` as ever. SIGTERM ends the process as it does without this, unless someone has a
    handler for it, who is left alone.

    Args:
        advice (`Callable[[], str | None]`):
            Gives the line when it is needed, or `None` for none.
    """
    process = os.getpid()

    def tell() -> None:
        # Not by `print` or `logging`: the signal may have interrupted them. Children that were forked stay silent.
        if os.getpid() == process and (line := advice()) is not None:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"\n{line}\n".encode())

    def leave(number: int, frame: FrameType | None) -> None:
        # Not by an exception, which could be swallowed on its way up, and might wait for processes that are gone.
        signal.signal(number, signal.SIG_DFL)
        try:
            tell()
        finally:
            os.kill(os.getpid(), number)

    # Python lets the main thread alone have handlers.
    handles = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if handles:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        tell()
        raise
    finally:
        if handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
