"""Tensors, tables and streamed rows on disk: written whole or not at all, with checksums."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Json, List
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import as_json, read_record, telling_where, write_record, written_aside


logger = logging.getLogger(__name__)

# Number of rows that are Python objects at one time while a dataset is read.
BATCH_ROWS = 1000


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """`str`: hash of tensors and their names."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode())
        content.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], key: str = "") -> None:
    """
    Write tensors as safetensors, with a checksum and a key.

    Args:
        path (`Path`):
            File to write, whole or not at all.
        tensors (`dict[str, torch.Tensor]`):
            Tensors of any shape, dtype and device.
        key (`str`, *optional*, defaults to `""`):
            Name of what the tensors belong to. [`read_tensors`] has to be given the same.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata={"key": key, "sha256": tensors_hash(tensors)})


def read_tensors(path: Path, key: str = "") -> dict[str, torch.Tensor] | None:
    """
    Read tensors that [`write_tensors`] wrote.

    Args:
        path (`Path`):
            File to read.
        key (`str`, *optional*, defaults to `""`):
            Key that the file must have.

    Returns:
        `dict[str, torch.Tensor]` or `None`: the tensors, on the CPU. `None` if there is no such file, if it has
        another key, or if it is damaged (logged).
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    # A damaged header can fail to decode (`ValueError`) or name an unknown type (`KeyError`, `TypeError`).
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(f"{path} is damaged ({error}) and is not used.")
        return None
    if metadata.get("sha256") != tensors_hash(tensors):
        logger.warning(f"{path} is damaged (its checksum does not fit) and is not used.")
        return None
    return tensors if metadata.get("key") == key else None


def write_table(
    path: Path, features: Features, parts: Iterable[Dataset], facts: dict[str, Any], key: str = ""
) -> None:
    """
    Write a dataset as Parquet, part by part, and facts about it as JSON beside it.

    Args:
        path (`Path`):
            File to write, with the suffix `.parquet`.
        features ([`~datasets.Features`]):
            Columns of the dataset and their types.
        parts (`Iterable[Dataset]`):
            Its rows, with these features; one part is in memory at a time.
        facts (`dict[str, Any]`):
            JSON values. They are written last: if they are there, the table is complete.
        key (`str`, *optional*, defaults to `""`):
            Name of what the table belongs to. [`read_table`] has to be given the same.
    """
    with written_aside(path) as aside:
        with pq.ParquetWriter(str(aside), features.arrow_schema) as writer:
            # Readers assume that all row groups are as large as the first, so an empty one stops them.
            for part in filter(len, parts):
                writer.write_table(_as_arrow(part))
        facts = {**facts, "table_sha256": file_hash(aside)}
    write_record(path.with_suffix(".json"), facts, key)


def storable(feature: Any) -> Any:
    """
    A feature type that Parquet can store. Parquet has no type for objects without fields, such as the empty arguments
    of a tool call, so these are stored as JSON.

    Args:
        feature (`Any`):
            Feature type of a column, such as a [`~datasets.Value`], a list or a dictionary of them.

    Returns:
        `Any`: the same type, with each object without fields replaced by a [`~datasets.Json`].
    """
    if isinstance(feature, dict):
        return {name: storable(part) for name, part in feature.items()} or Json()
    return List(storable(feature.feature), feature.length) if isinstance(feature, List) else feature


def read_facts(path: Path, key: str = "") -> dict[str, Any] | None:
    """
    Read the facts that [`write_table`] wrote, to find out whether the table has to be written.

    Args:
        path (`Path`):
            File of the table.
        key (`str`, *optional*, defaults to `""`):
            Key that the table must have.

    Returns:
        `dict[str, Any]` or `None`: the facts. `None` if there is no table yet, or if it is damaged or has another key
        (both logged).
    """
    try:
        return _whole_facts(path, key)
    except ValueError as error:
        logger.warning(f"{error} and is made again.")
        return None


