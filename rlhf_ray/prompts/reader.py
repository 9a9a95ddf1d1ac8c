"""prompts/: rows in order -> outcomes, through Ray Data, read ahead of whoever asks for them."""

from __future__ import annotations

import pickle
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.prompts.builder import NumberedRow, Outcome, PromptBuilder
from rlhf_ray.prompts.data_context import NUM_CPUS, RUN_NAME, data_errors, prompt_context
from rlhf_ray.prompts.order import PromptOrder
from rlhf_ray.prompts.row_codec import ROW_COLUMN, decode_row
from rlhf_ray.prompts.row_store import RowStore
from rlhf_ray.prompts.shared_tokenizer import SharedTokenizer
from rlhf_ray.worker_env import worker_env

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

__all__ = ["PromptReader"]

# One Ray Data execution. It bounds what is made ahead of need, and spreads the cost of starting an execution (about
# 0.4 s) over many prompts, however short an epoch is.
_PROMPTS_A_RUN = 8192
_PROMPTS_A_TASK = 512


class PromptReader:
    """Makes the outcomes of consecutive prompt ids.

    Args:
        store: The dataset's rows.
        order: Which row each prompt id stands for.
        builder: Makes prompts of rows.
        tokenizer: The model's.
    """

    def __init__(self, store: RowStore, order: PromptOrder, builder: PromptBuilder, tokenizer: SharedTokenizer) -> None:
        self._store = store
        self.order = order
        self._builder = builder
        self._tokenizer = tokenizer

    def outcomes(self, start: int, stop: int | None = None) -> Generator[Outcome]:
        """Yield the outcome of every prompt id from ``start`` on, to before ``stop`` or without end.

        Raises:
            ConfigError: A tokenizer with code of its own cannot be loaded in a worker.
            DataError: A worker cannot read the rows, or there is no CPU for it.
        """
        next_id = start
        while stop is None or next_id < stop:
            run_stop = next_id + _PROMPTS_A_RUN if stop is None else min(next_id + _PROMPTS_A_RUN, stop)
            for outcome in self._run(next_id, run_stop):
                yield outcome
                next_id += 1

    def _run(self, start: int, stop: int) -> Iterator[Outcome]:
        """Yield the outcomes of one execution: all of them, or fewer where it stood still in the middle."""
        from ray.data.exceptions import ExecutionTimeoutError

        rows = self._dataset(start, stop).iterator()
        # By default Ray Data kills what still runs when a reader stops early. Where the task ends at that moment, Ray
        # 2.60 ends this process too: "Check failed: it != submissible_tasks_.end()", without a Python traceback.
        rows._on_iteration_end = _stop_without_killing
        batches = iter(rows.iter_batches(batch_size=None, batch_format="pyarrow"))
        delivered = 0
        while True:
            try:
                with data_errors("making prompts"):
                    batch = next(batches, None)
            except Exception as failure:
                # An execution whose output is full stands still while a long update keeps us from asking: begin anew.
                if delivered and isinstance(failure.__cause__, ExecutionTimeoutError):
                    return
                raise
            if batch is None:
                return
            yield from (pickle.loads(data) for data in batch["outcome"].to_pylist())
            delivered += batch.num_rows

    def _dataset(self, start: int, stop: int) -> ray.data.Dataset:
        import ray.data

        from rlhf_ray.prompts.ordered_rows import OrderedRows

        # One task at a time keeps up with any training and leaves the CPUs to the engines.
        one_task = ray.data.TaskPoolStrategy(size=1)
        rows = OrderedRows(
            self._store,
            np.arange(start, stop, dtype=np.int64),
            self.order.dataset_rows(start, stop),
            rows_a_task=_PROMPTS_A_TASK,
        )
        with prompt_context():
            dataset = ray.data.read_datasource(
                rows,
                num_cpus=NUM_CPUS,
                runtime_env=worker_env(),
                compute=one_task,
                override_num_blocks=-(-(stop - start) // _PROMPTS_A_TASK),
            ).map_batches(
                _build,
                fn_kwargs={"builder": self._builder, "tokenizer": self._tokenizer},
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=NUM_CPUS,
                runtime_env=worker_env(),
                compute=one_task,
            )
        dataset.set_name(RUN_NAME)
        return dataset


def _stop_without_killing(executor: Any) -> None:
    if executor is not None:
        executor.shutdown(force=False)


def _build(rows: pa.Table, *, builder: PromptBuilder, tokenizer: SharedTokenizer) -> pa.Table:
    import pyarrow as pa

    numbered = [
        NumberedRow(prompt_id=row["prompt_id"], dataset_row=row["dataset_row"], row=decode_row(row[ROW_COLUMN]))
        for row in rows.to_pylist()
    ]
    outcomes = [pickle.dumps(outcome) for outcome in builder.build(numbered, tokenizer.get())]
    return pa.table({"outcome": pa.array(outcomes, pa.large_binary())})
