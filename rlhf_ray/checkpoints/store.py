"""checkpoints/: those of one run, newest and best."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from rlhf_ray.checkpoints.checkpoint import Checkpoint
from rlhf_ray.checkpoints.folder import Folder
from rlhf_ray.errors import DataError

__all__ = ["CheckpointStore"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of a run, one folder each."""

    folder: Folder

    def of_iteration(self, iteration: int) -> Checkpoint:
        """Where the checkpoint of an iteration lies."""
        return Checkpoint(self.folder / f"iteration_{iteration:06d}")

    def newest(self) -> Checkpoint | None:
        """The newest complete one; what is newer and is not complete is named in the log."""
        for folder in reversed(self.folder.folders()):
            checkpoint = Checkpoint(folder)
            try:
                checkpoint.read()
            except DataError as error:
                _LOG.warning("%s; looking for an earlier one", error)
            else:
                return checkpoint
        return None

    def prune(self, *, keep: int, keep_best: int, highest_is_best: bool) -> None:
        """Delete all but the ``keep`` newest complete checkpoints and the ``keep_best`` of best score."""
        complete = []
        for folder in self.folder.folders():
            try:
                complete.append((folder, Checkpoint(folder).state().score))
            except DataError:
                continue
        sign = 1.0 if highest_is_best else -1.0
        scored = sorted(((sign * score, folder.name) for folder, score in complete if score is not None), reverse=True)
        kept = {folder.name for folder, _ in complete[-keep:]} | {name for _, name in scored[:keep_best]}
        for folder, _ in complete:
            if folder.name not in kept:
                Checkpoint(folder).delete()
