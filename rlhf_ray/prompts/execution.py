"""Ray Data executions of this library: in order, quiet, on a tenth of a CPU, without touching the user's context."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import DataError, RLHFRayError
from rlhf_ray.worker_env import worker_env

if TYPE_CHECKING:
    import ray.data

__all__ = ["ITEM_COLUMN", "configure", "data_errors", "mapped", "ordered_tasks"]

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
