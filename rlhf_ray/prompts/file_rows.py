"""prompts/: an open file -> its rows. The same code reads in Ray Data's workers and in the check before a run."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from rlhf_ray.errors import DataError
from rlhf_ray.prompts.csv_rows import csv_rows
from rlhf_ray.prompts.json_rows import json_rows
from rlhf_ray.prompts.row_codec import Row, arrow_rows

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FileFormat", "file_rows"]

FileFormat: TypeAlias = Literal["json", "parquet", "csv"]


def file_rows(
    stream: pa.NativeFile, name: str, *, file_format: FileFormat, csv_types: Mapping[str, str]
) -> Iterator[Row]:
    """Read a file.

    Args:
        stream: The file, decompressed; one of Parquet must be seekable.
        name: What to call it in an error.
        file_format: Its format.
        csv_types: ``data.csv_types``: the columns of a CSV file that are not text.

    Yields:
        Its rows in order.

    Raises:
        DataError: It cannot be read or parsed.
    """
    try:
        if file_format == "json":
            yield from json_rows(io.BufferedReader(stream), name)
        elif file_format == "csv":
            yield from csv_rows(io.BufferedReader(stream), name, csv_types)
        else:
            for batch in _parquet_batches(stream):
                yield from arrow_rows(batch)
    except (OSError, ValueError) as failure:  # Arrow's own errors are ValueErrors
        raise DataError(f"{name}: cannot be read: {failure}") from failure


def _parquet_batches(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    from pyarrow import parquet

    yield from parquet.ParquetFile(stream).iter_batches(batch_size=1024)
