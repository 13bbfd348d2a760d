"""
Files that appear whole or not at all, and that say when they are damaged. Imports nothing heavy, so that a report needs
no torch.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# Some say it in words only: safetensors, written in Rust, and the writer of PyTorch, which does not tell the reason.
_DISK_ERRORS = re.compile(r"\(os error \d+\)|PytorchStreamWriter|inline_container|iostream error")


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class WriteError(OSError):
    """
    A file can't be written: there is no room, or no permission.

    Args:
        path (`Path`):
            The file, or the directory of a checkpoint.
        error (`Exception`):
            What the system, or the library that wrote it, said.
    """

    def __init__(self, path: Path, error: Exception):
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).split("\n")[0]
        super().__init__(
            f"{path} can't be written ({reason}); make room or permit it, and go on: what was written before is there, "
            "and training continues from it with `train(resume_from_checkpoint=True)`."
        )


@contextlib.contextmanager
def telling_where(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a disk, whichever library meets it, into a [`WriteError`] that names the file."""
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if (reason := disk_error(error)) is not None:
            raise WriteError(path, reason) from error
        raise


def disk_error(error: BaseException) -> Exception | None:
    """
    What a disk has said, if that is what an error came of.

    Args:
        error (`BaseException`):
            An error, whichever library has raised it.

    Returns:
        `Exception` or `None`: the error itself, or one before it: who closes a file that has no room may fail at that.
    """
    # Uploads may go with a checkpoint.
    is_of_network = isinstance(error, (ConnectionError, TimeoutError))
    is_of_system = isinstance(error, OSError) and error.errno is not None and not is_of_network
    if isinstance(error, Exception) and (is_of_system or _DISK_ERRORS.search(str(error))):
        return error
    before = error.__cause__ or error.__context__
    while before is not None:
        if isinstance(before, OSError) and before.errno in _NO_ROOM:
            return before
        before = before.__cause__ or before.__context__
    return None


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, and move it there once it was written without an error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with telling_where(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            os.replace(aside, path)
        finally:
            # Where the directory could not be made, or must not be written, there is nothing to delete.
            with contextlib.suppress(OSError):
                aside.unlink()


def delete_left_aside(directory: Path) -> None:
    """Delete what killed processes have left of [`written_aside`]; nobody may be writing there."""
    for path in directory.rglob(".*"):
        if re.search(r"\.\d+$", path.name) and path.is_file():
            path.unlink()


def as_json(value: Any) -> Any:
    """
    A value as JSON has it, which knows neither NaN nor infinity.

    Args:
        value (`Any`):
            What `json.dumps` takes.

    Returns:
        `Any`: dictionaries, lists, text and numbers, with `None` for each number that is not finite.
    """
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write JSON that appears whole or not at all, with null for what is NaN or infinite."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(as_json(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_record(path: Path, value: dict[str, Any], key: str = "") -> None:
    """
    Write a JSON object with a checksum and a key that says what it belongs to.

    Args:
        path (`Path`):
            File to write, whole or not at all.
        value (`dict[str, Any]`):
            JSON values, but for the names `"key"` and `"sha256"`. A number that is not finite becomes null.
        key (`str`, *optional*, defaults to `""`):
            What [`read_record`] may ask for.
    """
    value = {**as_json(value), "key": key}
    write_json(path, {**value, "sha256": _record_hash(value)})


def read_record(path: Path, key: str | None = None) -> dict[str, Any]:
    """
    Read what [`write_record`] wrote.

    Args:
        path (`Path`):
            File to read.
        key (`str`, *optional*):
            What it must belong to. If `None`, anything, and it may be of a version that wrote no checksums.

    Returns:
        `dict[str, Any]`: the value.

    Raises:
        ValueError: If the file is missing, damaged, or belongs to another key; says which, but not what to do.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        checksum = value.pop("sha256", None)
        is_whole = checksum == _record_hash(value) or (checksum is None and key is None)
        own_key = value.pop("key", None)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, AttributeError, TypeError, OSError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is damaged, or of another version of trl-ssrm")
    if key is not None and own_key != key:
        raise ValueError(f"{path} belongs to another run or round")
    return value


def _record_hash(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
