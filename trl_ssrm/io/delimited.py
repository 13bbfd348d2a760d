"""How a CSV or TSV file is laid out: its delimiter, its quotes, and the number of its rows."""

import contextlib
import csv
import gzip
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


@dataclass(frozen=True)
class TextTable:
    """
    Layout of a file.

    Args:
        columns (`list[str]`):
            Names of the columns, from the first line.
        separator (`str`):
            Character between two fields.
        is_quoted (`bool`):
            Whether a `"` at the start of a field is a quote. Otherwise it is text.
        num_rows (`int`):
            Number of rows below the first line.
    """

    columns: list[str]
    separator: str
    is_quoted: bool
    num_rows: int


def read_layout(path: Path, separator: str) -> TextTable:
    """
    Find out how a file is laid out.

    Tools write TSV with quotes or without any. Read the other way, one text that begins with `"` swallows all rows up to
    the next `"`. So the quotes of a TSV file are text if each of its lines is a whole row, and quotes stand in a field that
    is not quoted as a whole. CSV is always quoted where it has to be.

    Args:
        path (`Path`):
            A text file, UTF-8, with the names of the columns in its first line. It may be compressed (`.gz`).
        separator (`str`):
            Character between two fields.

    Returns:
        [`TextTable`]

    Raises:
        ValueError: If another character separates the columns, or if a quote is not closed where it should be.
    """
    with _opened(path) as file:
        columns = next(csv.reader(file, delimiter=separator), [])
    found = next((other for other in _NAMES if other != separator and len(columns) == 1 and other in columns[0]), None)
    if found is not None:
        advice = "name it .tsv" if found == "\t" else f"save it with {_NAMES[separator]}"
        raise ValueError(
            f"its columns are separated by {_NAMES[found]}, where its name says {_NAMES[separator]}; {advice}"
        )
    by_line = _read_by_line(path, separator, len(columns))
    if not by_line.has_quotes:
        return TextTable(columns, separator, True, by_line.num_rows)
    num_rows, merges, error = _read_quoted(path, separator)
    # A comma may stand in any text, so CSV files without quotes are rare, and lines that are whole rows are chance.
    if separator == "\t" and by_line.odd_line is None and not by_line.is_header_quoted:
        # In a file with one column every line is whole, also the lines of one text.
        is_text = by_line.has_bare_quotes and (len(columns) > 1 or not merges)
        if error is not None or is_text:
            return TextTable(by_line.header, separator, False, by_line.num_rows)
    if error is not None:
        raise ValueError(error)
    return TextTable(columns, separator, True, num_rows)


@dataclass
class _ByLine:
    """A file read line by line, as if it had no quotes. `odd_line`: the first one with another number of fields."""

    header: list[str]
    num_rows: int = 0
    odd_line: int | None = None
    has_quotes: bool = False
    has_bare_quotes: bool = False

    @property
    def is_header_quoted(self) -> bool:
        return self.header[0].startswith('"')


def _read_by_line(path: Path, separator: str, num_columns: int) -> _ByLine:
    # A field without quotes, or one that is quoted as a whole.
    quoted = re.compile(r'[^"]*|"(?:[^"]|"")*"', re.DOTALL)
    with _opened(path) as file:
        lines = enumerate(file, 1)
        found = _ByLine(next(lines, (1, ""))[1].rstrip("\r\n").split(separator))
        found.has_quotes = any('"' in name for name in found.header)
        for number, line in lines:
            # pandas skips them too.
            if not line.strip(" \r\n"):
                continue
            fields = line.rstrip("\r\n").split(separator)
            found.num_rows += 1
            if len(fields) != num_columns and found.odd_line is None:
                found.odd_line = number
            if '"' in line:
                found.has_quotes = True
                found.has_bare_quotes = found.has_bare_quotes or not all(map(quoted.fullmatch, fields))
    return found


def _read_quoted(path: Path, separator: str) -> tuple[int, bool, str | None]:
    """Number of rows of a file with quotes, whether a row has several lines, and what is wrong with its quotes."""
    num_rows, merges, start, line_before = 0, False, 1, 0
    with _opened(path) as file, _any_length():
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            for row in reader:
                start, line_before = line_before + 1, reader.line_num
                num_rows += bool("".join(row).strip(" ") or len(row) > 1)
                merges = merges or reader.line_num > start
        except csv.Error:
            return (
                num_rows,
                merges,
                (
                    f"a text that begins with a quote in line {line_before + 1} does not end with one; quote the whole text, "
                    'and write "" for a quote in it'
                ),
            )
    return num_rows - 1, merges, None


def _opened(path: Path) -> TextIO:
    """The text as it is: lines end as they do in the file."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


@contextlib.contextmanager
def _any_length() -> Iterator[None]:
    """Read fields of more than 131,072 characters, the limit of `csv`."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
