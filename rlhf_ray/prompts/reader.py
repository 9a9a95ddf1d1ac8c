"""Prompt ids -> outcomes: Ray Data makes the prompts, a few thousand ahead of the caller."""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import ConfigError, DataError, RLHFRayError
from rlhf_ray.prompts.builder import Outcome, Overlong, PromptBuilder
from rlhf_ray.prompts.rows import Int64Array, PromptOrder, RowTable
from rlhf_ray.prompts.tokenizer import SharedTokenizer
from rlhf_ray.stopping import stop_all
from rlhf_ray.types import Prompt
from rlhf_ray.worker_env import worker_env

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

__all__ = ["ITEM_COLUMN", "PromptReader", "configure", "data_errors", "mapped", "ordered_tasks"]

ITEM_COLUMN = "item"


_NUM_CPUS = 0.1

"""CPUs that a reading or tokenizing task reserves: replicas and learners may leave no whole one on a small machine."""

_NAME = "rlhf_ray_prompts"

"""Name of our datasets in Ray's logs, metrics and dashboard."""

_STALL_TIMEOUT_S = 300.0

"""Seconds without progress after which an execution fails."""


def ordered_tasks(
    function: Callable[..., Any], items: Sequence[Any], *, max_tasks: int, **arguments: Any
) -> ray.data.Dataset:
    """Return a dataset of what a function makes of each item, in the order of the items.

    There are no tasks of a whole CPU, by which Ray Data's own readers sample files before they read them: there may be
    no whole CPU.

    Args:
        function: Called in a task per item with a table whose column ``item`` holds it; returns a table or yields some.
        items: Numbers or strings.
        max_tasks: Tasks that run at the same time.
        **arguments: Arguments of the function.
    """
    import ray.data

    rows = [{ITEM_COLUMN: item} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    configure(dataset.context)  # A copy that from_items made.
    dataset.context.max_errored_blocks = 0  # A block left out for an error would give its prompt ids to the next one.
    # Ray Data warns of more tasks than it has blocks for.
    return mapped(dataset, function, arguments, compute=ray.data.TaskPoolStrategy(size=min(max_tasks, len(rows))))


def mapped(
    dataset: ray.data.Dataset,
    function: Callable[..., Any],
    arguments: dict[str, Any] | None = None,
    *,
    compute: ray.data.TaskPoolStrategy | None = None,
) -> ray.data.Dataset:
    """Return a dataset of what a function makes of each block of another, which it gets as an Arrow table."""
    result = dataset.map_batches(
        function,
        fn_kwargs=arguments,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=_NUM_CPUS,
        runtime_env=worker_env(),
        compute=compute,
    )
    result.set_name(_NAME)
    return result


def configure(context: ray.data.DataContext) -> None:
    """Set what our executions need on a context that belongs to them."""
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = _STALL_TIMEOUT_S
    context.raise_original_map_exception = True  # the wrapper loses its cause on the way out of a worker
    for name, log_filter in _FILTERS.items():
        logging.getLogger(name).addFilter(log_filter)  # adding the same filter again changes nothing


@contextlib.contextmanager
def data_errors(what: str) -> Iterator[None]:
    """Turn what an execution raises inside into this library's errors.

    Args:
        what: What was being done, for the message.

    Raises:
        RLHFRayError: As it was raised in a worker.
        DataError: Anything else that a reader or the user's own dataset raised; names the cause.
    """
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayTaskError

    thread = threading.get_ident()

    def is_of_other_threads(record: logging.LogRecord) -> bool:
        """Hide what Ray logs, in the calling thread, about an error that we raise ourselves with its cause."""
        return record.thread != thread

    logger = logging.getLogger("ray.data.exceptions")
    logger.addFilter(is_of_other_threads)
    try:
        yield
    except ExecutionTimeoutError as failure:
        raise DataError(
            f"{what} made no progress for {_STALL_TIMEOUT_S:g} s: Ray Data needs {_NUM_CPUS} CPU, and the cluster may "
            "have none left; lower resources.cpus_per_replica, cpus_per_learner or cpus_per_reward_worker"
        ) from failure
    # A reader and the user's own dataset may raise anything; nothing is tolerated here, only given its name.
    except Exception as failure:
        cause = failure.cause if isinstance(failure, RayTaskError) else failure
        if isinstance(cause, RLHFRayError):
            raise cause from failure
        reason = next(iter(str(cause).splitlines()), "")
        raise DataError(f"{what} failed: {type(cause).__name__}: {reason}") from failure
    finally:
        logger.removeFilter(is_of_other_threads)


def _is_no_routine(record: logging.LogRecord) -> bool:
    """Hide the routine messages of our own executions, of which there is one every few thousand prompts."""
    return record.levelno >= logging.WARNING or _NAME not in record.getMessage()


def _is_no_hint(record: logging.LogRecord) -> bool:
    """Hide the advice to turn progress bars on, which Ray gives once per process where they are off."""
    return not record.getMessage().startswith("Progress bars disabled")


_FILTERS = {
    "ray.data._internal.logging": _is_no_routine,
    "ray.data._internal.execution.streaming_executor": _is_no_routine,
    "ray.data._internal.progress": _is_no_hint,
}


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
