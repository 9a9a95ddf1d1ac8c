"""prompts/: every row of a dataset in Ray's object store, found by its number: what makes any order cheap and exact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.prompts.data_context import RUN_NAME, STALL_TIMEOUT_S
from rlhf_ray.prompts.order import Int64Array
from rlhf_ray.worker_env import worker_env

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data
    from ray import ObjectRef

__all__ = ["RowStore"]


class RowStore:
    """Blocks of encoded rows (row_codec.py), in dataset order.

    Args:
        blocks: References to the blocks.
        block_rows: Rows of each block.
    """

    def __init__(self, blocks: list[ObjectRef], block_rows: list[int]) -> None:
        self.num_rows = sum(block_rows)
        self._blocks = blocks
        self._starts: Int64Array = np.cumsum([0, *block_rows[:-1]], dtype=np.int64)

    @classmethod
    def from_dataset(cls, dataset: ray.data.Dataset) -> RowStore:
        """Run a dataset of encoded rows once and keep the result."""
        import ray

        dataset.set_name(RUN_NAME)
        blocks = dataset.to_arrow_refs()
        # Where a block lies is for Ray to know: its rows are counted there, not here.
        count = ray.remote(num_cpus=0, runtime_env=worker_env())(_num_rows)
        block_rows = ray.get([count.remote(block) for block in blocks], timeout=STALL_TIMEOUT_S)
        return cls(blocks, block_rows)

    @classmethod
    def from_tables(cls, tables: Iterable[pa.Table]) -> RowStore:
        """Keep tables of encoded rows that this process holds."""
        import ray

        blocks, block_rows = [], []
        for table in tables:
            blocks.append(ray.put(table))
            block_rows.append(table.num_rows)
        return cls(blocks, block_rows)

    def locate(self, dataset_rows: Int64Array) -> tuple[dict[int, ObjectRef], Int64Array, Int64Array]:
        """Find rows.

        Args:
            dataset_rows: ``[N]`` row numbers.

        Returns:
            The blocks that hold them, by number; ``[N]`` each row's block number; ``[N]`` its place in that block.
        """
        numbers: Int64Array = np.searchsorted(self._starts, dataset_rows, side="right").astype(np.int64) - 1
        blocks = {int(number): self._blocks[number] for number in np.unique(numbers)}
        return blocks, numbers, dataset_rows - self._starts[numbers]


def _num_rows(block: Any) -> int:
    return int(block.num_rows)
