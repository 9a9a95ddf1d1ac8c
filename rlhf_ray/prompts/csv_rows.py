"""prompts/: CSV files -> rows of text.

A reader that guesses types, as Arrow's and pandas' do, makes 7 of ``007``, ``True`` of ``true`` and null of ``NA``.
"""

from __future__ import annotations

import collections
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from rlhf_ray.errors import DataError
from rlhf_ray.prompts.row_codec import Row
from rlhf_ray.untrusted_text import shortened

__all__ = ["CSV_TYPES", "csv_rows", "typed_rows"]

_BOOLS: Final = {"true": True, "false": False, "1": True, "0": False}

CSV_TYPES: Final[Mapping[str, Callable[[str], Any]]] = {
    "int": int,
    "float": float,
    "bool": lambda text: _BOOLS[text.strip().lower()],
}
"""What ``data.csv_types`` may name -> what makes it of a cell's text."""


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
