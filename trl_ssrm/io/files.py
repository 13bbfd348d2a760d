"""
Files that are written whole or not at all, and JSON records with a checksum. Only the standard library is imported, so
that a report needs no torch.
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


# safetensors (written in Rust) and PyTorch's writer report a full disk in the text of another exception.
_DISK_ERRORS = re.compile(r"\(os error \d+\)|PytorchStreamWriter|inline_container|iostream error")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class WriteError(OSError):
    """
    A file can't be written: the disk is full, or permission is missing.

    Args:
        path (`Path`):
            The file, or the directory of a checkpoint.
        error (`Exception`):
            Error of the system, or of the library that wrote the file.
    """

    def __init__(self, path: Path, error: Exception):
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).split("\n")[0]
        super().__init__(
            f"{path} can't be written ({reason}); make room or allow writing there, then go on with "
            "`train(resume_from_checkpoint=True)`. Files that were written before are kept."
        )


@contextlib.contextmanager
def telling_where(path: Path) -> Iterator[None]:
    """Turn a disk error of any library into a [`WriteError`] that names the file."""
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
    The disk error behind an exception.

    Args:
        error (`BaseException`):
            Exception of any library.

    Returns:
        `Exception` or `None`: the exception itself, or an earlier one: after a full disk, closing the file may fail
        with another error. `None` if no disk error is behind it.
    """
    # Saving a checkpoint may upload it; those errors are of the network.
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
    """Give a temporary path beside `path`, and move the file to `path` once it is written without an error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with telling_where(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            os.replace(aside, path)
        finally:
            # The file is missing if it was moved, or if the directory can't be made or written.
            with contextlib.suppress(OSError):
                aside.unlink()


def delete_left_aside(directory: Path) -> None:
    """Delete temporary files of [`written_aside`] that killed processes left; no process may be writing there."""
    for path in directory.rglob(".*"):
        if re.search(r"\.\d+$", path.name) and path.is_file():
            path.unlink()


def as_json(value: Any) -> Any:
    """
    Replace each NaN and infinity by `None`, since JSON has neither.

    Args:
        value (`Any`):
            Value that `json.dumps` takes.

    Returns:
        `Any`: dictionaries, lists, text and numbers, with `None` for each number that is not finite.
    """
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all, with null for NaN and infinity."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(as_json(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_record(path: Path, value: dict[str, Any], key: str = "") -> None:
    """
    Write a JSON object with a checksum and a key that names its run or round.

    Args:
        path (`Path`):
            File to write, whole or not at all.
        value (`dict[str, Any]`):
            JSON values under any names except `"key"` and `"sha256"`. A number that is not finite becomes null.
        key (`str`, *optional*, defaults to `""`):
            Key that [`read_record`] can require.
    """
    value = {**as_json(value), "key": key}
    write_json(path, {**value, "sha256": _record_hash(value)})


def read_record(path: Path, key: str | None = None) -> dict[str, Any]:
    """
    Read a JSON object that [`write_record`] wrote.

    Args:
        path (`Path`):
            File to read.
        key (`str`, *optional*):
            Key that the file must have. If `None`, any key is accepted, and a file without a checksum too (versions
            before checksums wrote such files).

    Returns:
        `dict[str, Any]`: the value.

    Raises:
        ValueError: If the file is missing or damaged, or has another key. The message has no full stop, so that the
            caller can add the thing to do.
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
