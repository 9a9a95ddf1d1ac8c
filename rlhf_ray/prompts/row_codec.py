"""prompts/: a dataset row as it travels through Ray: pickled, so that what a file says is what the reward gets.

An Arrow table of plain columns would need one type a column: a key that only some rows have becomes a null in all,
and a string that looks like a date becomes one.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

__all__ = ["ROW_COLUMN", "Row", "decode_row", "encode_dataset", "encode_rows"]

Row: TypeAlias = dict[str, Any]

ROW_COLUMN = "row"


def encode_rows(rows: Iterable[Row]) -> pa.Table:
    """Return a table of one binary column, a pickled row each."""
    import pyarrow as pa

    return pa.table({ROW_COLUMN: pa.array([pickle.dumps(row) for row in rows], pa.large_binary())})


def encode_dataset(dataset: ray.data.Dataset, *, num_cpus: float) -> ray.data.Dataset:
    """Return a dataset of any columns as one of encoded rows; ``num_cpus`` a task."""
    return dataset.map_batches(_encode_table, batch_size=None, batch_format="pyarrow", num_cpus=num_cpus)


def _encode_table(table: pa.Table) -> pa.Table:
    return encode_rows(table.to_pylist())


def decode_row(data: bytes) -> Row:
    """Return the row that was encoded."""
    row: Row = pickle.loads(data)
    return row
