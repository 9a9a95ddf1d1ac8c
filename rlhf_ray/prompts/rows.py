"""Dataset rows: as plain Python, as they travel through Ray, and all rows of a dataset in Ray's object store.

A row travels pickled, so that what a file says is what the reward gets. An Arrow table of plain columns would need one
type per column: a key that only some rows have becomes a null in all, and a string that looks like a date becomes one.
"""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from rlhf_ray.types import PromptPosition

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data
    from ray import ObjectRef

__all__ = [
    "Int64Array",
    "PromptOrder",
    "Row",
    "RowSource",
    "RowTable",
    "arrow_rows",
    "decode_rows",
    "encode_table",
    "encoded_blocks",
]

Int64Array = npt.NDArray[np.int64]


class PromptOrder:
    """Maps prompt ids to dataset rows: prompt ``epoch * num_rows + i`` is the i-th row of that epoch's order.

    A run therefore resumes exactly where it stopped, on a cluster of any size: neither the number of workers nor the
    way that files were split into blocks matters.

    Args:
        num_rows: Rows of the dataset.
        seed: Seed of the shuffle, at least 0.
        shuffle: Whether each epoch has its own order; else rows come as they are.
    """

    def __init__(self, num_rows: int, *, seed: int, shuffle: bool) -> None:
        self.num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._cached: tuple[int, Int64Array] | None = None

    def dataset_rows(self, start: int, stop: int) -> Int64Array:
        """Return ``[stop - start]``, the dataset row of each prompt id in ``start <= id < stop``."""
        prompt_ids = np.arange(start, stop, dtype=np.int64)
        if not self._shuffle:
            return prompt_ids % self.num_rows
        parts = [
            self._permutation(epoch)[max(start - epoch * self.num_rows, 0) : stop - epoch * self.num_rows]
            for epoch in range(start // self.num_rows, -(-stop // self.num_rows))
        ]
        return np.concatenate([prompt_ids[:0], *parts])

    def prompt_id(self, position: PromptPosition) -> int:
        """Return the id of the prompt at a position."""
        return position.epoch * self.num_rows + position.row

    def position(self, prompt_id: int) -> PromptPosition:
        """Return the position of a prompt id."""
        epoch, row = divmod(prompt_id, self.num_rows)
        return PromptPosition(epoch=epoch, row=row)

    def _permutation(self, epoch: int) -> Int64Array:
        if self._cached is None or self._cached[0] != epoch:
            # Sorting raw bits and not Generator.permutation: numpy keeps only bit streams the same in every release.
            keys = np.random.PCG64([self._seed, epoch]).random_raw(self.num_rows)
            self._cached = (epoch, np.argsort(keys, kind="stable"))
        return self._cached[1]


Row: TypeAlias = dict[str, Any]


_COLUMN = "row"

_BLOCK_ROWS = 4096


class RowTable:
    """Blocks of encoded rows in the object store, in dataset order; a row is found by its number.

    Args:
        blocks: References to the blocks.
        block_rows: Rows of each block.
    """

    def __init__(self, blocks: list[ObjectRef], block_rows: list[int]) -> None:
        self.num_rows = sum(block_rows)
        self._blocks = blocks
        self._starts: Int64Array = np.cumsum([0, *block_rows[:-1]], dtype=np.int64)

    @classmethod
    def from_dataset(cls, dataset: ray.data.Dataset) -> RowTable:
        """Run a dataset of encoded rows once and keep the result."""
        blocks = [block for bundle in dataset.materialize().iter_internal_ref_bundles() for block in bundle.blocks]
        return cls([block.ref for block in blocks], [block.metadata.num_rows for block in blocks])

    @classmethod
    def from_rows(cls, rows: Iterator[Row]) -> RowTable:
        """Keep the rows that this process reads."""
        import ray

        # A block at a time: there may be more rows than this process has memory for.
        stored = [(ray.put(block), block.num_rows) for block in encoded_blocks(rows)]
        return cls([block for block, _ in stored], [num_rows for _, num_rows in stored])

    def take(self, numbers: Int64Array) -> list[Row]:
        """Return the rows with these numbers, in the order given."""
        import ray

        rows: list[Row] = [{} for _ in numbers]
        block_numbers = np.searchsorted(self._starts, numbers, side="right") - 1
        for block_number in np.unique(block_numbers):
            places = np.flatnonzero(block_numbers == block_number)
            # One block at a time: it is mapped from shared memory, and released again.
            block = ray.get(self._blocks[block_number])
            taken = decode_rows(block.take(numbers[places] - self._starts[block_number]))
            for place, row in zip(places, taken, strict=True):
                rows[place] = row
        return rows


@dataclass(eq=False)
class RowSource:
    """A dataset whose rows this process can read."""

    name: str
    """What messages call it."""
    rows: Callable[[], Iterator[Row]]
    """Reads the rows in order; raises ``DataError``, which names the cause, where they cannot be read."""

    def sample(self, limit: int) -> list[Row]:
        """Return up to ``limit`` rows from the start.

        Raises:
            DataError: As in :attr:`rows`.
        """
        return list(itertools.islice(self.rows(), limit))

    def load(self) -> RowTable:
        """Read all rows into the object store.

        Raises:
            DataError: As in :attr:`rows`.
        """
        return RowTable.from_rows(self.rows())


def encoded_blocks(rows: Iterator[Row]) -> Iterator[pa.Table]:
    """Yield tables of one binary column, a pickled row each, of up to 4,096 rows."""
    while block := list(itertools.islice(rows, _BLOCK_ROWS)):
        yield _encoded(block)


def encode_table(table: pa.Table) -> pa.Table:
    """Return an Arrow table of any columns as one of encoded rows."""
    return _encoded(arrow_rows(table))


def decode_rows(table: pa.Table) -> list[Row]:
    """Return the rows that were encoded."""
    return [pickle.loads(data) for data in table[_COLUMN].to_pylist()]


def _encoded(rows: Iterable[Row]) -> pa.Table:
    import pyarrow as pa

    return pa.table({_COLUMN: pa.array([pickle.dumps(row) for row in rows], pa.large_binary())})


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
