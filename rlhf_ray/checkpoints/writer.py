"""Finishes checkpoints in the background of training, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from rlhf_ray.checkpoints.checkpoint import Checkpoint, CheckpointState
from rlhf_ray.checkpoints.folder import Folder, StoredFile
from rlhf_ray.stopping import stop_all

__all__ = ["CheckpointWriter"]

_LOG = logging.getLogger(__name__)


class Saver(Protocol):
    """What a writer needs of the learner group."""

    def save(self, folder: Folder) -> Callable[[], dict[str, StoredFile]]:
        """Copy the state; the call that is returned waits for its files."""
        ...


class CheckpointWriter:
    """Training is held up while the learners copy their state, and where the checkpoint before is not written yet.

    Args:
        learners: The learner group.
    """

    def __init__(self, learners: Saver) -> None:
        self._learners = learners
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Checkpoint, Future[None]] | None = None
        self._written: list[Checkpoint] = []
        self.failed = 0
        """Checkpoints begun with :meth:`begin` that could not be written."""

    def write(self, checkpoint: Checkpoint, *, config: str, state: CheckpointState) -> None:
        """Write a checkpoint and wait for it; whatever goes wrong is raised."""
        self.wait_pending()
        self._start(checkpoint, config, state, lambda: None).result()

    def begin(self, checkpoint: Checkpoint, *, config: str, state: CheckpointState, then: Callable[[], None]) -> None:
        """Write a checkpoint in the background, and do ``then`` after it.

        What goes wrong is logged and counted: a full disk must not cost the training that it was to keep.
        """
        self.wait_pending()
        try:
            self._pending = checkpoint, self._start(checkpoint, config, state, then)
        except Exception as error:
            self._count(checkpoint, error)

    def wait_pending(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._pending is None:
            return
        (checkpoint, written), self._pending = self._pending, None
        try:
            written.result()
        except Exception as error:
            self._count(checkpoint, error)
        else:
            self._written.append(checkpoint)

    def take_written(self) -> list[Checkpoint]:
        """Those that :meth:`begin` began and that are complete, each once."""
        if self._pending is not None and self._pending[1].done():
            self.wait_pending()
        written, self._written = self._written, []
        return written

    def stop(self) -> None:
        """Wait for the checkpoint that is being written, and end the thread."""
        stop_all(
            ("checkpoint", self.wait_pending), ("thread of the checkpoints", lambda: self._thread.shutdown(wait=False))
        )

    def _start(
        self, checkpoint: Checkpoint, config: str, state: CheckpointState, then: Callable[[], None]
    ) -> Future[None]:
        checkpoint.begin()
        wait = self._learners.save(checkpoint.learner)

        def finish() -> None:
            checkpoint.commit(config=config, state=state, learner_files=wait())
            then()

        return self._thread.submit(finish)

    def _count(self, checkpoint: Checkpoint, error: Exception) -> None:
        self.failed += 1
        _LOG.error("the checkpoint %s could not be written, training continues: %s", checkpoint.folder, error)
