"""Data files -> rows: JSON, CSV and Parquet. The same code reads in Ray Data's workers and in the check before a run.

Readers that guess types are not used. Arrow's JSON reader, which ``ray.data.read_json`` uses, makes dates of strings
that look like one, refuses a key whose type differs between rows, and does not say which line is broken. CSV readers
of Arrow and pandas make 7 of ``007``, ``True`` of ``true`` and null of ``NA``.
"""

from __future__ import annotations

import collections
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, Literal, TypeAlias

from rlhf_ray.errors import DataError
from rlhf_ray.prompts.rows import Row, arrow_rows
from rlhf_ray.untrusted_text import shortened

__all__ = [
    "CSV_TYPES",
    "DATA_SUFFIXES",
    "FileFormat",
    "csv_rows",
    "file_format",
    "file_rows",
    "json_rows",
    "typed_rows",
]

FileFormat: TypeAlias = Literal["json", "parquet", "csv"]

DATA_SUFFIXES: Final[Mapping[str, FileFormat]] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
"""How the name of a data file ends, before a suffix of its compression."""

_COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4", ".br")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BOOLS: Final = {"true": True, "false": False, "1": True, "0": False}

CSV_TYPES: Final[Mapping[str, Callable[[str], Any]]] = {
    "int": int,
    "float": float,
    "bool": lambda text: _BOOLS[text.strip().lower()],
}
"""What ``data.csv_types`` may name -> what makes it of a cell's text."""


def file_format(path: Path) -> FileFormat | None:
    """The format that a file's name tells; ``None``: it cannot be read as data."""
    name = Path(path.name.lower())
    if name.suffix not in _COMPRESSIONS:
        return DATA_SUFFIXES.get(name.suffix)
    found = DATA_SUFFIXES.get(Path(name.stem).suffix)
    return None if found == "parquet" else found


def file_rows(path: Path, csv_types: Mapping[str, str]) -> Iterator[Row]:
    """Read a data file.

    Args:
        path: The file; its name tells format and compression.
        csv_types: ``data.csv_types``: the columns of a CSV file that are not text.

    Yields:
        Its rows in order.

    Raises:
        DataError: It cannot be opened, read or parsed.
    """
    import pyarrow as pa
    from pyarrow import parquet

    is_parquet = file_format(path) == "parquet"
    try:
        with pa.input_stream(str(path), compression=None if is_parquet else "detect") as stream:
            if is_parquet:
                for batch in parquet.ParquetFile(stream).iter_batches(batch_size=1024):
                    yield from arrow_rows(batch)
            elif file_format(path) == "csv":
                yield from csv_rows(io.BufferedReader(stream), str(path), csv_types)
            else:
                yield from json_rows(io.BufferedReader(stream), str(path))
    except (OSError, ValueError) as failure:  # Arrow's own errors are ValueErrors
        raise DataError(f"{path}: cannot be read: {failure}") from failure


def json_rows(stream: IO[bytes], name: str) -> Iterator[Row]:
    """Parse JSON lines, or one JSON array of objects; each value is exactly what ``json.loads`` makes of it.

    Args:
        stream: The decompressed file, in UTF-8.
        name: What to call the file in an error.

    Yields:
        The rows in order.

    Raises:
        DataError: A line is not JSON, not UTF-8 or not an object; names the line.
    """
    may_be_array = True
    for number, line in enumerate(stream, 1):
        text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if not text.strip():
            continue
        if may_be_array and text.lstrip().startswith(b"["):
            for index, value in enumerate(_parsed(text + stream.read(), name)):
                yield _object(value, f"{name}, element {index}")
            return
        may_be_array = False
        where = f"{name}, line {number}"
        yield _object(_parsed(text, where), where)


def csv_rows(stream: io.BufferedReader, name: str, csv_types: Mapping[str, str]) -> Iterator[Row]:
    """Read a file with a header.

    Args:
        stream: The decompressed file, in UTF-8.
        name: What to call the file in an error.
        csv_types: See :func:`typed_rows`.

    Yields:
        The rows in order; each cell is its text, an empty one an empty string.

    Raises:
        DataError: There is no header, it names a column twice, or as in :func:`typed_rows`.
        ValueError: A line is damaged: Arrow's own error.
    """
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(stream))
    names = next(filter(None, csv.reader(lines)), None)
    if names is None:
        raise DataError(f"{name}: cannot be read: Empty CSV file")
    if twice := [column for column, count in collections.Counter(names).items() if count > 1]:
        raise DataError(f"{name}: the header names column {twice[0]!r} more than once; rename one")
    if not stream.peek(1):
        return
    batches = arrow_csv.open_csv(
        stream,
        read_options=arrow_csv.ReadOptions(column_names=names),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    yield from typed_rows((row for batch in batches for row in batch.to_pylist()), name, csv_types)


def typed_rows(rows: Iterable[Row], name: str, csv_types: Mapping[str, str]) -> Iterator[Row]:
    """Convert the columns that ``data.csv_types`` names; all others stay text.

    Args:
        rows: Rows of text.
        name: What to call their file in an error.
        csv_types: Column -> one of ``CSV_TYPES``; an empty cell of such a column becomes ``None``.

    Raises:
        DataError: There is no such column, or a cell is not of its type; names row and column.
    """
    for index, row in enumerate(rows):
        for column, type_name in csv_types.items():
            if column not in row:
                raise DataError(
                    f"{name} has no column {column!r}, which data.csv_types names; it has {', '.join(map(repr, row))}"
                )
            text = row[column]
            try:
                row[column] = CSV_TYPES[type_name](text) if text else None
            except (ValueError, KeyError):
                raise DataError(
                    f"{name}, row {index} (from 0): column {column!r} holds {shortened(repr(text), 80)}, which is no "
                    f"{type_name}; fix it, or leave the column out of data.csv_types"
                ) from None
        yield row


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as failure:  # ValueError: both a JSON error and a Unicode error
        raise DataError(f"{where}: not JSON: {failure}") from failure


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be an object like {{...}}, not a {type(value).__name__}")
    return value
