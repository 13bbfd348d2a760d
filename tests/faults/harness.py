"""
Short runs that something goes wrong with. Each is forked from a process that has imported everything and done nothing, so
that it takes a second, and does what `run_script.py` does.

Where something can go wrong, it is counted by Python's own audit events: every step of training, and every file that is
opened for writing, renamed or deleted in the output directory, whichever library does it. What is written between two of
them, by native code, is reached by faults at a time.
"""

import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

# First of all what sets the environment of the tests.
import conftest  # noqa: E402, I001
import run_script  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl_ssrm.trainer  # noqa: E402
from trl import RewardTrainer  # noqa: E402, F401  # What a run would import.


# A run that takes longer hangs.
TIMEOUT = 120
# As a launcher does it: how long the others may take to leave after one process is gone.
GRACE = 5
PLACES = ("training", "scoring", "selection", "saving", "writing")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
SETUPS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": True, "stream": True},
    "folds": {"num_folds": 2, "pseudo_label_type": "soft"},
}
COMPARED = ("weights", "kept", "confidence", "facts", "losses", "num_logs")


@dataclass
class Fault:
    """
    What goes wrong in a run.

    Args:
        kind (`str`):
            A signal, `"no_space"`, which is that every write fails from then on, or `"none"`.
        place (`str`):
            One of [`PLACES`] and the number of times that it was reached before, or a time in seconds.
        process (`int`):
            Process that a SIGKILL is for, and whose places count. The other signals go to all, as from a launcher.
    """

    kind: str = "none"
    place: str = "time"
    number: float = 0
    process: int = 0


@dataclass
class Outcome:
    """
    How a run ended.

    Args:
        result (`dict`, *optional*):
            What `run_script.py` prints, if the run came to its end.
        statuses (`list[int]`):
            Exit statuses of its processes, negative for a signal.
        logs (`list[str]`):
            What each of them wrote to stdout and stderr.
        seconds (`float`):
            How long they took.
        seconds_to_leave (`float`, *optional*):
            How long all of them took to leave after the signal.
        places (`dict[str, int]`):
            How often the first process reached each place.
    """

    result: dict[str, Any] | None
    statuses: list[int]
    logs: list[str]
    seconds: float
    seconds_to_leave: float | None = None
    places: dict[str, int] = field(default_factory=dict)

    @property
    def log(self) -> str:
        """`str`: what all of them wrote."""
        return "".join(self.logs)


def make_models(directory: Path) -> str:
    """Make the tiny model of the tests in a process of its own: a process that has used threads is not to be forked."""

    def make() -> None:
        class Factory:
            mktemp = staticmethod(lambda name: directory)

        tokenizer = conftest.tokenizer.__wrapped__()
        conftest.llama.__wrapped__(Factory, tokenizer)

    if os.waitpid(_forked(make, directory.with_suffix(".log")), 0)[1]:
        raise RuntimeError(directory.with_suffix(".log").read_text())
    return str(directory)


def _wait(pids: list[int], fault: Fault, start: float) -> tuple[dict[int, int], float | None]:
    """Wait for the processes, and signal them as the fault says: exit status of each, and the time of the signal."""
    statuses: dict[int, int] = {}
    signaled = gone_at = None
    while len(statuses) < len(pids):
        now = time.monotonic()
        if fault.place == "time" and fault.kind in SIGNALS and signaled is None and now - start >= fault.number:
            signaled = now
            _signal(pids, statuses, fault)
        for rank, pid in enumerate(pids):
            if rank not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[rank] = os.waitstatus_to_exitcode(found[1])
                gone_at = gone_at or now if statuses[rank] else gone_at
        is_late = now - start > TIMEOUT or (gone_at is not None and now - gone_at > GRACE)
        for rank in range(len(pids)):
            if rank not in statuses and is_late:
                os.kill(pids[rank], signal.SIGKILL)
            elif rank not in statuses and gone_at is not None and fault.kind == "SIGKILL":
                os.kill(pids[rank], signal.SIGTERM)
        time.sleep(0.01)
    return statuses, signaled


def _signal(pids: list[int], statuses: dict[int, int], fault: Fault) -> None:
    """Send the signal of a fault: SIGKILL to one process, the others to all, as from a launcher."""
    for rank, pid in enumerate(pids):
        if rank not in statuses and (fault.kind != "SIGKILL" or rank == fault.process):
            os.kill(pid, getattr(signal, fault.kind))


