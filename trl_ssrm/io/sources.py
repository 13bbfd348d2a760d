"""Load rows from a file (JSON lines, CSV, Parquet), a folder or the hub."""

import contextlib
import csv
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.utils import logging

from .delimited import TextTable, read_layout


# Name that `load_dataset` has for the format of a file, by the file's extension.
_FORMATS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# Text files may be compressed.
_FORMATS |= {f"{extension}.gz": format for extension, format in _FORMATS.items() if format != "parquet"}
_EXTENSIONS = ", ".join(_FORMATS)
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def load_data(name_or_path: str, split: str | None = None, config: str | None = None) -> Dataset:
    """
    Load the rows of one split of a dataset.

    Args:
        name_or_path (`str`):
            A file (JSON lines, CSV, TSV or Parquet; text also compressed as `.gz`), a folder that [`~datasets.Dataset.save_to_disk`] wrote or that
            holds such files, or the ID of a dataset on the hub. A file or folder is used before a dataset of the same
            name.
        split (`str`, *optional*):
            Name of the split. If `None`, the only split, or `"train"` if there are several. A file has one split,
            which is returned under any name.
        config (`str`, *optional*):
            Configuration of a dataset on the hub.

    Returns:
        [`~datasets.Dataset`]: at least one row. The columns of a CSV file are text, except `margin`, which is a
        number.

    Raises:
        ValueError: If there is no such file, folder, dataset or split, or if it is empty or can't be read, or if a CSV
            file is separated or quoted in a way that would lose rows.
    """
    splits = load_splits(name_or_path, config)
    is_single = len(splits) == 1 and (split is None or Path(name_or_path).is_file())
    name = next(iter(splits)) if is_single else split or "train"
    if name not in splits:
        raise ValueError(f"{name_or_path} has no split {name!r}; it has {', '.join(map(repr, splits))}.")
    return splits[name]


def load_splits(name_or_path: str, config: str | None = None) -> dict[str, Dataset]:
    """
    Load all splits of a dataset.

    Args:
        name_or_path (`str`):
            As in [`load_data`].
        config (`str`, *optional*):
            As in [`load_data`].

    Returns:
        `dict[str, Dataset]`: the splits by name, each of at least one row.

    Raises:
        ValueError: If there is no such file, folder or dataset, or if a split is empty or can't be read.
    """
    path = Path(name_or_path)
    if path.is_file():
        splits = _load_file(path)
    elif path.is_dir():
        splits = _load_folder(path)
    else:
        splits = _load_from_hub(name_or_path, config)
    for name, rows in splits.items():
        if len(rows) == 0:
            raise ValueError(f"{name_or_path} has no rows in its split {name!r}; add rows.")
    return splits


def _load_file(path: Path) -> dict[str, Dataset]:
    if (extension := _extension(path)) is None:
        raise ValueError(f"{path} ends with {path.suffix!r}; a data file ends with one of {_EXTENSIONS}.")
    with _readable(path):
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        tables = _tables([path])
        splits = dict(load_dataset(_FORMATS[extension], data_files={"train": str(path)}, **_options(tables)))
        _check_number_of_rows(splits, tables)
        return splits


def _load_folder(path: Path) -> dict[str, Dataset]:
    with _readable(path):
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = load_from_disk(str(path))
            return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
        # `load_dataset` ignores hidden files too.
        files = sorted(
            file
            for file in path.rglob("*")
            if _extension(file) and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise ValueError(f"none of its files ends with one of {_EXTENSIONS}")
        tables = _tables(files)
        splits = dict(load_dataset(str(path), **_options(tables)))
        # `load_dataset` does not read every file of a folder: it may have one for each split and further ones.
        if len(splits) == 1 and len(files) == 1:
            _check_number_of_rows(splits, tables)
        return splits


def _extension(path: Path) -> str | None:
    """The longest end of a file name that is in `_FORMATS`."""
    ends = ("".join(path.suffixes[-number:]) for number in (2, 1))
    return next((end for end in ends if end in _FORMATS), None)


def _tables(files: list[Path]) -> dict[Path, TextTable]:
    """Layouts of CSV and TSV files; none if there are files of another format."""
    extensions = {file: _extension(file) or "" for file in files}
    if any(_FORMATS[extension] != "csv" for extension in extensions.values()):
        return {}
    tables = {file: read_layout(file, _SEPARATORS[end.removesuffix(".gz")]) for file, end in extensions.items()}
    (first, layout), *others = tables.items()
    for file, other in others:
        if (other.separator, other.is_quoted, set(other.columns)) != (
            layout.separator,
            layout.is_quoted,
            set(layout.columns),
        ):
            raise ValueError(
                f"{file.name} and {first.name} have other columns, delimiters or quotes; put them into folders of their own"
            )
    return tables


def _options(tables: dict[Path, TextTable]) -> dict[str, Any]:
    """Arguments to read CSV files as text: pandas would read the answers "42" and "NA" as a number and as missing."""
    if not tables:
        return {}
    layout = next(iter(tables.values()))
    features = Features({name: Value("float64" if name == "margin" else "string") for name in layout.columns})
    return {
        "sep": layout.separator,
        "quoting": csv.QUOTE_MINIMAL if layout.is_quoted else csv.QUOTE_NONE,
        "keep_default_na": False,
        "encoding": "utf-8-sig",
        "features": features,
    }


def _check_number_of_rows(splits: dict[str, Dataset], tables: dict[Path, TextTable]) -> None:
    expected, found = sum(table.num_rows for table in tables.values()), sum(map(len, splits.values()))
    if tables and expected != found:
        raise ValueError(f"it has {expected} rows, but {found} were read; check its quotes, or save it as JSON lines")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn any exception of a reader into one sentence."""
    verbosity = logging.get_verbosity()
    # `datasets` would log the same error again.
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        # `datasets` raises a `DatasetGenerationError`, whose cause says what is wrong with the file.
        raise ValueError(f"{path} can't be read, or has no rows: {_first_line(error.__cause__ or error)}.") from error
    finally:
        logging.set_verbosity(verbosity)


def _load_from_hub(name: str, config: str | None) -> dict[str, Dataset]:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or _extension(Path(name)):
        folder = Path(name).parent
        others = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        nearest = difflib.get_close_matches(Path(name).name, others, 1, 0.75)
        question = f" Did you mean {folder / nearest[0]}?" if nearest else ""
        raise ValueError(f"There is no file or folder {name}; check the path.{question}")
    try:
        return dict(load_dataset(name, name=config))
    except Exception as error:
        raise ValueError(
            f"{name} is no file or folder here, and the hub gave no dataset of that name: {_first_line(error)}."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".!") or type(error).__name__
