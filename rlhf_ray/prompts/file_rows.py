"""prompts/: an open file -> its rows. The same code reads in Ray Data's workers and in the check before a run."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

from rlhf_ray.errors import DataError
from rlhf_ray.prompts.json_rows import json_rows
from rlhf_ray.prompts.row_codec import Row

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FileFormat", "file_rows"]

FileFormat: TypeAlias = Literal["json", "parquet", "csv"]


def file_rows(stream: pa.NativeFile, name: str, *, file_format: FileFormat, prompt_column: str) -> Iterator[Row]:
    """Read a file.

    Args:
        stream: The file, decompressed; one of Parquet must be seekable.
        name: What to call it in an error.
        file_format: Its format.
        prompt_column: The column that stays a string in a CSV file, be it all digits.

    Yields:
        Its rows in order.

    Raises:
        DataError: It cannot be read or parsed.
    """
    try:
        if file_format == "json":
            yield from json_rows(io.BufferedReader(stream), name)
            return
        batches = _parquet_batches(stream) if file_format == "parquet" else _csv_batches(stream, prompt_column)
        for batch in batches:
            yield from batch.to_pylist()
    except (OSError, ValueError) as failure:  # Arrow's own errors are ValueErrors
        raise DataError(f"{name}: cannot be read: {failure}") from failure


def _parquet_batches(stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    from pyarrow import parquet

    yield from parquet.ParquetFile(stream).iter_batches(batch_size=1024)


def _csv_batches(stream: pa.NativeFile, prompt_column: str) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    from pyarrow import csv

    yield from csv.open_csv(
        stream,
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types={prompt_column: pa.string()}),
    )
