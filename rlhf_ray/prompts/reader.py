"""Prompt ids -> outcomes: Ray Data makes the prompts, a few thousand ahead of the caller."""

from __future__ import annotations

import pickle
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.prompts.builder import Outcome, Overlong, PromptBuilder
from rlhf_ray.prompts.execution import ITEM_COLUMN, data_errors, ordered_tasks
from rlhf_ray.prompts.order import Int64Array, PromptOrder
from rlhf_ray.prompts.rows import RowTable
from rlhf_ray.prompts.tokenizer import SharedTokenizer
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import Prompt

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

__all__ = ["PromptReader"]

# One Ray Data execution. It bounds what is made ahead of need, and spreads the cost of starting an execution (about
# 0.4 s) over many prompts, however short an epoch is.
_PROMPTS_PER_RUN = 8192
_PROMPTS_PER_TASK = 512


@dataclass(kw_only=True, eq=False)
class PromptReader:
    """Makes the prompts of ascending ids; reading ahead starts with the first."""

    table: RowTable
    order: PromptOrder
    """Which row each prompt id stands for."""
    builder: PromptBuilder
    tokenizer: SharedTokenizer
    stop: int | None = None
    """Id at which reading ahead ends; ``None``: it never does."""
    _reading: Generator[Outcome] | None = None
    _next_id: int = 0

    def read(self, prompt_id: int) -> Prompt | Overlong:
        """Return what became of a prompt; ids ascend until :meth:`close` is called.

        Raises:
            ConfigError: A setting does not go with the row, or a tokenizer with code of its own cannot be loaded in a
                worker.
            DataError: The row makes no prompt, a worker cannot read it, or there is no CPU for it.
        """
        try:
            if self._reading is None:
                self._reading, self._next_id = self._outcomes(prompt_id), prompt_id
            while True:  # Between unfinished prompts lie those that are done.
                outcome = next(self._reading)
                self._next_id += 1
                if self._next_id > prompt_id:
                    break
            if isinstance(outcome, (DataError, ConfigError)):
                raise outcome
        except BaseException:
            # Who asks for this prompt again has to be answered from here, not from the next row.
            stop_all(("prompts", self.close))
            raise
        return outcome

    def close(self) -> None:
        """Stop reading ahead; the next id may be any."""
        if self._reading is not None:
            reading, self._reading = self._reading, None
            reading.close()

    def _outcomes(self, start: int) -> Generator[Outcome]:
        next_id = start
        while self.stop is None or next_id < self.stop:
            run_stop = next_id + _PROMPTS_PER_RUN
            for outcome in self._run(next_id, run_stop if self.stop is None else min(run_stop, self.stop)):
                yield outcome
                next_id += 1

    def _run(self, start: int, stop: int) -> Iterator[Outcome]:
        """Yield the outcomes of one execution: all of them, or fewer where it stalled in the middle."""
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
                # An execution whose output is full stalls while a long update keeps us from asking: begin another.
                if delivered and isinstance(failure.__cause__, ExecutionTimeoutError):
                    return
                raise
            if batch is None:
                return
            yield from (pickle.loads(data) for data in batch["outcome"].to_pylist())
            delivered += batch.num_rows

    def _dataset(self, start: int, stop: int) -> ray.data.Dataset:
        return ordered_tasks(
            _outcome_table,
            range(0, stop - start, _PROMPTS_PER_TASK),
            # One task at a time keeps up with any training and leaves the CPUs to the engines.
            max_tasks=1,
            num_prompts=_PROMPTS_PER_TASK,
            first_id=start,
            dataset_rows=self.order.dataset_rows(start, stop),
            table=self.table,
            builder=self.builder,
            tokenizer=self.tokenizer,
        )


def _stop_without_killing(executor: Any) -> None:
    if executor is not None:
        executor.shutdown(force=False)


def _outcome_table(
    offsets: pa.Table,
    *,
    num_prompts: int,
    first_id: int,
    dataset_rows: Int64Array,
    table: RowTable,
    builder: PromptBuilder,
    tokenizer: SharedTokenizer,
) -> pa.Table:
    """Make the prompts of one task, which begins so many after the first of the execution."""
    import pyarrow as pa

    [offset] = offsets[ITEM_COLUMN].to_pylist()
    numbers = dataset_rows[offset : offset + num_prompts]
    outcomes = builder.build(table.take(numbers), tokenizer.get(), numbers=numbers.tolist(), first_id=first_id + offset)
    return pa.table({"outcome": pa.array([pickle.dumps(outcome) for outcome in outcomes], pa.large_binary())})