def read_table(path: Path, key: str = "") -> tuple[Dataset, dict[str, Any]] | None:
    """
    Read a table that [`write_table`] wrote.

    Args:
        path (`Path`):
            File to read.
        key (`str`, *optional*, defaults to `""`):
            Key that the table must have.

    Returns:
        `tuple[Dataset, dict]` or `None`: the dataset, in memory, and the facts. `None` if there is no table yet.

    Raises:
        ValueError: If the table is damaged or has another key.
    """
    try:
        facts = _whole_facts(path, key)
    except ValueError as error:
        raise ValueError(f"{error}; put a copy in its place, or start a new run in another `output_dir`.") from None
    return None if facts is None else (Dataset(pq.read_table(path)), facts)


def read_numbers(path: Path, columns: list[str], key: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """
    Read numeric columns of a table that [`write_table`] wrote; the other columns stay on disk.

    Args:
        path (`Path`):
            File to read.
        columns (`list[str]`):
            Names of the columns.
        key (`str`, *optional*, defaults to `""`):
            Key that the table must have.

    Returns:
        `tuple[dict[str, np.ndarray], dict]` or `None`: the columns by name, each of shape `(num_rows,)`, and the
        facts. `None` if there is no table yet, or if it is damaged or has another key (both logged).
    """
    try:
        facts = _whole_facts(path, key)
    except ValueError as error:
        logger.warning(f"{error}.")
        facts = None
    if facts is None:
        return None
    with pq.ParquetFile(path) as file:
        types = {name: file.schema_arrow.field(name).type.to_pandas_dtype() for name in columns}
        numbers = {name: np.empty(file.metadata.num_rows, dtype=dtype) for name, dtype in types.items()}
        start = 0
        for batch in file.iter_batches(columns=columns):
            for name in columns:
                numbers[name][start : start + len(batch)] = batch.column(name).to_numpy(zero_copy_only=False)
            start += len(batch)
    return numbers, facts


def write_rows(directory: Path, rows: Iterable[dict[str, Any]], features: Features | None = None) -> Path:
    """
    Write rows to disk as they come, for [`~datasets.Dataset.from_file`]. The file is named by a hash of its content,
    so the cache that `datasets` keeps beside it belongs to these rows and to no others.

    Args:
        directory (`Path`):
            Directory for the file. Files of other rows in it are deleted.
        rows (`Iterable[dict[str, Any]]`):
            The rows.
        features ([`~datasets.Features`], *optional*):
            Columns and types of the rows. If `None`, the first 1,000 rows decide them.

    Returns:
        `Path`: the file, in Arrow's streaming format.

    Raises:
        ValueError: If `features` is `None` and a later row has a column, field or type that the first 1,000 rows lack.
    """
    aside = directory / f".rows.{os.getpid()}"
    iterator, schema = iter(rows), None
    writer: Any = None
    try:
        for start in itertools.count(0, BATCH_ROWS):
            # Outside `telling_where`: an error in reading the stream is not an error of this disk.
            chunk = list(itertools.islice(iterator, BATCH_ROWS))
            if writer is not None and not chunk:
                break
            part = _as_dataset(chunk, features, start)
            if writer is None:
                schema = part.features.arrow_schema
                with telling_where(directory):
                    directory.mkdir(parents=True, exist_ok=True)
                    writer = pa.ipc.new_stream(str(aside), schema)
            elif part.features.arrow_schema != schema:
                part = _with_schema(part, schema, start)
            with telling_where(directory):
                writer.write_table(_as_arrow(part))
        with telling_where(directory):
            # Unset first, since closing twice (in `finally`) would write the end of the file twice.
            closing, writer = writer, None
            closing.close()
            return _named_by_content(aside, directory)
    finally:
        # On a full disk, closing can fail too, and the file may be missing.
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.close()
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def mapping(dataset: Any) -> Iterator[None]:
    """Turn a disk error in `Dataset.map` into a [`~trl_ssrm.io.files.WriteError`] that names the cache directory."""
    if not isinstance(dataset, Dataset):
        # A stream has no cache.
        yield
        return
    files = dataset.cache_files
    with telling_where(Path(files[0]["filename"]).parent if files else Path(tempfile.gettempdir())):
        yield


def changed_facts(path: Path, facts: dict[str, Any]) -> str:
    """
    Compare facts with those in a file, and name the differences.

    Args:
        path (`Path`):
            File that [`~trl_ssrm.io.files.write_record`] wrote, with the earlier facts.
        facts (`dict[str, Any]`):
            JSON values of now.

    Returns:
        `str`: such as "`seed` (1 then, 2 now)"; empty if all are equal.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        then, now = read_record(path), json.loads(json.dumps(as_json(facts)))
    except ValueError as error:
        raise ValueError(f"{error}; put a copy in its place, or choose another `output_dir`.") from None
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return ", ".join(f"`{name}` ({then.get(name)!r} then, {now.get(name)!r} now)" for name in changed)


def content_hash(*values: Any) -> str:
    """`str`: hash of JSON values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def rows_hash(dataset: Dataset) -> str:
    """`str`: hash of the rows. Unlike the fingerprint of a dataset, it does not depend on how the dataset was made."""
    content = hashlib.sha256()
    for row in dataset:
        content.update(json.dumps(row, default=str).encode())
    return content.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """`str`: hash of the content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole_facts(path: Path, key: str) -> dict[str, Any] | None:
    """The facts of a table, or `None` if there is none yet; refuse a table that is damaged or has another key."""
    if not path.with_suffix(".json").is_file():
        return None
    facts = read_record(path.with_suffix(".json"), key)
    try:
        is_whole = facts.pop("table_sha256", None) == file_hash(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError:
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is damaged")
    return facts


def _named_by_content(aside: Path, directory: Path) -> Path:
    """Move a file of rows to a folder named by its content, and delete everything else in the directory."""
    content = file_hash(aside)
    path = directory / content[:16] / "rows.arrow"
    # If the rows there are damaged, the whole folder goes: the cache that was made from them lies in it too.
    if path.parent.exists() and (not path.is_file() or file_hash(path) != content):
        shutil.rmtree(path.parent)
    if not path.is_file():
        path.parent.mkdir()
        os.replace(aside, path)
    # `datasets` writes its cache to a name that starts with "tmp" first; a killed process leaves that file behind.
    for other in [*directory.iterdir(), *path.parent.glob("tmp*")]:
        if other.is_dir() and other != path.parent:
            shutil.rmtree(other)
        elif other.is_file() and other != aside:
            other.unlink()
    return path


def _as_dataset(rows: list[dict[str, Any]], features: Features | None, first_row: int) -> Dataset:
    """Make a dataset of rows of a stream; refuse rows whose columns or types differ."""
    for number, row in enumerate(rows, first_row):
        # `Dataset.from_list` takes the columns of the first row and drops all others without a word.
        if not isinstance(row, dict) or (features is None and row.keys() != rows[0].keys()):
            raise ValueError(
                f"Row {number} of the stream has other columns than row {first_row}; give all rows the same columns."
            )
    try:
        return Dataset.from_list(rows, features=features)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"Rows {first_row} to {first_row + len(rows) - 1} of the stream can't be written ({error}); give each "
            "column values of one type, and valid Unicode text."
        ) from error


def _with_schema(part: Dataset, schema: pa.Schema, first_row: int) -> Dataset:
    """Cast rows in which values are missing to the types of the first rows; refuse rows that add columns or fields."""
    own = part.features.arrow_schema
    try:
        adds_nothing = pa.unify_schemas([schema, own], promote_options="permissive") == schema
    except pa.ArrowTypeError:
        adds_nothing = False
    if not adds_nothing:
        raise ValueError(
            f"Rows {first_row} to {first_row + len(part) - 1} of the stream have columns, fields or types that the "
            f"first {BATCH_ROWS} rows lack; create the stream with `features`."
        )
    features, columns = Features.from_arrow_schema(schema), part.to_dict()
    return Dataset.from_dict({name: columns.get(name, [None] * len(part)) for name in features}, features=features)


def _as_arrow(dataset: Dataset) -> pa.Table:
    return dataset.with_format("arrow")[:]
