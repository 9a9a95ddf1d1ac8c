"""prompts/: Ray Data's source of rows in the order of training. Imports Ray, so import it where it is used."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from rlhf_ray.prompts.order import Int64Array
from rlhf_ray.prompts.row_codec import ROW_COLUMN
from rlhf_ray.prompts.row_store import RowStore

if TYPE_CHECKING:
    from ray import ObjectRef

__all__ = ["OrderedRows"]


class OrderedRows(Datasource):  # type: ignore[misc] # Ray ships no types
    """Yields tables of ``prompt_id``, ``dataset_row`` and the encoded row, a read task for every so many rows.

    Args:
        store: The dataset's rows.
        prompt_ids: ``[N]`` ids of the prompts to be made.
        dataset_rows: ``[N]`` the row behind each.
        rows_a_task: Rows of one read task.
    """

    def __init__(self, store: RowStore, prompt_ids: Int64Array, dataset_rows: Int64Array, *, rows_a_task: int) -> None:
        super().__init__()
        self._store = store
        self._prompt_ids = prompt_ids
        self._dataset_rows = dataset_rows
        self._rows_a_task = rows_a_task

    def estimate_inmemory_data_size(self) -> int | None:
        """Say that the size is not known."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return the read tasks in order; how many is ours to say, whatever parallelism Ray has in mind."""
        starts = range(0, len(self._prompt_ids), self._rows_a_task)
        return [self._read_task(slice(start, start + self._rows_a_task), per_task_row_limit) for start in starts]

    def _read_task(self, part: slice, per_task_row_limit: int | None) -> ReadTask:
        prompt_ids, dataset_rows = self._prompt_ids[part], self._dataset_rows[part]
        read = functools.partial(_read, prompt_ids, dataset_rows, *self._store.locate(dataset_rows))
        metadata = BlockMetadata(num_rows=len(prompt_ids), size_bytes=None, exec_stats=None)
        return ReadTask(read, metadata, per_task_row_limit=per_task_row_limit)


def _read(
    prompt_ids: Int64Array,
    dataset_rows: Int64Array,
    blocks: dict[int, ObjectRef],
    block_numbers: Int64Array,
    places: Int64Array,
) -> Iterator[pa.Table]:
    taken, found = [], []
    for number, block in blocks.items():
        wanted = np.flatnonzero(block_numbers == number)
        # One block at a time: it is mapped from shared memory, and let go again.
        taken.append(ray.get(block)[ROW_COLUMN].take(places[wanted]).combine_chunks())
        found.append(wanted)
    rows = pa.chunked_array(taken).take(np.argsort(np.concatenate(found)))
    yield pa.table({"prompt_id": prompt_ids, "dataset_row": dataset_rows, ROW_COLUMN: rows})
