"""prompts/: a dataset row as it travels through Ray: pickled, so that what a file says is what the reward gets.

An Arrow table of plain columns would need one type a column: a key that only some rows have becomes a null in all,
and a string that looks like a date becomes one.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rlhf_ray.worker_env import worker_env

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

__all__ = ["ROW_COLUMN", "Row", "arrow_rows", "decode_row", "encode_dataset", "encode_rows"]

Row: TypeAlias = dict[str, Any]

ROW_COLUMN = "row"


def encode_rows(rows: Iterable[Row]) -> pa.Table:
    """Return a table of one binary column, a pickled row each."""
    import pyarrow as pa

    return pa.table({ROW_COLUMN: pa.array([pickle.dumps(row) for row in rows], pa.large_binary())})


def encode_dataset(dataset: ray.data.Dataset, *, num_cpus: float) -> ray.data.Dataset:
    """Return a dataset of any columns as one of encoded rows; ``num_cpus`` a task."""
    return dataset.map_batches(
        _encode_table, batch_size=None, batch_format="pyarrow", num_cpus=num_cpus, runtime_env=worker_env()
    )


def _encode_table(table: pa.Table) -> pa.Table:
    return encode_rows(arrow_rows(table))


def arrow_rows(table: pa.Table | pa.RecordBatch) -> list[Row]:
    """Return an Arrow table's rows in plain Python, as a JSON file would have given them.

    Arrow gives every record of a nested column the keys of all of them, null where a record has none, and cannot tell
    such a null from one that was written. All of them are left out, at every depth below the columns. Kept are the null
    of a whole column, of a list's item, and of a key without a value in any record, which no padding explains, unless
    it is in a chat message. Values that Arrow holds as JSON text are parsed.
    """
    import pyarrow as pa

    nested = {field.name: field.type for field in table.schema if not pa.types.is_primitive(field.type)}
    rows: list[Row] = table.to_pylist()
    for row in rows:
        row.update((name, _value(row[name], kind)) for name, kind in nested.items())
    return rows


def _value(value: Any, kind: pa.DataType, *, in_message: bool = False) -> Any:
    import pyarrow as pa

    if value is None:
        return None
    if isinstance(kind, pa.BaseExtensionType):
        return json.loads(value) if kind.extension_name == "arrow.json" else _without_arrays(value)
    if pa.types.is_struct(kind):
        in_message = in_message or kind.get_field_index("role") >= 0
        return {
            field.name: _value(value[field.name], field.type, in_message=in_message)
            for field in kind
            if value[field.name] is not None or (pa.types.is_null(field.type) and not in_message)
        }
    if pa.types.is_map(kind):
        return {key: _value(item, kind.item_type, in_message=in_message) for key, item in value}
    if isinstance(value, list):
        return [_value(item, kind.value_type, in_message=in_message) for item in value]
    return value


def _without_arrays(value: Any) -> Any:
    """A pickled object without NumPy in it, which templates and ``json.dumps`` do not know; an array stays one."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _without_arrays(value.tolist())
    return value.item() if isinstance(value, np.generic) else _without_arrays(value)


def decode_row(data: bytes) -> Row:
    """Return the row that was encoded."""
    row: Row = pickle.loads(data)
    return row
