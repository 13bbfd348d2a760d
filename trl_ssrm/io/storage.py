"""Files that appear whole or not at all, and that say when they are damaged."""

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


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """`str`: hash of tensors and their names."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode())
        content.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], key: str = "") -> None:
    """
    Write tensors as safetensors, with a checksum and a key that says what they belong to.

    Args:
        path (`Path`):
            File to write, whole or not at all.
        tensors (`dict[str, torch.Tensor]`):
            Tensors of any shape, dtype and device.
        key (`str`, *optional*, defaults to `""`):
            What [`read_tensors`] must ask for.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata={"key": key, "sha256": tensors_hash(tensors)})


def read_tensors(path: Path, key: str = "") -> dict[str, torch.Tensor] | None:
    """
    Read what [`write_tensors`] wrote.

    Returns:
        `dict[str, torch.Tensor]` or `None`: the tensors, on the CPU; `None` if there is no such file, if it belongs to
        another key, or if it is damaged, which is logged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    # A header that is damaged may be no text any more, or name a type that there is not.
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
            JSON values. They are written last, so they are the sign that the table is there.
        key (`str`, *optional*, defaults to `""`):
            What [`read_table`] must ask for.
    """
    with written_aside(path) as aside:
        with pq.ParquetWriter(str(aside), features.arrow_schema) as writer:
            # Readers take the first group of rows for the size of all; one without rows stops them.
            for part in filter(len, parts):
                writer.write_table(_as_arrow(part))
        facts = {**facts, "table_sha256": file_hash(aside)}
    write_record(path.with_suffix(".json"), facts, key)


def storable(feature: Any) -> Any:
    """
    A feature type that Parquet takes. It has none for objects without fields, such as the arguments of tools that have
    none, so they are kept as JSON.

    Args:
        feature (`Any`):
            Feature type of a column, such as a [`~datasets.Value`], a list or a dictionary of them.

    Returns:
        `Any`: the same type, in which each object without fields is a [`~datasets.Json`].
    """
    if isinstance(feature, dict):
        return {name: storable(part) for name, part in feature.items()} or Json()
    return List(storable(feature.feature), feature.length) if isinstance(feature, List) else feature


def read_facts(path: Path, key: str = "") -> dict[str, Any] | None:
    """
    Read the facts that [`write_table`] wrote, to know whether it has to be written.

    Returns:
        `dict[str, Any]` or `None`: `None` if the table is not there yet, or if it is damaged or belongs to another key,
        which is logged.
    """
    try:
        return _whole_facts(path, key)
    except ValueError as error:
        logger.warning(f"{error} and is made again.")
        return None


def _whole_facts(path: Path, key: str) -> dict[str, Any] | None:
    """The same, but what is wrong is raised."""
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


def read_table(path: Path, key: str = "") -> tuple[Dataset, dict[str, Any]] | None:
    """
    Read what [`write_table`] wrote.

    Args:
        path (`Path`):
            File to read.
        key (`str`, *optional*, defaults to `""`):
            What it must belong to.

    Returns:
        `tuple[Dataset, dict]` or `None`: the dataset, in memory, and the facts; `None` if it is not there yet.

    Raises:
        ValueError: If it is damaged or belongs to another key.
    """
    try:
        facts = _whole_facts(path, key)
    except ValueError as error:
        raise ValueError(f"{error}; put a copy in its place, or start the run anew elsewhere.") from None
    return None if facts is None else (Dataset(pq.read_table(path)), facts)


