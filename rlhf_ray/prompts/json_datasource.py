"""prompts/: Ray Data's reader of JSON files. Imports Ray, so import it where it is used."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ray.data.datasource import FileBasedDatasource

from rlhf_ray.prompts.json_rows import json_rows
from rlhf_ray.prompts.row_codec import Row, encode_rows

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["JsonDatasource"]

_ROWS_A_BLOCK = 4096


class JsonDatasource(FileBasedDatasource):  # type: ignore[misc] # Ray ships no types
    """Reads JSON lines and JSON arrays, compressed or not, into encoded rows (row_codec.py)."""

    def _read_stream(self, f: pa.NativeFile, path: str) -> Iterator[pa.Table]:
        block: list[Row] = []
        for row, _ in json_rows(io.BufferedReader(f), path):
            block.append(row)
            if len(block) == _ROWS_A_BLOCK:
                yield encode_rows(block)
                block = []
        yield encode_rows(block)
