"""An interrupted run ends at once, and says how to go on."""

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
    At Ctrl-C and at SIGTERM, write one line of advice to stderr and leave. Nothing is saved then: everything that is
    needed to go on is on disk already.

    Ctrl-C raises `KeyboardInterrupt` as usual. SIGTERM ends the process as usual. If a handler for SIGTERM is set already,
    it stays.

    Args:
        advice (`Callable[[], str | None]`):
            Function that returns the line, or `None` for no line.
    """
    process = os.getpid()

    def tell() -> None:
        # `print` and `logging` may be what the signal has interrupted. Forked children stay silent.
        if os.getpid() == process and (line := advice()) is not None:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"\n{line}\n".encode())

    def leave(number: int, frame: FrameType | None) -> None:
        # An exception could be caught on its way up, or wait for processes that are gone.
        signal.signal(number, signal.SIG_DFL)
        try:
            tell()
        finally:
            os.kill(os.getpid(), number)

    # Only the main thread can have signal handlers.
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
