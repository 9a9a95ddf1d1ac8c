"""prompts/: how our Ray Data executions run: in order, quietly, on a tenth of a CPU, beside the user's own context."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_ray.errors import DataError, RLHFRayError

if TYPE_CHECKING:
    import ray.data

__all__ = ["NUM_CPUS", "RUN_NAME", "STALL_TIMEOUT_S", "configure", "data_errors", "prompt_context"]

NUM_CPUS = 0.1
"""CPUs that a reading or tokenizing task reserves: replicas and learners may leave no whole one on a small machine."""

RUN_NAME = "rlhf_ray_prompts"
"""Name of our datasets in Ray's logs, metrics and dashboard."""

STALL_TIMEOUT_S = 300.0
"""Seconds that an execution may stand still."""


@contextlib.contextmanager
def prompt_context() -> Iterator[None]:
    """Give datasets created inside a context of their own, made from the user's.

    The current context belongs to the whole process, so create a dataset inside and run it outside.
    """
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    configure(context)
    context.max_errored_blocks = 0  # a block left out for an error would give its prompt ids to the next one
    with DataContext.current(context):
        yield


def configure(context: ray.data.DataContext) -> None:
    """Set what our executions need on a context that belongs to them."""
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = STALL_TIMEOUT_S
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

    hidden = _ThisThread()
    logger = logging.getLogger("ray.data.exceptions")
    logger.addFilter(hidden)
    try:
        yield
    except ExecutionTimeoutError as failure:
        raise DataError(
            f"{what} stood still for {STALL_TIMEOUT_S:g} s: Ray Data needs {NUM_CPUS} CPU, and the cluster may have "
            "none left; lower resources.cpus_per_replica, cpus_per_learner or cpus_per_reward_worker"
        ) from failure
    # A reader and the user's own dataset may raise anything; nothing is tolerated here, only given its name.
    except Exception as failure:
        cause = failure.cause if isinstance(failure, RayTaskError) else failure
        if isinstance(cause, RLHFRayError):
            raise cause from failure
        reason = next(iter(str(cause).splitlines()), "")
        raise DataError(f"{what} failed: {type(cause).__name__}: {reason}") from failure
    finally:
        logger.removeFilter(hidden)


class _OwnRuns(logging.Filter):
    """Hides the routine messages of our own executions, of which there is one every few thousand prompts."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or RUN_NAME not in record.getMessage()


class _NoProgressBarHint(logging.Filter):
    """Hides the advice to turn progress bars on, which Ray gives once a process to whoever turned them off."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Progress bars disabled")


class _ThisThread(logging.Filter):
    """Hides what Ray logs, in the calling thread, about an error that we raise ourselves with its cause."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread


_OWN_RUNS = _OwnRuns()
_FILTERS = {
    "ray.data._internal.logging": _OWN_RUNS,
    "ray.data._internal.execution.streaming_executor": _OWN_RUNS,
    "ray.data._internal.progress": _NoProgressBarHint(),
}