def read_numbers(path: Path, columns: list[str], key: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """
    Read columns of numbers of what [`write_table`] wrote, and nothing else into memory.

    Args:
        path (`Path`):
            File to read.
        columns (`list[str]`):
            Names of the columns.
        key (`str`, *optional*, defaults to `""`):
            What it must belong to.

    Returns:
        `tuple[dict[str, np.ndarray], dict]` or `None`: the columns, each of shape `(num_rows,)`, by their names, and the
        facts; `None` if the table is not there yet, or if it is damaged or belongs to another key, which is logged.
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
    Write rows to disk as they come, for [`~datasets.Dataset.from_file`]. The file is named by its content, so that the
    cache of what was made of other rows is not taken for that of these.

    Args:
        directory (`Path`):
            Directory for the file, which is emptied of what other rows have left there.
        rows (`Iterable[dict[str, Any]]`):
            The rows.
        features ([`~datasets.Features`], *optional*):
            Their columns and types. If `None`, they are those of the first thousand rows.

    Returns:
        `Path`: the file, in Arrow's format of streams.

    Raises:
        ValueError: If `features` is `None` and later rows have something that the first ones have not.
    """
    aside = directory / f".rows.{os.getpid()}"
    iterator, schema = iter(rows), None
    writer: Any = None
    try:
        for start in itertools.count(0, BATCH_ROWS):
            # Whatever goes wrong in reading is not of this disk.
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
            # Closed twice, it would write its end twice.
            closing, writer = writer, None
            closing.close()
            return _named_by_content(aside, directory)
    finally:
        # Where there was no room to write, there may be none to close, and nothing to delete.
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.close()
        with contextlib.suppress(OSError):
            aside.unlink()


def _named_by_content(aside: Path, directory: Path) -> Path:
    """Move a file of rows to where its content says, and delete what else there is."""
    content = file_hash(aside)
    path = directory / content[:16] / "rows.arrow"
    # The cache of what was made of these rows lies beside them.
    if path.parent.exists() and (not path.is_file() or file_hash(path) != content):
        shutil.rmtree(path.parent)
    if not path.is_file():
        path.parent.mkdir()
        os.replace(aside, path)
    # What a process that was killed at it has left; `datasets` writes its cache to a name of this form first.
    for other in [*directory.iterdir(), *path.parent.glob("tmp*")]:
        if other.is_dir() and other != path.parent:
            shutil.rmtree(other)
        elif other.is_file() and other != aside:
            other.unlink()
    return path


@contextlib.contextmanager
def mapping(dataset: Any) -> Iterator[None]:
    """Name where `datasets` keeps what it makes of the rows of a dataset, if nothing can be written there."""
    if not isinstance(dataset, Dataset):
        # What a stream makes is not kept.
        yield
        return
    files = dataset.cache_files
    with telling_where(Path(files[0]["filename"]).parent if files else Path(tempfile.gettempdir())):
        yield


def _as_dataset(rows: list[dict[str, Any]], features: Features | None, first_row: int) -> Dataset:
    """Rows that come as Python objects; refuse those that are of no one form."""
    for number, row in enumerate(rows, first_row):
        # `Dataset.from_list` takes the columns of the first row and leaves out what others have besides.
        if not isinstance(row, dict) or (features is None and row.keys() != rows[0].keys()):
            raise ValueError(
                f"Row {number} of the stream has not the columns of row {first_row}; give all rows the same."
            )
    try:
        return Dataset.from_list(rows, features=features)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"Rows {first_row} to {first_row + len(rows) - 1} of the stream can't be written ({error}); give each column "
            "values of one type, and text without halves of surrogate pairs."
        ) from error


def _with_schema(part: Dataset, schema: pa.Schema, first_row: int) -> Dataset:
    """Rows without a value somewhere, in the types of others that have one; refuse those that have more."""
    own = part.features.arrow_schema
    try:
        adds_nothing = pa.unify_schemas([schema, own], promote_options="permissive") == schema
    except pa.ArrowTypeError:
        adds_nothing = False
    if not adds_nothing:
        raise ValueError(
            f"Rows {first_row} to {first_row + len(part) - 1} of the stream have columns, fields or types that the first "
            f"{BATCH_ROWS} rows have not; make the stream with `features`."
        )
    features, columns = Features.from_arrow_schema(schema), part.to_dict()
    return Dataset.from_dict({name: columns.get(name, [None] * len(part)) for name in features}, features=features)


def _as_arrow(dataset: Dataset) -> pa.Table:
    return dataset.with_format("arrow")[:]


def changed_facts(path: Path, facts: dict[str, Any]) -> str:
    """
    What is different from facts that were written before, in words.

    Args:
        path (`Path`):
            File that [`~trl_ssrm.io.files.write_record`] wrote, with the facts of then.
        facts (`dict[str, Any]`):
            JSON values of now.

    Returns:
        `str`: such as "`seed` (1 then, 2 now)"; empty if nothing is.

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
    """`str`: hash of the rows, which unlike the fingerprint of a dataset does not depend on how it was made."""
    content = hashlib.sha256()
    for row in dataset:
        content.update(json.dumps(row, default=str).encode())
    return content.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """`str`: hash of the content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Rows that are Python objects at one time where a dataset is gone through.
BATCH_ROWS = 1000
