"""
Python scripts in processes of their own. They are forked from a process that has imported the libraries and done nothing, so
that they start at once, where Python would import for some seconds in each. What a launcher does is left to the tests of
the command.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path


CONTEXT = multiprocessing.get_context("forkserver")
# Each worker of the tests has a server, from its first script on.
CONTEXT.set_forkserver_preload(
    ["trl_ssrm.trainer", *(f"trl_ssrm.alignment.{name}" for name in ("generation", "judge", "labeling")), "peft"]
)
# Seconds that the others have to leave after one process is gone, as a launcher gives them.
GRACE = 5
# A script that takes longer hangs.
TIMEOUT = 300


def run_python(
    words: list[str], environment: dict[str, str] | None = None, num_processes: int = 1
) -> subprocess.CompletedProcess:
    """
    Run a Python script to its end.

    Args:
        words (`list[str]`):
            Path of the script, and its arguments.
        environment (`dict[str, str]`, *optional*):
            What its processes have in their environment beside that of the tests.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes, which find each other as those of `accelerate launch` do.

    Returns:
        `subprocess.CompletedProcess`: the first exit status that is not 0, negative for a signal, and all that they wrote.

    Raises:
        TimeoutError: If they take more than `TIMEOUT` seconds. They are killed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        processes = []
        for rank in range(num_processes):
            own = dict(environment or {})
            if num_processes > 1:
                own |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(port),
                }
                own |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
                own |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
            outputs = [str(Path(directory) / f"{rank}.{name}") for name in ("out", "err")]
            processes.append(CONTEXT.Process(target=_run, args=(words, {**os.environ, **own}, os.getcwd(), outputs)))
            processes[-1].start()
        status = _wait(processes, time.monotonic() + TIMEOUT)
        out, err = (
            "".join(path.read_text(errors="replace") for path in sorted(Path(directory).glob(f"*.{name}")))
            for name in ("out", "err")
        )
    return subprocess.CompletedProcess(words, status, out, err)


def _wait(processes: list[multiprocessing.Process], end: float) -> int:
    """The first exit status that is not 0. One process that fails ends the others."""
    status, is_late = 0, False
    while alive := [each for each in processes if each.is_alive()]:
        wait([each.sentinel for each in alive], timeout=max(0.0, end - time.monotonic()))
        if not status and (failed := [each.exitcode for each in processes if each.exitcode]):
            status, end = failed[0], time.monotonic() + GRACE
            for each in alive:
                each.terminate()
        if time.monotonic() >= end:
            is_late = not status
            for each in alive:
                each.kill()
                each.join()
    if is_late:
        raise TimeoutError("The processes took too long.")
    return status or next((each.exitcode for each in processes if each.exitcode), 0)


def _run(words: list[str], environment: dict[str, str], directory: str, outputs: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    # As from a terminal, and unlike what the server has set.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Where Python would put them, for a script.
    sys.path[:0] = [str(Path(words[0]).parent), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
