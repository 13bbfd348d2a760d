"""Where the files of a run are, which run they belong to, and the lock against a second run."""

import errno
import functools
import logging
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..io.files import WriteError, delete_left_aside, read_record, telling_where, write_record
from ..io.storage import changed_facts, content_hash


logger = logging.getLogger(__name__)

# Worker processes of a killed run may hold its lock for some seconds.
SECONDS_TO_WAIT_FOR_LOCK = 10


class RunRoot:
    """
    The directory of one run.

    Args:
        output_dir (`str`):
            Output directory of the trainer.
    """

    def __init__(self, output_dir: str):
        self.output_dir = Path(output_dir)
        # `Trainer.push_to_hub` leaves out what starts with "_": the texts of the pool stay here.
        self.root = self.output_dir / "_rounds"

    @property
    def run_key(self) -> str:
        """`str`: hash that names this run; empty until the run is started."""
        path = self.root / "run.json"
        return content_hash(sorted(read_record(path).items())) if path.is_file() else ""

    def key(self, path: Path) -> str:
        """`str`: names a file by its run and its place in it."""
        return f"{self.run_key} {Path(os.path.relpath(path, self.root)).as_posix()}"

    @functools.cached_property
    def _lock(self) -> FileLock:
        return FileLock(self.root / "lock")

    def acquire(self) -> None:
        """
        Lock the directory until [`RunDirectory.release`], or until the process ends in whatever way.

        Raises:
            ValueError: If another process has locked it.
            WriteError: If nothing can be written there.
        """
        try:
            with telling_where(self.root / "lock"):
                self.root.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=SECONDS_TO_WAIT_FOR_LOCK)
        except Timeout:
            raise ValueError(
                f"Another run is at work in {self.output_dir}; wait until it ends, stop it, or choose another `output_dir`. If "
                f"there is none on any machine, delete {self.root / 'lock'}."
            ) from None
        except WriteError as error:
            # Some network file systems have no locks.
            if error.__cause__.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # type: ignore[union-attr]
                raise
            logger.warning(f"{self.output_dir} is on a file system without locks; start one run at a time in it.")

    def release(self) -> None:
        """Unlock the directory."""
        self._lock.release()

    @property
    def has_run(self) -> bool:
        """`bool`: whether a run was started here."""
        return (self.root / "run.json").is_file()

    def start(self, identity: dict[str, Any], resume: bool) -> None:
        """
        Open the directory for a new run, or check that the run in it is the same.

        Args:
            identity (`dict[str, Any]`):
                Settings and data that decide the result, as JSON values.
            resume (`bool`):
                Whether to go on with the run in the directory.

        Raises:
            ValueError: If there is a run and `resume` is not set, if there is none and it is, or if the run was
                started with other settings or data.
        """
        if not self.has_run:
            if resume:
                raise ValueError(
                    f"There is no run to resume in {self.output_dir}; leave out `resume_from_checkpoint` to start one."
                )
            write_record(self.root / "run.json", identity)
            return
        if not resume:
            raise ValueError(
                f"{self.output_dir} already holds a run; pass `resume_from_checkpoint=True` to go on with it, choose "
                f"another `output_dir`, or delete {self.root}."
            )
        changed = changed_facts(self.root / "run.json", identity)
        if "`format`" in changed:
            raise ValueError(
                f"The run in {self.output_dir} was started by another version of trl-ssrm, which writes other files: go on "
                "with that version, or choose another `output_dir`."
            )
        if changed:
            raise ValueError(
                f"The run in {self.output_dir} was started with other settings or data: {changed}. Resume it with what "
                "it was started with, or choose another `output_dir`."
            )
        delete_left_aside(self.root)