def run(
    output_dir: Path,
    fault: Fault = Fault(),  # noqa: B008 - never changed
    num_processes: int = 1,
    limit: int | None = None,
    **settings: Any,
) -> Outcome:
    """
    Run `run_script.py` in `output_dir`, on top of what is there.

    Args:
        output_dir (`Path`):
            Output directory; the logs of the processes are beside it.
        fault ([`Fault`]):
            What goes wrong.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes.
        limit (`int`, *optional*):
            Size in bytes that no file may exceed.
        settings:
            Arguments of `run_script.main`.

    Returns:
        [`Outcome`]
    """
    notes = Path(f"{output_dir}.notes")
    notes.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    logs = [Path(f"{output_dir}.{rank}.log") for rank in range(num_processes)]
    start = time.monotonic()
    pids: list[int] = []
    for rank, log in enumerate(logs):
        pids.append(
            _forked(lambda rank=rank: _work(output_dir, fault, rank, num_processes, port, notes, limit, settings), log)
        )
        # A group of their own, as that of a command in a terminal.
        os.setpgid(pids[-1], pids[0])
    statuses, signaled = _wait(pids, fault, start)
    end = time.monotonic()
    written = [path.read_text(errors="replace") for path in logs]
    noted = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
    told = next((each["signaled"] for each in noted if "signaled" in each), signaled)
    found_result = re.search(r"^RESULT (.*)$", written[0], re.MULTILINE)
    return Outcome(
        result=json.loads(found_result[1]) if found_result else None,
        statuses=[statuses[rank] for rank in range(num_processes)],
        logs=written,
        seconds=end - start,
        seconds_to_leave=None if told is None else end - told,
        places=next((each["places"] for each in noted if "places" in each), {}),
    )


def _forked(function, log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    # All of it ends here, whatever happens: the parent's `finally` clauses are none of the child's.
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        function()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(
    output_dir: Path,
    fault: Fault,
    rank: int,
    num_processes: int,
    port: int,
    notes: Path,
    limit: int | None,
    settings: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    # As from any terminal, and unlike what a test runner may have set.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if num_processes > 1:
        os.environ.update(
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)},
            LOCAL_WORLD_SIZE=str(num_processes),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
            ACCELERATE_MIXED_PRECISION="no",
            ACCELERATE_DYNAMO_BACKEND="no",
        )
    # Which has tests of its own and takes as long as all the rest.
    trl_ssrm.trainer.report_run = lambda output_dir, trackers, step: None
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    places = Places(output_dir, fault if rank == fault.process else Fault(), notes)
    sys.addaudithook(places.audit)

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            places.reach("training")

    settings = {"num_train_epochs": 2, "save_steps": 5, **settings}
    run_script.main(output_dir=str(output_dir), callbacks=[Steps()], **settings)
    places.is_over = True
    if rank == 0:
        with notes.open("a") as file:
            file.write(json.dumps({"places": places.counts}) + "\n")
    if num_processes > 1:
        torch.distributed.destroy_process_group()


class Places:
    """Counts how often each place was reached, and does there what is to go wrong."""

    def __init__(self, output_dir: Path, fault: Fault, notes: Path):
        self.output_dir, self.fault, self.notes = str(output_dir), fault, notes
        self.counts = dict.fromkeys(PLACES, 0)
        self.is_full = self.is_over = False

    def audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            is_write = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        elif event in ("os.rename", "os.mkdir", "os.remove"):
            path, is_write = args[0], True
        else:
            return
        if not is_write or not isinstance(path, str | os.PathLike) or self.is_over:
            return
        place = os.path.relpath(os.fspath(path), self.output_dir)
        if place.startswith("..") or place in (".", "_rounds/lock"):
            return
        if self.is_full and event != "os.remove":
            raise OSError(28, "No space left on device")
        if "checkpoint-" in place:
            self.reach("saving")
        elif "/scores/" in place:
            self.reach("scoring")
        elif "pseudo_labels" in place or "labeling" in place:
            self.reach("selection")
        else:
            self.reach("writing")

    def reach(self, place: str) -> None:
        self.counts[place] += 1
        if (place, self.counts[place] - 1) != (self.fault.place, self.fault.number):
            return
        if self.fault.kind == "no_space":
            self.is_full = True
            raise OSError(28, "No space left on device")
        # Not by `open`, which would come here.
        line = json.dumps({"signaled": time.monotonic()}) + "\n"
        descriptor = os.open(self.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, line.encode())
        os.close(descriptor)
        number = getattr(signal, self.fault.kind)
        if self.fault.kind == "SIGKILL":
            os.kill(os.getpid(), number)
        os.killpg(0, number)
