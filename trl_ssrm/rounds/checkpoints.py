"""Checkpoints within a round, marked when all of their files are on disk."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..io.files import read_record, telling_where, write_record
from ..io.storage import file_hash


# Holds the checksums of all files of a checkpoint. `Trainer` writes no such mark, and would resume from half a checkpoint.
CHECKPOINT_MARKER = "checkpoint_complete"


def mark_checkpoint(checkpoint: Path, key: str) -> None:
    """
    Mark a checkpoint as whole, with the checksums of its files.

    Args:
        checkpoint (`Path`):
            Its directory.
        key (`str`):
            Names the run and the place of the marker in it.
    """
    path = checkpoint / CHECKPOINT_MARKER
    # An old mark must not stand for files that a killed process has half written. On some file systems, deleting needs
    # room too.
    with telling_where(path):
        path.unlink(missing_ok=True)
    write_record(path, {"files": _hashes(checkpoint)}, key)


def damage_of(checkpoint: Path, key: str) -> str | None:
    """`str` or `None`: what is wrong with a checkpoint that was marked as whole under a key."""
    try:
        is_whole = read_record(checkpoint / CHECKPOINT_MARKER, key)["files"] == _hashes(checkpoint)
    except ValueError as error:
        return str(error)
    return None if is_whole else f"{checkpoint} is damaged"


def _hashes(checkpoint: Path) -> dict[str, str]:
    """Checksum of each file of a checkpoint, by its place there."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKPOINT_MARKER)
    # Weights and optimizer may be gigabytes each, so files are hashed in parallel.
    with ThreadPoolExecutor() as pool:
        return dict(
            zip((path.relative_to(checkpoint).as_posix() for path in files), pool.map(file_hash, files), strict=True)
        )
