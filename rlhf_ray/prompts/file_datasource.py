"""prompts/: Ray Data's reader of data files. Imports Ray, so import it where it is used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.data.datasource import FileBasedDatasource

from rlhf_ray.prompts.file_rows import FileFormat, file_rows
from rlhf_ray.prompts.row_codec import encode_rows

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FileDatasource"]

_ROWS_A_BLOCK = 4096


class FileDatasource(FileBasedDatasource):  # type: ignore[misc] # Ray ships no types
    """Reads files into encoded rows (row_codec.py).

    Beside what the codec is for, it does without the tasks of a whole CPU by which ``ray.data.read_parquet`` samples
    files before it reads them: there may be no whole CPU.

    Args:
        paths: The files.
        file_format: Their format.
        csv_types: See :func:`file_rows`.
    """

    def __init__(self, paths: Sequence[str], *, file_format: FileFormat, csv_types: Mapping[str, str]) -> None:
        super().__init__(list(paths))
        self._file_format = file_format
        self._csv_types = csv_types

    def _open_input_source(self, filesystem: Any, path: str, **open_args: Any) -> pa.NativeFile:
        if self._file_format == "parquet":
            return filesystem.open_input_file(path)
        return super()._open_input_source(filesystem, path, **open_args)

    def _read_stream(self, f: pa.NativeFile, path: str) -> Iterator[pa.Table]:
        rows = file_rows(f, path, file_format=self._file_format, csv_types=self._csv_types)
        while block := list(itertools.islice(rows, _ROWS_A_BLOCK)):
            yield encode_rows(block)
